"""`model.generate` takes the arguments of Transformers' `generate` and gives the same tokens, scores and errors.

Most models here have output projections of zero, so that each layer adds nothing, and the logits depend on the last
token alone. Their bits are then equal in both libraries, and so must be the scores and the drawn tokens.
tests/test_generate.py compares the loops with attention.
"""

import inspect
import json
import random
import re

import pytest
import torch
import transformers
from hypothesis import given, strategies as st

from checkpoint import GenerationConfig
from checkpoint.generation_config import HARMLESS_SETTINGS, UNSUPPORTED, WITHOUT_EFFECT
from generate import generate, generate_naive
from ministral import KVCache
from settings import GENERATION_SETTINGS
from tests.cases import VOCAB, draw_case
from tests.conftest import at_most, newer_transformers
from tests.test_generate import assert_same_tokens

rngs = st.randoms(use_true_random=False)
GENERATE_ARGUMENTS = set(inspect.signature(generate).parameters) - {"model", "other_settings"}


def draw_models(rng):
    """A case with padding on the left, whose layers add nothing."""
    case = draw_attending_models(rng)
    for model in (case.ours, case.theirs):
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.data.zero_()
    return case


def draw_attending_models(rng):
    """A case with padding on the left. Windows of 1 are left out: Transformers' cache is wrong there."""
    fixed = {"family": rng.choice(["ministral", "ministral3"])}
    if fixed["family"] == "ministral":
        fixed["sliding_window"] = rng.choice([2, 3, 5, 8, 16, 64])
    case = draw_case(rng, use_cache=True, **fixed)
    if case.mask is not None:
        case.mask = case.mask.sort(dim=1).values
    return case


def draw_arguments(rng, case):
    """Arguments of `generate` in random combinations."""
    end = rng.randrange(1, VOCAB)
    arguments = {
        "do_sample": rng.choice([True, True, False]),
        "eos_token_id": rng.choice([end, [end], [end, 7, 9]]),
        "pad_token_id": rng.choice([i for i in range(VOCAB) if i not in case.ids[:, -1]]),
        "repetition_penalty": rng.choice([1.0, 1.7]),
        "use_cache": True,
        "num_beams": 1,
        "return_dict_in_generate": rng.random() < 0.5,
        "output_scores": rng.random() < 0.7,
        "output_logits": rng.random() < 0.7,
    }
    if arguments["do_sample"]:
        arguments |= {
            "temperature": rng.choice([0.6, 1.0, 1.7]),
            "top_k": rng.choice([0, 5, 20]),
            "top_p": rng.choice([1.0, 0.4, 0.9]),
            "min_p": rng.choice([0.02, 0.3]),
            "num_return_sequences": rng.randint(1, 3),
        }
    arguments |= rng.choice([
        {"max_new_tokens": rng.randint(1, 20)},
        {"max_length": case.ids.shape[1] + rng.randint(1, 20)},
        {},
    ])  # fmt: skip
    chosen = {name: value for name, value in arguments.items() if rng.random() < 0.7}
    if "num_return_sequences" in chosen:
        chosen["do_sample"] = True
    return chosen


def draw_hooks(rng, prompt):
    """Processors and criteria: Transformers' own, and plain functions."""
    hooks = {}
    if rng.random() < 0.3:
        length = prompt + rng.randint(1, 5)
        hooks["stopping_criteria"] = [
            lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= length) | (ids[:, -1] < 5)
        ]
    if rng.random() < 0.5:
        hooks["logits_processor"] = transformers.LogitsProcessorList(rng.sample([
            transformers.NoRepeatNGramLogitsProcessor(2),
            transformers.SuppressTokensLogitsProcessor([3, 4, 5]),
            lambda ids, scores: scores.tanh() * 3 + (ids[:, -1:] % 7) / 9,
            transformers.MinNewTokensLengthLogitsProcessor(prompt, 4, [7], device="cpu"),
        ], rng.randint(1, 3)))  # fmt: skip
    return hooks


