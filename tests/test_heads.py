"""Classification and question answering: logits, losses, gradients and training equal Transformers' to the bit."""

import copy
import io
import json
import random
import re
import warnings
from dataclasses import fields

import pytest
import torch
import transformers
from hypothesis import given, strategies as st

from examples import verse
from generate import generate
from heads import (
    Ministral3ForSequenceClassification,
    MinistralForQuestionAnswering,
    MinistralForSequenceClassification,
    MinistralForTokenClassification,
)
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config
from model_types import BUNDLED, load_model
from tests.cases import (
    DTYPES,
    HEADS,
    SCALES_BY_POSITION,
    cache_name,
    draw_case,
    draw_config,
    our_class,
    pair,
    their_arguments,
)
from tests.conftest import newer_torch
from tests.test_checkpoint import assert_same_weights
from tests.test_parity import assert_same
from tokenizer import Tokenizer
from vision import Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

rngs = st.randoms(use_true_random=False)
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def draw_head_case(rng, device="cpu", dtype=None, task=None, **fixed):
    """A model with a head (or the causal one), texts, and the arguments of the task, with labels."""
    task = task or rng.choice(HEADS)
    labels = rng.choice([1, 2, 3, 5])
    problem = rng.choice([None, *(p for p in PROBLEMS if labels > 1 or "single" not in p)])
    drawn = dict(num_labels=labels, problem_type=problem, classifier_dropout=rng.choice([None, 0.0, 0.3]))
    case = draw_case(rng, device, dtype, task, **drawn | dict(pad_token_id=0) | fixed)
    (B, S), N, kind = case.ids.shape, case.ours.config.num_labels, case.ours.config.problem_type
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    whole = torch.randint(0, N, (B, S), generator=g)
    numbers = torch.rand(B, N, generator=g).to(case.ours.dtype)
    # In float16 Transformers' eager scores overflow in rows that see only padding (see assert_same), so nothing must
    # read those: labels ignore padding then, and where a loss reads all tokens, nothing is padding.
    eager = case.ours.config.attn_implementation == "eager" or device == "cuda"  # see check_case
    overflows = case.ours.dtype == torch.float16 and eager
    if task == "CausalLM":
        labels = {"labels": case.labels(rng) if overflows or rng.random() < 0.5 else case.ids}
    elif task == "TokenClassification":
        ignored = torch.rand(B, S, generator=g) < rng.choice([0, 0.3])
        labels = {"labels": whole.masked_fill(ignored | ~case.padding_mask.cpu() if overflows else ignored, -100)}
    elif task == "QuestionAnswering":
        places = torch.randint(-2, S + 3, (2, B), generator=g)
        labels = {"start_positions": places[0], "end_positions": rng.choice([places[1], places[1][:, None]])}
    elif kind == "single_label_classification" or (kind is None and N > 1 and rng.random() < 0.5):
        labels = {"labels": whole[:, 0].masked_fill(torch.arange(B) > rng.choice([0, 1, 2]), -100)}
    else:
        labels = {"labels": numbers[:, 0] if N == 1 and kind != "multi_label_classification" else numbers}
    arguments = {name: tensor.to(device) for name, tensor in labels.items()}
    arguments |= {"input_ids": case.ids, "attention_mask": case.mask}
    if rng.random() < 0.2:
        arguments["position_ids"] = torch.arange(S, device=device)[None] + rng.randrange(100)
    if rng.random() < 0.2 and SCALES_BY_POSITION:
        with torch.no_grad():
            arguments["inputs_embeds"] = case.ours.base_model.embed_tokens(arguments.pop("input_ids"))
    if overflows and ("input_ids" not in arguments or task == "QuestionAnswering"):
        case.mask = arguments["attention_mask"] = None
    return case, arguments


