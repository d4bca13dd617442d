"""From the files of a model directory to its configuration and tensors, whichever of the two layouts they have."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checks import brief

from .files import CONFIG, CONSOLIDATED, PARAMS, WEIGHTS, layout, read_json, read_json_object
from .fp8 import ACTIVATION_SCALE, FP8, SCALE, dequantize, expect_fp8, expect_scale
from .hf import text_config
from .hub import refuse_adapter
from .mistral import from_params
from .mistral_tensors import from_mistral, half_split, reorder_rows
from .writer import interrupted_save

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# The same in safetensors.
KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Endings of the names of tensors that are no parameters.
NO_PARAMETERS = ("weight_scale_inv", "activation_scale", "inv_freq")


# ------------------------------------------------------------------------------------------------- configuration


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json, a JSON object; in Mistral's own layout that of params.json, under the keys of a
    config.json (raises as `read_json` and `from_params`)."""
    in_mistral_layout = layout(directory) == "mistral"
    path = directory / CONFIG
    if in_mistral_layout:
        path = directory / PARAMS
    if not path.is_file():
        refuse_adapter(directory)
    if not path.exists():
        what = f"a model is a directory with {CONFIG} and {WEIGHTS}"
        raise FileNotFoundError(f"{path} does not exist; {what}{interrupted_save(directory)}")
    content = read_json_object(path)
    if in_mistral_layout:
        return from_params(content)
    return content


def named_dtype(config: dict[str, Any], default: torch.dtype) -> torch.dtype:
    """The type that a config.json names, at the top or in its text part; the default if it names none."""
    names = [config.get("dtype"), config.get("torch_dtype"), text_config(config).get("dtype")]
    given = [name for name in names if name]
    return DTYPES.get(str(next(iter(given), None)), default)


def as_dtype(dtype: Any, torch_dtype: Any = None) -> torch.dtype | None:
    """The type that an argument names, as a torch.dtype or as text; None for None and for "auto", the stored type.
    `torch_dtype` is another name of the argument.

    Raises:
        ValueError: another type, or both names with different values.
    """
    if dtype is not None and torch_dtype not in (None, dtype):
        raise ValueError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} differ; give one of the two")
    wanted = dtype
    if wanted is None:
        wanted = torch_dtype
    if wanted is None or wanted == "auto":
        return None
    named = DTYPES.get(str(wanted).removeprefix("torch."))
    if named is None or not isinstance(wanted, (str, torch.dtype)):
        supported = f"{', '.join(DTYPES)}, or auto for the stored type (a device is given as device=)"
        raise ValueError(f"dtype={wanted!r} is not supported; supported: {supported}")
    return named


# ------------------------------------------------------------------------------------------------------- tensors


def open_safetensors(path: Path) -> Any:
    """Open a file of tensors, without reading them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not in the safetensors format.
    """
    try:
        path.open("rb").close()  # an OSError says why the file cannot be read
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        problem = f"{path} is truncated or not a safetensors file ({error})"
        raise ValueError(f"{problem}; fetch it again") from error


