"""The sampling loop: greedy equals Transformers, rows equal themselves alone, filters equal Transformers' filters."""

import math
import random

import pytest
import torch
import transformers
from hypothesis import given, strategies as st

from generate import Sampling, filter_logits, generate, penalize_repetition, sample
from tests.cases import VOCAB, draw_case

rngs = st.randoms(use_true_random=False)


def draw_prompts(rng, dtype=torch.float32, **fixed):
    """A case whose padding is on the left, as generation wants it."""
    case = draw_case(rng, dtype=dtype, **fixed)
    if case.mask is not None:
        case.mask = case.mask.sort(dim=1).values
    return case


@torch.no_grad()
def naive(model, ids, new, ends=()):
    """Greedy continuation of one text (T,) without cache, masks or chunks: the whole text again for every token."""
    tokens = ids.tolist()
    while len(tokens) < len(ids) + new:
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens


@torch.no_grad()
def assert_same_tokens(case, ours, theirs, penalty=1.0):
    """Equal tokens in every row. A row may differ from the first tie on: where float64 gives both tokens the same logit
    to within 1e-4 of the largest, ten times the error of float32 (tests/test_cache.py prints it)."""
    length = min(ours.shape[1], theirs.shape[1])
    assert ours.shape == theirs.shape or not torch.equal(ours[:, :length], theirs[:, :length])
    for row, real in enumerate(case.real):
        different = (ours[row, :length] != theirs[row, :length]).nonzero()
        if len(different) == 0:
            continue
        place = int(different[0])
        text = torch.cat((case.ids[row][real], ours[row, len(real) : place]))[None]
        logits = penalize_repetition(case.truth()(text).logits[0, -1], text[0], penalty)
        gap = logits[ours[row, place]] - logits[theirs[row, place]]
        assert gap.abs() <= 1e-4 * logits.abs().max(), f"row {row}, token {place}: {gap:.3g} apart"


@given(rngs)
def test_greedy_equals_transformers_token_for_token(device, rng):
    """Also batched with padding, past the window, and past an end-of-sequence token that some row meets."""
    case = draw_prompts(rng, device=device, use_cache=True)
    if case.ours.config.sliding_window == 1:
        return  # Transformers' cache is wrong there
    new, ends = rng.randint(1, 30), [rng.randrange(1, VOCAB) for _ in range(rng.choice([1, 1, 3]))]
    # (Transformers penalises padding tokens, too, which are no part of the text here.)
    penalty = rng.choice([1.0, 1.5]) if case.mask is None else 1.0
    mask = torch.ones_like(case.ids) if case.mask is None else case.mask
    theirs = case.theirs.generate(
        case.ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0,
        repetition_penalty=penalty,
    )  # fmt: skip
    case.ours.config.pad_token_id = 0
    ours = generate(case.ours, case.ids, mask, max_new_tokens=new, eos_token_id=ends, repetition_penalty=penalty)
    assert_same_tokens(case, ours, theirs, penalty)


@given(rngs)
def test_a_row_gets_in_a_batch_what_it_gets_alone(rng):
    """Greedy and sampled, cut into any chunks, equal to the loop without a cache where that is defined."""
    case = draw_prompts(rng)
    model = case.truth()
    model.config.attn_implementation = rng.choice(["eager", "sdpa"])
    ends, new = [rng.randrange(1, VOCAB)], rng.randint(1, 25)
    settings = rng.choice(
        [
            dict(temperature=0.0),
            dict(temperature=0.0, repetition_penalty=1.7),
            dict(temperature=0.9, top_k=rng.randint(1, 20), repetition_penalty=rng.choice([1.0, 1.3])),
            dict(temperature=1.4, top_p=rng.uniform(0.1, 1), min_p=rng.choice([None, 0.05])),
        ]
    )
    settings |= dict(max_new_tokens=new, eos_token_id=ends, seed=rng.randrange(99))
    batch = generate(model, case.ids, case.mask, prefill_chunk_size=rng.randint(1, 50), **settings)
    for row, real in enumerate(case.real):
        prompt = case.ids[row][real]
        alone = generate(model, prompt[None], **settings)[0].tolist()
        together = batch[row].tolist()[case.ids.shape[1] - len(prompt) :]
        assert together[: len(alone)] == alone
        filler = ends[0] if model.config.pad_token_id is None else model.config.pad_token_id
        assert set(together[len(alone) :]) <= {filler}
        if settings["temperature"] == 0.0 and "repetition_penalty" not in settings:
            assert alone == naive(model, prompt, new, ends)