def run(model, arguments, seed=3):
    """The output, with equal random numbers for dropout on both sides."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "inputs_embeds that end in padding")
        return model(**arguments)


def check_case(rng, device, dtype=None, **fixed):
    case, arguments = draw_head_case(rng, device, dtype, **fixed)
    if device == "cuda" and case.ours.config.attn_implementation == "sdpa":
        case.ours.config.attn_implementation = case.theirs.config._attn_implementation = "eager"
    eager = case.ours.config.attn_implementation == "eager"
    wanted = dict(output_hidden_states=True, output_attentions=eager)
    training = device == "cpu" and rng.random() < 0.5
    a, b = (run(model.train(training), arguments | wanted) for model in (case.ours, case.theirs))
    sequence = isinstance(case.ours, Ministral3ForSequenceClassification | MinistralForSequenceClassification)
    for name in ("logits", "start_logits", "end_logits"):
        assert hasattr(a, name) == hasattr(b, name)
        if hasattr(a, name):
            assert_same(getattr(a, name), getattr(b, name), None if sequence else case.padding_mask)
    if not b.loss.isnan():  # NaN: nothing but ignored labels
        assert a.loss.dtype == b.loss.dtype and torch.equal(a.loss, b.loss)
    assert case.ours.config.problem_type == case.theirs.config.problem_type
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert_same(x, y, case.padding_mask)
    assert (a.attentions is not None) == eager
    ours, theirs = ({field.name for field in fields(out)} for out in (a, b))
    assert (cache_name(case.ours) in ours) == (cache_name(case.theirs) in theirs)


@torch.no_grad()
@given(rngs)
def test_logits_and_losses_are_bit_identical(device, rng):
    check_case(rng, device)


@torch.no_grad()
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_every_combination_is_bit_identical(device, family, dtype, attn_implementation, task):
    for seed in range(6):
        rng = random.Random(f"{family}{dtype}{attn_implementation}{task}{seed}")
        check_case(rng, device, dtype, task=task, family=family, attn_implementation=attn_implementation)


# --------------------------------------------------------------------------------------------------- training


def draw_training_case(rng, **fixed):
    """A float32 case with a loss that is a number, with and without attention dropout."""
    while True:
        task = rng.choice([*HEADS, "CausalLM"])
        dropout = rng.choice([0.0, 0.0, 0.3])
        case, arguments = draw_head_case(rng, "cpu", torch.float32, task, attention_dropout=dropout, **fixed)
        case.ours.train(), case.theirs.train()
        with torch.no_grad():
            if not run(case.theirs, arguments).loss.isnan():
                return case, arguments


def checkpoint_theirs(model, on):
    """Transformers' gradient checkpointing, by its newer name where there is one."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()


def gradients(model, arguments):
    model.zero_grad()
    run(model, arguments).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@given(rngs)
def test_the_gradient_of_every_parameter_is_bit_identical(rng):
    """One backward pass in float32, heads and the causal loss, with dropout and labels at padding: no bit differs."""
    case, arguments = draw_training_case(rng)
    ours, theirs = gradients(case.ours, arguments), gradients(case.theirs, arguments)
    assert list(ours) == list(theirs) and len(ours) >= len(list(case.ours.parameters())) - 1  # embeddings may be given
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name]), name
    one = 1 in (case.ours.config.num_labels, case.ids.shape[1])  # one label or one place: nothing to learn
    assert one or any(gradient.any() for gradient in ours.values())


@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_gradients_of_single_tokens_and_under_autocast(family):
    """One token with grouped heads and fused attention. Products in bfloat16, where keys and values differ in dtype,
    with a cache whose window is full, and with gradient checkpointing."""
    for seed in range(30):
        rng = random.Random(f"{family}{seed}")
        config = draw_config(rng, family, num_attention_heads=4, num_key_value_heads=rng.choice([1, 2]), pad_token_id=0,
                             num_labels=3, sliding_window=4, head_dim=rng.choice([8, 32]))  # fmt: skip
        ours, theirs = pair(config, torch.float32, seed, task="SequenceClassification")
        for length, autocast in ((1, False), (rng.choice([1, 3, 9]), True)):
            arguments = {"input_ids": torch.randint(1, 50, (3, length)), "labels": torch.tensor([0, 1, 2])}
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results = [gradients(model, arguments) for model in (ours, theirs)]
                ours.train().gradient_checkpointing = True
                checkpoint_theirs(theirs.train(), True)
                results += [gradients(model, arguments) for model in (ours, theirs)]
                ours.eval().gradient_checkpointing = False
                checkpoint_theirs(theirs.eval(), False)
            for name, gradient in results[0].items():
                assert torch.equal(gradient, results[1][name]) and torch.equal(results[2][name], results[3][name]), name


