"""Decoding through the cache, padding, and true float64."""

import logging
import math
import random
import re
import statistics
import warnings
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, strategies as st

import ministral
from blockwise import CausalWindow
from ministral import (
    KVCache,
    LayerCache,
    MinistralConfig,
    MinistralForCausalLM,
    RMSNorm,
    RotaryEmbedding,
    SlidingLayerCache,
    make_attention_mask,
    same_text,
)
from ministral3 import YarnRotaryEmbedding
from reference.mutants import Namespace, replace
from tests.cases import DTYPES, cache_name, draw_case, draw_chunks, run_chunked
from tests.conftest import CUDA
from tests.errors import Errors, number_of_cases
from tests.test_parity import assert_same

rngs = st.randoms(use_true_random=False)


def float64_case(rng, device="cpu", **fixed):
    """A case whose model is in float64 (Transformers' side is not used)."""
    case = draw_case(rng, device, torch.float32, **fixed)
    case.ours = case.truth()
    case.ours.config.attn_implementation = rng.choice(["eager", "sdpa"])
    return case


# ---------------------------------------------------------------------------------------------------- float64


@torch.no_grad()
@given(rngs)
def test_any_chunks_equal_one_shot_in_float64(device, rng):
    """With windows, rings, padding and chunks longer than the window, results are equal to 1e-12."""
    case = float64_case(rng, device)
    whole = case.ours(case.ids, case.mask, use_cache=False).logits
    chunked = run_chunked(case.ours, case)
    torch.testing.assert_close(chunked[case.padding_mask], whole[case.padding_mask], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@given(rngs)
def test_padding_and_other_rows_change_nothing_in_float64(device, rng):
    """A text alone equals the same text padded on either side in a batch, for any other rows."""
    case = float64_case(rng, device)
    for row in range(len(case.ids)):
        is_text = case.padding_mask[row]
        positions = (is_text.cumsum(0) - 1).clamp(min=0)[None]
        alone = case.ours(case.ids[row][is_text][None]).logits[0]
        batch = case.ours(case.ids, case.mask, position_ids=positions).logits[row][is_text]
        torch.testing.assert_close(batch, alone, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_transformers_is_not_float64():
    """Transformers keeps norms, rotary tables and softmax in float32, so its float64 run is off by about 1e-5. Ours
    is not: the two differ by what float32 costs. Padding that sees nothing makes it NaN: its lowest number of float64
    is not a float32. (This documents Transformers' behaviour.)"""
    distances = []
    for seed in range(20):
        case = draw_case(random.Random(seed), dtype=torch.float32, attn_implementation="eager")
        theirs = case.theirs.double()(case.ids, attention_mask=case.mask).logits
        ours = case.truth()(case.ids, case.mask).logits
        assert ours.isfinite().all()
        if theirs[case.padding_mask].isnan().any():
            assert not case.padding_mask.all()
        else:
            distances.append((ours - theirs)[case.padding_mask].abs().max().item())
    assert len(distances) >= 10 and 1e-8 < statistics.median(distances) < 1e-4, distances


# ------------------------------------------------------------------------------ bit-identical until a wrap


@torch.no_grad()
@given(rngs)
def test_eager_decoding_is_bit_identical_until_a_window_wraps(device, rng):
    """Chunk by chunk through both caches. (Window 1 is left out: Transformers' cache is wrong there, see below.)"""
    case = draw_case(rng, device, attn_implementation="eager", sliding_window=rng.choice([2, 5, 64]))
    ours, theirs = run_chunked(case.ours, case), run_chunked(case.theirs, case)
    assert case.ours.config.sliding_window is not None
    same = slice(0, case.ours.config.sliding_window)
    assert_same(ours[:, same], theirs[:, same], case.padding_mask[:, same])


@torch.no_grad()
@given(rngs)
def test_a_window_of_one_is_right(rng):
    """Each token sees only itself. Transformers' cached decoding is wrong here: its cache keeps all keys, because of a
    slice from -0. So the test compares with its forward pass without a cache, which is right."""
    case = draw_case(rng, family="ministral", sliding_window=1, layer_types=None, dtype=torch.float32)
    exact = run_chunked(case.truth(), case)[case.padding_mask]
    whole = case.theirs(case.ids, attention_mask=case.mask, use_cache=False).logits[case.padding_mask]
    # (Another window would change the logits by their own size.)
    assert (whole - exact).norm() < 1e-2 * exact.norm()


@torch.no_grad()
def test_deprecations_of_transformers_are_errors():
    """Both those that it warns about and those that it only logs. So no test uses an old name."""
    with pytest.raises(FutureWarning, match="x is deprecated"):
        warnings.warn("x is deprecated", FutureWarning, stacklevel=1)
    with pytest.raises(FutureWarning, match="x is deprecated"):
        logging.getLogger("transformers.models").warning("x is deprecated")
    case = draw_case(random.Random(0), dtype=torch.float32)
    result = case.theirs(case.ids, use_cache=True)
    assert getattr(result, cache_name(case.theirs)).get_seq_length() == case.ids.shape[1]
    if cache_name(case.theirs) == "cache":
        with pytest.raises(FutureWarning, match="past_key_values"):
            case.theirs(case.ids, past_key_values=None)
        with pytest.raises(FutureWarning, match="past_key_values"):
            print(result.past_key_values)


# ------------------------------------------------------------------ elsewhere: an error no larger than Transformers'


def draw_errors(device, dtype, attn_implementation, cases, chunked=True, planted=nullcontext):
    """Errors of the logits of many random models, ours and Transformers', both decoded through their caches.

    Each side gets its own random chunks, so that their sums differ. Texts shorter than 10 tokens are left out, because
    few numbers give a heavy tail. A window of 1 is left out, because Transformers' cache is wrong there. Float16 cases
    in which Transformers returns NaN (its mask overflows on padding) are left out, too; ours must be finite always.

    Args:
        chunked: whether the texts are cut into chunks at all.
        planted: a context in which our side runs.
    """
    errors, seed = Errors(), 0
    while len(errors.mean) < cases:
        seed += 1
        rng = random.Random(seed)
        case = draw_case(rng, device, dtype, attn_implementation=attn_implementation)
        if case.ours.config.sliding_window == 1 or case.padding_mask.sum() < 10:
            continue
        length = case.ids.shape[1]
        exact = case.truth()(case.ids, case.mask).logits[case.padding_mask]
        case.chunks = draw_chunks(rng, length) if chunked else [length]
        with planted():
            ours = run_chunked(case.ours, case)[case.padding_mask]
        assert ours.isfinite().all()
        case.chunks = draw_chunks(rng, length) if chunked else [length]
        theirs = run_chunked(case.theirs, case)[case.padding_mask]
        if theirs.isfinite().all():
            errors.add(ours, theirs, exact)
    return errors


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("attn_implementation", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
def test_cached_decoding_is_no_further_from_float64(device, dtype, attn_implementation, capsys):
    """The criterion is in tests/errors.py. In 16-bit types most logits are equal to the bit, whatever the chunks."""
    cases = number_of_cases(280)
    errors = draw_errors(device, dtype, attn_implementation, cases)
    with capsys.disabled():
        print(f"\n{device} {attn_implementation} {dtype}: {errors}")
    assert dtype != torch.float32 or errors.differ >= cases * 200 // 280
    assert errors.no_larger, errors


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_whole_sequences_on_cuda_are_no_further_from_float64(device, dtype, capsys):
    """The fused kernels of CUDA; the eager path, and both paths on the CPU, are bit-identical (test_parity.py)."""
    errors = draw_errors(device, dtype, "sdpa", number_of_cases(280), chunked=False)
    with capsys.disabled():
        print(f"\n{device} sdpa {dtype}, whole sequences: {errors}")
    assert errors.no_larger, errors


def softmax_in_bfloat16(stack):
    replace(stack, ministral, "F", lambda right: Namespace(
        right, softmax=lambda x, dim, dtype: right.softmax(x.clamp(min=-1e38).bfloat16(), dim)))  # fmt: skip


def probabilities_in_16_bits(stack):
    replace(stack, ministral, "F", lambda right: Namespace(
        right, softmax=lambda x, dim, dtype: right.softmax(x, dim, dtype=dtype).bfloat16()))  # fmt: skip


def rotary_tables_in_16_bits(stack):
    for cls in (RotaryEmbedding, YarnRotaryEmbedding):
        replace(stack, cls, "forward", lambda right: lambda self, x, position_ids: tuple(
            table.bfloat16().to(x.dtype) for table in right(self, x, position_ids)))  # fmt: skip


def norms_in_16_bits(stack):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    replace(stack, RMSNorm, "forward", lambda _: forward)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "planted, dtype, attn_implementation",
    [
        (softmax_in_bfloat16, torch.float32, "eager"),
        (probabilities_in_16_bits, torch.float32, "eager"),
        (probabilities_in_16_bits, torch.float16, "eager"),
        (rotary_tables_in_16_bits, torch.float32, "eager"),
        (rotary_tables_in_16_bits, torch.float32, "sdpa"),
        (rotary_tables_in_16_bits, torch.float16, "sdpa"),
        (norms_in_16_bits, torch.bfloat16, "sdpa"),
    ],
)
def test_a_planted_loss_of_precision_is_detected(planted, dtype, attn_implementation):
    """The criterion finds a planted error. Fewer cases are enough where the loss of precision is large."""

    @contextmanager
    def applied():
        with ExitStack() as stack:
            planted(stack)
            yield

    cases = number_of_cases(280 if dtype == torch.bfloat16 else 70)
    errors = draw_errors("cpu", dtype, attn_implementation, cases, planted=applied)
    print(f"{planted.__name__}, {attn_implementation} {dtype}: {errors}")
    assert not errors.no_larger


# -------------------------------------------------------------------------------------------- cache, in itself


@torch.no_grad()
@given(rngs)
def test_unused_slots_are_never_read(rng):
    case = draw_case(rng)
    expected = run_chunked(case.ours, case)
    cache, start, logits = KVCache(case.ours.config, expected=128), 0, []  # with room to spare at every step
    for length in case.chunks:
        for layer in cache.layers:
            if layer.keys is not None:
                layer.keys[:, :, layer.length :], layer.values[:, :, layer.length :] = math.nan, math.nan
        mask = None if case.mask is None else case.mask[:, : start + length]
        logits.append(case.ours(case.ids[:, start : start + length], mask, past_key_values=cache).logits)
        start += length
    assert_same(torch.cat(logits, dim=1), expected)


@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_a_ring_returns_exactly_the_window(window, chunks):
    """The keys are their own positions. `update` returns the positions of `key_positions`. They include every key that
    a query of the chunk may see, and they are at most window + chunk - 1."""
    layer, start = SlidingLayerCache(window), 0
    for new in chunks:
        positions = torch.arange(start, start + new)
        announced = layer.key_positions(new)
        keys, values = layer.update(positions.view(1, 1, -1, 1).double(), -positions.view(1, 1, -1, 1).double())
        returned = keys[0, 0, :, 0].long()
        assert torch.equal(returned, announced) and torch.equal(-values[0, 0, :, 0].long(), announced)
        needed = set(range(max(0, start - window + 1), start + new))
        assert needed <= set(returned.tolist()) and len(returned) <= window + new - 1
        assert layer.keys.shape[2] <= window
        start += new


def test_the_docstring_of_the_cache_is_true():
    """The worked example, step by step: what is returned, and the slots afterwards."""
    layer = SlidingLayerCache(4)
    rows = [line.split() for line in SlidingLayerCache.__doc__.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 5

    def feed(*positions):
        keys, _ = layer.update(*[torch.tensor(positions).view(1, 1, -1, 1).double()] * 2)
        return [int(k) for k in keys[0, 0, :, 0]], [int(k) for k in layer.keys[0, 0, :, 0]]

    assert feed(0, 1, 2, 3, 4, 5) == ([0, 1, 2, 3, 4, 5], [4, 5, 2, 3])
    assert feed(6) == ([4, 5, 6, 3], [4, 5, 6, 3])
    assert feed(7) == ([4, 5, 6, 7], [4, 5, 6, 7])
    assert feed(8) == ([8, 5, 6, 7], [8, 5, 6, 7])
    assert feed(9, 10, 11) == ([6, 7, 8, 9, 10, 11], [8, 9, 10, 11])


@given(rngs)
def test_the_memory_of_sliding_layers_does_not_grow(rng):
    config = MinistralConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
                             intermediate_size=8, vocab_size=9, sliding_window=rng.randint(1, 9))
    model, cache, sizes = MinistralForCausalLM(config), KVCache(config), []
    for length in draw_chunks(rng, 200):
        with torch.no_grad():
            model(torch.ones(1, length, dtype=torch.long), past_key_values=cache)
        sizes.append(cache.nbytes())
    assert max(sizes) <= 2 * 2 * config.sliding_window * config.head_dim * 4  # k and v, two layers, float32


# ------------------------------------------------------------------------------------------------------- masks


@given(rngs)
def test_masks_equal_their_definition(rng):
    queries, keys = [sorted(rng.sample(range(20), rng.randint(1, 9))) for _ in range(2)]
    rng.shuffle(keys)  # a ring hands keys out in any order
    window = rng.choice([None, 1, 2, 3, 7, 30])
    allowed = torch.tensor([[rng.random() < 0.7 for _ in keys] for _ in range(2)])
    mask = make_attention_mask(torch.tensor(queries), torch.tensor(keys), window, allowed[:, None])
    for b in range(2):
        for i, q in enumerate(queries):
            for j, k in enumerate(keys):
                visible = k <= q and (window is None or k in range(q - window + 1, q + 1)) and bool(allowed[b, j])
                assert mask[b, 0, i, j] == visible


@pytest.mark.parametrize(
    "kind, queries, keys, needed",
    [
        ("full_attention", 5, 5, False),
        ("full_attention", 1, 5, False),
        ("full_attention", 2, 5, True),
        ("sliding_attention", 3, 3, False),
        ("sliding_attention", 4, 4, True),  # hides nothing, but Transformers makes it
        ("sliding_attention", 1, 4, False),
        ("sliding_attention", 2, 5, True),
    ],
)
def test_where_a_mask_is_needed(kind, queries, keys, needed):
    """Not for a kernel that hides later keys by itself, nor for a single query; always for eager attention."""
    positions = torch.arange(keys)
    padding = torch.ones(1, keys, dtype=torch.bool)
    for attention in ("sdpa", "eager", "blockwise"):
        config = MinistralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
                                 num_key_value_heads=1, vocab_size=9, sliding_window=4, attn_implementation=attention,
                                 layer_types=["full_attention", "sliding_attention"])  # fmt: skip
        model = MinistralForCausalLM(config).model
        given = (kind, positions[-queries:], positions)
        mask = model._mask(*given, None, None)
        expected = {"blockwise": CausalWindow, "eager": torch.Tensor, "sdpa": torch.Tensor if needed else type(None)}
        assert type(mask) is expected[attention]
        if attention == "blockwise":
            assert mask == CausalWindow(4 if kind == "sliding_attention" else None)
        assert torch.is_tensor(model._mask(*given, padding, None))
    same = torch.ones(1, keys, keys, dtype=torch.bool)
    assert torch.is_tensor(model._mask(kind, positions, positions, None, same))


@torch.no_grad()
def test_outputs_of_layers_are_given_if_wanted():
    """Attentions by position, although a ring with W = 3 returns its keys in slot order."""
    config = MinistralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
                             num_key_value_heads=1, vocab_size=9, sliding_window=3,
                             attn_implementation="eager")  # fmt: skip
    model = MinistralForCausalLM(config)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    whole = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(whole.attentions) == 2 and len(whole.hidden_states) == 3
    cache = model(ids[:, :4]).past_key_values
    step = model(ids[:, 4:], past_key_values=cache)
    assert step.attentions is None and step.hidden_states is None
    cache = model(ids[:, :4]).past_key_values
    step = model(ids[:, 4:], past_key_values=cache, output_attentions=True)
    torch.testing.assert_close(step.attentions[0], whole.attentions[0][:, :, 4:, 2:])