def both(case, inputs, arguments, seed=0):
    """The results of Transformers and of ours, each after the same seed."""
    results = []
    for model, extra in ((case.theirs, {}), (case.ours, {"fast": False})):
        torch.manual_seed(seed)
        results.append(model.generate(**inputs, **arguments, **extra))
    return results


def assert_same_results(theirs, ours):
    """Equal tokens, and equal bits of scores."""
    if torch.is_tensor(theirs):
        assert torch.equal(theirs, ours)
        return
    assert torch.equal(theirs.sequences, ours.sequences)
    for name in ("scores", "logits"):
        expected, found = getattr(theirs, name), getattr(ours, name)
        assert (expected is None) == (found is None)
        if expected is None:
            continue
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == torch.float32 and torch.equal(a, b)


@newer_transformers
@at_most(100)
@given(rngs)
def test_the_same_tokens_and_scores(rng):
    """Greedy and drawn after the same seed, padded or not, with and without each argument, and every default."""
    case = draw_models(rng)
    inputs = {"input_ids": case.ids}
    if case.mask is not None:
        inputs["attention_mask"] = case.mask
    arguments = draw_arguments(rng, case) | draw_hooks(rng, case.ids.shape[1])
    if case.mask is None and case.ours.config.pad_token_id is None and "pad_token_id" not in arguments:
        arguments["pad_token_id"] = 0  # Transformers would set it, with a warning
        case.ids.clamp_(min=1)
    assert_same_results(*both(case, inputs, arguments, rng.randrange(999)))


@newer_transformers
@at_most(30)
@given(rngs)
def test_a_generation_config_of_either_library(rng):
    """The call has precedence over the object, and the object over that of the model."""
    case = draw_models(rng)
    stored, given = draw_arguments(rng, case), draw_arguments(rng, case)
    for name in ("return_dict_in_generate", "output_scores", "output_logits", "num_beams", "use_cache"):
        stored.pop(name, None)
    stored.pop("num_return_sequences", None)  # the other one may say do_sample=False
    given.pop("num_return_sequences", None)
    case.theirs.generation_config = transformers.GenerationConfig(**stored)
    case.ours.generation_config = GenerationConfig(**stored)
    there = {"eos_token_id": 2, "pad_token_id": 0}  # from config.json here
    case.ours.config.eos_token_id, case.ours.config.pad_token_id = 2, 0
    missing = {name: value for name, value in there.items() if name not in stored and name not in given}
    seed = rng.randrange(999)
    ones = torch.ones_like(case.ids)
    torch.manual_seed(seed)
    config = transformers.GenerationConfig(**given, **missing)
    theirs = case.theirs.generate(case.ids, attention_mask=ones, generation_config=config)
    for cls in (transformers.GenerationConfig, GenerationConfig):
        torch.manual_seed(seed)
        config = cls(**given | {"repetition_penalty": 5.0})
        penalty = given.get("repetition_penalty", stored.get("repetition_penalty", 1.0))
        ours = case.ours.generate(
            case.ids, attention_mask=ones, generation_config=config, fast=False, repetition_penalty=penalty
        )
        assert_same_results(theirs, ours)


class Recorder(transformers.generation.streamers.BaseStreamer):
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.tolist())

    def end(self):
        self.calls.append("end")


@newer_transformers
@at_most(10)
@given(rngs)
def test_a_streamer_gets_the_same(rng):
    case = draw_models(rng)
    arguments = {"max_new_tokens": rng.randint(1, 9), "eos_token_id": rng.randrange(VOCAB), "pad_token_id": 0}
    streamers = Recorder(), Recorder()
    mask = torch.ones_like(case.ids)
    case.theirs.generate(case.ids, attention_mask=mask, streamer=streamers[0], **arguments)
    case.ours.generate(case.ids, attention_mask=mask, streamer=streamers[1], fast=False, **arguments)
    assert streamers[0].calls == streamers[1].calls and streamers[0].calls[-1] == "end"