@given(rngs)
def test_gradient_checkpointing_changes_no_bit(rng):
    """The bits are those of `use_cache=False`, with dropout and packed texts and for any `use_cache` of the
    configuration. Setting it on a model sets it on its backbone."""
    case, arguments = draw_training_case(rng)
    model, S = case.ours, case.ids.shape[1]
    if rng.random() < 0.3:
        arguments |= {"attention_mask": None, "position_ids": torch.arange(S)[None] % rng.randint(1, S)}
    model.config.use_cache = rng.random() < 0.5
    plain = gradients(model, arguments | {"use_cache": False})
    assert not model.gradient_checkpointing
    model.gradient_checkpointing = True
    assert model.gradient_checkpointing and model.base_model.gradient_checkpointing
    calls = []
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    saved = gradients(model, arguments)
    assert len(calls) == 2 * len(model.base_model.layers)  # once forward, once again in the backward pass
    for name, gradient in plain.items():
        assert torch.equal(gradient, saved[name]), name
    for wrong in ({"use_cache": True}, {"past_key_values": KVCache(model.config)}):
        with pytest.raises(ValueError, match="gradient_checkpointing runs each layer twice"):
            model(**arguments | wrong)


@pytest.mark.parametrize("task", ["", *HEADS, "CausalLM"])
@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_packed_texts_do_not_see_each_other_under_gradient_checkpointing(family, task):
    """There is no cache, also if `use_cache` is the default. The second text has the same result as alone, and all
    hidden states equal Transformers' to the bit."""
    for seed in range(4):
        rng = random.Random(f"{family}{task}{seed}")
        config = draw_config(rng, family, pad_token_id=0, use_cache=True)
        ours, theirs = pair(config, torch.float32, seed, task=task)
        ids, positions = torch.randint(1, 50, (1, 20)), torch.cat((torch.arange(8), torch.arange(12)))[None]
        ours.train().gradient_checkpointing = True
        checkpoint_theirs(theirs.train(), True)
        arguments = dict(position_ids=positions, output_hidden_states=True)
        output = ours(ids, **arguments)
        for x, y in zip(output.hidden_states, theirs(ids, **arguments).hidden_states, strict=True):
            assert torch.equal(x, y)
        alone = ours.double()(ids[:, 8:], output_hidden_states=True).hidden_states
        for x, y in zip(ours(ids, **arguments).hidden_states, alone):
            torch.testing.assert_close(x[:, 8:], y, rtol=1e-12, atol=1e-12)
        assert getattr(output, "past_key_values", None) is None


def test_packed_texts_after_images_do_not_see_each_other_under_gradient_checkpointing():
    model = vision_model(use_cache=True).double().train()
    model.gradient_checkpointing = True
    pixels = dict(pixel_values=torch.randn(1, 3, 16, 16).double(), image_sizes=[(16, 16)])
    first, second = torch.tensor([[1, 3, 3, 3, 3, 7]]), torch.tensor([[9, 8, 7, 6, 5]])
    positions = torch.cat((torch.arange(6), torch.arange(5)))[None]
    both = model(torch.cat((first, second), dim=1), position_ids=positions, **pixels).logits
    torch.testing.assert_close(both[:, 6:], model(second).logits, rtol=1e-12, atol=1e-12)


def vision_model(**fixed):
    text = draw_config(random.Random(0), "ministral3", **fixed)
    vision = PixtralVisionConfig(16, 16, 1, 2, image_size=64, patch_size=4)
    return Mistral3ForConditionalGeneration(Mistral3Config(vision, text, image_token_index=3)).eval()


