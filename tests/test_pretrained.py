"""Names of Transformers that every model has: outputs, arguments of loading and saving, embeddings, and what holds for
each class (padding, batches, embeddings in the place of ids, gradient checkpointing, files)."""

import copy
import dataclasses
import json
import math
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.serialization._base import parse_size_to_int
from hypothesis import given, strategies as st
from torch import nn
from transformers.models.mistral3 import modeling_mistral3

import checkpoint
import heads
import outputs
import pretrained
import trainable
import vision
from checkpoint.writer import parse_size
from checks import LOADING_CURES, SAVING_CURES, devices_present
from generate import generate
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config, Ministral3ForCausalLM
from model_types import load_model
from tests import test_vision
from tests.cases import VOCAB, draw_config, our_class, pair
from tests.conftest import at_most
from vision import Mistral3ForConditionalGeneration, Mistral3Model
from vision_config import Mistral3Config, PixtralVisionConfig

rngs = st.randoms(use_true_random=False)
OUTPUTS = (
    outputs.BaseModelOutputWithPast, outputs.CausalLMOutputWithPast, heads.SequenceClassifierOutputWithPast,
    heads.TokenClassifierOutput, heads.QuestionAnsweringModelOutput, vision.BaseModelOutput,
    vision.Mistral3ModelOutputWithPast, vision.Mistral3CausalLMOutputWithPast,
)  # fmt: skip
TASKS = ("", "CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
MODELS = [(family, task) for family in ("ministral", "ministral3") for task in TASKS]
MODELS += [("mistral3", ""), ("mistral3", "ConditionalGeneration")]
models = pytest.mark.parametrize("family, task", MODELS)
IDS = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
IDS[IDS == 10] = 11  # [IMG]


def text_config(family, seed=0, **fixed):
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    if family == "ministral3":
        layers = {"sliding_window": None}
    common = dict(pad_token_id=0, num_hidden_layers=2, attn_implementation="eager", classifier_dropout=0.0)
    return draw_config(random.Random(seed), family=family, **common | layers | fixed)


def make_config(family, **fixed):
    """A configuration in which every feature fires within 9 tokens."""
    if family != "mistral3":
        return text_config(family, **fixed)
    parts = PixtralVisionConfig(8, 12, 2, 2, image_size=16, patch_size=2), text_config("ministral3")
    return Mistral3Config(*parts, attn_implementation="eager", spatial_merge_size=1, **fixed)


def make(family, task, dtype=torch.float64, **fixed):
    """A model with weights that are far from a fresh model's."""
    classes = {"": Mistral3Model, "ConditionalGeneration": Mistral3ForConditionalGeneration}
    cls = classes[task] if family == "mistral3" else our_class(family, task)
    model = cls(make_config(family, **fixed)).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4 + (p.ndim == 1))
    return model


def arguments_of(model, ids=IDS):
    """Arguments of `forward`: ids, and two images of 2 x 1 patches in the first two rows for a vision model."""
    if not hasattr(model.base_model, "vision_tower"):
        return {"input_ids": ids}
    ids = ids.clone()
    ids[:2, 1:3] = 10
    pixels = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(2), dtype=model.dtype)
    return {"input_ids": ids, "pixel_values": pixels[: min(len(ids), 2)]}


def main_result(out):
    """What the model computes for each token (or text)."""
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), dim=-1)
    return out.get("logits", out.get("last_hidden_state"))


def loss_of(model, arguments):
    """A loss of all results, so that every parameter has a gradient."""
    return main_result(model(**arguments, use_cache=False)).square().mean()


# --------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("cls", OUTPUTS)
def test_fields_are_in_the_order_of_transformers(cls):
    theirs = getattr(modeling_mistral3, cls.__name__, None) or getattr(transformers.modeling_outputs, cls.__name__)
    renamed = {"cache": "past_key_values", "image_outputs": "image_hidden_states"}
    names = [renamed.get(field.name, field.name) for field in dataclasses.fields(theirs)]
    ours = [field.name for field in dataclasses.fields(cls)]
    more = {"aux_loss", "router_logits", "video_outputs", "audio_outputs", "attentions"} - set(ours)
    assert [name for name in names if name not in more] == ours


