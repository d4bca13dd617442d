"""FP8 weights: numbers of 8 bits (E4M3) and their scales, to numbers of any type."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from checks import brief, is_size

FP8 = "F8_E4M3"  # in safetensors
SCALE = "_scale_inv"  # what the name of a weight's scale ends with, though the weight is not divided by it
ACTIVATION_SCALE = ".activation_scale"


def expect_fp8(quantization: Any) -> None:
    """Raise ValueError unless a config.json's `quantization_config` is none, or the FP8 that `dequantize` reads."""
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config={brief(quantization)} is impossible; allowed: an object")
    method = quantization.get("quant_method", "of unknown kind")
    numbers = quantization.get("fmt", "e4m3")
    if quantization and (method, numbers) != ("fp8", "e4m3"):
        name = str(method)
        if numbers != "e4m3":
            name = f"{method} {numbers}"
        problem = f"quantized weights ({name}) are not supported"
        raise ValueError(f"{problem}; allowed: fp8 e4m3, or a BF16 version")
    block = quantization.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(map(is_size, block))):
        allowed = "none, or two whole numbers above 0"
        raise ValueError(f"weight_block_size={brief(block)} is impossible; allowed: {allowed}")


def expect_scale(name: str, shape: tuple[int, ...], scale: Tensor, block: list[int] | None) -> None:
    """Raise ValueError unless a scale fits the weight of this name and shape: floating-point numbers of 16 bits or
    more, and, where it is a grid, one for each block of the size `block` (`weight_block_size` of config.json)."""
    grid = None
    if block is not None:
        grid = [size / length for size, length in zip(shape, block)]
    other_grid = scale.ndim == 2 and grid is not None and list(scale.shape) != grid
    if scale.is_floating_point() and scale.element_size() >= 2 and not other_grid:
        return
    blocks = "a grid"
    if grid is not None:
        blocks = str([math.ceil(count) for count in grid])
    allowed = f"one number, or {blocks} of them, each for a whole block of {list(shape)}, of 16 bits or more"
    raise ValueError(f"{name}: scale of shape {list(scale.shape)}, {scale.dtype}; allowed: {allowed}")


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 numbers (rows, columns) times their scale, which is one number, or one for each block of a grid of equal
    blocks. The product is computed in float32 and rounded once, as in Transformers on the CPU, bit for bit.

    In the files the scale is called weight_scale_inv, though the weight is not divided by it.

    Raises:
        ValueError: the grid does not divide the matrix.
    """
    grid = (1, 1)
    if scale.ndim == 2:
        grid = (scale.shape[0], scale.shape[1])
    one_for_each = 0 < scale.numel() == math.prod(grid)
    if weight.ndim != 2 or not one_for_each or weight.shape[0] % grid[0] or weight.shape[1] % grid[1]:
        shapes = f"scales {list(scale.shape)} for a tensor {list(weight.shape)}"
        raise ValueError(f"{shapes}; allowed: one number, or one for each of equal blocks")
    rows, columns = weight.shape
    blocks = weight.float().view(grid[0], rows // grid[0], grid[1], columns // grid[1])
    blocks *= scale.float().view(grid[0], 1, grid[1], 1)
    return blocks.view(rows, columns).to(dtype)