def test_without_gradients_nothing_is_run_again():
    """During training a model can generate and use a cache, as in Transformers."""
    case = draw_case(random.Random(0), dtype=torch.float32)
    expected = generate(case.ours, case.ids, max_new_tokens=3)
    case.ours.train().gradient_checkpointing = True
    assert torch.equal(generate(case.ours, case.ids, max_new_tokens=3), expected)
    with torch.no_grad():
        assert case.ours(case.ids, use_cache=True).past_key_values.get_seq_length() == case.ids.shape[1]


def saved_numbers(model, ids):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        model(ids)
    return sum(sizes)


def test_gradient_checkpointing_saves_memory():
    """Tensors stored for the backward pass: with checkpointing, hardly more for eight layers than for two."""
    numbers = {}
    for layers in (2, 8):
        for on in (False, True):
            config = MinistralConfig(50, 32, 64, layers, 4, 2, num_labels=3, pad_token_id=0)
            model = MinistralForTokenClassification(config).train()
            model.gradient_checkpointing = on
            numbers[layers, on] = saved_numbers(model, torch.ones(2, 64, dtype=torch.long))
    assert numbers[8, False] - numbers[2, False] > 10 * (numbers[8, True] - numbers[2, True]) > 0


@pytest.mark.parametrize("task", [*HEADS, "CausalLM"])
@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_three_steps_of_adamw_end_in_the_same_weights(family, task):
    for seed in range(3):
        rng = random.Random(f"{family}{task}{seed}")
        case, arguments = draw_head_case(rng, "cpu", torch.float32, task, family=family, attention_dropout=0.1)
        start = copy.deepcopy(case.ours.state_dict())
        for model in (case.ours.train(), case.theirs.train()):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            for step in range(3):
                loss = run(model, arguments, step).loss
                assert not loss.isnan()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_same_weights(case.ours, case.theirs)
        moved = [name for name, p in case.ours.state_dict().items() if not p.equal(start[name])]
        assert len(moved) > len(start) / 2


# ----------------------------------------------------------------------------------------------- which token


