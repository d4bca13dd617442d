"""Products of rows and weights on a CPU, in the form that is fastest there. `fast.py` uses them. A weight (in, out) is
the transposed view of that of a linear layer.

A step of decoding multiplies one row by every weight, and reading the weights takes the time. PyTorch reads them at a
half of the rate of the memory or less in two cases, which `split_mm` and `without_onednn` cure. A prompt is many rows.
On many processors, float32 is then much faster than 16 bits: `wide_mm`.

In figures (two cores of an AMD EPYC with AVX-512 and bfloat16 arithmetic, torch 2.13): decoding with the shape of a
135-million model is 1.6 times as fast in float32 and 2.1 times in bfloat16, with the 3B shape 2.1 times in bfloat16.
Reading a prompt of 512 tokens in bfloat16 is 5 times as fast on a processor without bfloat16 arithmetic.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------- many rows


def wide_rows(dtype: torch.dtype, device: torch.device) -> float:
    """The number of rows from which a CPU multiplies 16-bit weights faster in float32.

    It is 8 on processors without such arithmetic. It is 128 for bfloat16 where a virtual machine hides the
    processor's matrix unit (AMX): 512 rows are multiplied with 300 instead of 180 GFLOPS."""
    cpu = torch.ops.mkldnn
    native = {torch.bfloat16: cpu._is_mkldnn_bf16_supported(), torch.float16: cpu._is_mkldnn_fp16_supported()}
    if device.type != "cpu" or dtype not in native:
        return math.inf
    if not native[dtype]:
        return 8
    has_unit = torch.cpu._is_avx512_bf16_supported() and native[torch.float16]
    if dtype == torch.bfloat16 and has_unit and not torch.cpu._is_amx_tile_supported():
        return 128
    return math.inf


# Numbers of a weight that are converted at a time: 16 MB. With 1 MB, products take a third longer.
TILE = 1 << 22


def wide_mm(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x (N, in), float32, with a 16-bit weight (in, out): (N, out), computed in float32, which is closer
    to float64. Less than 8 rows, which are bound by reading the weight, are multiplied in 16 bits."""
    if len(x) < 8:
        return torch.mm(x.to(weight.dtype), weight)
    out = torch.empty(len(x), weight.shape[1], dtype=x.dtype)
    columns = max(TILE // len(weight), 1)
    for start in range(0, weight.shape[1], columns):
        tile = weight[:, start : start + columns].to(x.dtype)
        torch.mm(x, tile, out=out[:, start : start + columns])
    return out


# --------------------------------------------------------------------------------------------------------- one row


def splits_rows(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `split_mm` is for this type and device. With one thread it would take 5 % longer."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64) and torch.get_num_threads() > 1


def split_mm(x: Tensor, weight: Tensor) -> Tensor:
    """The product of one row x (1, in) with a weight (in, out), in up to 16 parts: (1, out).

    PyTorch's library (MKL) multiplies one row in one thread, but several products in several threads. Two threads read
    a weight of 3072 x 9216 with 21 instead of 17 GB/s, one of 1536 x 576 with 15 instead of 9."""
    size, out = weight.shape
    parts = math.gcd(out, 16)
    weights = weight.view(size, parts, out // parts).transpose(0, 1)
    return torch.bmm(x.expand(parts, 1, size), weights).view(1, out)


def avoids_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one row is multiplied faster without oneDNN."""
    return device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


_lock = threading.Lock()
_blocks = 0  # in which oneDNN is off now
_enabled = True  # before the first of them


@contextmanager
def without_onednn() -> Iterator[None]:
    """A block in which PyTorch multiplies without oneDNN.

    oneDNN rearranges a bfloat16 weight before each product. For one row, this takes longer than the product: a weight
    of 9216 x 3072 is read with 18 GB/s, and with 26 to 34 by PyTorch's own kernel. The setting is that of the process:
    meanwhile, other threads multiply without oneDNN, too."""
    global _blocks, _enabled
    with _lock:
        if _blocks == 0:
            _enabled = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                torch._C._set_mkldnn_enabled(_enabled)
