"""Model directories: config.json and safetensors weights, from files to tensors and back. Knows no model."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What is fetched from the Hub: Transformers' layout and the tokenizer. Mistral's own consolidated*.safetensors would
# double the download.
HUB_FILES = [CONFIG, "generation_config.json", "model*.safetensors", INDEX, "tokenizer.json", "tekken.json"]


def find(path_or_hub_id: str | Path) -> Path:
    """The directory of a model: the one named, or the local copy of a Hub repository ("owner/name"), downloaded now
    if it is not there yet (huggingface_hub's cache, variables and offline mode apply).

    Raises:
        FileNotFoundError: neither a directory nor a repository that can be reached.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; a model is a directory with {CONFIG} and {WEIGHTS}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) or str(path_or_hub_id).startswith("."):
        raise FileNotFoundError(f"no model directory {path}; give a directory with {CONFIG}, or a Hub id 'owner/name'")
    from huggingface_hub import snapshot_download  # imported late: a local model needs none of it

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=HUB_FILES))
    except Exception as error:  # many kinds: no network, no such repository, a login needed, a full disk
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{path_or_hub_id} is no directory here and could not be fetched from the Hub ({reason})"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not UTF-8 JSON; the message says where.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json, a JSON object (raises as `read_json`)."""
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{directory / CONFIG} must hold a JSON object; found {type(config).__name__}")
    return config


# Keys of a config.json that do not change what a text model computes.
HARMLESS_KEYS = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"),
    *("return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "num_labels", "pretraining_tp", "_attn_implementation_autoset"),
}


