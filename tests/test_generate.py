"""The sampling loop: greedy text and filters equal Transformers', and a row of a batch equals the same text alone."""

import copy
import json
import math
import random
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, strategies as st

import generate as generation
from checkpoint import GenerationConfig
from generate import (
    Sampling,
    filter_logits,
    generate,
    generate_naive,
    penalize_repetition,
    resolve_sampling,
    sample,
)
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from model_types import BUNDLED
from tests.cases import VOCAB, draw_case
from tests.conftest import at_most, newer_transformers
from tokenizer import StopText, TextStream, Tokenizer

rngs = st.randoms(use_true_random=False)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_dir(BUNDLED)


def draw_prompts(rng, dtype=torch.float32, **fixed):
    """A case with padding on the left, as generation needs it."""
    case = draw_case(rng, dtype=dtype, **fixed)
    if case.mask is not None:
        case.mask = case.mask.sort(dim=1).values
    return case


def naive(model, ids, new, ends=()):
    """The continuation of one text (T,) by `generate_naive`, up to the first of `ends`."""
    tokens = generate_naive(model, ids[None], new)[0].tolist()
    for place in range(len(ids), len(tokens)):
        if tokens[place] in ends:
            return tokens[: place + 1]
    return tokens


@torch.no_grad()
def assert_same_tokens(models, exact, ids, padding_mask, tokens, penalty=1.0, **images):
    """Equal tokens in every row. From the first tie on, a row may differ: where the logits of the two tokens in float64
    are no further apart than ten times the largest error of the two models for this text.

    Args:
        models: our model and Transformers'.
        exact: ours in float64.
        ids, padding_mask: the prompt (B, T), True where it is not padding.
        tokens: the tokens (B, T + new) of both models.
    """
    ours, theirs = tokens
    length = min(ours.shape[1], theirs.shape[1])
    assert ours.shape == theirs.shape or not torch.equal(ours[:, :length], theirs[:, :length])
    for row, is_text in enumerate(padding_mask):
        different = (ours[row, :length] != theirs[row, :length]).nonzero()
        if len(different) == 0:
            continue
        place = int(different[0])
        text = torch.cat((ids[row][is_text], ours[row, len(is_text) : place]))
        right = exact(text[None], **{name: widened(value) for name, value in images.items()}).logits[0, -1]
        errors = [(model(text[None], **images).logits[0, -1] - right).abs().max() for model in models]
        logits = penalize_repetition(right, text, penalty)
        gap = (logits[ours[row, place]] - logits[theirs[row, place]]).abs()
        assert gap <= 10 * max(errors), f"row {row}, token {place}: logits {gap:.3g} apart, errors {errors}"


def widened(value):
    """Pixels in float64; anything else as it is."""
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


@given(rngs)
def test_greedy_equals_transformers_token_for_token(device, rng):
    """Also in batches with padding, beyond the window, and after an end-of-sequence token in one of the rows."""
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
    assert_same_tokens((case.ours, case.theirs), case.truth(), case.ids, case.padding_mask, (ours, theirs), penalty)


@given(rngs)
def test_the_loop_equals_the_loop_without_a_cache(rng):
    """Greedy, with any dtype, beyond the window, and with any chunks of the prompt."""
    case = draw_case(rng)
    new, text = rng.randint(1, 25), torch.ones_like(case.ids)
    settings = dict(max_new_tokens=new, eos_token_id=(), prefill_chunk_size=rng.randint(1, 50))
    tokens = generate(case.ours, case.ids, text, **settings, fast=False)
    expected = generate_naive(case.ours, case.ids, new)
    assert_same_tokens((case.ours, case.ours), case.truth(), case.ids, text.bool(), (tokens, expected))


def test_models_that_return_tuples_generate():
    case = draw_case(random.Random(5), dtype=torch.float32)
    expected = generate_naive(case.ours, case.ids, 2)
    case.ours.config.return_dict = False
    assert generate_naive(case.ours, case.ids, 2).equal(expected)