@pytest.mark.parametrize("cls", OUTPUTS)
@given(data=st.data())
def test_outputs_are_read_like_transformers(cls, data):
    """By name, number and slice, and as a tuple; fields that are None do not count."""
    names = [field.name for field in dataclasses.fields(cls)]
    their_names = {name: name.replace("past_key_values", "cache") for name in names}
    theirs_class = dataclasses.make_dataclass(
        "Theirs", [(name, object, None) for name in their_names.values()], bases=(transformers.utils.ModelOutput,)
    )
    values = [data.draw(st.sampled_from([None, torch.zeros(i + 1), (torch.ones(i + 1),)])) for i in range(len(names))]
    ours, theirs = cls(*values), theirs_class(*values)
    same = lambda left, right: left is right or (len(left) == len(right) and all(map(same, left, right)))  # noqa: E731
    assert same(ours.to_tuple(), theirs.to_tuple()) and len(ours) == len(theirs)
    assert list(ours) == list(ours.keys()) and [their_names[name] for name in ours] == list(theirs.keys())
    assert dict(ours).keys() == dict(ours.items()).keys() == set(ours)
    assert same(tuple(ours.values()), tuple(theirs.values()))
    for name, their_name in (*their_names.items(), ("no such", "no such")):
        assert (name in ours) == (their_name in theirs) and ours.get(name, 5) is theirs.get(their_name, 5)
        if name not in ours:
            with pytest.raises(KeyError, match=name):
                ours[name]
        else:
            assert ours[name] is theirs[their_name]
    number = data.draw(st.integers(-len(names) - 1, len(names)))
    if -len(ours) <= number < len(ours):
        assert ours[number] is theirs[number]
    else:
        with pytest.raises(IndexError):
            ours[number]
    part = data.draw(st.slices(len(names)))
    assert same(ours[part], theirs[part])


@torch.no_grad()
@models
def test_a_tuple_has_the_values_of_the_output(family, task):
    """`return_dict` in the call, of `forward` itself too, and in the configuration; the call wins."""
    model = make(family, task)
    arguments = arguments_of(model) | dict(output_hidden_states=True, output_attentions=True, use_cache=False)
    expected = model(**arguments).to_tuple()
    assert isinstance(expected, tuple) and len(expected) >= 3
    results = [model(**arguments, return_dict=False), model.forward(**arguments, return_dict=False)]
    for module in model.modules():
        if isinstance(module, pretrained.PreTrainedModel):
            module.config.return_dict = False
    results += [model(**arguments), model.forward(**arguments), model(**arguments, return_dict=None)]
    assert not isinstance(model(**arguments, return_dict=True), tuple)
    for result in results:
        assert isinstance(result, tuple)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_tuple_compiles_and_exports():
    model = make("ministral3", "CausalLM", return_dict=False)
    expected = model(IDS, use_cache=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(IDS, use_cache=False)
    exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False).module()(IDS, use_cache=False)
    for result in (compiled, exported):
        assert isinstance(result, tuple)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)

    def read(ids):
        out = model(ids, use_cache=False, return_dict=True)
        return out[0], out["logits"], out.to_tuple(), list(out.keys()), len(out), "loss" in out

    results = torch.compile(read, backend="eager", fullgraph=True)(IDS)
    assert results[3:] == (["logits"], 1, False) and torch.equal(results[0], results[1])


@torch.no_grad()
@models
def test_the_configuration_says_what_is_returned(family, task):
    """The arguments of the call win. A vision model also asks where its text part does."""
    for name in ("output_hidden_states", "output_attentions"):
        key = name.removeprefix("output_")
        for part in ("whole", "text"):
            model = make(family, task)
            assert key not in model(**arguments_of(model))
            config = model.config if part == "whole" else model.config.get_text_config()
            setattr(config, name, True)
            for value, expected in (({}, True), ({name: None}, True), ({name: False}, False)):
                assert (key in model(**arguments_of(model), **value)) == expected
            out = model(**arguments_of(model))
            torch.testing.assert_close(out[key], getattr(model(**arguments_of(model), **{name: True}), key))


