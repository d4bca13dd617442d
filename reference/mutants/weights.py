"""Mistakes of reading FP8 weights.

Models keep no FP8 numbers. So the switches read the files of a model again, with the mistake, and exchange its weights
while it runs. Models that were not read from a directory with FP8 weights stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import checkpoint
from checkpoint import reader
from ministral import MinistralForCausalLM
from pretrained import PreTrainedModel
from reference.mutants.catalogue import mutant, replace
from vision import Mistral3ForConditionalGeneration

Dequantize = Callable[[Tensor, Tensor, torch.dtype], Tensor]  # see `checkpoint.dequantize`
Weights = dict[str, Tensor]


def read_again(model: PreTrainedModel, dequantize: Dequantize) -> Weights:
    """The weights of a model that was read from FP8 files, computed in another way; of other models, nothing."""
    directory = Path(model.name_or_path)
    if not model.name_or_path or not directory.is_dir():
        return {}
    if checkpoint.read_config(directory).get("quantization_config") is None:
        return {}
    with warnings.catch_warnings(), patch.object(reader, "dequantize", dequantize):
        warnings.simplefilter("ignore", UserWarning)
        return type(model).from_pretrained(directory, model.dtype, model.device).state_dict()


@contextmanager
def exchanged(model: PreTrainedModel, weights: Weights) -> Iterator[None]:
    """Give a model other weights for a while."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = weights.get(name, parameter.data)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]


def misread(stack: ExitStack, dequantize: Dequantize) -> None:
    """Run models with the weights that another way of reading FP8 makes."""
    weights: dict[PreTrainedModel, Weights] = {}  # those that were read again

    def make(right: Any) -> Any:
        def changed(self: PreTrainedModel, *arguments: Any, **named: Any) -> Any:
            if self not in weights:
                weights[self] = read_again(self, dequantize)
            with exchanged(self, weights[self]):
                return right(self, *arguments, **named)

        return changed

    for cls in (MinistralForCausalLM, Mistral3ForConditionalGeneration):
        replace(stack, cls, "forward", make)


@mutant
def fp8_bytes_as_numbers(stack: ExitStack) -> None:
    """Takes FP8 codes for whole numbers from 0 to 255 and multiplies them by the scale."""
    right = checkpoint.dequantize
    misread(stack, lambda weight, scale, dtype: right(weight.view(torch.uint8), scale, dtype))


@mutant
def fp8_scale_ignored(stack: ExitStack) -> None:
    """Does not multiply FP8 weights by their scale."""
    right = checkpoint.dequantize
    misread(stack, lambda weight, scale, dtype: right(weight, torch.ones_like(scale), dtype))


@mutant
def fp8_scale_divided(stack: ExitStack) -> None:
    """Divides FP8 weights by weight_scale_inv; it is a factor, in spite of its name."""
    right = checkpoint.dequantize
    misread(stack, lambda weight, scale, dtype: right(weight, 1 / scale.float(), dtype))
