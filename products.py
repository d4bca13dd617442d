"""Products of rows and weights on a CPU, each in its fastest form. Only `fast.py` uses them. Weights are (in, out):
transposed views of the weights of linear layers.

    wide_mm         many rows (a prompt), 16-bit weights: in float32, where the processor is slow with 16 bits
    split_mm        one row (a step of decoding), float32: in parts, because PyTorch uses only one thread for one row
    without_onednn  one row, bfloat16: without a library that rearranges the weight each time

With `wide_mm`, a prompt of 512 tokens was read 4.7 times as fast as in Transformers (135-million shape, bfloat16, Intel
Xeon limited to AVX2). With the other two, the 135-million shape decoded 1.6 times as fast as before in float32, and 1.8
to 2.0 times in bfloat16 (two cores of an AMD EPYC with bfloat16 arithmetic; benchmarks/RESULTS.md).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------- many rows


def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of a 16-bit type on this processor. PyTorch may be built without oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def wide_rows(dtype: torch.dtype, device: torch.device) -> float:
    """The number of rows from which a CPU multiplies 16-bit weights faster in float32.

    It is 8 on processors without arithmetic in this type. It is 128 for bfloat16 if the processor has a matrix unit
    (AMX) which a virtual machine hides: 512 rows are multiplied at 300 instead of 180 GFLOPS (two cores of an Intel
    Xeon). Elsewhere it is infinite."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return math.inf
    if not has_arithmetic(dtype):
        return 8
    # AVX-512 with arithmetic in bfloat16 and float16 is found only in processors with AMX.
    has_unit = torch.cpu._is_avx512_bf16_supported() and has_arithmetic(torch.float16)
    if dtype == torch.bfloat16 and has_unit and not torch.cpu._is_amx_tile_supported():
        return 128
    return math.inf


# Numbers of a weight that are converted at a time, 16 MB in float32. With 1 MB, products take a third longer.
TILE = 1 << 22


def wide_mm(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x (N, in), float32, with a 16-bit weight (in, out), computed in float32: (N, out), float32.

    The result is closer to float64 than a product in 16 bits. Fewer than 8 rows (the last layer's last tokens) are
    multiplied in 16 bits: there, reading the weight takes the time, and converting it would take more."""
    if len(x) < 8:
        return torch.mm(x.to(weight.dtype), weight)
    out = x.new_empty(len(x), weight.shape[1])
    columns = max(TILE // len(weight), 1)
    for start in range(0, weight.shape[1], columns):
        tile = weight[:, start : start + columns].to(x.dtype)
        torch.mm(x, tile, out=out[:, start : start + columns])
    return out


# --------------------------------------------------------------------------------------------------------- one row


def splits_rows(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to use `split_mm` for one row. With one thread it would take 5 % longer."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64) and torch.get_num_threads() > 1


def split_mm(x: Tensor, weight: Tensor) -> Tensor:
    """The product of one row x (1, in) with a weight (in, out), as up to 16 products with a part of the columns each:
    (1, out).

    PyTorch's library (MKL) multiplies one row in one thread, but several products in several threads. Two threads read
    a weight of 3072 x 9216 at 21 instead of 17 GB/s, and one of 1536 x 576 at 15 instead of 9 (AMD EPYC)."""
    size, out = weight.shape
    parts = math.gcd(out, 16)
    weights = weight.view(size, parts, out // parts).transpose(0, 1)
    return torch.bmm(x.expand(parts, 1, size), weights).view(1, out)


def avoids_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to use `without_onednn` for one row."""
    return device.type == "cpu" and dtype == torch.bfloat16 and has_arithmetic(dtype)


_lock = threading.Lock()
_blocks = 0  # the number of `without_onednn` blocks that are running now, in all threads
_enabled = True  # the setting before the first of these blocks


@contextmanager
def without_onednn() -> Iterator[None]:
    """A block in which PyTorch multiplies without the library oneDNN.

    oneDNN rearranges a bfloat16 weight before each product. For one row, this takes longer than the product: a weight
    of 9216 x 3072 is read at 18 GB/s, by PyTorch's own kernel at 26 to 34 (AMD EPYC). The setting belongs to the
    process, so during the block other threads multiply without oneDNN, too."""
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