@newer_transformers
@at_most(20)
@given(rngs)
def test_pad_tokens_are_padding_where_no_mask_is_given(rng):
    """At the beginning and within the text, unless the same id ends texts; positions skip them."""
    case = draw_attending_models(rng)
    pad, end = rng.randrange(VOCAB), rng.randrange(VOCAB)
    case.ids[:, : rng.randint(0, case.ids.shape[1] - 1)] = pad
    case.ids[0, rng.randrange(case.ids.shape[1])] = pad
    case.ids[:, -1] = (pad + 1) % VOCAB
    arguments = {"max_new_tokens": 6, "eos_token_id": end, "pad_token_id": pad}
    theirs, ours = both(case, {"inputs": case.ids}, arguments)
    visible = torch.ones_like(case.ids, dtype=torch.bool)
    if pad != end:
        visible = case.ids != pad
    assert_same_tokens((case.ours, case.theirs), case.truth(), case.ids, visible, (ours, theirs))


def test_without_a_prompt_a_text_begins_with_bos():
    case = draw_models(random.Random(3))
    case.theirs.generation_config.bos_token_id = 1
    arguments = {"max_new_tokens": 5, "eos_token_id": 2, "pad_token_id": 0}
    assert_same_results(*both(case, {}, arguments))
    case.ours.config.bos_token_id = None
    with pytest.raises(ValueError, match="no prompt, and no bos_token_id to begin with; give input_ids"):
        case.ours.generate(**arguments)
    for inputs in (case.ids, {"input_ids": case.ids}):
        with pytest.raises(ValueError, match="input_ids: given in inputs and as an argument; give one of the two"):
            case.ours.generate(inputs, input_ids=case.ids)
        expected = case.ours.generate(case.ids, max_new_tokens=2)
        assert torch.equal(case.ours.generate(inputs, input_ids=None, max_new_tokens=2), expected)