@torch.no_grad()
def test_the_vision_tower_returns_hidden_states():
    tower = make("mistral3", "").vision_tower
    pixels = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    assert list(tower(pixels)) == ["last_hidden_state"]
    tower.config.output_hidden_states = True
    assert len(tower(pixels).hidden_states) == 3 and len(tower(pixels, return_dict=False)) == 2
    with pytest.raises(ValueError, match="output_attentions=True is impossible; allowed: False"):
        PixtralVisionConfig(output_attentions=True)


@torch.no_grad()
def test_generation_does_not_depend_on_what_is_returned():
    plain = make("ministral3", "CausalLM", torch.float32, attn_implementation="sdpa")
    returns = dict(return_dict=False, output_hidden_states=True)
    model = make("ministral3", "CausalLM", torch.float32, attn_implementation="sdpa", **returns)
    expected = generate(plain, IDS, max_new_tokens=4, eos_token_id=())
    for fast in (True, False):
        assert torch.equal(generate(model, IDS, max_new_tokens=4, eos_token_id=(), fast=fast), expected)


@pytest.mark.parametrize("name, default", [("return_dict", True), ("output_hidden_states", False),
                                           ("output_attentions", False)])  # fmt: skip
@pytest.mark.parametrize("family", ["ministral", "ministral3", "mistral3"])
def test_output_fields_of_configurations(family, name, default, tmp_path):
    """They are written where they are set, read here and by Transformers, and follow no other field in position."""
    config = make_config(family)
    assert getattr(config, name) is default and name not in config.to_dict()
    changed = dataclasses.replace(config, **{name: not default})
    content = json.loads(json.dumps(changed.to_dict()))
    assert content[name] is not default
    assert dataclasses.replace(type(config).from_dict(content), attn_implementation="eager") == changed
    their_config = transformers.AutoConfig.for_model(**content)
    assert getattr(their_config, name) is not default
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(type(config).from_dict(their_config.to_dict()), name) is not default
    with pytest.raises(ValueError, match=f"{name}='no' is impossible; allowed: true or false"):
        dataclasses.replace(config, **{name: "no"})
    assert MinistralConfig(50, 64).hidden_size == 64 and PixtralVisionConfig(128).hidden_size == 128

    if family != "mistral3":
        make(family, "CausalLM").save_pretrained(tmp_path)
        assert getattr(load_model(tmp_path, **{name: not default}).config, name) is not default


# ------------------------------------------------------------------------------------------------- from_pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of ours and its directory."""
    path = tmp_path_factory.mktemp("saved")
    model = make("ministral3", "CausalLM", torch.float32)
    model.save_pretrained(path)
    return model, path


loaders = pytest.mark.parametrize("load", [Ministral3ForCausalLM.from_pretrained, load_model])


@loaders
def test_one_device_under_its_names(saved, load):
    _, path = saved
    present = devices_present()[0]
    for device_map in ("auto", {"": "auto"}):
        assert load(path, device_map=device_map).device.type == load(path, device=device_map and "auto").device.type
        assert load(path, device_map=device_map).device.type == present
    for device_map in ("cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}):
        assert load(path, device_map=device_map).device.type == "cpu"


@loaders
@pytest.mark.parametrize("device_map", [
    "balanced", "balanced_low_0", "sequential", "disk", {"": "disk"}, True, 99, -1, {}, ["cpu"],
    {"model": "cpu", "lm_head": "cpu"}, {"": "cpu", "lm_head": "cpu"},
])  # fmt: skip
def test_several_devices_are_refused(saved, load, device_map):
    message = r"device_map=.* is not supported.*; supported: 'auto', or one device"
    with pytest.raises(ValueError, match=message) as error:
        load(saved[1], device_map=device_map)
    assert "\n" not in str(error.value)
    if not isinstance(device_map, str) and device_map not in (99, {"": "disk"}):
        assert "is not supported; supported" in str(error.value)  # PyTorch is not asked: it takes True for a number


@pytest.mark.parametrize("choice, cuda, mps", [("cuda", True, True), ("mps", False, True), ("cpu", False, False)])
def test_the_device_that_auto_chooses(monkeypatch, choice, cuda, mps):
    from checks import as_device
    from command import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert as_device("auto").type == as_device(None, "auto").type == choose_device("auto").type == choice


def test_a_device_is_no_type(saved):
    for dtype in ("cpu", torch.device("cpu")):
        with pytest.raises(ValueError, match=r"is not supported; .*\(a device is given as device=\)"):
            load_model(saved[1], dtype)


@loaders
def test_arguments_of_transformers_that_change_nothing(saved, load):
    _, path = saved
    unset = {name: (None, False, "")[number % 3] for number, name in enumerate(LOADING_CURES)}
    harmless = dict(trust_remote_code=True, low_cpu_mem_usage=True, use_safetensors=True)
    loaded = load(path, torch_dtype="auto", attn_implementation="sdpa", **harmless, **unset)
    assert torch.equal(loaded(IDS).logits, load(path)(IDS).logits)
    assert loaded.name_or_path == str(path) and not hasattr(loaded.config, "trust_remote_code")


@loaders
@pytest.mark.parametrize("name, value", [(name, "x") for name in LOADING_CURES] + [
    ("quantization_config", {"load_in_4bit": True}), ("load_in_8bit", True), ("output_loading_info", True),
    ("use_safetensors", False), ("attn_implementation", "flash_attention_2"), ("attn_implementation", "flex_attention"),
])  # fmt: skip
def test_arguments_of_transformers_that_are_refused(saved, load, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported; .*") as error:
        load(saved[1], **{name: value})
    assert "\n" not in str(error.value)


def test_the_documentation_names_every_refused_argument():
    page = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    section = page.partition("\n## Models\n")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("|")]
    refused = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[3] for row in rows)))
    assert refused == LOADING_CURES.keys() | SAVING_CURES.keys()


