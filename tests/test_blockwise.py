"""Attention in blocks equals the formula, in a model, too; the choice of kernel; the cost of a sliding layer."""

import math
import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, strategies as st
from torch._subclasses import FakeTensorMode

import blockwise
from blockwise import CausalWindow, blockwise_attention, choose_kernel
from ministral import eager_attention, make_attention_mask, sdpa_attention
from tests.cases import draw_case, run_chunked
from tests.conftest import at_most
from tests.errors import Errors, number_of_cases

rngs = st.randoms(use_true_random=False)
WINDOWS = [None, 1, 2, 3, 5, 8, 11]


def draw_tensors(past, new, seed=0, heads=(6, 2), head_dim=8, dtype=torch.float64, device="cpu"):
    """q (2, H, new, D), k and v (2, G, past + new, D)."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads[0], new, head_dim, dtype=torch.float64, generator=g)
    k, v = torch.randn(2, 2, heads[1], past + new, head_dim, dtype=torch.float64, generator=g)
    return [x.to(device, dtype) for x in (q, k, v)]


def mask_of(past, new, window, device="cpu"):
    """The same rule as a mask."""
    places = torch.arange(past + new, device=device)
    return make_attention_mask(places[past:], places, window)


def lengths(window):
    """Numbers of earlier keys, as a cache returns them, and of new tokens."""
    pasts = range(13) if window is None else range(min(13, window))
    return [(past, new) for past in pasts for new in range(1, 14)]


@pytest.mark.parametrize("kernel", ["chosen", "formula"])
@pytest.mark.parametrize("window", WINDOWS)
def test_it_equals_the_formula(window, kernel, device, monkeypatch):
    if kernel == "formula":
        monkeypatch.setattr(blockwise, "choose_kernel", lambda *_: "formula")
    for past, new in lengths(window):
        q, k, v = draw_tensors(past, new, device=device)
        expected, _ = eager_attention(q, k, v, mask_of(past, new, window, device), 0.5, 0.0)
        found, probs = blockwise_attention(q, k, v, CausalWindow(window), 0.5, 0.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
        assert probs is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_in_comparison_with_a_mask(dtype, device):
    """By the criterion of tests/errors.py, for lengths of several tiles of the kernels.

    In 16 bits, a result is rounded twice: in its part, and after the parts are joined. Two errors of equal size add up
    to 1.42 of one. (Measured: 1.19 of the error of the fused kernel with a mask, 0.92 in float32.)"""
    errors = Errors()
    for seed in range(number_of_cases(150)):
        rng = random.Random(seed)
        window, new = rng.choice([None, 2, 7, 33, 100]), rng.randint(2, 150)
        past = rng.randint(0, 150 if window is None else window - 1)
        tensors = draw_tensors(past, new, seed, (4, 2), 64, dtype, device)
        mask = mask_of(past, new, window, device)
        exact, _ = eager_attention(*(x.double() for x in tensors), mask, 0.125, 0.0)
        with_mask, _ = sdpa_attention(*tensors, mask, 0.125, 0.0)
        found, _ = blockwise_attention(*tensors, CausalWindow(window), 0.125, 0.0)
        assert found.dtype == dtype
        errors.add(found.cpu(), with_mask.cpu(), exact.cpu())
    print(f"blockwise attention, {dtype}, {device}: {errors}")
    if dtype == torch.float32:
        assert errors.no_larger, errors
    else:
        assert errors.ratio <= math.sqrt(2), errors


# ------------------------------------------------------------------------------------------------------- in a model


def blockwise_model(case):
    """The model of a case in float64, with this attention."""
    model = case.truth()
    model.set_attn_implementation("blockwise")
    return model


@given(rngs)
def test_a_model_equals_the_eager_one(rng):
    """Whole texts, padding, chunks of any length through rings."""
    case = draw_case(rng)
    model, eager, real = blockwise_model(case), case.truth(), case.padding_mask
    with torch.no_grad():
        expected = eager(case.ids, attention_mask=case.mask).logits[real]
        whole = model(case.ids, attention_mask=case.mask, use_cache=False).logits[real]
    bound = 1e-12 * max(expected.abs().max().item(), 1)
    torch.testing.assert_close(whole, expected, rtol=0, atol=bound)
    torch.testing.assert_close(run_chunked(model, case)[real], expected, rtol=0, atol=bound)


@given(rngs)
@at_most(30)
def test_gradients_equal_those_of_the_eager_model(rng):
    """Of every parameter; also of packed texts."""
    case = draw_case(rng)
    arguments = {"attention_mask": case.mask}
    S = case.ids.shape[1]
    if case.mask is None and rng.random() < 0.5:
        arguments["position_ids"] = torch.arange(S)[None] % max(S // 2, 1)
    labels = case.labels(rng)
    gradients = []
    for model in (blockwise_model(case), case.truth()):
        loss = model(case.ids, labels=labels, use_cache=False, **arguments).loss
        if loss.isnan():  # no token has a successor
            return
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(expected.abs().max().item(), 1))


def test_what_it_lacks_is_refused():
    case = draw_case(random.Random(0), attn_implementation="sdpa", dtype=torch.float32)
    model = type(case.ours)(replace(case.ours.config, attn_implementation="blockwise", attention_dropout=0.5))
    with pytest.raises(ValueError, match=r"attention_dropout=0.5 with attn_implementation='blockwise'.*use 'sdpa'"):
        model.train()(case.ids)
    model.eval()(case.ids)
    with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager'"):
        model(case.ids, output_attentions=True)


# ------------------------------------------------------------------------------------------------- kernels and cost


@pytest.mark.parametrize(
    ("choice", "dtype", "head_dim", "kernel"),
    [
        ("CUDNN_ATTENTION", torch.bfloat16, 128, "cudnn_attention"),
        ("FLASH_ATTENTION", torch.bfloat16, 64, "flash_attention"),
        ("EFFICIENT_ATTENTION", torch.float32, 64, "efficient_attention"),
        ("MATH", torch.float64, 64, "formula"),
        ("OVERRIDEABLE", torch.bfloat16, 64, "formula"),
        ("FLASH_ATTENTION", torch.bfloat16, 12, "formula"),
    ],
)
def test_the_kernel_on_a_gpu(choice, dtype, head_dim, kernel):
    """That which PyTorch chooses. (The tensors have a device and a shape, but no numbers.)"""
    number = torch._C._SDPBackend.__members__[choice].value
    with FakeTensorMode():
        q = torch.empty(1, 4, 70, head_dim, device="cuda", dtype=dtype)
        with patch.object(torch, "_fused_sdp_choice", lambda *_: number):
            assert choose_kernel(q, q, q, True) == kernel


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("kernel", ["formula", *blockwise.OPTIONS])
def test_every_kernel_takes_its_arguments(kernel, window, monkeypatch):
    """And returns sums of the right shape, with those of PyTorch's functions that compute shapes only."""
    monkeypatch.setattr(blockwise, "choose_kernel", lambda *_: kernel)
    dtype = torch.float32 if kernel == "efficient_attention" else torch.bfloat16
    q, k, v = draw_tensors(30, 50, head_dim=64, dtype=dtype, device="meta")
    out, total = blockwise.attend(q[:, :2], k, v, False, 0.5)
    assert out.shape == (2, 2, 50, 64) and total.shape == (2, 2, 50)
    found, _ = blockwise_attention(q, k, v, CausalWindow(window), 0.5, 0.0)
    assert found.shape == q.shape and found.dtype == dtype