@torch.no_grad()
def test_packed_texts_are_apart_only_without_mask_and_cache():
    config = MinistralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                             num_key_value_heads=1, vocab_size=9, sliding_window=None)  # fmt: skip
    model = MinistralForCausalLM(config)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 2, 3, 4, 5, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    ones = torch.ones_like(ids)
    for mask, cache, apart in ((None, False, True), (None, True, False), (ones, False, False)):
        a, b = model(ids, mask, positions, use_cache=cache).logits[:, 3:]
        assert a.equal(b) == apart


def test_one_text_needs_no_mask(monkeypatch):
    """While compiling, which allows no branch on numbers, it gets a mask that hides nothing."""
    positions = torch.stack((torch.arange(4), torch.arange(7, 11)))
    assert same_text(positions) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert same_text(positions).all()


def test_the_grids_in_the_docstring_are_true():
    """The three drawings: full, sliding with W = 3, and a chunk of two queries behind a ring."""
    drawn = re.findall(r"[#.](?: [#.])+", make_attention_mask.__doc__)
    chunk = [row for row in drawn if len(row) == 7]
    full, sliding = [[row for row in drawn if len(row) == 13][side::2] for side in (0, 1)]
    everything, last = torch.arange(7), torch.arange(5, 7)
    for rows, mask in (
        (full, make_attention_mask(everything, everything)),
        (sliding, make_attention_mask(everything, everything, 3)),
        (chunk, make_attention_mask(last, torch.arange(3, 7), 3)),
    ):
        assert [" ".join(".#"[visible] for visible in row) for row in mask[0, 0].tolist()] == rows