def test_unknown_arguments_are_refused(saved):
    with pytest.raises(ValueError, match="no_such: no argument here and no field of Ministral3Config"):
        load_model(saved[1], no_such=1)


@loaders
def test_arguments_of_the_hub_are_passed_on(saved, load, monkeypatch):
    """`load_model` asks the Hub once."""
    calls = []

    def find(name, revision=None, parts="model", token=None, cache_dir=None, local_files_only=False):
        calls.append((str(name), revision, parts, token, cache_dir, local_files_only))
        return saved[1]

    monkeypatch.setattr(checkpoint, "find", find)
    model = load("owner/name", revision="main", token="secret", cache_dir="somewhere", local_files_only=True)
    assert calls[0] == ("owner/name", "main", "model", "secret", "somewhere", True)
    assert model.name_or_path == "owner/name"
    assert [call for call in calls[1:] if call[0] == "owner/name"] == []


@torch.no_grad()
def test_a_configuration_in_the_place_of_the_stored_one(saved):
    model, path = saved
    config = dataclasses.replace(model.config, rms_norm_eps=0.5, tie_word_embeddings=False)
    given_config = copy.deepcopy(config)
    with pytest.warns(UserWarning, match="has no lm_head.weight, so it is tied"):
        loaded = load_model(path, config=config, attn_implementation="sdpa")
    assert config == given_config and loaded.config is not config
    assert loaded.config.rms_norm_eps == 0.5 and loaded.config.attn_implementation == "sdpa"
    assert not torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.warns(UserWarning, match="has no lm_head.weight, so it is tied"):
        loaded = load_model(path, config=config)
    assert config == given_config and loaded.config.tie_word_embeddings
    with pytest.raises(ValueError, match="config and num_labels are given; set the fields in the configuration"):
        load_model(path, config=config, num_labels=3)
    for other in (str(path), transformers.Ministral3Config(), PixtralVisionConfig(), {}):
        with pytest.raises(ValueError, match="config must be a Ministral3Config of this project, or left out; found"):
            load_model(path, config=other)


# ------------------------------------------------------------------------------------------------- save_pretrained


