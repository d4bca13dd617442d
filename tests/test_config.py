"""Configurations: defaults, published files in every format, refused values, and the checks of `forward`."""

import dataclasses
import json
import math
import random
import re
import warnings

import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from generate import generate
from ministral import KVCache, MinistralConfig, MinistralForCausalLM, MinistralModel
from ministral3 import Ministral3Config, Ministral3ForCausalLM, YarnRotaryEmbedding
from model_types import MODELS, model_class
from reference.published import MINISTRAL3_3B, MINISTRAL_8B
from tests.cases import draw_case, draw_config, pair, their_arguments
from tests.test_parity import assert_same

rngs = st.randoms(use_true_random=False)

def parameters(cls, config):
    with torch.device("meta"):
        return sum(p.numel() for p in cls(config).parameters())


@pytest.mark.parametrize("name", ["MinistralConfig", "Ministral3Config"])
def test_defaults_are_transformers(name):
    ours = {"MinistralConfig": MinistralConfig, "Ministral3Config": Ministral3Config}[name]()
    theirs = getattr(transformers, name)()
    for field in dataclasses.fields(ours):
        if field.name in ("attn_implementation", "rope_theta", "head_dim", "layer_types"):
            continue
        value = getattr(theirs, field.name, None)  # Transformers reads classifier_dropout only where somebody set it
        if field.name == "rope_parameters":
            value = {k: v for k, v in value.items() if k != "type"}
        assert getattr(ours, field.name) == value, field.name
    assert ours.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads) == 128
    if name == "MinistralConfig":
        assert ours.layer_types == theirs.layer_types == ["sliding_attention"] * 32


def test_the_published_files_are_read():
    """With the parameter counts of the published models, exactly."""
    old = MinistralConfig.from_dict(MINISTRAL_8B)
    assert (old.rope_theta, old.pad_token_id, set(old.layer_types)) == (1e8, None, {"sliding_attention"})
    assert parameters(MinistralForCausalLM, old) == 8_019_808_256
    new = Ministral3Config.from_dict(MINISTRAL3_3B)
    assert (new.rope_theta, new.pad_token_id, set(new.layer_types)) == (1e6, 11, {"full_attention"})
    assert parameters(Ministral3ForCausalLM, new) == 3_429_006_336
    assert parameters(Ministral3ForCausalLM, Ministral3Config()) == 8_489_553_920
    larger = dict(hidden_size=5120, intermediate_size=16384, num_hidden_layers=40, tie_word_embeddings=False)
    assert parameters(Ministral3ForCausalLM, Ministral3Config.from_dict(MINISTRAL3_3B | larger)) == 13_506_073_600


