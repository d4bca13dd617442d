"""A LoRA adapter in PEFT's format: what its two files say about each weight of a model.

    adapter_config.json         rank r, lora_alpha, which modules have an adapter
    adapter_model.safetensors   base_model.model.X.lora_A.weight (r, in), base_model.model.X.lora_B.weight (out, r)
                                of each linear layer X, whose weight W is (out, in)
                                base_model.model.X.lora_embedding_A (r, V), ...lora_embedding_B (E, r)
                                of an embedding X, whose weight W is (V, E)
                                base_model.model.X.weight of a module that was trained whole (modules_to_save)

The merged weight is W + scaling * B A, for an embedding W + scaling * (B A)^T. The scaling is lora_alpha / r, with
use_rslora lora_alpha / sqrt(r).
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checks import as_list, brief, is_number, is_size

from .files import ADAPTER, ADAPTER_WEIGHTS, has_any, read_json_object
from .reader import KINDS, open_safetensors

PREFIX = "base_model.model."
# How the names of the two factors end: the factor, and whether it belongs to an embedding.
FACTORS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
# Keys of adapter_config.json that are read here.
READ_KEYS = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
    "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save",
}  # fmt: skip
# Keys that are not: names, versions, and settings of training, which the trained tensors do not depend on any more.
OTHER_KEYS = {
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode",
    "lora_dropout", "megatron_config", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
}  # fmt: skip
# Initialisations that leave the base as it is. Other initialisations change the base: they subtract the adapter's first
# product from it.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
PEFT_CURE = "merge it with PEFT: model.merge_and_unload().save_pretrained(OUT)"


@dataclass
class Change:
    """The change of one parameter: it replaces the weight, adds a product of two factors, or both. A, B and weight are
    names of tensors in the adapter, or None.

    Attributes:
        module: name of the module, as the adapter has it.
        embedding: whether the product is that of an embedding.
    """

    module: str
    embedding: bool = False
    A: str | None = None
    B: str | None = None
    weight: str | None = None

    def tensors(self) -> list[str]:
        """The names of its tensors."""
        return [name for name in (self.A, self.B, self.weight) if name is not None]


class Adapter:
    """An adapter whose files have been read, apart from the numbers.

    Attributes:
        config: the content of adapter_config.json.
        names: those of the tensors.
        changes: {parameter, by its name in the model that the adapter was trained on: its `Change`}.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an adapter of another kind, or tensors without a meaning, missing, or of a wrong rank.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not has_any(directory, ADAPTER):
            cure = "give the directories in the order ADAPTER BASE OUT"
            raise FileNotFoundError(f"{directory} holds no {ADAPTER}, so it is no adapter; {cure}")
        self.config = read_json_object(directory / ADAPTER)
        self._expect_config()
        self._file = self._open()
        self.changes: dict[str, Change] = {}
        self.names: list[str] = list(self._file.keys())
        for name in self.names:
            self._add(name)
        if not self.changes:
            raise ValueError(f"{directory / ADAPTER_WEIGHTS} holds no tensors; save the adapter again")
        for change in self.changes.values():
            self._expect_pair(change)

    def _open(self) -> Any:
        """Open the file of the tensors.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it cannot be read.
            ValueError: it is not in the safetensors format.
        """
        path = self.directory / ADAPTER_WEIGHTS
        if not path.is_file():
            cure = f"write {ADAPTER_WEIGHTS} (PEFT: save_pretrained); a pickle ({path.stem}.bin) is not read"
            raise FileNotFoundError(f"{path} does not exist; {cure}")
        return open_safetensors(path)

    # Configuration.

    def _expect(self, key: str, valid: object, allowed: str) -> None:
        """Raise ValueError unless a value of adapter_config.json is `valid`."""
        if not valid:
            found = f"{self.directory / ADAPTER} has {key}={brief(self.config.get(key))}"
            raise ValueError(f"{found}; allowed: {allowed}")

    def _expect_config(self) -> None:
        """Raise ValueError unless the merged weight follows the formula at the top of this file."""
        config = self.config
        if config.get("peft_type") != "LORA":
            kind = f"{self.directory / ADAPTER} has peft_type={brief(config.get('peft_type'))}"
            raise ValueError(f"{kind}, which is not supported; supported: 'LORA'; {PEFT_CURE}")
        self._expect("r", is_size(config.get("r")), "a whole number above 0")
        self._expect("lora_alpha", _is_alpha(config.get("lora_alpha")), "a number of float64")
        self._expect("use_rslora", config.get("use_rslora") in (None, False, True), "true or false")
        self._expect("bias", config.get("bias") in (None, "none"), "'none'")
        start = config.get("init_lora_weights")
        unchanged = "true, false, 'gaussian', 'eva', 'orthogonal' or 'mica', which leave the base unchanged"
        cure = "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        self._expect("init_lora_weights", start in INITIALISATIONS, f"{unchanged}; {cure}")
        for key in sorted(config.keys() - READ_KEYS - OTHER_KEYS):
            if config[key] not in (None, False, "", [], {}):
                found = f"{self.directory / ADAPTER} has {key}={brief(config[key])}"
                raise ValueError(f"{found}, which is not supported; {PEFT_CURE}")
        self._expect_patterns()

    def _expect_patterns(self) -> None:
        """Raise ValueError unless the keys that select modules have values that can be read."""
        for key, valid in (("rank_pattern", is_size), ("alpha_pattern", _is_alpha)):
            pattern = self.config.get(key)
            of_kind = isinstance(pattern, dict) and all(valid(value) for value in pattern.values())
            valid_pattern = pattern is None or of_kind
            self._expect(key, valid_pattern, "an object from names of modules to numbers, or none")
            for expression in _dict_or_empty(pattern):
                self._expect(key, _is_expression(f"({expression})"), "names or regular expressions")
        for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = self.config.get(key)
            names = isinstance(value, list) and all(isinstance(name, str) for name in value)
            self._expect(key, names or isinstance(value, (str, type(None))), "a text, or a list of texts")
            if isinstance(value, str):
                self._expect(key, _is_expression(value), "a regular expression")
        for pattern in as_list(self.config.get("layers_pattern")):
            valid_pattern = _is_expression(_layer_expression(pattern))
            self._expect("layers_pattern", valid_pattern, "names or regular expressions")
        layers = self.config.get("layers_to_transform")
        numbers = isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
        self._expect("layers_to_transform", numbers or isinstance(layers, (int, type(None))), "whole numbers")

    def targets(self, module: str) -> bool:
        """Whether the configuration gives a linear layer or an embedding of this name an adapter, by PEFT's rules."""
        config = self.config
        if _matches(config.get("exclude_modules"), module):
            return False
        for saved in as_list(config.get("modules_to_save")):
            if re.match(rf"(.*\.)?{re.escape(saved)}(\..*)?$", module):
                return False
        wanted = config.get("target_modules")
        layers = config.get("layers_to_transform")
        if wanted == "all-linear":
            return not module.endswith(("lm_head", "embed_tokens"))
        if not _matches(wanted, module):
            return False
        if isinstance(wanted, str) or layers in (None, []) or module in as_list(wanted):
            return True
        patterns = ["[^.]*"]
        if config.get("layers_pattern"):
            patterns = as_list(config["layers_pattern"])
        for pattern in patterns:
            found = re.match(_layer_expression(pattern), module)
            if found is not None:  # without a number if the pattern is an alternative, a|b
                return found["number"] is not None and int(found["number"]) in as_list(layers)
        return False

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names a module of this name or one around it, by PEFT's rules."""
        return any(_is_saved(saved, module) for saved in as_list(self.config.get("modules_to_save")))

    def missing_saved(self) -> list[str]:
        """The names in modules_to_save of which the file has no tensor."""
        modules = [change.module for change in self.changes.values() if change.weight is not None]
        names = as_list(self.config.get("modules_to_save"))
        return [name for name in names if not any(_is_saved(name, module) for module in modules)]

    def rank(self, module: str) -> int:
        """The r of a module."""
        return self._of_pattern("rank_pattern", module, self.config["r"])

    def scaling(self, module: str) -> float:
        """The number by which the product of a module's factors is multiplied."""
        r = self.rank(module)
        alpha = self._of_pattern("alpha_pattern", module, self.config["lora_alpha"])
        if self.config.get("use_rslora"):
            return alpha / math.sqrt(r)
        return alpha / r

    def _of_pattern(self, key: str, module: str, default: Any) -> Any:
        """The value of the first pattern that a module's name ends with."""
        for pattern, value in _dict_or_empty(self.config.get(key)).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    # Tensors.

    def _add(self, name: str) -> None:
        """Add a tensor to the changes.

        Raises:
            ValueError: the name or the type is not one of an adapter's, or another tensor has the same meaning.
        """
        path = self.directory / ADAPTER_WEIGHTS
        if not name.startswith(PREFIX):
            allowed = f"names that begin with {PREFIX!r}, as PEFT writes them"
            raise ValueError(f"{path} holds {name}; allowed: {allowed}")
        kind = self._file.get_slice(name).get_dtype()
        if kind not in KINDS:
            raise ValueError(f"{path}: {name} is {kind}; allowed: {', '.join(KINDS)}")
        parameter, part, embedding = _split_factor(name.removeprefix(PREFIX))
        parameter = parameter.replace(".base_layer.", ".")  # of a weight that is saved beside its factors
        change = self.changes.setdefault(parameter, Change(parameter.rpartition(".")[0]))
        if getattr(change, part) is not None:
            problem = f"{getattr(change, part)} and {name} are the same tensor"
            raise ValueError(f"{path}: {problem}; save the adapter again")
        setattr(change, part, name)
        change.embedding |= embedding

    def _expect_pair(self, change: Change) -> None:
        """Raise ValueError unless a change has both factors or none, of the configured rank."""
        path = self.directory / ADAPTER_WEIGHTS
        if change.A is None and change.B is None:
            return
        if change.A is None or change.B is None:
            problem = f"{change.tensors()[0]} is there without the other factor"
            raise ValueError(f"{path}: {problem}; save the adapter again")
        if not self.targets(change.module):
            problem = f"{path}: {change.A} is there, but target_modules in {ADAPTER} does not name its module"
            raise ValueError(f"{problem}; both files must be of one adapter")
        r = self.rank(change.module)
        A, B = self.shape(change.A), self.shape(change.B)
        if len(A) != 2 or len(B) != 2 or A[0] != r or B[1] != r:
            problem = f"{path}: factors {list(A)} and {list(B)} of {change.module}; {ADAPTER} says rank {r}"
            allowed = "both files of one adapter, of linear layers and embeddings only"
            raise ValueError(f"{problem}; allowed: {allowed}")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._file.get_slice(name).get_shape())

    def shapes(self, change: Change) -> list[tuple[int, ...]]:
        """The shapes of what a change adds to a weight, and of what it puts in its place."""
        shapes = []
        if change.weight is not None:
            shapes.append(self.shape(change.weight))
        if change.A is not None and change.B is not None:
            product = (self.shape(change.B)[0], self.shape(change.A)[1])
            if change.embedding:
                product = product[::-1]
            shapes.append(product)
        return shapes

    def read(self, name: str) -> Tensor:
        """A tensor; raises ValueError if it has infinite numbers or NaN."""
        tensor: Tensor = self._file.get_tensor(name)
        if not tensor.isfinite().all():
            problem = f"{self.directory / ADAPTER_WEIGHTS}: {name} holds NaN or infinity"
            raise ValueError(f"{problem}; the training has failed, or the file is damaged")
        return tensor

    def apply(self, change: Change, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged weight. It is computed in float32, or float64 if a factor or the weight is, and rounded once."""
        if change.weight is not None:
            weight = self.read(change.weight)
        if change.A is None or change.B is None:
            return weight.to(dtype)
        A, B = self.read(change.A), self.read(change.B)
        sum_dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), weight.dtype)
        sum_dtype = torch.promote_types(sum_dtype, torch.float32)
        product = B.to(sum_dtype) @ A.to(sum_dtype)
        if change.embedding:
            product = product.T
        return (weight.to(sum_dtype) + product * self.scaling(change.module)).to(dtype)


def _split_factor(name: str) -> tuple[str, str, bool]:
    """The parameter that a tensor changes, the part of its `Change` ("A", "B" or "weight"), and whether that part
    belongs to an embedding."""
    for ending, (factor, embedding) in FACTORS.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + ".weight", factor, embedding
    return name, "weight", False


def _is_alpha(value: Any) -> bool:
    return is_number(value, float, -sys.float_info.max, sys.float_info.max)


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError):
        return False
    return True


def _layer_expression(pattern: str) -> str:
    """The expression that finds the number of the layer in a module's name, behind the name of the list of layers."""
    return rf"(?:.*?\.)?{pattern}\.(?P<number>\d+)\."


def _is_saved(saved: str, module: str) -> bool:
    """Whether the name of a module, or of one around it, ends with a name of modules_to_save."""
    return re.search(rf"{re.escape(saved)}(\.|$)", module) is not None


def _dict_or_empty(value: dict[str, Any] | None) -> dict[str, Any]:
    """A JSON object, empty for none."""
    if value is None:
        return {}
    return value


def _matches(wanted: Any, module: str) -> bool:
    """Whether a module is meant by a regular expression of its whole name, or by a list of ends of names."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in as_list(wanted))