def config_fields(d: Any, known: set[str], model_types: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields of a text model's config.json, whichever Transformers generation wrote it.

    4.x has `rope_theta` and `rope_scaling` (or null), 5.x has `rope_parameters`; what they hold is merged. Keys of no
    known meaning are left out with a warning.

    Args:
        d: the content of the file.
        known: names of the fields that are wanted.
        model_types: the model types that are taken, each with its defaults for fields that the file leaves out.

    Raises:
        ValueError: another model type, biases, or quantised weights: these compute something else.
    """
    if not isinstance(d, dict):
        raise ValueError(f"{CONFIG} must hold a JSON object; found {type(d).__name__}")
    objects = {"rope_scaling": dict, "rope_parameters": dict, "quantization_config": dict}
    for key, kind in {"model_type": str, **objects}.items():
        if not isinstance(d.get(key), (kind, type(None))):
            raise ValueError(f"{key}={d[key]!r} is impossible; allowed: {'an object' if kind is dict else 'a name'}")
    model_type = d.get("model_type") or next(iter(model_types))
    if model_type not in model_types:
        raise ValueError(f"model_type {model_type!r} computes another function; allowed: {', '.join(model_types)}")
    for key in ("attention_bias", "mlp_bias"):
        if d.get(key):
            raise ValueError(f"{key}={d[key]!r}: biases make it another function; allowed: false, or none")
    if d.get("quantization_config"):
        method = d["quantization_config"].get("quant_method", "of unknown kind")
        raise ValueError(f"quantized weights ({method}) are not supported; use a BF16 version of the model")
    read = {"rope_scaling", "attention_bias", "mlp_bias", "quantization_config"}
    if unknown := sorted(d.keys() - known - read - HARMLESS_KEYS):
        warnings.warn(f"{CONFIG}: ignored unknown keys {', '.join(unknown)}", stacklevel=3)
    values = model_types[model_type] | {key: value for key, value in d.items() if key in known}
    if model_type == "llama":
        values["sliding_window"] = None  # its attention has none, whatever the file says
    if rope := {**(d.get("rope_scaling") or {}), **(d.get("rope_parameters") or {})}:
        values["rope_parameters"] = rope
    return values


def label_maps(
    num_labels: int | None = None, id2label: dict[Any, str] | None = None, label2id: dict[str, Any] | None = None
) -> tuple[int, dict[int, str], dict[str, int]]:
    """What a config.json says of a classifier's labels, complete: their number, the name of each, the number of each
    name. One of the three is enough; none means two labels.

    As in Transformers, labels without names are called LABEL_0, LABEL_1, ...; such names give way to a `num_labels`
    that asks for more or fewer, and to other names in `label2id`. For the rest, `id2label` is right and `label2id`
    follows from it: Transformers writes files in which they differ.

    Raises:
        ValueError: no or an impossible number of labels, or a number without a name.
    """

    def unnamed(names: dict[Any, str]) -> bool:
        return names == {i: f"LABEL_{i}" for i in range(len(names))}

    def number(key: Any) -> Any:
        return int(key) if str(key).isdecimal() else key  # keys in JSON are text

    for field, value in (("id2label", id2label), ("label2id", label2id)):
        if not isinstance(value, (dict, type(None))):
            raise ValueError(f"{field}={value!r} is impossible; allowed: an object, or none")
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise ValueError(f"num_labels={num_labels!r} is impossible; allowed: a whole number not below 1")
    names = {number(key): str(name) for key, name in (id2label or {}).items()}
    others = {number(key): str(name) for name, key in (label2id or {}).items()}
    if unnamed(names) and not unnamed(others):
        names = others
    if unnamed(names):
        names = {i: f"LABEL_{i}" for i in range(num_labels or len(names) or 2)}
    if names.keys() != set(range(len(names))):
        raise ValueError(f"labels numbered {', '.join(map(str, names))}; allowed: 0, 1, 2, ... with a name for each")
    if num_labels not in (None, len(names)):
        raise ValueError(f"num_labels={num_labels} is impossible; allowed: {len(names)}, the number of given names")
    return len(names), names, {name: i for i, name in names.items()}


class Checkpoint:
    """The tensors of a model directory, in one file or in shards with an index. Opening reads the headers only;
    `read` maps one tensor at a time into memory.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is not there.
        ValueError: a file is truncated or not safetensors, or a shard lacks a tensor the index promises.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}  # tensor name -> open file
        if (directory / WEIGHTS).is_file():
            shard = self._open(directory / WEIGHTS)
            self._files = dict.fromkeys(shard.keys(), shard)
        elif (directory / INDEX).is_file():
            self._open_shards(read_json(directory / INDEX))
        else:
            found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; found {found}")

    @staticmethod
    def _open(path: Path) -> Any:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, though the index names it; fetch the model again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error

    def _open_shards(self, index: Any) -> None:
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
            raise ValueError(f"{self.directory / INDEX} has no weight_map from tensor names to file names")
        shards = {name: self._open(self.directory / name) for name in sorted(set(weight_map.values()))}
        held = {name: set(shard.keys()) for name, shard in shards.items()}
        for tensor, file in weight_map.items():
            if tensor not in held[file]:
                raise ValueError(f"{self.directory / file} lacks {tensor}, which the index promises; fetch it again")
            self._files[tensor] = shards[file]

    def names(self) -> list[str]:
        """The stored names."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """How one tensor's numbers are stored: F32, BF16, I8, ..."""
        return str(self._files[name].get_slice(name).get_dtype())

    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        bits = {name: re.search(r"\d+", self.kind(name)) for name in self._files}
        return sum(math.prod(self.shape(name)) * int(found[0]) // 8 for name, found in bits.items() if found)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, mapped to the file."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def fill(
    module: nn.Module,
    files: Checkpoint,
    own_name: Callable[[str], str | None],
    tied: dict[str, str],
    new: set[str],
    dtype: torch.dtype | None,
    device: torch.device,
) -> bool:
    """Replace the parameters of a module, which may be on the meta device, one by one by those in the files.

    Args:
        own_name: from a stored name to the parameter's, or None for a tensor that is to be left out.
        tied: parameters that share another's tensor and need not be stored: {name: the other's name}.
        new: parameters that are left as they are.
        dtype, device: what each tensor is cast and moved to; dtype None keeps the stored one.

    Returns:
        False if a tied parameter is stored with values of its own: then it was filled, and is not to be tied.

    Raises:
        ValueError: tensors are missing, unexpected, misshapen, given twice, no floating-point numbers, or of several
            types when `dtype` is None; the message names them.
    """
    wanted = {k: p for k, p in module.named_parameters(remove_duplicate=False) if k not in new}
    stored: dict[str, str] = {}
    for name in files.names():
        if (own := own_name(name)) is not None:
            if own in stored:
                raise ValueError(f"{files.directory}: {stored[own]} and {name} are the same parameter")
            stored[own] = name
    kept_tied = True
    for name, other in tied.items():
        if name in stored and other in stored:
            if torch.equal(files.read(stored[name]), files.read(stored[other])):
                del stored[name]  # stored twice, one tensor in memory
            else:
                warnings.warn(f"{name} is stored with values of its own, so it is not tied to {other}", stacklevel=3)
                kept_tied = False
    shapes = {name: files.shape(stored[name]) for name in wanted if name in stored}
    problems = {
        "missing": sorted(wanted.keys() - stored.keys() - tied.keys()),
        "unexpected": sorted(stored.keys() - wanted.keys()),
        "misshapen": [
            f"{name} is {list(shape)}, {CONFIG} asks for {list(wanted[name].shape)}"
            for name, shape in sorted(shapes.items())
            if shape != wanted[name].shape
        ],
    }
    for what, found in problems.items():
        if found:
            more = f" and {len(found) - 6} more" if len(found) > 6 else ""
            raise ValueError(f"{files.directory}: {len(found)} tensors {what}: {', '.join(found[:6])}{more}")
    kinds = {files.kind(stored[name]): name for name in shapes}
    if not kinds.keys() <= {"F64", "F32", "F16", "BF16"} or (dtype is None and len(kinds) > 1):
        types = ", ".join(f"{name} is {kind}" for kind, name in sorted(kinds.items()))
        raise ValueError(f"{files.directory}: {types}; allowed: one floating-point type, or several if you give dtype")
    for name in shapes:
        owner, _, attribute = name.rpartition(".")
        tensor = files.read(stored[name]).to(device=device, dtype=dtype)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor))
    return kept_tied


def write(
    directory: str | Path, config: dict[str, Any], tensors: dict[str, Tensor], max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a model directory that Transformers reads too: one weights file, or, above `max_shard_bytes`, shards
    with an index. Every file appears complete or not at all; config.json comes last, so that a directory without one
    is known to be unfinished.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; a model is written into a directory")
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += nbytes
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        replace_file(directory / name, partial(save_file, shard, metadata={"format": "pt"}))
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _remove_other_weights(directory, {*names, *([INDEX] if len(shards) > 1 else [])})
    write_json(directory / CONFIG, config)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write_to: Callable[[Path], object]) -> None:
    """Let `write_to` write a temporary file beside `path`, then put that in its place: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_other_weights(directory: Path, keep: Iterable[str]) -> None:
    """Weights of an earlier save in another number of shards would be read together with the new ones."""
    for path in directory.iterdir():
        if path.name not in keep and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name):
            path.unlink()