def test_the_kernel_elsewhere():
    q, k, v = draw_tensors(0, 3)
    assert choose_kernel(q, k, v, True) == "flash_attention_for_cpu"
    assert choose_kernel(*(x.to("meta") for x in (q, k, v)), True) == "formula"
    assert choose_kernel(q, k.requires_grad_(), v, True) == "formula"
    with torch.no_grad():
        assert choose_kernel(q, k, v, True) == "flash_attention_for_cpu"


@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize("past", [0, 7, 99])
@pytest.mark.parametrize("new", [1, 40, 400])
def test_a_query_costs_no_more_than_its_window(window, past, new):
    """The number of scores that the kernels compute, and the memory for keys that are repeated."""
    if window is not None:
        past = min(past, window - 1)
    scores, copied = [], []
    right, repeat = blockwise.attend, blockwise.repeat_heads

    def count(q, k, v, causal, scaling):
        rows, keys = q.shape[1] * q.shape[2], k.shape[2]
        scores.append(rows * (keys + 1) / 2 if causal else rows * keys)
        return right(q, k, v, causal, scaling)

    def count_copies(x, heads):
        copied.append(x.shape[2])
        return repeat(x, heads)

    q, k, v = draw_tensors(past, new)
    with patch.object(blockwise, "attend", count), patch.object(blockwise, "repeat_heads", count_copies):
        blockwise_attention(q, k, v, CausalWindow(window), 0.5, 0.0)
    visible = mask_of(past, new, window).sum().item()
    assert sum(scores) == 6 * visible  # exactly the visible pairs, for 6 heads
    assert sum(copied) <= 4 * new