@given(st.integers(1, 10**6), st.integers(0, 99), st.sampled_from(["KB", "MB", "GB", "TB"]), st.booleans())
def test_sizes_of_shards(whole, hundredths, unit, space):
    text = f"{whole}.{hundredths:02}{' ' * space}{unit}"
    assert parse_size(text) == parse_size_to_int(text) and parse_size(f"{whole}{unit}") == parse_size(f"{whole} {unit}")
    power = "KMGT".index(unit[0]) + 1
    assert parse_size(f"{whole}{unit[0]}iB") == whole * 1024**power and parse_size(whole) == whole


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "", "5", "GB", "5 pages", "-5GB", "0GB", "1e3MB", "5GBs"])
def test_sizes_that_are_none(saved, size, tmp_path):
    message = re.escape(f"max_shard_size={size!r} is impossible; allowed: a whole number of bytes not below 1, or text")
    with pytest.raises(ValueError, match=message):
        saved[0].save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_arguments_of_saving(saved, tmp_path):
    model, _ = saved
    unset = {name: None for name in SAVING_CURES}
    model.save_pretrained(tmp_path / "all", max_shard_size="4KB", safe_serialization=True, **unset)
    assert len(list((tmp_path / "all").glob("model-*.safetensors"))) > 3
    assert torch.equal(load_model(tmp_path / "all", attn_implementation="eager")(IDS).logits, model(IDS).logits)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    for name in [*SAVING_CURES, "safe_serialization"]:
        with pytest.raises(ValueError, match=f"{name}=.* is not supported; "):
            model.save_pretrained(tmp_path / "none", **{name: name != "safe_serialization"})
    with pytest.raises(ValueError, match="max_shard_bytes: no argument of save_pretrained"):
        model.save_pretrained(tmp_path / "none", max_shard_bytes=5)

    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "doubled", state_dict=doubled)
    again = load_model(tmp_path / "doubled").state_dict()
    assert again.keys() == doubled.keys() and all(torch.equal(again[name], doubled[name]) for name in again)
    with pytest.raises(ValueError, match=r"state_dict needs model.norm.weight of shape \("):
        model.save_pretrained(tmp_path / "none", state_dict=doubled | {"model.norm.weight": torch.ones(2, 2)})


# ------------------------------------------------------------------------------------------------------ embeddings


def assert_same_state(ours, theirs):
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert [name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, expected[name])] == []


def draw_resizing(rng):
    """Arguments of `resize_token_embeddings`."""
    arguments = {"new_num_tokens": rng.choice([None, VOCAB, 11, 30, 51, 60, 64, 128])}
    if arguments["new_num_tokens"] is None or rng.random() < 0.4:
        arguments["pad_to_multiple_of"] = rng.choice([None, 1, 8, 64])
    if rng.random() < 0.7:
        arguments["mean_resizing"] = rng.random() < 0.5
    return arguments


def resize(model, arguments):
    torch.manual_seed(5)
    embeddings = model.resize_token_embeddings(**arguments)
    assert embeddings is model.get_input_embeddings()
    return embeddings


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
@at_most(40)
@given(rngs)
def test_resizing_is_transformers(task, rng):
    """Old rows, new rows (with the same seed), the tie, the configuration, the loss and a text."""
    ours, theirs = pair(draw_config(rng, hidden_act="silu"), rng.choice([torch.float32, torch.bfloat16]), 3, task=task)
    old = ours.get_input_embeddings().weight.clone()
    for arguments in [draw_resizing(rng) for _ in range(rng.randint(1, 2))]:
        embeddings, expected = resize(ours, arguments), resize(theirs, arguments)
        assert ours.get_input_embeddings().num_embeddings == expected.num_embeddings == len(embeddings.weight)
        assert embeddings.padding_idx == expected.padding_idx
        assert ours.config.vocab_size == theirs.config.vocab_size
        assert_same_state(ours, theirs)
        if min(len(embeddings.weight), VOCAB) == VOCAB:
            assert torch.equal(embeddings.weight[: len(old)][:11], old[:11])
    V = ours.config.vocab_size
    ids = torch.randint(1, V, (1, 6), generator=torch.Generator().manual_seed(1))
    if task == "CausalLM":
        assert (ours.lm_head.weight is embeddings.weight) == ours.config.tie_word_embeddings
        assert ours.lm_head.out_features == V
        assert torch.equal(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss)
        assert generate(ours, ids, max_new_tokens=3, eos_token_id=()).shape == (1, 9)
    else:
        assert torch.equal(main_result(ours(ids)), main_result(theirs(ids)))