@at_most(100)
@given(rngs)
def test_a_row_of_a_batch_equals_the_same_text_alone(rng):
    """Greedy and sampled, with any chunks; equal to the loop without a cache where that is defined."""
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
    for row, is_text in enumerate(case.padding_mask):
        prompt = case.ids[row][is_text]
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


def padded_case(**fixed):
    """A case and two prompts (2, 5); the second has two tokens of padding."""
    case = draw_case(random.Random(5), **fixed)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    return case.ours, torch.tensor([[1, 2, 3, 4, 5], [9, 9, 6, 7, 8]]), mask


def test_each_row_fills_its_own_positions():
    model, ids, mask = padded_case()
    model.config.max_position_embeddings = 7
    told = []
    settings = dict(max_new_tokens=9, eos_token_id=(), on_token=lambda *new: told.append(new))
    tokens = generate(model, ids, mask, **settings)
    assert [row for row, _ in told] == [0, 1, 0, 1, 1, 1] and {type(token) for _, token in told} == {int}
    assert tokens.shape == (2, 9)


def test_a_row_that_has_ended_is_filled_up():
    """By an end token, a criterion for each row, or one for all."""
    model, ids, mask = padded_case(dtype=torch.float32)
    settings = dict(temperature=3.0, seed=2, max_new_tokens=5, pad_token_id=0)
    free = generate(model, ids, mask, **settings, eos_token_id=())[:, 5:].tolist()
    end = free[0][1]
    assert end != free[0][0] and end not in free[1]
    ended = [[*free[0][:2], 0, 0, 0], free[1]]
    assert generate(model, ids, mask, **settings, eos_token_id=end)[:, 5:].tolist() == ended
    each = [lambda tokens, scores: tokens[:, -1] == end]
    settings["eos_token_id"] = ()
    assert generate(model, ids, mask, **settings, stopping_criteria=each)[:, 5:].tolist() == ended
    both = [lambda tokens, scores: tokens.shape[1] == 7]
    assert generate(model, ids, mask, **settings, stopping_criteria=both).shape == (2, 7)


class Puts(list):
    """A streamer that keeps what it gets."""

    def put(self, ids):
        self.append(ids.tolist())

    def end(self):
        self.append("end")


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.5, top_k=3)])
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_what_a_result_has(settings, penalty):
    """Logits in float32, as the model gives them, and scores, which are filtered where tokens are drawn."""
    model, ids, mask = padded_case(dtype=torch.bfloat16)
    settings = dict(settings, repetition_penalty=penalty, max_new_tokens=3, eos_token_id=(), seed=1)
    plain = generate(model, ids, mask, **settings, output_logits=False, streamer=(puts := Puts()))
    assert puts == [ids.tolist(), *plain[:, 5:].T.tolist(), "end"]
    settings["return_dict_in_generate"] = True
    nothing = generate(model, ids, mask, **settings)
    assert nothing.sequences.equal(plain) and nothing.logits is None and nothing.scores is None
    logits = generate(model, ids, mask, **settings, output_logits=True)
    scores = generate(model, ids, mask, **settings, output_scores=True)
    assert logits.scores is None and scores.logits is None and len(logits.logits) == len(scores.scores) == 3
    sampling = Sampling(settings.get("temperature", 0.0), settings.get("top_k"))
    for n, (raw, kept) in enumerate(zip(logits.logits, scores.scores)):
        assert raw.dtype == torch.float32
        for row, is_text in enumerate(mask.bool()):
            text = torch.cat((ids[row][is_text], plain[row, 5 : 5 + n]))
            expected = penalize_repetition(raw[row], text, penalty)
            if sampling.temperature > 0:
                expected = filter_logits(expected, sampling)
            assert kept[row].equal(expected)


def test_a_stop_text_ends_one_row(monkeypatch):
    class Stop:
        def push(self, token):
            self.pushed = getattr(self, "pushed", 0) + 1
            return self is stops[0] and self.pushed == 2

    stops = [Stop(), Stop()]
    monkeypatch.setattr(generation.settings, "make_stop_texts", lambda *_: stops)
    model, ids, mask = padded_case()
    generate(model, ids, mask, max_new_tokens=4, eos_token_id=())
    assert [stop.pushed for stop in stops] == [2, 4]


