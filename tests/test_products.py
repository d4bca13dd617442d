"""Products on a CPU: each form equals the plain one, within its rounding, and is taken where it is faster."""

import math
import threading

import pytest
import torch

import products
from fast import FlatModel
from ministral import KVCache
from products import avoids_onednn, split_mm, splits_rows, wide_mm, wide_rows, without_onednn
from tests.test_fast import tiny

CPU = torch.device("cpu")


def draw(rows, size, out, dtype=torch.float64):
    """x (rows, size) and the transposed view (size, out) of a weight."""
    g = torch.Generator().manual_seed(rows * size + out)
    return torch.randn(rows, size, generator=g).to(dtype), torch.randn(out, size, generator=g).to(dtype).t()


# ------------------------------------------------------------------------------------------------------- many rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 8, 33])
def test_wide_products_are_those_of_float32(dtype, rows, monkeypatch):
    """Also where a weight is converted in several tiles. Products of a few rows stay in 16 bits."""
    x, weight = draw(rows, 96, 75, dtype)
    x = x.float()
    monkeypatch.setattr(products, "TILE", 96 * 32)
    product = wide_mm(x, weight)
    if rows < 8:
        assert torch.equal(product, torch.mm(x.to(dtype), weight))
    else:
        exact = x.double() @ weight.double()
        assert product.dtype == torch.float32 and product.is_contiguous()
        assert (product - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_pytorch_without_onednn(monkeypatch):
    """As on Apple's processors, where its functions do not exist."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert wide_rows(torch.float32, CPU) == math.inf and wide_rows(torch.bfloat16, CPU) == 8
    assert not avoids_onednn(torch.bfloat16, CPU)
    FlatModel(tiny())


def test_a_hidden_matrix_unit(monkeypatch):
    """AVX-512 with both 16-bit types, but without AMX."""
    monkeypatch.setattr(products, "has_arithmetic", lambda dtype: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert wide_rows(torch.bfloat16, CPU) == (math.inf if amx else 128)
        assert wide_rows(torch.float16, CPU) == math.inf


def test_a_weight_whose_column_is_larger_than_a_tile(monkeypatch):
    x, weight = draw(9, 96, 5, torch.bfloat16)
    monkeypatch.setattr(products, "TILE", 50)
    torch.testing.assert_close(wide_mm(x.float(), weight), x.float() @ weight.float())


def test_the_widened_types_are_those_that_gain():
    bf16, fp16 = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert (wide_rows(torch.bfloat16, CPU) == 8) is not bf16
    assert (wide_rows(torch.float16, CPU) == 8) is not fp16
    assert torch.cpu._is_amx_tile_supported() <= (wide_rows(torch.bfloat16, CPU) == math.inf)
    assert wide_rows(torch.float32, CPU) == wide_rows(torch.bfloat16, torch.device("cuda")) == math.inf


# --------------------------------------------------------------------------------------------------------- one row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("out", [1, 2, 7, 16, 24, 75, 160])
def test_a_product_in_parts(out, dtype):
    """For numbers of rows of the weight that divide into 1 to 16 parts."""
    x, weight = draw(1, 96, out, dtype)
    exact = x.double() @ weight.double()
    product = split_mm(x, weight)
    assert product.shape == (1, out) and product.dtype == dtype
    torch.testing.assert_close(product.double(), exact, rtol=0, atol=40 * torch.finfo(dtype).eps * 96**0.5)


def test_rows_are_split_where_it_is_faster(monkeypatch):
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert splits_rows(torch.float32, CPU) == splits_rows(torch.float64, CPU) == (threads == 2)
        assert not splits_rows(torch.bfloat16, CPU) and not splits_rows(torch.float32, torch.device("cuda"))


def test_onednn_is_avoided_where_it_is_used():
    assert avoids_onednn(torch.bfloat16, CPU) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not avoids_onednn(torch.float32, CPU) and not avoids_onednn(torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("before", [True, False])
def test_the_setting_of_onednn_comes_back(before):
    """After an error, after nested blocks, and after blocks of several threads that overlap."""
    is_enabled, set_enabled = torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled
    set_enabled(before)
    try:
        with pytest.raises(ZeroDivisionError), without_onednn():
            assert not is_enabled()
            1 / 0  # noqa: B018
        assert is_enabled() == before

        entered, leave = threading.Event(), threading.Event()

        def other():
            with without_onednn():
                entered.set()
                leave.wait(10)

        thread = threading.Thread(target=other)
        with without_onednn():
            thread.start()
            assert entered.wait(10)
        assert not is_enabled()  # the other thread is in its block
        leave.set()
        thread.join(10)
        assert is_enabled() == before
    finally:
        set_enabled(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_of_one_row_takes_these_forms(rows, dtype, monkeypatch):
    """A step with one row only, and never a prompt."""
    split, quiet = [], []
    right, set_enabled = split_mm, torch._C._set_mkldnn_enabled

    def count(x, weight):
        split.append(len(x))
        return right(x, weight)

    def remember(value):
        quiet.append(value)
        set_enabled(value)

    monkeypatch.setattr("fast.split_mm", count)
    monkeypatch.setattr(torch._C, "_set_mkldnn_enabled", remember)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("fast.avoids_onednn", lambda dtype, device: dtype == torch.bfloat16)
    model = tiny().to(dtype)
    ids = torch.randint(1, 50, (rows, 6), generator=torch.Generator().manual_seed(0))
    forward, cache = FlatModel(model), KVCache(model.config)
    with torch.no_grad():
        forward(ids[:, :-1], torch.arange(5)[None], cache)
        assert split == quiet == []
        logits = forward(ids[:, -1:], torch.tensor([[5]]), cache)
        expected = model(ids).logits[:, -1]
    assert bool(split) == (rows == 1 and dtype != torch.bfloat16)
    assert quiet == ([False, True] if rows == 1 and dtype == torch.bfloat16 else [])
    bound = 0.05 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits, expected, rtol=0, atol=bound * expected.abs().max().item())