def test_a_tokenizers_mapping_is_an_input():
    case = draw_models(random.Random(3))
    ids, mask = case.ids, torch.ones_like(case.ids)
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    expected = case.ours.generate(ids, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(case.ours.generate(batch, max_new_tokens=4), expected)


# ------------------------------------------------------------------------------------------------------- arguments


def their_arguments():
    """Every argument of Transformers' `generate`: those of the method, and the settings of its GenerationConfig."""
    method = set(inspect.signature(transformers.GenerationMixin.generate).parameters) - {"self", "kwargs", "inputs"}
    config = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    return method | config


@newer_transformers
@pytest.mark.parametrize("name", sorted(their_arguments() - HARMLESS_SETTINGS))
def test_every_argument_is_supported_or_refused_by_name(name):
    if name in GENERATION_SETTINGS | GENERATE_ARGUMENTS:
        assert name not in UNSUPPORTED
        return
    case = draw_case(random.Random(3))
    value = {"use_cache": False, "cache_implementation": "static"}.get(name, 3)
    without_effect = WITHOUT_EFFECT.get(name)
    message = f"^{name}={value!r} is not supported; {re.escape(UNSUPPORTED[name])}"
    with pytest.raises(ValueError, match=message):
        case.ours.generate(case.ids, **{name: value})
    case.ours.generate(case.ids, max_new_tokens=1, **{name: without_effect})
    theirs = transformers.GenerationConfig(max_new_tokens=1)
    setattr(theirs, name, value)  # past the checks of its constructor
    for config in (GenerationConfig(**{name: value}), theirs):
        with pytest.raises(ValueError, match=message):
            case.ours.generate(case.ids, generation_config=config)
    setattr(theirs, name, without_effect)
    for config in (GenerationConfig(max_new_tokens=1, **{name: without_effect}), theirs):
        case.ours.generate(case.ids, generation_config=config)


def test_settings_of_a_call_are_not_read_from_a_file(tmp_path):
    """Code that calls `generate` relies on the type of the result."""
    case = draw_case(random.Random(3))
    case.ours.save_pretrained(tmp_path)
    content = {"return_dict_in_generate": True, "output_scores": True, "seed": 3, "max_new_tokens": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    model = type(case.ours).from_pretrained(tmp_path)
    assert torch.is_tensor(model.generate(case.ids)) and torch.is_tensor(generate(model, case.ids))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == content
    model.generation_config.return_dict_in_generate = True  # set in Python, it counts
    assert len(model.generate(case.ids)) == 2


def test_an_unknown_argument_is_refused():
    case = draw_case(random.Random(3))
    for model_generate in (case.ours.generate, lambda *a, **k: generate(case.ours, *a, **k)):
        with pytest.raises(ValueError, match="generate has no argument temprature"):
            model_generate(case.ids, temprature=0.5)
    with pytest.raises(ValueError, match="seed is an argument of generate, and no setting of a GenerationConfig"):
        generate(case.ours, case.ids, generation_config=GenerationConfig(seed=3))
    with pytest.raises(ValueError, match="generate has no argument foo"):
        generate(case.ours, case.ids, foo=None)
    with pytest.raises(ValueError, match="generation_config must be a GenerationConfig; found int"):
        generate(case.ours, case.ids, generation_config=3)
    with pytest.raises(ValueError, match="model must be one that load_model returns"):
        case.ours.model.generate(case.ids)


# ----------------------------------------------------------------------------------------------------- afterwards


def test_results_and_caches_can_be_used_in_training():
    """Nothing that the caller gets was made in inference mode."""
    case = draw_case(random.Random(5), dtype=torch.float32)
    model = case.ours
    tokens = model.generate(case.ids, max_new_tokens=3)
    assert not tokens.is_inference()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    cache = KVCache(model.config)
    results = [
        generate(model, case.ids, max_new_tokens=3, past_key_values=cache, return_dict_in_generate=True),
        generate(model, case.ids, max_new_tokens=3, return_dict_in_generate=True),
    ]
    for result in results:
        with torch.no_grad():
            model(result.sequences[:, -1:], past_key_values=result.past_key_values)


@at_most(20)
@given(rngs)
def test_positions_skip_padding_within_a_text(rng):
    """A mask may hide tokens anywhere but at the end: the text is that of the tokens left. In float64, because nearly
    equal logits may change their order in float32."""
    case = draw_attending_models(rng)
    case.ours.double()
    hidden = torch.tensor([rng.random() < 0.4 for _ in range(case.ids.shape[1])])
    hidden[-1] = False
    if case.ours.config.sliding_window is not None:
        hidden[:] = False  # a window counts hidden tokens, too
    mask = (~hidden).long().expand_as(case.ids)
    tokens = generate(case.ours, case.ids, mask, max_new_tokens=4, eos_token_id=())
    expected = generate_naive(case.ours, case.ids[:, ~hidden], 4)
    assert torch.equal(tokens[:, -4:], expected[:, -4:])


# ------------------------------------------------------------------------------------------ settings of the model


@newer_transformers
@at_most(20)
@given(rngs)
def test_none_switches_a_setting_of_the_file_off(rng):
    case = draw_models(rng)
    stored = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.6, "repetition_penalty": 1.7}
    stored |= {"eos_token_id": rng.randrange(1, VOCAB), "pad_token_id": 0}
    case.ids.clamp_(min=1)
    case.theirs.generation_config = transformers.GenerationConfig(**stored)
    case.ours.generation_config = GenerationConfig(**stored)
    names = [name for name in stored if name != "pad_token_id" and rng.random() < 0.5]
    arguments = dict.fromkeys(names) | {"max_new_tokens": 12, "attention_mask": torch.ones_like(case.ids)}
    if "do_sample" in names:
        arguments["do_sample"] = False  # None is a warning there
    assert_same_results(*both(case, {"input_ids": case.ids}, arguments, rng.randrange(99)))


def test_settings_that_are_set_later_are_refused():
    """In a generation_config.json they are a warning, as the text may still be of use."""
    case = draw_case(random.Random(3))
    model, ids = case.ours, case.ids
    model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(ValueError, match="no_repeat_ngram_size=2 is not supported"):
        model.generate(ids, max_new_tokens=1)
    model.generation_config = transformers.GenerationConfig(num_beams=2)
    with pytest.raises(ValueError, match="num_beams=2 is not supported"):
        generate(model, ids, max_new_tokens=1)
    config = GenerationConfig(max_new_tokens=1)
    config.num_beams = 4
    assert config.num_beams == 4 and config.min_new_tokens is None
    model.generation_config = None
    assert model.generate(ids, eos_token_id=()).shape[1] == ids.shape[1] + 20
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2)
    with pytest.raises(ValueError, match="num_beams=4 is not supported"):
        model.generate(ids, config)
    assert model.generate(ids, eos_token_id=()).shape[1] == ids.shape[1] + 2
    for name in ("forced_eos_token_id", "max_time"):  # 0 is a value of these
        with pytest.raises(ValueError, match=f"{name}=0 is not supported"):
            model.generate(ids, **{name: 0})
    with pytest.raises(ValueError, match="top_p=2 is impossible"):
        model.generation_config = GenerationConfig()
        model.generation_config.top_p = 2
    with pytest.raises(AttributeError, match="GenerationConfig has no temprature"):
        assert model.generation_config.temprature