def test_a_kept_cache_is_no_inference_tensor():
    """A cache that the caller has can be used outside of inference mode."""
    model, ids, mask = padded_case()
    cache = KVCache(model.config, 8)
    settings = dict(max_new_tokens=2, eos_token_id=())
    generate(model, ids, mask, **settings, past_key_values=cache)
    other = generate(model, ids, mask, **settings, return_dict_in_generate=True).past_key_values
    assert not any(part.keys.is_inference() for part in (*cache.layers, *other.layers))


@pytest.mark.parametrize(
    "attention, settings, pays, expected",
    [
        ("sdpa", {}, False, (False, False)),
        ("sdpa", {}, True, (True, True)),
        ("sdpa", dict(fast=False), True, (False, False)),
        ("sdpa", dict(compile=False), True, (True, False)),
        ("sdpa", dict(compile=True), False, (True, True)),
        ("sdpa", dict(compile=True, fast=True), False, (True, True)),
        ("sdpa", dict(compile=True, fast=False), False, "only the fast path can be compiled"),
        ("eager", dict(compile=True), False, "fast=True is not supported"),
        ("sdpa", dict(compile=1), False, "compile=1 is impossible"),
    ],
)
def test_when_steps_are_recorded_and_compiled(monkeypatch, attention, settings, pays, expected):
    seen = []

    def stop(forward, cache, visible, record, compile, expected):
        seen.append((record, compile))
        raise RuntimeError("seen")

    for name in ("compiling_pays", "recording_pays"):
        monkeypatch.setattr(generation, name, lambda *_: pays)
    monkeypatch.setattr(generation, "Decoder", stop)
    model, ids, mask = padded_case(family="ministral3", attn_implementation=attention, sliding_window=None)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            generate(model, ids, mask, **settings)
    else:
        with pytest.raises(RuntimeError, match="seen"):
            generate(model, ids, mask, **settings)
        assert seen == [expected]


def test_scores_are_kept_if_a_processor_uses_them_again():
    model, ids, mask = padded_case(dtype=torch.float32)
    memory = torch.zeros(2, VOCAB)
    settings = dict(max_new_tokens=2, eos_token_id=(), return_dict_in_generate=True, output_scores=True)
    process = [lambda ids, scores: memory.copy_(scores)]
    a, b = generate(model, ids, mask, **settings, logits_processor=process).scores
    assert not a.equal(b)


def test_without_a_seed_the_global_generator_draws():
    model, ids, mask = padded_case(dtype=torch.float32)
    settings = dict(temperature=1.0, max_new_tokens=1, eos_token_id=(), return_dict_in_generate=True)
    torch.manual_seed(3)
    out = generate(model, ids, mask, **settings, output_logits=True)
    torch.manual_seed(3)
    assert out.sequences[:, 5].equal(sample(out.logits[0], Sampling(1.0)))


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
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p="most"), "top_p='most'"),
        (dict(num_return_sequences=0), "num_return_sequences=0"),
        (dict(num_return_sequences=2), "num_return_sequences=2 with greedy decoding"),
        (dict(do_sample=True, temperature=0), "do_sample=True with temperature=0"),
        (dict(stop_strings="a"), r"stop_strings=\['a'\] without a tokenizer"),
        (dict(stop_strings=[""]), r"stop_strings=\[''\] is impossible"),
        (dict(min_p=1.5), "min_p=1.5"),
        (dict(repetition_penalty=0), "repetition_penalty=0"),
        (dict(repetition_penalty=1e-300), "from 0.01 to 100"),
        (dict(eos_token_id=50), r"eos_token_id=\[50\].*below 50"),
        (dict(eos_token_id=[2, -1]), r"eos_token_id=\[2, -1\]"),
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
        (dict(temperature="0.7"), "temperature='0.7' is impossible; allowed: a number not below 0"),
        (dict(top_p="1"), "top_p='1' is impossible; allowed: a number above 0"),
        (dict(eos_token_id="</s>"), "eos_token_id=.* is impossible; allowed: a token id, or a list of such"),
        (dict(eos_token_id=2.5), "eos_token_id=2.5 is impossible; allowed: a token id"),
        (dict(eos_token_id=50), "eos_token_id=.* is impossible; allowed: ids below 50"),
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