@torch.no_grad()
@given(rngs)
def test_a_row_of_nothing_but_padding_is_not_nan(device, rng):
    case = draw_case(rng, device)
    mask = torch.ones_like(case.ids)
    mask[rng.randrange(len(mask))] = 0
    case.mask = mask
    out = case.ours(case.ids, mask, output_hidden_states=True)
    assert not any(x.isnan().any() for x in (out.logits, *out.hidden_states))
    assert not run_chunked(case.ours, case).isnan().any()


def test_eager_attention_in_float16_and_with_dropout():
    """Scores of a hidden row that overflow leave it finite; dropout removes probabilities."""
    q = torch.full((1, 1, 1, 1), 200.0, dtype=torch.float16)
    k = torch.full((1, 1, 2, 1), -200.0, dtype=torch.float16)
    out, probs = ministral.eager_attention(q, k, k, torch.zeros(1, 1, 1, 2, dtype=torch.bool), 1.0, 0.0)
    assert (probs == 0.5).all() and (out == -200).all()
    q = torch.ones(1, 1, 1, 4)
    k = torch.ones(1, 1, 50, 4)
    _, probs = ministral.eager_attention(q, k, k, None, 0.5, 0.5)
    assert 0 < (probs == 0).sum() < 50


def test_a_single_query_with_gradients_sees_all_keys():
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    k, v = torch.randn(2, 1, 2, 3, 8)
    fused, _ = ministral.sdpa_attention(q, k, v, None, 0.3, 0.0)
    plain, _ = ministral.eager_attention(q, k, v, None, 0.3, 0.0)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(fused, ministral.sdpa_attention(q.detach(), k, v, None, 0.3, 0.0)[0])