def test_every_token_is_reported_once_and_a_row_can_be_ended():
    case = draw_prompts(random.Random(3))
    told = {row: [] for row in range(len(case.ids))}

    def on_token(row, token):
        told[row].append(token)
        return len(told[row]) == 3 + row

    tokens = generate(case.ours, case.ids, case.mask, max_new_tokens=9, eos_token_id=(), on_token=on_token)
    for row, new in told.items():
        assert len(new) == 3 + row
        assert tokens[row, case.ids.shape[1] :].tolist()[: len(new)] == new


def test_a_text_ends_at_the_last_position():
    case = draw_prompts(random.Random(0))
    limit = case.ids.shape[1] + 4
    case.ours.config.max_position_embeddings = limit
    prompt = case.ids[:1]
    for new in (4, 5, 99, 10**12):  # a cache for 10**12 tokens would not fit
        assert generate(case.ours, prompt, max_new_tokens=new, eos_token_id=()).shape == (1, limit)
    one_left = torch.ones(1, limit - 1, dtype=torch.long)
    assert generate(case.ours, one_left, max_new_tokens=9, eos_token_id=()).shape == (1, limit)
    for length in (limit, limit + 1):
        with pytest.raises(ValueError, match=f"{length} tokens; allowed: below max_position_embeddings={limit}"):
            generate(case.ours, torch.ones(1, length, dtype=torch.long))