# ------------------------------------------------------------------------------------------ settings of the model


def test_numbers_of_numpy_are_numbers():
    case = draw_prompts(random.Random(0))
    model, ids = case.ours, case.ids[:1]
    settings = dict(max_new_tokens=9, eos_token_id=2, pad_token_id=1, top_k=7, seed=5, num_return_sequences=2)
    in_numpy = {name: np.int64(value) for name, value in settings.items()}
    expected = generate(model, ids, temperature=1.5, **settings)
    assert torch.equal(generate(model, ids, temperature=np.float64(1.5), **in_numpy), expected)


def draw_settings(rng, model, ids):
    """A generation_config.json as in published repositories, with an end token that the model does generate."""
    end = generate(model, ids, max_new_tokens=4, eos_token_id=())[0, -rng.randint(1, 4)].item()
    everything = {
        "eos_token_id": rng.choice([end, [2, end], [end, *rng.sample(range(VOCAB), 2)]]),
        "pad_token_id": rng.randrange(VOCAB),
        "repetition_penalty": rng.choice([1.0, 1.7]),
        "max_new_tokens": rng.randint(1, 12),
        "max_length": ids.shape[1] + rng.randint(1, 12),
        "do_sample": False,
        "temperature": 0.6,
        "transformers_version": "4.46.0.dev0",
        "_from_model_config": True,
    }
    return {name: value for name, value in everything.items() if rng.random() < 0.6}


@at_most(30)
@newer_transformers
@given(rngs)
def test_the_settings_of_the_model_are_used_as_in_transformers(rng):
    """The settings of generation_config.json are used unless an argument replaces them, and they are saved."""
    case = draw_prompts(rng, dtype=torch.float32, use_cache=True)
    if case.ours.config.sliding_window == 1:
        return  # Transformers' cache is wrong there
    stored = draw_settings(rng, case.ours, case.ids)
    with tempfile.TemporaryDirectory() as folder:
        case.ours.save_pretrained(folder)
        Path(folder, "generation_config.json").write_text(json.dumps(stored))
        model = type(case.ours).from_pretrained(folder, attn_implementation=case.ours.config.attn_implementation)
        model.save_pretrained(folder)
        case.theirs.generation_config = transformers.GenerationConfig()
        if stored:
            assert json.loads(Path(folder, "generation_config.json").read_text()) == stored
            case.theirs.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    given = rng.choice([{}, {"max_new_tokens": 5}, {"eos_token_id": 7}, {"repetition_penalty": 1.3}])
    if "max_new_tokens" not in stored and "max_length" not in stored:
        given |= {"max_new_tokens": 9}  # the default is another one there
    # What the file leaves out comes from config.json here; Transformers has none then.
    there = {"eos_token_id": model.config.eos_token_id} if "eos_token_id" not in stored else {}
    if "pad_token_id" not in stored:
        there["pad_token_id"] = model.config.pad_token_id
    ones = torch.ones_like(case.ids)  # Transformers would penalise padding
    theirs = case.theirs.generate(case.ids, attention_mask=ones, **there | given)
    penalty = (stored | given).get("repetition_penalty", 1.0)
    tokens = (generate(model, case.ids, **given), theirs)
    assert_same_tokens((model, case.theirs), case.truth(), case.ids, ones.bool(), tokens, penalty)


def test_the_settings_of_a_directory_that_does_not_exist_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model directory .*nothing_here"):
        GenerationConfig.from_pretrained(tmp_path / "nothing_here")
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig()