def test_published_yarn_values():
    """Frequencies of the 3B and the 14B model, and the scale of queries, against known values."""
    rope = MINISTRAL3_3B["rope_parameters"]
    small = YarnRotaryEmbedding(Ministral3Config.from_dict(MINISTRAL3_3B))
    large = YarnRotaryEmbedding(Ministral3Config(rope_parameters=rope | {"rope_theta": 1e9}))
    f, g = small.inverse_frequencies(torch.float64), large.inverse_frequencies(torch.float64)
    for i, value in ((0, 1.0), (1, 0.8058422), (20, 0.0133352149), (21, 0.0101534640), (22, 0.0077045355),
                     (23, 0.0058238073), (30, 0.00069070229), (38, 1.71151223e-5), (63, 7.755861e-8)):  # fmt: skip
        assert f[i].item() == pytest.approx(value, rel=1e-6)
    assert f.sum().item() == pytest.approx(5.135129485865, rel=1e-7)
    assert g.sum().item() == pytest.approx(3.604505301784, rel=1e-7)
    assert small.attention_factor() == 1.0
    del (without := dict(rope))["mscale"]
    paper = YarnRotaryEmbedding(Ministral3Config(rope_parameters=without)).attention_factor()
    assert paper == pytest.approx(1.2772588722)
    positions = torch.tensor([[0, 16383, 16384, 32768, 65536, 131072, 262143]])
    scale = small(torch.zeros(1, dtype=torch.float64), positions)[2].flatten()
    expected = [1.0, 1.0, 1.0693147, 1.1098613, 1.1609437, 1.2197225, 1.2772589]
    torch.testing.assert_close(scale, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_the_corners_of_yarn_are_those_of_transformers():
    """Left-out ends of the ramp, a ramp beyond the last pair, a step, and two magnitudes."""
    beyond = YARN | dict(rope_theta=100.0, original_max_position_embeddings=2**18, beta_fast=1e5, beta_slow=0.01)
    just_before_3 = 16 / (2 * math.pi) * 1e4 ** (-2 * 2.99895 / 8)  # turns of "pair 2.99895"
    step = YARN | dict(truncate=False, beta_fast=just_before_3, beta_slow=just_before_3)
    long = YARN | dict(original_max_position_embeddings=16384, truncate=False)
    for rope in (beyond, step, long, YARN | dict(mscale=0.7, mscale_all_dim=0.5)):
        config = Ministral3Config(head_dim=8, rope_parameters=rope)
        theirs = transformers.Ministral3Config(**their_arguments(config))
        theirs.rope_parameters = {"beta_fast": 32, "beta_slow": 1} | theirs.rope_parameters
        expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
        rotary = YarnRotaryEmbedding(config)
        torch.testing.assert_close(rotary.inverse_frequencies(torch.float32), expected)
        assert rotary.attention_factor() == pytest.approx(factor)


@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_frequencies_are_computed_on_the_cpu(family):
    rotary = MODELS[family].model_class.rotary_class(draw_config(random.Random(0), family))
    with torch.device("meta"):
        assert rotary.inverse_frequencies(torch.float32).device.type == "cpu"


@pytest.mark.parametrize("family", ["ministral", "ministral3"])
@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_a_change_of_rope_parameters_takes_effect(family, in_place):
    """At the next call, also of the fast path, whether the dictionary or its values are replaced."""
    model = MODELS[family](draw_config(random.Random(3), family, attn_implementation="sdpa")).eval()
    config = model.config
    ids = torch.randint(3, config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    before = model(ids, return_dict=True).logits
    generate(model, ids, max_new_tokens=4, fast=True)
    changed = dict(config.rope_parameters, rope_theta=7 * config.rope_theta)
    if family == "ministral3":
        changed |= {"factor": 3 * changed["factor"], "original_max_position_embeddings": 5}
    if in_place:
        config.rope_parameters.update(changed)
    else:
        config.rope_parameters = changed
    with pytest.raises(ValueError, match=r"rope_theta=.* differ; change both"):
        model(ids)
    config.rope_theta = changed["rope_theta"]
    fresh = MODELS[family](type(config).from_dict(config.to_dict())).eval()
    fresh.load_state_dict(model.state_dict())
    after = model(ids, return_dict=True).logits
    assert after.equal(fresh(ids, return_dict=True).logits) and not after.equal(before)
    texts = [generate(one, ids, max_new_tokens=8, fast=True) for one in (model, fresh)]
    assert texts[0].equal(texts[1])


@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_training_after_inference_mode(family):
    """Frequencies that a call in inference mode keeps can be saved for backward."""
    model = MODELS[family](draw_config(random.Random(3), family))
    ids = torch.randint(3, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids)
    rotary = model.model.rotary_emb
    frequencies = rotary.frequencies(torch.float32, ids.device)
    assert list(rotary._frequencies.values()) == [frequencies] and not frequencies.is_inference()


@given(rngs)
def test_to_dict_loads_in_transformers_and_here(rng):
    config = draw_config(rng)
    d = json.loads(json.dumps(config.to_dict()))
    again = type(config).from_dict(d)
    assert dataclasses.replace(again, attn_implementation=config.attn_implementation) == config
    theirs = transformers.AutoConfig.for_model(**d)
    assert type(theirs).__name__ == type(config).__name__
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "sliding_window", "tie_word_embeddings"):
        assert getattr(theirs, key) == getattr(config, key)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(config).from_dict(theirs.to_dict()).rope_parameters == config.rope_parameters


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mistral", "mistral all full", "llama"])
@given(rngs)
def test_foreign_models_of_the_same_function(kind, rng):
    """A config.json and weights of Transformers' Mistral and Llama give the same bits here."""
    window = None if kind != "mistral" else rng.choice([1, 4, 64])
    config = draw_config(rng, family="ministral", layer_types=None, sliding_window=window, hidden_size=24)
    name = "Llama" if kind == "llama" else "Mistral"
    arguments = their_arguments(config)
    del arguments["layer_types"]
    if kind == "llama":
        del arguments["sliding_window"]
    their_config = getattr(transformers, f"{name}Config")(**arguments, attn_implementation=config.attn_implementation)
    theirs = getattr(transformers, f"{name}ForCausalLM")(their_config).eval()
    d = json.loads(their_config.to_json_string())
    if rng.random() < 0.5:  # the dialect of Transformers 4
        rope = d.pop("rope_parameters")
        d |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    d.pop("attn_implementation", None)
    read = MinistralConfig.from_dict(d)
    ours = model_class(d)(dataclasses.replace(read, attn_implementation=config.attn_implementation))
    ours.load_state_dict(theirs.state_dict())
    ids = torch.tensor([[rng.randrange(50) for _ in range(rng.randint(1, 20))]])
    assert_same(ours.eval()(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_configurations_on_which_transformers_fails():
    """Ministral with its own defaults (head_dim None), without any window; Ministral 3 with plain RoPE, or without
    query scaling."""
    tiny = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=20)  # fmt: skip
    ids = torch.randint(12, 20, (1, 9))
    with torch.device("meta"):
        MinistralModel(MinistralConfig(num_hidden_layers=1))
    assert MinistralForCausalLM(MinistralConfig(**tiny))(ids).logits.shape == (1, 9, 20)
    full = MinistralForCausalLM(MinistralConfig(**tiny, sliding_window=None)).double()
    wide = MinistralForCausalLM(MinistralConfig(**tiny, sliding_window=9)).double()
    wide.load_state_dict(full.state_dict())
    torch.testing.assert_close(full(ids).logits, wide(ids).logits, rtol=1e-12, atol=1e-12)
    plain = Ministral3Config(**tiny, head_dim=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    yarn = plain.rope_parameters | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
    for config in (plain, Ministral3Config(**tiny, head_dim=4, rope_parameters=yarn)):
        ours, theirs = pair(config, torch.float32, 0)  # with to_dict's values Transformers runs, too
        assert_same(ours(ids).logits, theirs(ids).logits)


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (MinistralConfig, dict(num_key_value_heads=5), "num_key_value_heads=5.*divisor of 32"),
        (MinistralConfig, dict(head_dim=7), "head_dim=7.*even"),
        (MinistralConfig, dict(hidden_size=0), "hidden_size=0.*whole number from 1"),
        (MinistralConfig, dict(vocab_size=-3), "vocab_size=-3"),
        (MinistralConfig, dict(hidden_size=2**64), "hidden_size=18446744073709551616.*from 1 to 1048576"),
        (MinistralConfig, dict(sliding_window=2**53 + 1), "sliding_window=9007199254740993"),
        (MinistralConfig, dict(num_hidden_layers=65536), "num_hidden_layers=65536.*from 1 to 1000"),
        (MinistralConfig, dict(num_labels=10**7), "num_labels=10000000.*from 1 to 100000"),
        (MinistralConfig, dict(rope_theta=10**400), r"rope_theta=1000.*\.\.\..*a number above 1"),
        (MinistralConfig, dict(max_position_embeddings=10**5000), "max_position_embeddings=a number of thousands"),
        (MinistralConfig, dict(hidden_act="x" * 20000), "hidden_act='xxxx.*silu"),
        (MinistralConfig, dict(num_hidden_layers=2.5), "num_hidden_layers=2.5.*whole number"),
        (MinistralConfig, dict(hidden_act="tanhshrink"), "hidden_act='tanhshrink'.*silu"),
        (MinistralConfig, dict(layer_types=["full_attention"]), "layer_types.*num_hidden_layers=32"),
        (MinistralConfig, dict(num_hidden_layers=1, layer_types=["linear"]), "layer_types.*full_attention"),
        (MinistralConfig, dict(hidden_act=["silu"]), "hidden_act.*allowed: silu"),
        (MinistralConfig, dict(attn_implementation=["sdpa"]), "attn_implementation.*is not supported"),
        (MinistralConfig, dict(sliding_window=0), "sliding_window=0"),
        (MinistralConfig, dict(sliding_window=None, layer_types=["sliding_attention"] * 32), "sliding_window=None"),
        (MinistralConfig, dict(rope_parameters=dict(rope_type="llama3")), "llama3.*allowed: rope_type default"),
        (MinistralConfig, dict(rope_parameters=YARN), "yarn.*allowed: rope_type default"),
        (MinistralConfig, dict(rope_theta=-1.0), "rope_theta=-1.0"),
        (MinistralConfig, dict(rope_theta=2.0, rope_parameters=dict(rope_theta=3.0)), "rope_theta=2.0"),
        (MinistralConfig, dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (MinistralConfig, dict(rope_parameters=dict(type="default", rope_type="yarn")), "rope_parameters"),
        (MinistralConfig, dict(rms_norm_eps=0), "rms_norm_eps=0"),
        (MinistralConfig, dict(attention_dropout=1.0), "attention_dropout=1.0"),
        (MinistralConfig, dict(pad_token_id=32000), "pad_token_id=32000"),
        (MinistralConfig, dict(attn_implementation="flash"), "attn_implementation='flash'.*sdpa, eager"),
        (Ministral3Config, dict(rope_parameters=dict(rope_type="linear")), "linear.*yarn or default"),
        (Ministral3Config, dict(rope_parameters={**YARN, "factor": None}), r"\['factor'\]=None"),
        (Ministral3Config, dict(rope_parameters={**YARN, "factor": 0.5}), r"\['factor'\]=0.5"),
        (Ministral3Config, dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "original_max_position_emb"),
        (Ministral3Config, dict(rope_parameters={**YARN, "llama_4_scaling_beta": -1}), "llama_4_scaling_beta"),
        (Ministral3Config, dict(layer_types=["sliding_attention"] * 34), "sliding_window=None|layer_types"),
        (Ministral3Config, dict(rope_parameters={**YARN, "beta_fats": 32}), "beta_fats.*allowed: keys rope_type"),
        (Ministral3Config, dict(rope_parameters={**YARN, "beta_fast": "x"}), r"\['beta_fast'\]='x'"),
        (Ministral3Config, dict(rope_parameters={**YARN, "rope_theta": 1.0}), "rope_theta=1.0"),
        (Ministral3Config, dict(rope_parameters=dict(rope_type="default", llama_4_scaling_beta=0.1)), "original_max"),
        (Ministral3Config, dict(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"],
                                sliding_window=5), r"layer_types.*\(see sliding_window\)"),
        (Ministral3Config, dict(rope_theta=1e9), "rope_theta=1000000000.0.*rope_parameters"),
        (MinistralConfig, dict(rope_parameters={"full_attention": {"rope_theta": 5.0}}), "full_attention"),
        (MinistralConfig, dict(rope_parameters=[1]), r"rope_parameters=\[1\].*an object"),
        (MinistralConfig, dict(eos_token_id=[2, 32000]), "eos_token_id"),
        (MinistralConfig, dict(tie_word_embeddings="false"), "tie_word_embeddings='false'"),
    ],
)
def test_impossible_values_are_refused(cls, values, message):
    with pytest.raises(ValueError, match=message) as error:
        cls(**values)
    assert "allowed" in str(error.value) or "; supported: sdpa, eager" in str(error.value)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, least",
    [("factor", 1), ("original_max_position_embeddings", 1), ("max_position_embeddings", 1), ("beta_fast", 1e-6),
     ("beta_slow", 1e-6), ("mscale", 0), ("mscale_all_dim", 0), ("attention_factor", 1e-6),
     ("llama_4_scaling_beta", 0)],
)  # fmt: skip
def test_the_least_rope_parameters(key, least):
    assert Ministral3Config(rope_parameters={**YARN, key: least}).rope_parameters[key] == least
    with pytest.raises(ValueError, match=f"{key}.*not below {least}"):
        Ministral3Config(rope_parameters={**YARN, key: least - 1e-7})


def test_what_is_filled_in_and_left_out():
    """As many key/value heads as query heads, as in old files; all layers are alike in Ministral 3."""
    assert MinistralConfig(num_attention_heads=4, num_key_value_heads=None).num_key_value_heads == 4
    assert "layer_types" not in Ministral3Config().to_dict()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="qwen2"), "qwen2.*allowed: ministral, mistral, llama"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(quantization_config=dict(quant_method="gptq")), r"quantized weights \(gptq\).*allowed: fp8 e4m3"),
        (dict(quantization_config=dict(quant_method="fp8", fmt="e5m2")), r"quantized weights \(fp8 e5m2\)"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0)), "yarn"),
        (dict(hidden_size="big"), "hidden_size='big'"),
        (dict(rope_scaling="yarn"), "rope_scaling='yarn'.*an object"),
        (dict(quantization_config="fp8"), "quantization_config='fp8'"),
        (dict(model_type=["x"]), "model_type=.*a name"),
        (dict(layer_types=3), "layer_types=3 is impossible; allowed: a list of the names"),
    ],
)
def test_other_functions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MinistralConfig.from_dict(MINISTRAL_8B | change)