@torch.no_grad()
@given(rngs)
def test_a_text_is_classified_by_its_last_token(device, rng):
    """In float64, in a batch padded on either side, each text has the logits of its last token when it is alone."""
    case, _ = draw_head_case(rng, device, torch.float32, "SequenceClassification")
    model = case.truth()
    positions = (case.padding_mask.long().cumsum(1) - 1).clamp(min=0)
    batch = model(case.ids, case.mask, positions).logits
    for row, is_text in enumerate(case.padding_mask):
        hidden = model.model(case.ids[row][is_text][None]).last_hidden_state[0, -1]
        torch.testing.assert_close(batch[row], model.score(hidden), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_padding_that_cannot_be_seen():
    torch.manual_seed(0)
    config = MinistralConfig(50, 16, 16, 1, 2, 1, num_labels=3)
    model = MinistralForSequenceClassification(config).eval()
    ids = torch.randint(1, 50, (2, 5))
    with pytest.raises(ValueError, match=r"2 texts without config\.pad_token_id"):
        model(ids)
    every = model.score(model.model(ids).last_hidden_state)
    assert model(ids[:1]).logits.equal(model.score(model.model(ids[:1]).last_hidden_state)[:, -1])
    config.pad_token_id = 7
    ids[0, 3:], ids[1, 0] = 7, 7
    every = model.score(model.model(ids).last_hidden_state)
    assert model(ids).logits.equal(torch.stack((every[0, 2], every[1, 4])))
    embeds, mask = model.model.embed_tokens(ids), (ids != 7).long()
    with pytest.warns(UserWarning, match="inputs_embeds that end in padding"):
        hidden = model(attention_mask=mask, inputs_embeds=embeds).logits
    assert hidden.equal(model.score(model.model(ids, mask).last_hidden_state)[:, -1])


@torch.no_grad()
def test_a_cache_continues_a_text():
    case, _ = draw_head_case(random.Random(2), task="SequenceClassification", family="ministral3")
    model, ids = case.truth(), torch.randint(1, 50, (2, 12))
    first = model(ids[:, :7], use_cache=True)
    second = model(ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(ids).logits, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "config, labels, message",
    [
        ({"num_labels": 1}, torch.tensor([True, False]), "labels of torch.bool for regression; allowed: floating"),
        ({"num_labels": 1}, torch.rand(2, 2), r"labels for regression must be (2,) or (2, 1); found (2, 2)"),
        ({"num_labels": 3, "problem_type": "regression"}, torch.rand(2), "labels for regression must be (2, 3); found"),
        ({"num_labels": 3}, torch.tensor([0, 3]), "labels from 0 to 3; allowed: 0 to 2, or -100"),
        ({"num_labels": 3}, torch.tensor([-1, 0]), "labels from -1 to 0; allowed: 0 to 2, or -100"),
        ({"num_labels": 3}, torch.tensor([0, 1, 2]), "single_label_classification must be (2,) or (2, 1); found (3,)"),
        ({"num_labels": 3, "problem_type": PROBLEMS[1]}, torch.rand(2), "labels of torch.float32; allowed: whole"),
        ({"num_labels": 3}, torch.rand(2), "labels for multi_label_classification must be (2, 3); found (2,)"),
        ({"num_labels": 3}, torch.rand(2, 3) + 1, "for multi_label_classification; allowed: 0 to 1"),
        ({"num_labels": 3}, torch.rand(2, 3) > 0.5, "labels of torch.bool for multi_label_classification; allowed"),
        ({"num_labels": 3, "problem_type": PROBLEMS[2]}, torch.ones(2, 3).long(), "torch.int64 for multi_label"),
    ],
)
def test_wrong_labels_of_a_text(config, labels, message):
    model = MinistralForSequenceClassification(MinistralConfig(50, 16, 16, 1, 2, 1, pad_token_id=0, **config))
    before = model.config.problem_type
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.ones(2, 4).long(), labels=labels)
    assert model.config.problem_type == before


@torch.no_grad()
def test_forms_of_labels():
    """Any type of whole number, one column or none; Transformers fails on int32."""
    for labels, count in ((torch.tensor([2, 0]), 3), (torch.tensor([5, -3]), 1)):
        config = MinistralConfig(50, 16, 16, 1, 2, 1, pad_token_id=0, num_labels=count)
        model = MinistralForSequenceClassification(config)
        losses = [model(torch.ones(2, 4).long(), labels=form).loss for form in (labels, labels[:, None])]
        for dtype in (torch.int32, torch.int8, *((torch.float32,) if count == 1 else ())):
            model.config.problem_type = None
            losses.append(model(torch.ones(2, 4).long(), labels=labels.to(dtype)).loss)
            assert model.config.problem_type == PROBLEMS[count > 1]
        assert len({loss.item() for loss in losses}) == 1