def test_sampling_is_on_where_call_or_file_says_so():
    case = draw_case(random.Random(5), dtype=torch.float32)
    model, ids = case.ours, case.ids[:1]

    def texts(**settings):
        texts = [generate(model, ids, max_new_tokens=12, eos_token_id=(), seed=s, **settings)[0] for s in range(3)]
        return [text.tolist() for text in texts]

    greedy, drawn = texts(temperature=0), texts(temperature=1.0)
    assert greedy[0] == greedy[1] and drawn[0] != drawn[1]
    assert texts() == greedy and texts(do_sample=True) == drawn
    model.generation_config.temperature = 0.7
    assert texts() == greedy and texts(do_sample=True) == texts(temperature=0.7) != drawn
    model.generation_config.do_sample = True
    assert texts() == texts(temperature=0.7)
    assert texts(do_sample=False) == texts(temperature=0) == greedy
    model.generation_config.top_k = 1
    assert texts() == greedy and texts(top_k=0) == texts(temperature=0.7, top_k=0) != greedy
    with pytest.warns(UserWarning, match="top_p: no effect on greedy decoding; give do_sample=True"):
        assert texts(do_sample=False, top_p=0.5) == greedy


@pytest.mark.parametrize(
    "file, call, expected",
    [
        ({}, {}, Sampling()),
        (dict(temperature=0.7, top_k=5), {}, Sampling()),
        (dict(do_sample=True), {}, Sampling(1.0)),
        (dict(do_sample=True, temperature=0.7), dict(top_p=0.9, min_p=0.1), Sampling(0.7, None, 0.9, 0.1)),
        ({}, dict(temperature=0.5, top_k=5, repetition_penalty=1.3), Sampling(0.5, 5, repetition_penalty=1.3)),
        ({}, dict(do_sample=True, temperature=2), Sampling(2)),
        (dict(do_sample=True), dict(temperature=0, repetition_penalty=1.3), Sampling(repetition_penalty=1.3)),
        ({}, dict(do_sample=False, temperature=0.5), "temperature"),
        ({}, dict(temperature=0, top_k=5), "top_k"),
        ({}, dict(top_p=0.5, min_p=0.1), "top_p, min_p"),
    ],
)
def test_the_settings_of_sampling(file, call, expected):
    """A text: the call is greedy, with a warning of these settings."""
    resolved = generation.settings.resolve(GenerationConfig(**file), call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampling = resolve_sampling(resolved, call)
    if isinstance(expected, str):
        expected = f"{expected}: no effect on greedy decoding; give do_sample=True"
        assert [str(warning.message) for warning in caught] == [expected] and sampling == Sampling()
    else:
        assert sampling == expected and not caught


def test_settings_of_sampling_are_checked():
    with pytest.raises(ValueError, match="top_p=2"):
        Sampling(top_p=2)


def test_a_whole_context_as_max_length_takes_no_memory_at_once(monkeypatch):
    """Ministral 3's own file has 262144."""
    case = draw_case(random.Random(5), dtype=torch.float32)
    case.ours.config.max_position_embeddings = case.ours.generation_config.max_length = 262144
    rooms = []
    monkeypatch.setattr(generation, "KVCache", lambda config, expected: rooms.append(expected) or KVCache(config, 64))
    generate(case.ours, case.ids, on_token=lambda *_: True)
    generate(case.ours, case.ids, max_new_tokens=5000, on_token=lambda *_: True)
    assert rooms == [case.ids.shape[1] + 128, case.ids.shape[1] + 5000]


def test_padding_outside_the_vocabulary_is_refused():
    case = draw_case(random.Random(5), dtype=torch.float32)
    case.ours.generation_config.pad_token_id = VOCAB
    with pytest.raises(ValueError, match=f"pad_token_id={VOCAB} is impossible; allowed: an id below {VOCAB}"):
        generate(case.ours, case.ids)


def test_a_save_leaves_no_settings_of_another_model(tmp_path):
    case = draw_case(random.Random(5), dtype=torch.float32)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 17}')
    case.ours.save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    case.ours.generation_config.eos_token_id = [2, 9]
    case.ours.save_pretrained(tmp_path)
    assert type(case.ours).from_pretrained(tmp_path).generation_config.eos_token_id == [2, 9]


@given(rngs)
def test_several_continuations_of_one_row(rng):
    """The n-th continuation of a row equals that of the row alone with a seed that is n higher, padded or not."""
    case = draw_prompts(rng)
    model, seed, copies = case.truth(), rng.randrange(99), rng.randint(1, 4)
    settings = dict(max_new_tokens=6, eos_token_id=(), temperature=1.5)
    tokens = generate(model, case.ids, case.mask, seed=seed, num_return_sequences=copies, **settings)
    for n in range(copies):
        assert torch.equal(tokens[n::copies], generate(model, case.ids, case.mask, seed=seed + n, **settings))