def test_unknown_keys_are_named():
    with pytest.warns(UserWarning, match="ignored unknown keys logit_softcap, qk_norm"):
        MinistralConfig.from_dict(MINISTRAL_8B | {"qk_norm": True, "logit_softcap": 30.0})


def test_the_class_is_picked_from_the_file():
    assert {kind: model_class({"model_type": kind}) for kind in MODELS} == MODELS
    with pytest.raises(ValueError, match=r"'bert'.*ministral3"):
        model_class({"model_type": "bert"})


def test_the_published_pattern():
    kinds = MinistralConfig.published_layer_types(36)
    assert kinds == (["full_attention"] + ["sliding_attention"] * 3) * 9


# ------------------------------------------------------------------------------------------- forward's checks


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "exactly one"),
        (dict(input_ids=IDS, inputs_embeds=torch.zeros(2, 3, 8)), "exactly one"),
        (dict(input_ids=IDS[0]), r"input_ids must be .*found \(3,\)"),
        (dict(input_ids=IDS[:, :0]), "not empty"),
        (dict(input_ids=IDS.float()), "whole numbers.*float32"),
        (dict(input_ids=IDS * 9), "input_ids from 9 to 9; allowed: 0 to 8"),
        (dict(input_ids=-IDS), "input_ids from -1 to -1"),
        (dict(inputs_embeds=torch.zeros(2, 3, 7)), r"inputs_embeds must be \(batch, tokens, 8\).*\(2, 3, 7\)"),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 2)), r"attention_mask must be \(2, 3\); found \(2, 2\)"),
        (dict(input_ids=IDS[:1], position_ids=torch.ones(2, 3)), r"position_ids must be \(1, 3\); found \(2, 3\)"),
        (dict(input_ids=IDS, position_ids=torch.ones(3)), r"position_ids must be \(2, 3\) or \(1, 3\)"),
        (dict(input_ids=IDS, cache_position=torch.arange(1, 4)), r"cache_position must be 0\.\.2"),
        (dict(input_ids=IDS, output_attentions=True), "needs attn_implementation='eager'"),
        (dict(input_ids=IDS, labels=IDS, logits_to_keep=1), "labels need all logits"),
        (dict(input_ids=IDS, labels=IDS[:, :2]), r"labels must be \(2, 3\); found \(2, 2\)"),
        (dict(input_ids=IDS, labels=IDS * 9), "labels from 9 to 9; allowed: 0 to 8, or -100"),
        (dict(input_ids=IDS, logits_to_keep=-1), "logits_to_keep=-1"),
        (dict(input_ids=IDS, logits_to_keep=None), "logits_to_keep=None is impossible"),
        (dict(input_ids=IDS, logits_to_keep=1.5), "logits_to_keep=1.5 is impossible"),
        (dict(input_ids=[[1, 2]]), r"input_ids must be a tensor, as torch.tensor\(.*found list"),
        (dict(input_ids="To be"), "input_ids must be a tensor, .*found str"),
        (dict(input_ids=IDS.to("meta")), "input_ids is on meta, the model on cpu; move one of them"),
        (dict(inputs_embeds=torch.zeros(2, 3, 8).double()), "inputs_embeds of torch.float64, weights of torch.float32"),
        (dict(inputs_embeds=torch.zeros(2, 3, 8).long()), "inputs_embeds of torch.int64, weights of torch.float32"),
        (dict(inputs_embeds=torch.zeros(2, 3, 8).tolist()), "inputs_embeds must be a tensor"),
        (dict(input_ids=IDS, attention_mask=[[1, 1, 1]] * 2), "attention_mask must be a tensor.*found list"),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 3, 3)), "attention_mask of 4 dimensions is not supported"),
        (dict(input_ids=IDS, attention_mask=torch.tensor([[0, 0, -torch.inf]] * 2)), "numbers from -inf to 0"),
        (dict(input_ids=IDS, attention_mask=torch.tensor([[1, 1, -1e4]] * 2)), "numbers from -10000 to 1 is not"),
        (dict(input_ids=IDS, attention_mask=torch.zeros(2, 3)), "numbers from 0 to 0 is not supported"),
        (dict(input_ids=IDS, position_ids=torch.ones(1, 3)), "position_ids of torch.float32 are not supported"),
        (dict(input_ids=IDS[:1], position_ids=torch.ones(3)), r"position_ids must be \(1, 3\); found \(3,\)"),
        (dict(input_ids=IDS, position_ids=[[0, 1, 2]]), "position_ids must be a tensor"),
        (dict(input_ids=IDS, cache_position=[0, 1, 2]), "cache_position must be a tensor"),
        (dict(input_ids=IDS, labels=[[1, 1, 1]] * 2), "labels must be a tensor"),
        (dict(input_ids=IDS, past_key_values=((IDS, IDS),)), "past_key_values must be a KVCache of .*found tuple"),
        (dict(input_ids=IDS, past_key_values=transformers.DynamicCache()), "must be a KVCache of .*found DynamicCache"),
    ],
)
def test_wrong_inputs_are_refused(arguments, message):
    model = MinistralForCausalLM(
        MinistralConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
                        intermediate_size=8, vocab_size=9)
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@torch.no_grad()
def test_a_mask_may_be_of_any_type_of_ones_and_zeros():
    case = draw_case(random.Random(1), dtype=torch.float32)
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = case.ours(ids, mask).logits
    for dtype in (torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(case.ours(ids, mask.to(dtype)).logits, expected)
        assert torch.equal(generate(case.ours, ids, mask.to(dtype), 3), generate(case.ours, ids, mask, 3))


@torch.no_grad()
def test_padding_without_a_mask_gives_a_warning():
    """At the start of a row, because all later tokens see it; in generation also at its end. Never in a decode step,
    with a mask, or if the id also begins or ends texts."""
    case = draw_case(random.Random(3), dtype=torch.float32, family="ministral3", pad_token_id=0,
                     attn_implementation="sdpa")  # fmt: skip
    left, right = torch.tensor([[0, 0, 5], [5, 6, 7]]), torch.tensor([[5, 0, 0], [5, 6, 7]])
    model, message = case.ours, "a row is padded with pad_token_id 0, which is read as text; give attention_mask"
    with pytest.warns(UserWarning, match=message):
        model(left)
    for ids in (left, right):
        for fast in (True, False):
            with pytest.warns(UserWarning, match=message):
                generate(model, ids, max_new_tokens=2, fast=fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(right)
        model(left, left != 0)
        generate(model, left, left != 0, max_new_tokens=2)
        model(left, past_key_values=model(left[:, 2:]).past_key_values)
        for ends in (0, [2, 0]):
            model.config.eos_token_id = ends
            model(left)


@torch.no_grad()
def test_cache_arguments():
    case = draw_case(random.Random(2), dtype=torch.float32)
    ids = case.ids[:1]
    assert case.ours(ids, use_cache=False).past_key_values is None
    case.ours.config.use_cache = False
    assert case.ours(ids).past_key_values is None
    cache = case.ours(ids, use_cache=True).past_key_values
    assert isinstance(cache, KVCache) and cache.get_seq_length() == ids.shape[1]
    n = ids.shape[1]
    a = case.ours(ids, past_key_values=cache, cache_position=torch.arange(n, 2 * n)).logits
    assert a.shape == (1, n, 50) and cache.get_seq_length() == 2 * n
    with pytest.raises(ValueError, match=re.escape(f"attention_mask must be {(1, 3 * n)}")):
        case.ours(ids, attention_mask=torch.ones(1, n), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds a batch of 1, the input is a batch of 2"):
        case.ours(ids.expand(2, -1), past_key_values=cache)
    other = draw_case(random.Random(2), dtype=torch.float32).ours.double()
    with pytest.raises(ValueError, match=r"holds .* torch.float32 on cpu, the model makes .* torch.float64"):
        other(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"config must be a configuration, such as model.config; found"):
        KVCache(case.ours)
    with pytest.raises(ValueError, match=r"max_length=1.5 is impossible"):
        cache.crop(1.5)
    cache.layers.append(cache.layers[0])
    with pytest.raises(ValueError, match="made for a configuration with other layers"):
        case.ours(ids, past_key_values=cache)
