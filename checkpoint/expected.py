"""The model that a configuration describes: its parameters, named and counted, without numbers.

All sizes and defaults come from the configuration classes. The other files of this package know no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .hf import VISION_PREFIXES, expect_complete
from .load import list_names
from .mistral_tensors import to_mistral


def empty_model(config: dict[str, Any]) -> Any:
    """The model of a config.json on the meta device, where parameters have shapes and no numbers.

    Raises:
        ValueError: the file leaves out numbers that shapes depend on (see `expect_complete`), or no class here reads
            it.
    """
    from model_types import model_class  # imported late: the models import this package

    expect_complete(config)
    cls = model_class(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown keys, which `from_pretrained` gives
        read: Any = cls.config_class.from_dict(config)
    with torch.device("meta"):
        return cls(read)


def count_parameters(config: dict[str, Any]) -> dict[str, int]:
    """The numbers in each part of a model, from the content of its config.json alone: "text", "vision", "projector",
    and, counted under "text" too, "fp8": the matrices that the published FP8 files quantise (raises as
    `empty_model`)."""
    return count_by_part(empty_model(config))


def count_by_part(model: Any) -> dict[str, int]:
    """The same of a model."""
    counts = {"text": 0, "vision": 0, "projector": 0, "fp8": 0}
    vision_tower, projector = VISION_PREFIXES
    for name, parameter in model.named_parameters():
        name = name.removeprefix("model.")
        part = "text"
        if name.startswith(vision_tower):
            part = "vision"
        elif name.startswith(projector):
            part = "projector"
        counts[part] += parameter.numel()
        if part == "text" and "layers." in name and parameter.ndim == 2:
            counts["fp8"] += parameter.numel()
    return counts


def expect_tensors(directory: Path, model: Any, names: Iterable[str]) -> None:
    """Raise ValueError unless the tensors, by Mistral's names, are the parameters of the model: no others but scales
    and a head of its own, and none missing."""
    expected = {to_mistral(name) for name, _ in model.named_parameters()}
    stored = {name for name in names if not name.rpartition(".")[2].startswith("qscale_")}
    _refuse(directory, "lacks", expected - stored - {"output.weight"})
    _refuse(directory, "should not have", stored - expected - {"output.weight"})


def _refuse(directory: Path, what: str, names: set[Any]) -> None:
    """Raise ValueError if there are such names."""
    if not names:
        return
    listed = list_names(sorted(names), 4)
    raise ValueError(f"{directory} {what} {listed} (Mistral's names), by its configuration; fetch it again")