def test_a_warned_setting_of_the_file_is_no_error(tmp_path):
    case = draw_case(random.Random(3))
    case.ours.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"num_beams": 4, "length_penalty": 2.0}')
    with pytest.warns(UserWarning, match=r"not supported here, and left out: num_beams=4$"):
        model = type(case.ours).from_pretrained(tmp_path)
    model.generate(case.ids, max_new_tokens=1)
    model.generation_config.num_beams = 5
    with pytest.raises(ValueError, match="num_beams=5 is not supported"):
        model.generate(case.ids, max_new_tokens=1)


@pytest.mark.parametrize("process", [
    lambda ids, scores: scores[:1], lambda ids, scores: scores[0], lambda ids, scores: scores[:, :3],
    lambda ids, scores: None,
])  # fmt: skip
def test_processors_return_scores_of_the_same_shape(process):
    case = draw_case(random.Random(3))
    ids = torch.arange(1, 13).view(3, 4)
    with pytest.raises(ValueError, match="the result of a logits processor must be"):
        case.ours.generate(ids, max_new_tokens=2, logits_processor=[process])


def test_criteria_return_one_answer_or_one_for_each_row():
    case = draw_case(random.Random(3))
    ids = torch.arange(1, 13).view(3, 4)
    settings = dict(max_new_tokens=6, eos_token_id=(), do_sample=False)
    for answer in (True, 1, torch.tensor(True), torch.ones(3), torch.tensor([True] * 3)):
        stopped = case.ours.generate(ids, stopping_criteria=[lambda ids, scores, a=answer: a], **settings)
        assert stopped.shape == (3, 5)
    for answer in (torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="the result of a stopping criterion must be"):
            case.ours.generate(ids, stopping_criteria=[lambda ids, scores, a=answer: a], **settings)


def test_replaced_methods_are_used_or_refused():
    """accelerate replaces `forward` of the model, peft's prompt tuning `prepare_inputs_for_generation`."""
    case = draw_case(random.Random(3), dtype=torch.float32)
    model, calls = case.ours, []
    original = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    generate(model, case.ids, max_new_tokens=2)
    assert calls
    del model.forward
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {}
    with pytest.raises(ValueError, match="prepare_inputs_for_generation was replaced"):
        model.generate(case.ids)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="the weights are on the meta device"):
        empty.generate(case.ids)
    with pytest.raises(ValueError, match="pixel_values must be a tensor"):
        generate(case.truth(), case.ids, image_sizes=[(28, 28)])