@at_most(20)
@given(rngs)
def test_stop_texts_equal_transformers(tokenizer, rng):
    """A stop text ends a row with the token that completes it. It may begin and end within tokens and within the
    prompt. The models never draw special tokens, whose names Transformers compares with the stop texts."""
    torch.manual_seed(rng.randrange(2**31))
    sizes = dict(vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, sliding_window=64, initializer_range=0.3)  # fmt: skip
    ours = MinistralForCausalLM(MinistralConfig(**sizes)).eval()
    with torch.no_grad():
        ours.lm_head.weight[list(tokenizer.special_tokens.values())] = 0  # a logit of 0 is never the largest of 2,048
    theirs = transformers.MinistralForCausalLM(transformers.MinistralConfig(**sizes)).eval()
    theirs.load_state_dict(ours.state_dict())
    words = [i for i in range(1100, 2048) if tokenizer.decode([i]).isascii()]
    ids = torch.tensor([rng.sample(words, 5) for _ in range(2)])
    free = tokenizer.decode(generate(ours, ids[:1], max_new_tokens=20, eos_token_id=())[0, 3:].tolist())
    start = rng.randrange(len(free) - 5)
    stops = [free[start : start + rng.randint(1, 5)], "never so"]
    stops = [stop for stop in stops if stop.isascii()]
    both = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    settings = dict(max_new_tokens=20, eos_token_id=2, pad_token_id=11, stop_strings=stops)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, tokenizer=both, **settings)
    ours.config.pad_token_id = 11
    del settings["pad_token_id"]
    tokens = generate(ours, ids, tokenizer=tokenizer, **settings)
    exact = copy.deepcopy(ours).double()
    assert_same_tokens((ours, theirs), exact, ids, torch.ones_like(ids, dtype=torch.bool), (tokens, expected))


def test_stop_texts_do_not_see_special_tokens(tokenizer):
    """The text is what `decode` returns: a special token neither completes a stop text nor interrupts one."""
    first, second = tokenizer.encode("the", bos=False), tokenizer.encode(" king", bos=False)
    special = tokenizer.special_tokens["[TOOL_CALLS]"]
    stop = StopText(tokenizer, ["T", "e k"])
    assert [stop.push(i) for i in [*first, special]] == [False] * (len(first) + 1)
    assert any(stop.push(i) for i in second)


def test_a_stream_never_cuts_a_character(tokenizer):
    text = "Wherefore art thou é, 漢字 \N{GRINNING FACE}?"
    ids = tokenizer.encode(text, bos=False)
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert len(ids) > len(text) - 10 and "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.close() == text
    cut = TextStream(tokenizer)
    assert "".join(map(cut.push, tokenizer.encode("a漢", bos=False)[:-1])) + cut.close() == "a\ufffd"


# ---------------------------------------------------------------------------------------------------- sampling


@given(rngs)
def test_filters_equal_transformers_processors(rng):
    # On a grid: subtracting the maximum makes a tie of numbers 1e-33 apart, and which one of a tie stays is arbitrary.
    grid = rng.choice([0, 3, 3])  # whole numbers have ties, too
    logits = torch.tensor([[round(rng.uniform(-8, 8), grid) for _ in range(30)] for _ in range(2)])
    settings = Sampling(
        temperature=rng.uniform(0.2, 2),
        top_k=rng.choice([None, 0, rng.randint(1, 40)]),
        # (Not on the edge between tokens of equal probability, where rounding decides.)
        top_p=rng.choice([None, 1.0, rng.uniform(0.05, 0.99) + 0.00314159]),
        min_p=rng.choice([None, 0.0, 1.0, rng.uniform(0, 0.99) + 0.00314159]),
    )
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
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