@pytest.mark.parametrize("task", HEADS)
def test_a_fresh_head_is_drawn_as_transformers_draws_it(task):
    config = Ministral3Config(50, 512, 16, 1, 2, 1, num_labels=9, initializer_range=0.3)
    model = our_class("ministral3", task)(config)
    head = model.get_submodule(model.new_layer)
    assert 0.25 < head.weight.std() < 0.35 and (head.bias is None or not head.bias.any())


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(2, 3).long(), "labels must be (2, 4); found (2, 3)"),
        (torch.full((2, 4), 2), "labels from 2 to 2; allowed: 0 to 1, or -100"),
        (torch.zeros(2, 4), "labels of torch.float32; allowed: whole numbers"),
    ],
)
def test_wrong_labels_of_tokens(labels, message):
    config = MinistralConfig(50, 16, 16, 1, 2, 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        MinistralForTokenClassification(config)(torch.ones(2, 4).long(), labels=labels)
    if "must be" in message or "torch.float32" in message:
        with pytest.raises(ValueError, match=re.escape(message)):
            MinistralForCausalLM(config)(torch.ones(2, 4).long(), labels=labels)


@pytest.mark.parametrize(
    "positions, message",
    [
        ({"labels": torch.zeros(2).long()}, "a span is given as start_positions and end_positions"),
        ({"start_positions": torch.zeros(2).long()}, "give both start_positions and end_positions, or neither"),
        ({"start_positions": torch.zeros(2).long(), "end_positions": torch.zeros(2)}, "end_positions of torch.float32"),
        ({"start_positions": torch.zeros(3).long(), "end_positions": torch.zeros(2).long()},
         "start_positions must be (2,) or (2, 1); found (3,)"),
    ],
)  # fmt: skip
def test_wrong_positions(positions, message):
    model = MinistralForQuestionAnswering(MinistralConfig(50, 16, 16, 1, 2, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.ones(2, 4).long(), **positions)


def test_label_names():
    def three(**given):
        config = MinistralConfig(**given)
        assert MinistralConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        return config.num_labels, config.id2label, config.label2id

    two = {0: "LABEL_0", 1: "LABEL_1"}
    assert three() == three(num_labels=2) == three(id2label=two) == (2, two, {"LABEL_0": 0, "LABEL_1": 1})
    names = (2, {0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    assert three(id2label=names[1]) == three(label2id=names[2]) == three(id2label={"1": "yes", "0": "no"}) == names
    assert three(num_labels=3, id2label=two)[1] == three(num_labels=3)[1] == {**two, 2: "LABEL_2"}
    assert not {"id2label", "label2id", "problem_type"} & MinistralConfig().to_dict().keys()
    # Transformers writes these when labels are named after their number was given.
    assert three(id2label={0: "a", 1: "b"}, label2id={"LABEL_0": 0, "LABEL_1": 1})[2] == {"a": 0, "b": 1}
    assert three(id2label=two, label2id={"a": 0, "b": 1})[1] == {0: "a", 1: "b"}
    assert three(id2label={0: "O", 1: "O"}, label2id={"O": 0})[1] == {0: "O", 1: "O"}
    for wrong, message in (
        ({"num_labels": True}, "num_labels=True is impossible"),
        ({"num_labels": 0}, "num_labels=0 is impossible; allowed: a whole number from 1 to 100000"),
        ({"num_labels": 3, "id2label": names[1]}, "num_labels=3 is impossible; allowed: 2, the number of given names"),
        ({"id2label": {1: "a", 2: "b"}}, "labels numbered 1, 2; allowed: 0, 1, 2, ..."),
        ({"label2id": {"a": 0, "b": 0, "c": 2}}, "labels numbered 0, 2; allowed"),
        ({"id2label": ["no", "yes"]}, "allowed: an object, or none"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is impossible; allowed: None, regression"),
        ({"num_labels": 1, "problem_type": PROBLEMS[1]}, "allowed: the two others, for num_labels=1"),
        ({"classifier_dropout": 1.5}, "classifier_dropout=1.5 is impossible"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            MinistralConfig(**wrong)


# ----------------------------------------------------------------------------------------------------- files


@torch.no_grad()
@given(rngs)
def test_directories_go_both_ways(tmp_path_factory, rng):
    """Saved here and loaded by Transformers, and the reverse: equal weights, and equal labels in config.json."""
    case, arguments = draw_head_case(rng)
    run(case.ours, arguments), run(case.theirs, arguments)  # sets problem_type
    attn, cls = case.ours.config.attn_implementation, type(case.ours)
    for source, target in ((case.ours, type(case.theirs)), (case.theirs, cls)):
        path = tmp_path_factory.mktemp("head")
        source.save_pretrained(path)
        again = target.from_pretrained(path, attn_implementation=attn)
        assert_same_weights(case.ours, again)
        for name in ("num_labels", "id2label", "label2id", "problem_type", "classifier_dropout"):
            theirs = getattr(again.config, name, None)
            assert theirs == getattr(case.ours.config, name), name
    assert json.loads((path / "config.json").read_text())["architectures"] == [cls.__name__]


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_a_language_model_becomes_a_classifier(family, task, tmp_path):
    """From a causal language model's files and from a backbone's, here and in Transformers'."""
    for seed in range(4):
        rng = random.Random(f"{family}{task}{seed}")
        language_model = draw_case(rng, dtype=torch.bfloat16, family=family, pad_token_id=0, initializer_range=0.5)
        cls, layer = our_class(family, task), "qa_outputs" if task == "QuestionAnswering" else "score"
        new = [f"{layer}.weight"] if task == "SequenceClassification" else [f"{layer}.bias", f"{layer}.weight"]
        for i, source in enumerate((language_model.ours, language_model.ours.model, language_model.theirs)):
            path = tmp_path / f"{seed}-{i}"
            source.save_pretrained(path)
            with pytest.warns(UserWarning, match=rf"has no {', '.join(new)}: initialised, to be trained") as caught:
                model = cls.from_pretrained(path, torch.float32, num_labels=7)
            assert len(caught) == 1 and caught[0].filename == __file__
            assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
            for name, p in model.base_model.state_dict().items():
                assert p.equal(language_model.ours.model.state_dict()[name].float()), name
            head = getattr(model, layer)
            assert head.weight.shape == (2 if layer == "qa_outputs" else 7, model.config.hidden_size)
            assert 0.2 < head.weight.std() < 1.0 and (head.bias is None or not head.bias.any())
        # And back: the fine-tuned backbone is a backbone.
        model.save_pretrained(path)
        backbone = our_class(family, "").from_pretrained(path)
        assert_same_weights(backbone, model.base_model)


def test_files_that_do_not_fit(tmp_path):
    config = MinistralConfig(50, 16, 16, 1, 2, 1, num_labels=3)
    MinistralForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 tensors misshapen: score.weight is \[3, 16\]"):
        MinistralForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    with pytest.raises(ValueError, match=r"1 tensors missing: score.bias"):
        MinistralForTokenClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 tensors unexpected: score.weight"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"labels: no argument here and no field of MinistralConfig"):
        MinistralForSequenceClassification.from_pretrained(tmp_path, labels=4)
    config = MinistralForSequenceClassification.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"}).config
    assert config.label2id == {"a": 0, "b": 1, "c": 2}


def test_labels_of_the_call_replace_those_of_the_file(tmp_path):
    MinistralForCausalLM(MinistralConfig(50, 16, 16, 1, 2, 1, id2label={0: "a", 1: "b"})).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"num_labels": 2}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for changes, names in (
        ({}, ["a", "b"]),
        ({"num_labels": 2}, ["a", "b"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {0: "x", 1: "y", 2: "z"}}, ["x", "y", "z"]),
        ({"label2id": {"y": 1, "x": 0}}, ["x", "y"]),
        ({"num_labels": 2, "id2label": {0: "x", 1: "y"}}, ["x", "y"]),
    ):
        with pytest.warns(UserWarning, match=r"has no score\.weight"):
            model = MinistralForSequenceClassification.from_pretrained(tmp_path, **changes)
        assert [model.config.id2label[i] for i in range(len(names))] == names and model.num_labels == len(names)


def test_labels_set_after_construction():
    config = MinistralConfig(50, 16, 16, 1, 2, 1)
    config.num_labels = 5
    assert MinistralForSequenceClassification(config).config.id2label[4] == "LABEL_4"
    assert MinistralConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_files_in_which_the_label_maps_differ(tmp_path):
    """Transformers writes such files if both names and number of labels are given."""
    config = MinistralConfig(50, 16, 16, 1, 2, 1)
    theirs = transformers.MinistralForCausalLM(transformers.MinistralConfig(**their_arguments(config)))
    theirs.save_pretrained(tmp_path / "base")
    transformers.MinistralForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, id2label={0: "a", 1: "b", 2: "c"}
    ).save_pretrained(tmp_path / "head")
    written = json.loads((tmp_path / "head" / "config.json").read_text())
    assert written["label2id"] != {"a": 0, "b": 1, "c": 2}
    ours = MinistralForSequenceClassification.from_pretrained(tmp_path / "head")
    assert ours.config.label2id == {"a": 0, "b": 1, "c": 2}


# ------------------------------------------------------------------------------------- torch.compile, torch.export


def traced(model, ids, arguments):
    """The result of the model, of its exported program, saved and loaded, and of its graph compiled without a break."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (ids,), arguments, strict=False), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    results = [run(ids, **arguments) for run in (model, exported, compiled)]
    names = [name for name in ("logits", "start_logits", "last_hidden_state") if hasattr(results[0], name)]
    return [getattr(result, names[0]) for result in results]


slow = pytest.mark.slow
CLASSIFIER = "SequenceClassification"  # its head looks for padding
OTHERS = [pytest.param(task, marks=slow) for task in ("", "CausalLM", *HEADS) if task != CLASSIFIER]


@newer_torch
@torch.no_grad()
@pytest.mark.parametrize("task", [CLASSIFIER, *OTHERS])
@pytest.mark.parametrize("family", [pytest.param("ministral", marks=slow), "ministral3"])
def test_models_compile_and_export_whole(family, task):
    """Also with masks and packed texts. Checks of values are not part of the graph. The model itself is unchanged,
    also if it is exported before it has computed anything."""
    model = our_class(family, task)(draw_config(random.Random(3), family, pad_token_id=0)).eval()
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = 0
    mask, packed = (ids != 0).long(), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    variants = [{"attention_mask": mask}, {}, {"position_ids": packed}]
    for variant in variants if task == "CausalLM" else variants[:1]:
        results = traced(model, ids, {"use_cache": False} | variant)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)
    fresh = our_class(family, task)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(outputs(fresh, ids), outputs(model, ids), strict=True))


def outputs(model, ids):
    return model(ids, output_hidden_states=True).hidden_states


@torch.no_grad()
def test_an_exported_model_takes_texts_of_other_lengths():
    model = MinistralForCausalLM(draw_config(random.Random(3), "ministral")).eval()
    ids, other = torch.ones(1, 9, dtype=torch.long), torch.randint(1, 50, (1, 13))
    shapes = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    program = torch.export.export(model, (ids,), {"use_cache": False}, dynamic_shapes=shapes, strict=False)
    logits = program.module()(other, use_cache=False).logits
    torch.testing.assert_close(logits, model(other).logits, rtol=1e-5, atol=1e-5)


@newer_torch
@torch.no_grad()
def test_a_vision_model_compiles_and_exports_whole():
    pixels = dict(pixel_values=torch.randn(1, 3, 16, 16), image_sizes=[(16, 16)], use_cache=False)
    results = traced(vision_model(), torch.tensor([[1, 3, 3, 3, 3, 7]]), pixels)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- example


@pytest.mark.slow
def test_the_example():
    """The data are as described, and a short run is better than the baseline on the held-out plays."""
    train, test = verse.load_data()
    assert len(train) > 6600 and len(test) == 391 and not {text for text, _ in train} & {text for text, _ in test}
    by_text = dict(test)
    assert sum(by_text.values()) / len(test) == pytest.approx(0.7, abs=0.05)
    assert by_text[next(text for text in by_text if text.startswith("To be, or not to be,--that is the"))] == 1
    assert by_text[next(text for text in by_text if text.startswith("Speak the speech, I pray you"))] == 0
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="has no score.weight"):
        model = Ministral3ForSequenceClassification.from_pretrained(BUNDLED, torch.float32, id2label=verse.LABELS)
    tokenizer = Tokenizer.from_dir(BUNDLED)
    rare = [speech for speech in train if speech[1] == 0]
    verse.fine_tune(model, tokenizer, rare[:300] + [s for s in train if s[1] == 1][::20], epochs=1)
    balanced = [s for s in test if s[1] == 0] + [s for s in test if s[1] == 1][: sum(label == 0 for _, label in test)]
    is_verse = verse.probabilities(model, tokenizer, balanced) > 0.5
    right = (is_verse == torch.tensor([label for _, label in balanced])).float().mean()
    assert right > 0.6, right