class Checkpoint:
    """The tensors of a model directory, in one file or in shards with an index, under the names and in the order of
    rows of Transformers' files. Opening reads the headers only; `read` maps one tensor at a time into memory.

    FP8 weights count as `dtype`; the scales of weights and activations are not among the names.

    Args:
        raw: return FP8 weights and scales as they are stored.

    Attributes:
        config: the content of config.json (see `read_config`).
        dtype: of most numbers that are not FP8. FP8 weights become it if no other type is asked for; with them, it is
            the type that config.json names.
        scaled: how many weights are FP8.
        numbers: how many numbers of each kind are stored, scales not counted.

    Raises:
        FileNotFoundError: no configuration, no weights, or a shard that the index names is missing.
        ValueError: a file is truncated or not safetensors, a shard lacks a tensor that the index names, or the weights
            are quantised in another way than FP8.
    """

    def __init__(self, directory: Path, raw: bool = False) -> None:
        self.directory = directory
        self.layout = layout(directory)
        self.config = read_config(directory)
        self._files = self._open_all()  # name -> (open file, name in it)
        quantization = self.config.get("quantization_config")
        expect_fp8(quantization)
        self._block: list[int] | None = None
        if quantization is not None:
            self._block = quantization.get("weight_block_size")
        self._scales: dict[str, tuple[Any, str]] = {}  # name of a weight -> its scale
        if not raw:
            self._separate_scales()
        self.scaled = len(self._scales)
        self.numbers = Counter[str]()
        for name in self._files:
            if not name.endswith(NO_PARAMETERS):
                self.numbers[self._stored_kind(name)] += math.prod(self.shape(name))
        self.dtype = self._common_dtype()

    def _open_all(self) -> dict[str, tuple[Any, str]]:
        """Every tensor by Transformers' name: the open file, and the name in it."""
        weights = WEIGHTS
        if self.layout == "mistral":
            weights = CONSOLIDATED
        path = self.directory / weights
        index = self.directory / f"{weights}.index.json"
        if path.is_file():
            file = self._open(path)
            stored = dict.fromkeys(file.keys(), file)
        elif index.is_file():
            stored = self._open_shards(index)
        else:
            refuse_adapter(self.directory)
            names = sorted(path.name for path in self.directory.iterdir())
            found = ", ".join(names[:8]) if names else "nothing"
            problem = f"{self.directory} holds neither {weights} nor {index.name}"
            raise FileNotFoundError(f"{problem}; found {found}{interrupted_save(self.directory)}")
        # Ranges of quantisation in training ("fake_quantizer") are not used in computing.
        stored = {name: file for name, file in stored.items() if "fake_quantizer" not in name}
        if self.layout == "hf":
            return {name: (file, name) for name, file in stored.items()}
        return self._rename(stored, path)

    def _rename(self, stored: dict[str, Any], path: Path) -> dict[str, tuple[Any, str]]:
        """The tensors of Mistral's layout by Transformers' names."""
        vision = isinstance(self.config.get("vision_config"), dict)
        renamed = {name: from_mistral(name, vision) for name in stored}
        unknown = [name for name, theirs in renamed.items() if theirs is None]
        if unknown:
            problem = f"{unknown[0]} is no tensor of Mistral's layout (see NAMES)"
            raise ValueError(f"{path}: {problem}{describe_origin(unknown)}")
        return {str(renamed[name]): (file, name) for name, file in stored.items()}

    @staticmethod
    def _open(path: Path) -> Any:
        if not path.is_file():
            problem = f"{path} does not exist, though the index names it"
            raise FileNotFoundError(f"{problem}; fetch the model again")
        return open_safetensors(path)

    def _open_shards(self, path: Path) -> dict[str, Any]:
        """Every tensor that an index names: the open shard that holds it."""
        index = read_json(path)
        weight_map = None
        if isinstance(index, dict):
            weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{path} has no weight_map from tensor names to file names")
        for name, file in weight_map.items():
            if Path(str(file)).name != file:
                problem = f"weight_map names {brief(file)} for {brief(name)}"
                raise ValueError(f"{path}: {problem}; allowed: a file name")
        shards = {name: self._open(self.directory / name) for name in sorted(set(weight_map.values()))}
        tensors_in_shard = {name: set(shard.keys()) for name, shard in shards.items()}
        for tensor, file in weight_map.items():
            if tensor not in tensors_in_shard[file]:
                problem = f"{self.directory / file} lacks {tensor}, which the index promises"
                raise ValueError(f"{problem}; fetch it again")
        return {tensor: shards[file] for tensor, file in weight_map.items()}

    def _separate_scales(self) -> None:
        """Move the scales of weights from the tensors to `_scales`, and leave those of activations out."""
        for name in self.names():
            if name.endswith(f".weight{SCALE}"):
                self._scales[name.removesuffix(SCALE)] = self._files.pop(name)
            elif name.endswith(ACTIVATION_SCALE):
                del self._files[name]
        for name in sorted(self._scales):
            if name not in self._files or self._stored_kind(name) != FP8:
                problem = f"{name} has a scale but is not stored as {FP8}"
                raise ValueError(f"{self.directory}: {problem}; fetch the model again")

    def _common_dtype(self) -> torch.dtype:
        """See the attribute `dtype`."""
        stored = [KINDS[kind] for kind, _ in self.numbers.most_common() if kind in KINDS]
        most = next(iter(stored), torch.bfloat16)
        if self._scales or not stored:
            return named_dtype(self.config, most)
        return most

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        file, stored_name = self._files[name]
        return tuple(file.get_slice(stored_name).get_shape())

    def _stored_kind(self, name: str) -> str:
        file, stored_name = self._files[name]
        return str(file.get_slice(stored_name).get_dtype())

    def kind(self, name: str) -> str:
        """The kind of numbers that `read` returns if no type is asked for: F32, BF16, I8, ..."""
        if name in self._scales:
            return next(kind for kind, dtype in KINDS.items() if dtype == self.dtype)
        return self._stored_kind(name)

    def itemsize(self, name: str) -> int:
        """Bytes of each number that `read` returns if no type is asked for."""
        bits = re.search(r"\d+", self.kind(name))
        if bits is None:  # BOOL
            return 1
        return int(bits[0]) // 8

    def nbytes(self) -> int:
        """Bytes of all tensors if no type is asked for."""
        return sum(math.prod(self.shape(name)) * self.itemsize(name) for name in self._files)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, on the CPU: mapped to the file where nothing has to be computed.

        Args:
            dtype: what it is cast to; None leaves it as `kind` says.

        Raises:
            ValueError: FP8 scales that do not fit.
        """
        file, stored_name = self._files[name]
        tensor: Tensor = file.get_tensor(stored_name)
        if name in self._scales:
            file, stored_name = self._scales[name]
            scale = file.get_tensor(stored_name)
            expect_scale(name, tuple(tensor.shape), scale, self._block)
            try:
                tensor = dequantize(tensor, scale, self.dtype if dtype is None else dtype)
            except ValueError as error:
                raise ValueError(f"{self.directory}: {name}: {error}") from error
        if self.layout == "mistral":
            tensor = reorder_rows(name, tensor, self.config, half_split)
        if dtype is None:
            return tensor
        return tensor.to(dtype)


# What wrappers put before the names in the files that are written of them, and what has to be written instead.
WRAPPERS = {
    "module.": "torch's DataParallel: save model.module",
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "_fsdp_wrapped_module.": "torch's FSDP: save the full state dict",
    "base_model.model.": "PEFT: save model.merge_and_unload()",
}


def describe_origin(names: Sequence[str]) -> str:
    """The program that seems to have written these names of tensors, which no parameter has, for an error message;
    "" if that is not known."""
    if any(".lora_" in name for name in names):
        return "; they are of a LoRA adapter that is not merged: save model.merge_and_unload()"
    if not names:
        return ""
    for prefix, program in WRAPPERS.items():
        if all(prefix in name for name in names):
            return f"; {prefix!r} is written by {program}"
    if all(from_mistral(name, False) is not None for name in names):
        return f"; they are Mistral's names, which belong into {CONSOLIDATED} with {PARAMS}"
    return ""