@torch.no_grad()
@given(rngs)
def test_attentions_are_in_order_of_position(rng):
    """Also when the keys are in a ring: the probabilities of each query end with its own key."""
    case = draw_case(rng, attn_implementation="eager", dtype=torch.float32)
    model = case.truth()
    case.mask, cache, start = None, KVCache(model.config), 0
    whole = model(case.ids, output_attentions=True, use_cache=False).attentions
    for length in case.chunks:
        end = start + length
        out = model(case.ids[:, start:end], past_key_values=cache, output_attentions=True)
        for part, full in zip(out.attentions, whole):
            torch.testing.assert_close(part, full[:, :, start:end, end - part.shape[-1] : end], rtol=0, atol=1e-12)
        start = end


@pytest.mark.parametrize("window, capacities", [(None, [2, 2, 4, 4, 8]), (5, [2, 2, 4, 4, 5])])
def test_a_cache_grows_by_doubling_and_keeps_its_keys(window, capacities):
    """From the expected capacity up to the window. The first update returns contiguous tensors, for their kernels."""
    cache = LayerCache(2) if window is None else SlidingLayerCache(window, 2)
    k = torch.randn(1, 5, 2, 3).transpose(1, 2)  # (B, G, S, D), all sizes differ
    for end, capacity in enumerate(capacities, start=1):
        keys, values = cache.update(k[:, :, end - 1 : end], -k[:, :, end - 1 : end])
        assert keys.equal(k[:, :, :end]) and values.equal(-k[:, :, :end])
        assert cache.capacity == capacity
    assert all(part.is_contiguous() for part in LayerCache().update(k, -k))


def test_a_cache_belongs_to_a_device_and_a_dtype():
    """Keys and values are checked on their own; positions are on the device that is asked for."""
    k = torch.zeros(1, 1, 3, 4)
    for cache in (LayerCache(), SlidingLayerCache(2)):
        assert {cache.key_positions(new, torch.device("meta")).device.type for new in (1, 3)} == {"meta"}
        cache.update(k, k)
        assert cache.key_positions(1, torch.device("meta")).device.type == "meta"
        for other in ((k.double(), k), (k, k.double())):
            with pytest.raises(ValueError, match=r"torch\.float64"):
                cache.update(*other)


def test_an_empty_cache_has_no_bytes():
    cache = KVCache(MinistralConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]), 3)
    assert cache.nbytes() == 0
    for layer in cache.layers:
        layer.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    assert cache.nbytes() == 2 * 2 * 3 * 4 * 4  # layers, keys and values, slots, D, bytes of a float32