def test_seeds_for_each_row():
    case = draw_case(random.Random(5), dtype=torch.float32)
    ids = case.ids[:1].expand(3, -1)
    a, b, c = generate(case.ours, ids, temperature=2.0, max_new_tokens=9, eos_token_id=(), seed=[1, 1, 2]).tolist()
    assert a == b != c


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-1), "temperature=-1"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(top_p=2), "top_p=2 is impossible; allowed: a number above 0, at most 1"),
        (dict(top_p=0), "top_p=0"),
        (dict(top_k=0), "top_k=0"),
        (dict(min_p=1.5), "min_p=1.5"),
        (dict(repetition_penalty=0), "repetition_penalty=0"),
        (dict(repetition_penalty=1e-300), "from 0.01 to 100"),
        (dict(eos_token_id=50), r"eos_token_id=\[50\].*below 50"),
        (dict(seed=2**64), "seed=18446744073709551616"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(prefill_chunk_size=0), "prefill_chunk_size=0"),
        (dict(seed=[1, 2, 3]), "one for each of 2 rows"),
        (dict(attention_mask=torch.tensor([[1, 1], [1, 0]])), "padding on the left"),
        (dict(attention_mask=torch.tensor([[0, 0], [1, 1]])), "padding on the left"),
        (dict(input_ids=torch.ones(1, 0, dtype=torch.long)), "at least one token"),
        (dict(input_ids=[[1, 2]]), "input_ids must be a tensor"),
        (dict(input_ids=torch.ones(2, 2)), "whole numbers .*found .* of torch.float32"),
        (dict(attention_mask=[[1, 1], [1, 1]]), "attention_mask must be a tensor"),
        (dict(attention_mask=torch.zeros(2, 2)), "numbers from 0 to 0 is not supported"),
        (dict(attention_mask=torch.ones(2, 1, 2, 2)), "attention_mask of 4 dimensions"),
        (dict(max_new_tokens="9"), "max_new_tokens='9' is impossible"),
        (dict(max_new_tokens=1.5), "max_new_tokens=1.5 is impossible"),
        (dict(prefill_chunk_size=1.5), "prefill_chunk_size=1.5 is impossible"),
        (dict(temperature="0.7"), "temperature must be a number; found str '0.7'"),
        (dict(top_p="1"), "top_p must be a number; found str"),
        (dict(eos_token_id="</s>"), "eos_token_id=.* is impossible; allowed: ids below 50"),
        (dict(eos_token_id=2.5), "eos_token_id must be an id or a list of ids; found float"),
        (dict(seed="7"), "seed must be one number or one for each of 2 rows"),
        (dict(seed=1.5), "seed=1.5 is impossible"),
        (dict(past_key_values=transformers.DynamicCache()), "past_key_values must be a KVCache .*found DynamicCache"),
        (dict(model="models/x"), r"model must be a loaded model; found a name: give load_model\('models/x'\)"),
        (dict(model=torch.nn.Linear(2, 2)), "model must be one that load_model returns .*found Linear"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    case = draw_case(random.Random(1))
    with pytest.raises(ValueError, match=message):
        generate(**dict(model=case.ours, input_ids=torch.ones(2, 2, dtype=torch.long)) | settings)


def test_models_of_another_kind_are_refused():
    case = draw_case(random.Random(1))
    for model in (case.theirs, case.ours.model, torch.nn.DataParallel(case.ours)):
        with pytest.raises(ValueError, match=f"found {type(model).__name__}"):
            generate(model, case.ids)


# ---------------------------------------------------------------------------------------------------- sampling


@given(rngs)
def test_filters_equal_transformers_processors(rng):
    # On a grid: subtracting the maximum makes a tie of numbers 1e-33 apart, and which one of a tie stays is arbitrary.
    grid = rng.choice([0, 3, 3])  # whole numbers have ties, too
    logits = torch.tensor([[round(rng.uniform(-8, 8), grid) for _ in range(30)] for _ in range(2)])
    settings = Sampling(
        temperature=rng.uniform(0.2, 2),
        top_k=rng.choice([None, rng.randint(1, 40)]),
        # (Not on the edge between tokens of equal probability, where rounding decides.)
        top_p=rng.choice([None, 1.0, rng.uniform(0.05, 0.99) + 0.00314159]),
        min_p=rng.choice([None, 0.0, 1.0, rng.uniform(0, 0.99) + 0.00314159]),
    )
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        warpers.append(transformers.TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        warpers.append(transformers.MinPLogitsWarper(settings.min_p))
    expected = warpers(None, logits.double()).softmax(-1)
    torch.testing.assert_close(filter_logits(logits.double(), settings).softmax(-1), expected)


@given(rngs)
def test_repetition_penalty_equals_transformers(rng):
    logits = torch.tensor([rng.uniform(-8, 8) for _ in range(30)])
    ids = torch.tensor([rng.randrange(30) for _ in range(rng.randint(1, 20))])
    penalty = rng.uniform(0.5, 2)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None])[0]
    assert torch.equal(penalize_repetition(logits, ids, penalty), expected)


def test_sampling_draws_from_the_distribution():
    """Frequencies of 20,000 draws against the probabilities: chi-squared, 9 degrees of freedom, p = 1e-6 is 46."""
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 3.0, 1.5, -2.0, 0.2, 2.5])
    g, n, settings = torch.Generator().manual_seed(1), 20_000, Sampling(temperature=1.3)
    counts = sample(logits.expand(n, 10), settings, g).bincount(minlength=10)
    expected = (logits / 1.3).softmax(-1) * n
    assert ((counts - expected) ** 2 / expected).sum() < 46


def test_sixteen_bit_logits_are_filtered_in_float32():
    """Probabilities of bfloat16 logits are not rounded to bfloat16: 0.9 of 1000 equal tokens is 900 of them."""
    logits, settings = torch.zeros(20_000, 1000, dtype=torch.bfloat16), Sampling(temperature=1.0, top_p=0.9)
    kept = sample(logits, settings, torch.Generator().manual_seed(0)).unique()
    assert 890 < len(kept) <= 901


def test_sampling_is_a_pure_function():
    logits, settings = torch.randn(3, 50), Sampling(temperature=0.7, top_p=0.9)
    draws = [sample(logits, settings, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)


@given(st.floats(1e-300, 1e-3), st.sampled_from([torch.float16, torch.float32]))
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature, dtype):
    logits = torch.tensor([1.0, 30.0, 29.0, -60000.0], dtype=dtype)
    assert sample(logits, Sampling(temperature=temperature, top_p=0.9, min_p=0.1)).item() == 1