@torch.no_grad()
@at_most(40)
@given(rngs)
def test_resizing_a_vision_model_is_transformers(rng):
    case = test_vision.draw_case(rng, dtype=torch.float32, image_token_index=10)
    arguments = draw_resizing(rng)
    resize(case.ours, arguments), resize(case.theirs, arguments)
    assert_same_state(case.ours, case.theirs)
    V = case.ours.get_input_embeddings().num_embeddings
    assert case.ours.config.text_config.vocab_size == case.theirs.config.text_config.vocab_size == V
    assert case.ours.config.text_config is case.ours.model.language_model.config
    ids = case.ids.clamp(max=V - 1)
    labels = dict(input_ids=ids, attention_mask=case.mask, labels=ids)
    if V > 13:
        assert torch.equal(case.ours(**labels).loss, case.theirs(**labels).loss)


@models
def test_a_resized_model_is_saved_and_loaded(family, task, tmp_path):
    model = make(family, task, torch.float32)
    resize(model, dict(new_num_tokens=VOCAB + 7))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert again.config.get_text_config().vocab_size == VOCAB + 7
    assert_same_state(again, model)
    with torch.no_grad():
        arguments = arguments_of(model)
        assert torch.equal(main_result(again(**arguments)), main_result(model(**arguments)))


def test_resizing_keeps_what_is_trained():
    """In place: an optimiser goes on with the same parameters, of which a frozen one stays frozen."""
    model = make("ministral3", "CausalLM", torch.float32, tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(False)
    model(IDS, labels=IDS).loss.backward()
    parameters = list(model.parameters())
    model.resize_token_embeddings(VOCAB + 1)
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert not model.lm_head.weight.requires_grad and model.get_input_embeddings().weight.requires_grad
    model(IDS, labels=IDS).loss.backward()
    with torch.device("meta"):
        empty = Ministral3ForCausalLM(make_config("ministral3"))
    assert empty.resize_token_embeddings(60).weight.shape[0] == 60


@pytest.mark.parametrize("arguments, message", [
    (dict(new_num_tokens=0), "new_num_tokens=0 is impossible; allowed: a whole number above 0"),
    (dict(new_num_tokens=5.0), "new_num_tokens=5.0 is impossible"),
    (dict(new_num_tokens=True), "new_num_tokens=True is impossible"),
    (dict(pad_to_multiple_of=0), "pad_to_multiple_of=0 is impossible"),
    (dict(new_num_tokens=2), "eos_token_id=2 is impossible; allowed: None, an id below 2"),
    (dict(new_num_tokens=9), "image_token_index=10 is impossible; allowed: an id of the vocabulary"),
])  # fmt: skip
def test_impossible_sizes_change_nothing(arguments, message):
    model = make("mistral3", "ConditionalGeneration")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(**arguments)
    assert model.config.text_config.vocab_size == VOCAB and model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="PixtralVisionModel has no token embeddings that could be resized"):
        model.model.vision_tower.resize_token_embeddings(60)


def test_new_rows_are_near_the_mean():
    """With the covariance of the old rows, scaled down; the mean itself where there are too few rows."""
    g = torch.Generator().manual_seed(0)
    old = torch.randn(4000, 6, generator=g) @ torch.randn(6, 6, generator=g) + 3
    torch.manual_seed(0)
    rows = (trainable.draw_rows(old.double(), 20000) - old.double().mean(0)) / math.sqrt(1e-9)
    torch.testing.assert_close(torch.cov(rows.T), torch.cov(old.double().T), rtol=0.1, atol=0.3)
    assert torch.equal(trainable.draw_rows(old[:3], 2), old[:3].mean(0).expand(2, -1))


@models
def test_embeddings_and_counts(family, task):
    model = make(family, task)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings, nn.Embedding) and embeddings.num_embeddings == VOCAB
    assert (head is not None) == model.can_generate() == (task in ("CausalLM", "ConditionalGeneration"))
    assert model.base_model.get_output_embeddings() is None or not model.can_generate()
    new = nn.Embedding(VOCAB, embeddings.embedding_dim, dtype=torch.float64)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is model.base_model.get_input_embeddings() is new
    new_head = nn.Linear(embeddings.embedding_dim, VOCAB, bias=False, dtype=torch.float64)
    if head is None:
        with pytest.raises(ValueError, match="has no language model head"):
            model.set_output_embeddings(new_head)
    else:
        model.set_output_embeddings(new_head)
        assert model.get_output_embeddings() is model.lm_head is new_head


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_transformers(task, tied):
    ours, theirs = pair(text_config("ministral", tie_word_embeddings=tied), torch.float32, 0, task=task)
    for model in (ours, theirs):
        model.base_model.layers[0].requires_grad_(False)
    for only_trainable in (False, True):
        for without in (False, True):
            assert ours.num_parameters(only_trainable, without) == theirs.num_parameters(only_trainable, without)
    assert ours.num_parameters() == sum(p.numel() for p in ours.parameters())
    assert ours.can_generate() == theirs.can_generate()