def test_the_corners_of_filters():
    """top_p=1 is off, the dropped tokens may have 1 - top_p together, and the most likely one always stays."""
    far = torch.tensor([0.0, -200.0])
    assert filter_logits(far, Sampling(1.0, top_p=1.0)).equal(far)
    for logits, top_p in (([0.0, 0.0], 0.5), ([3.0, 2.0, 1.0], 1e-12)):
        assert filter_logits(torch.tensor(logits), Sampling(1.0, top_p=top_p)).isfinite().sum() == 1
    assert sample(torch.tensor([0.0, math.inf]), Sampling()) == 1
    assert sample(torch.zeros(2, 3, 4), Sampling(1.0)).shape == (2, 3)
    large = torch.tensor([[1e9, 0.0, 0.0], [0.0, 0.0, 2e9]])  # 1e9 / 1e-30 is beyond float32
    assert filter_logits(large, Sampling(1e-30)).softmax(-1).equal(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))


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
    drawn = sample(logits, settings, torch.Generator().manual_seed(0)).unique()
    assert 890 < len(drawn) <= 901


@given(rngs)
def test_a_row_with_its_own_generator_draws_what_it_draws_alone(device, rng):
    """Also bit for bit what `torch.multinomial` draws."""
    B, V = rng.randint(1, 5), rng.choice([2, 50, 3000])
    settings = Sampling(temperature=rng.uniform(0.3, 2), top_k=rng.choice([0, 7]), top_p=rng.choice([None, 0.8]))
    seeds = [rng.randrange(2**31) for _ in range(B)]
    g = torch.Generator().manual_seed(seeds[0])
    logits = torch.randn(B, V, dtype=rng.choice([torch.float32, torch.float64]), generator=g).to(device)
    batch, alone = ([torch.Generator(device).manual_seed(seed) for seed in seeds] for _ in range(2))
    for _ in range(3):
        drawn = sample(logits, settings, batch)
        probs = filter_logits(logits, settings).softmax(-1)
        assert drawn.tolist() == [torch.multinomial(row, 1, generator=g).item() for row, g in zip(probs, alone)]


@pytest.mark.parametrize("generator", [None, [torch.Generator(), torch.Generator()]])
def test_nothing_is_drawn_from_nan(generator):
    logits = torch.tensor([[1.0, 2.0], [1.0, math.nan]])
    with pytest.raises(ValueError, match="the logits contain NaN"):
        sample(logits, Sampling(temperature=1.0), generator)


def test_sampling_is_a_pure_function():
    logits, settings = torch.randn(3, 50), Sampling(temperature=0.7, top_p=0.9)
    draws = [sample(logits, settings, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)


@given(st.floats(1e-300, 1e-3), st.sampled_from([torch.float16, torch.float32]))
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature, dtype):
    logits = torch.tensor([1.0, 30.0, 29.0, -60000.0], dtype=dtype)
    assert sample(logits, Sampling(temperature=temperature, top_p=0.9, min_p=0.1)).item() == 1


@pytest.mark.parametrize("temperature", [2**63, 10**300, 1e300])
def test_a_huge_temperature_makes_all_tokens_equally_likely(temperature):
    logits = torch.tensor([1.0, 30.0, 29.0, -60000.0]).expand(4000, 4)
    drawn = sample(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert (drawn - 1000).abs().max() < 150


SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fast", [True, False])
def test_weights_that_are_not_finite_are_named(temperature, fast):
    model = MinistralForCausalLM(MinistralConfig(**SMALL)).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 2] = torch.inf
    message = r"model\.layers\.0\.mlp\.up_proj\.weight has numbers that are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=2, temperature=temperature, fast=fast)


def test_the_first_result_that_is_not_finite_is_named():
    """Finite weights whose products overflow in float16."""
    model = MinistralForCausalLM(MinistralConfig(**SMALL)).half().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)  # so all inputs of the layer's products are about 1
        for p in model.model.layers[1].mlp.parameters():
            p.fill_(60.0)
    message = r"output of model\.layers\.1\.mlp.* is the first .* in float16; try another dtype"
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=2)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="the logits contain NaN"):
            sample(torch.tensor([[1.0, torch.nan]]), Sampling(temperature))