def test_the_embeddings_of_a_vision_tower():
    tower = make("mistral3", "").vision_tower
    assert tower.get_input_embeddings() is tower.patch_conv


# ------------------------------------------------------------------------------------------ what holds for each class


@models
def test_gradient_checkpointing_gives_the_same_gradients(family, task):
    gradients = []
    for on in (False, True):
        model = make(family, task).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert model.is_gradient_checkpointing == model.base_model.gradient_checkpointing == on
        loss_of(model, arguments_of(model)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


@pytest.mark.parametrize("arguments", [dict(gradient_checkpointing_kwargs={"use_reentrant": True}),
                                       dict(every_n_layers=2), dict(offload=True)])  # fmt: skip
def test_other_ways_of_gradient_checkpointing_are_refused(arguments):
    model = make("ministral", "")
    with pytest.raises(ValueError, match=r"gradient checkpointing with .* is not supported; supported: "):
        model.gradient_checkpointing_enable(**arguments)
    assert not model.is_gradient_checkpointing
    model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@torch.no_grad()
@models
def test_embeddings_in_the_place_of_ids(family, task):
    """The last token is no padding, so that a classifier reads the same one. Images are recognised by [IMG]."""
    model = make(family, task)
    arguments = arguments_of(model)
    expected = main_result(model(**arguments))
    arguments["inputs_embeds"] = model.get_input_embeddings()(arguments.pop("input_ids"))
    assert torch.equal(main_result(model(**arguments)), expected)


@torch.no_grad()
@models
def test_a_mask_of_ones_is_none(family, task):
    model = make(family, task)
    arguments = arguments_of(model)
    expected = main_result(model(**arguments))
    assert torch.equal(main_result(model(**arguments, attention_mask=torch.ones_like(IDS))), expected)
    assert torch.equal(main_result(model(**arguments)), expected)  # in eval mode it is the same each time


@torch.no_grad()
@models
def test_padding_on_the_right_changes_nothing_before_it(family, task):
    model = make(family, task)
    arguments = arguments_of(model)
    expected = main_result(model(**arguments))
    arguments["input_ids"] = nn.functional.pad(arguments["input_ids"], (0, 4))
    mask = (arguments["input_ids"] != 0).long()
    for attention_mask in (mask, None):
        found = main_result(model(**arguments, attention_mask=attention_mask))
        if task != "SequenceClassification":
            found = found[:, : IDS.shape[1]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)  # measured: 1.1e-14


@torch.no_grad()
@models
def test_padding_on_the_left_changes_nothing_after_it(family, task):
    """With the positions that `generate` passes, which skip padding."""
    model = make(family, task)
    arguments = arguments_of(model)
    expected = main_result(model(**arguments))
    arguments["input_ids"] = nn.functional.pad(arguments["input_ids"], (4, 0))
    mask = (arguments["input_ids"] != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = main_result(model(**arguments, attention_mask=mask, position_ids=positions))
    if task != "SequenceClassification":
        found = found[:, 4:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)  # measured: 1.1e-14


@torch.no_grad()
@models
def test_rows_do_not_depend_on_the_batch(family, task):
    model = make(family, task)
    arguments = arguments_of(model)
    whole = main_result(model(**arguments))
    for row in range(len(IDS)):
        alone = {name: value[row : row + 1] for name, value in arguments.items() if row < len(value)}
        torch.testing.assert_close(main_result(model(**alone))[0], whole[row], rtol=0, atol=1e-13)  # measured: 1.1e-14


@torch.no_grad()
@models
def test_files_hold_the_whole_model(family, task, tmp_path):
    """In one file and in shards."""
    model = make(family, task, torch.float32)
    arguments = arguments_of(model)
    for size in ("5GB", "4KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert (tmp_path / "model.safetensors").exists() == (size == "5GB")
        again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
        assert again.config == model.config and not again.training
        assert_same_state(again, model)
        assert torch.equal(main_result(again(**arguments)), main_result(model(**arguments)))


@models
def test_fresh_weights(family, task):
    """Matrices have mean 0 and deviation initializer_range, norms are ones, and padding and biases zeros."""
    config = make_config(family)
    text = config.get_text_config()
    wide = dataclasses.replace(text, hidden_size=64, intermediate_size=96, initializer_range=0.05)
    if family == "mistral3":
        encoder = PixtralVisionConfig(32, 64, 2, 2, image_size=16, patch_size=4, initializer_range=0.02)
        wide = dataclasses.replace(config, text_config=wide, vision_config=encoder)
    cls = type(make(family, task))
    torch.manual_seed(0)
    model = cls(wide)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.full_like(p, not name.endswith("bias"))), name
            continue
        std = 0.02 if "vision_tower" in name else 0.05
        values = p.detach()
        if name.endswith("embed_tokens.weight"):
            assert (values[0] == 0).all()
            values = values[1:]
        count = values.numel()
        assert values.mean().abs() < 5 * std / math.sqrt(count), name
        assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * count), name


@torch.no_grad()
def test_a_cache_is_among_the_outputs():
    """By default, at the place where Transformers has it."""
    model = make("ministral3", "CausalLM")
    out = model(IDS, labels=IDS)
    assert isinstance(out[2], KVCache) and list(out) == ["loss", "logits", "past_key_values"]
    assert isinstance(MinistralForCausalLM(text_config("ministral"))(IDS, return_dict=False)[1], KVCache)
    assert isinstance(Ministral3Config(), MinistralConfig)


# --------------------------------------------------------------------------------------- edited configurations


@torch.no_grad()
@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_layers_follow_a_configuration_that_is_edited(family):
    """As in Transformers, whose Ministral 3 has no list of layers. A list that was given stays."""
    ids = torch.arange(1, 20)[None]
    config = draw_config(random.Random(0), family, sliding_window=None, layer_types=None)
    config.num_hidden_layers, config.sliding_window = 3, 4
    assert config.layer_types == ["sliding_attention"] * 3
    model = our_class(family, "CausalLM")(config).eval()
    narrow = model(ids).logits
    model.config.sliding_window = None
    assert not torch.allclose(model(ids).logits, narrow)
    assert dataclasses.replace(config, attn_implementation="eager").layer_types == ["full_attention"] * 3
    mixed = MinistralConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    mixed.sliding_window = 7
    assert mixed.layer_types == ["full_attention", "sliding_attention"]


@torch.no_grad()
@models
def test_attention_is_changed_in_all_parts(family, task):
    model = make(family, task)
    ids = torch.arange(1, 9)[None]
    model.set_attn_implementation("sdpa")
    plain = model(ids, return_dict=False)[0]
    model.set_attn_implementation("eager")
    configs = {part.config.attn_implementation for part in model.modules() if hasattr(part, "config")}
    assert configs == {"eager"} and model.config._attn_implementation == "eager"
    out = model(ids, output_attentions=True)
    assert out.attentions is not None
    torch.testing.assert_close(out[0], plain, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="attn_implementation='flash' is not supported"):
        model.set_attn_implementation("flash")


def test_a_configuration_is_read_with_its_attention(saved):
    assert Ministral3Config.from_pretrained(saved[1], attn_implementation="eager").attn_implementation == "eager"
    with pytest.raises(ValueError, match="attn_implementation='nonsense' is not supported"):
        Ministral3Config.from_pretrained(saved[1], attn_implementation="nonsense")


@models
def test_unknown_arguments_of_forward_are_refused(family, task):
    model = make(family, task)
    ids = torch.arange(1, 9)[None]
    model(ids, token_type_ids=None)
    with pytest.raises(ValueError, match=r"token_type_ids=tensor.* is not supported; arguments: input_ids"):
        model(ids, token_type_ids=ids)
    model.base_model.config.output_hidden_states = True
    assert model(ids).hidden_states is not None


def test_hooks_of_embeddings_come_and_go():
    model = make("ministral", "CausalLM")
    model.disable_input_require_grads()
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks
