"""Published layouts: Mistral's own files compared with Transformers' and with Mistral's formulas, FP8 compared with
Transformers, the Hub, and the commands `convert` and `info`."""

import copy
import dataclasses
import fnmatch
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations import finegrained_fp8

import checkpoint
from checkpoint import (
    NAMES,
    VISION_PREFIXES,
    convert,
    count_parameters,
    dequantize,
    from_mistral,
    from_params,
    half_split,
    interleave,
    to_mistral,
    to_params,
)
from checkpoint.__main__ import describe, main
from decoder import kv_cache_bytes
from heads import Ministral3ForSequenceClassification
from ministral import MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config, Ministral3ForCausalLM, Ministral3Model, YarnRotaryEmbedding
from model_types import BUNDLED, load_model
from reference.published import MINISTRAL3_8B_PARAMS, MINISTRAL_8B, MINISTRAL_8B_PARAMS, ministral3
from tests.cases import VOCAB, draw_config
from tests.conftest import at_most
from tests.published import hub_names, quantize
from tests.test_checkpoint import assert_same_weights
from tests.test_cli import run as run_command
from tests.test_parity import assert_same
from vision import Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

rngs = st.randoms(use_true_random=False)
WINDOWS = ([None, 5, 5, 5], [5], [None], [5, None], [None, 5, 5], [5, 5, None, None])


def draw_model(rng, kind, dtype=None):
    """A tiny model of both layouts: "ministral" (any pattern of layers), "ministral3", "mistral3" (a vision model)."""
    family = "ministral" if kind == "ministral" else "ministral3"
    layers = rng.choice([2, 4])
    pattern = rng.choice([w for w in WINDOWS if layers % len(w) == 0])
    kinds = [("full" if window is None else "sliding") + "_attention" for window in pattern] * (layers // len(pattern))
    window = max((w for w in pattern if w), default=None)
    fixed = dict(hidden_act="silu", num_hidden_layers=layers, sliding_window=window)
    if family == "ministral":
        fixed |= dict(layer_types=kinds)
    else:
        rope = dict(rope_type="yarn", rope_theta=100.0, factor=rng.choice([2.0, 16.0]), beta_fast=4.0, beta_slow=1.0,
                    original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=rng.choice([0.0, 1.0]),
                    llama_4_scaling_beta=rng.choice([0.0, 0.5]))  # fmt: skip
        fixed |= dict(rope_parameters=rope, layer_types=None, sliding_window=rng.choice([None, 5]))
    config = draw_config(rng, family=family, **fixed)
    if kind == "mistral3":
        heads = rng.choice([1, 2, 3])
        vision_config = PixtralVisionConfig(
            hidden_size=heads * rng.choice([4, 8]), intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=heads, image_size=60, patch_size=3, hidden_act="silu",
        )  # fmt: skip
        config = Mistral3Config(vision_config, config, spatial_merge_size=2, tie_word_embeddings=rng.random() < 0.5,
                                multimodal_projector_bias=rng.random() < 0.5)  # fmt: skip
        model = Mistral3ForConditionalGeneration(config)
    else:
        model = (MinistralForCausalLM if family == "ministral" else Ministral3ForCausalLM)(config)
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.4 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    return model.to(dtype or rng.choice([torch.float32, torch.bfloat16, torch.float16])).eval()


def draw_ids(rng):
    return torch.tensor([[rng.choice([i for i in range(1, VOCAB) if i != 10]) for _ in range(20)] for _ in range(2)])


# -------------------------------------------------------------------------------------------- Mistral's layout


@torch.no_grad()
@at_most(100)
@given(rngs, st.sampled_from(["ministral", "ministral3", "mistral3"]), st.booleans())
def test_both_layouts_give_the_same_bits(tmp_path_factory, rng, kind, old_names):
    """Transformers' layout -> Mistral's -> Transformers', loaded from all three: equal weights and logits."""
    path, model = tmp_path_factory.mktemp("layouts"), draw_model(rng, kind)
    model.save_pretrained(path / "hf")
    if kind == "mistral3" and old_names:
        hub_names(path / "hf")
    convert(path / "hf", path / "mistral", format="mistral")
    convert(path / "mistral", path / "again", max_shard_size=rng.choice([10**9, 5000]))
    assert sorted(p.name for p in (path / "mistral").iterdir()) == ["consolidated.safetensors", "params.json"]
    ids, attn = draw_ids(rng), model.config.attn_implementation
    models = [load_model(path / name, attn_implementation=attn) for name in ("hf", "mistral", "again")]
    for other in models:
        assert type(other) is type(model)
        assert_same_weights(other, model)
        # Copied, because weights mapped to a file begin elsewhere, which can change the last bit of single rows.
        assert_same(copy.deepcopy(other)(ids).logits, copy.deepcopy(model)(ids).logits)


def rotate(x, angles):
    """Mistral's rotary positions: neighbours are one complex number. x (S, heads, D), angles (S, D/2)."""
    z = torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2))
    return torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def block(w, name, x, heads, kv_heads, angles, allowed, eps, factor=1.0, scale=None):
    """One layer, of the text or of the encoder, under Mistral's names."""
    S, h = len(x), norm(x, w[f"{name}.attention_norm.weight"], eps)
    q, k, v = (h @ w[f"{name}.attention.w{part}.weight"].T for part in "qkv")
    q, k = rotate(q.view(S, heads, -1), angles) * factor, rotate(k.view(S, kv_heads, -1), angles) * factor
    q = q if scale is None else q * scale[:, None, None]
    k, v = (t.view(S, kv_heads, -1).repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    probs = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    x = x + torch.einsum("hqk,khd->qhd", probs, v).flatten(1) @ w[f"{name}.attention.wo.weight"].T
    h, ff = norm(x, w[f"{name}.ffn_norm.weight"], eps), f"{name}.feed_forward.w"
    return x + (F.silu(h @ w[f"{ff}1.weight"].T) * (h @ w[f"{ff}3.weight"].T)) @ w[f"{ff}2.weight"].T


def see(w, p, pixels):
    """The embeddings of one image (3, height, width), by Mistral's formulas."""
    size, heads, m = p["patch_size"], p["num_attention_heads"], p["spatial_merge_size"]
    x = F.conv2d(pixels[None], w["vision_encoder.patch_conv.weight"], stride=size)[0]
    C, rows, columns = x.shape
    x = norm(x.flatten(1).T, w["vision_encoder.ln_pre.weight"], 1e-5)
    D = C // heads
    frequencies = 1 / p["rope_theta"] ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    y, z = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([y.reshape(-1, 1) * frequencies[::2], z.reshape(-1, 1) * frequencies[1::2]], -1)
    for n in range(p["num_hidden_layers"]):
        seen = torch.ones(len(x), len(x), dtype=torch.bool)
        x = block(w, f"vision_encoder.transformer.layers.{n}", x, heads, heads, angles, seen, 1e-5)
    x = norm(x, w["pre_mm_projector_norm.weight"], p["eps"]).view(rows // m, m, columns // m, m, C)
    x = x.permute(0, 2, 4, 1, 3).reshape(-1, C * m * m) @ w["patch_merger.merging_layer.weight"].T
    bias = [w.get(f"vision_language_adapter.{part}.bias", 0) for part in ("w_in", "w_out")]
    x = F.gelu(x @ w["vision_language_adapter.w_in.weight"].T + bias[0])
    return x @ w["vision_language_adapter.w_out.weight"].T + bias[1]


def mistrals_logits(directory, ids, pixels, frequencies, factor):
    """Logits (S, V) in float64 from params.json and consolidated.safetensors alone, by Mistral's formulas; only the
    rotary frequencies and their magnitude are arguments."""
    p = json.loads((directory / "params.json").read_text())
    w = {name: t.double() for name, t in load_file(directory / "consolidated.safetensors").items()}
    x, S = w["tok_embeddings.weight"][ids], len(ids)
    if pixels is not None:
        x[ids == p["vision_encoder"]["image_token_id"]] = see(w, p["vision_encoder"] | {"eps": p["norm_eps"]}, pixels)
    places = torch.arange(S)
    scaling = p.get("llama_4_scaling", {"beta": 0, "original_max_position_embeddings": 1})
    scale = 1 + scaling["beta"] * torch.log1p((places // scaling["original_max_position_embeddings"]).double())
    windows = p.get("sliding_window")
    for n in range(p["n_layers"]):
        window = windows[n % len(windows)] if isinstance(windows, list) else windows
        allowed = (places[None] <= places[:, None]) & (places[None] > places[:, None] - (window or S))
        x = block(w, f"layers.{n}", x, p["n_heads"], p["n_kv_heads"], places[:, None] * frequencies, allowed,
                  p["norm_eps"], factor, scale)  # fmt: skip
    return norm(x, w["norm.weight"], p["norm_eps"]) @ w.get("output.weight", w["tok_embeddings.weight"]).T


@torch.no_grad()
@given(rngs, st.sampled_from(["ministral", "ministral3", "mistral3"]))
def test_mistrals_files_equal_mistrals_formulas(tmp_path_factory, rng, kind):
    """So names, order of rows, windows and YaRN are right, and a round trip does not only undo its own mistakes."""
    path, model = tmp_path_factory.mktemp("formulas"), draw_model(rng, kind, torch.float32)
    model.save_pretrained(path / "hf")
    convert(path / "hf", path / "mistral", format="mistral")
    ours = load_model(path / "mistral", dtype=torch.float64)
    rotary = ours.base_model.language_model.rotary_emb if kind == "mistral3" else ours.model.rotary_emb
    ids, pixels, arguments = draw_ids(rng)[:1], None, {}
    if kind == "mistral3":
        pixels = torch.randn(3, 12, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ids[0, 3:9] = 10
        arguments = dict(pixel_values=pixels[None], image_sizes=[(12, 18)])
    frequencies, factor = rotary.inverse_frequencies(torch.float64), rotary.attention_factor()
    expected = mistrals_logits(path / "mistral", ids[0], pixels, frequencies, factor)
    assert (ours(ids, **arguments).logits[0] - expected).abs().max() < 1e-9 * expected.abs().max()


@torch.no_grad()
def test_biases_of_the_projector(tmp_path):
    """Mistral's `adapter_bias`: both layouts give the same result, and it differs from that without biases."""
    drawn = (draw_model(random.Random(seed), "mistral3", torch.float32) for seed in itertools.count())
    model = next(m for m in drawn if m.config.multimodal_projector_bias)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mistral", format="mistral")
    convert(tmp_path / "mistral", tmp_path / "again")
    assert json.loads((tmp_path / "mistral" / "params.json").read_text())["vision_encoder"]["adapter_bias"] is True
    ids = draw_ids(random.Random(0))[:1]
    ids[0, 3:9] = 10
    pixels = torch.randn(1, 3, 12, 18, generator=torch.Generator().manual_seed(0))
    images = dict(pixel_values=pixels, image_sizes=[(12, 18)])
    expected = copy.deepcopy(model)(ids, **images).logits
    for name in ("hf", "mistral", "again"):
        other = load_model(tmp_path / name, attn_implementation=model.config.attn_implementation)
        assert other.config.multimodal_projector_bias
        assert_same(copy.deepcopy(other)(ids, **images).logits, expected)
        for layer in (other.model.multi_modal_projector.linear_1, other.model.multi_modal_projector.linear_2):
            layer.bias.zero_()
            assert not other(ids, **images).logits.equal(expected)


@given(rngs)
def test_the_order_of_rows(rng):
    heads, D, E = rng.choice([1, 2, 3, 8]), rng.choice([2, 4, 6, 128]), rng.choice([1, 5])
    w = torch.randn(heads * D, E)
    assert half_split(w, heads).equal(w.view(heads, D // 2, 2, E).transpose(1, 2).reshape(heads * D, E))
    assert interleave(half_split(w, heads), heads).equal(w) and half_split(interleave(w, heads), heads).equal(w)
    rows = interleave(torch.arange(heads * D)[:, None].float(), heads)[:D, 0].tolist()
    assert rows[:4] == [0, D // 2, 1, D // 2 + 1][:D]


def test_every_tensor_has_one_name_in_each_layout():
    """The table of names covers all parameters of a vision model, in both generations of Transformers' names."""
    models = (draw_model(random.Random(seed), "mistral3") for seed in itertools.count())
    model = next(m for m in models if not m.config.tie_word_embeddings and m.config.multimodal_projector_bias)
    names = [name for name, _ in model.named_parameters()]
    mistral = {to_mistral(name): name for name in names}
    assert None not in mistral and len(mistral) == len(names)
    used = {re.sub(r"(?<=layers\.)\d+", "N", name.rpartition(".")[0]) for name in mistral}
    assert used == NAMES.keys()
    for theirs, name in mistral.items():
        published = from_mistral(theirs, vision=True)
        assert published.startswith(("language_model.model.", "language_model.lm_head.", *VISION_PREFIXES))
        assert model.own_name(published) == name == model.own_name(name) and to_mistral(published) == theirs
    text = [name for name, _ in Ministral3ForCausalLM(model.config.text_config).named_parameters()]
    assert [from_mistral(to_mistral(name), vision=False) for name in text] == text
    assert from_mistral("layers.0.attention.wq.qscale_act", False) == "model.layers.0.self_attn.q_proj.activation_scale"
    for name in ("layers.0.attention.wx.weight", "layers.0.attention.wq.rows", "model.layers.0.mlp.gate_proj.weight"):
        assert from_mistral(name, vision=True) is None


def test_the_published_params_are_the_published_configs():
    """Both files of the 8B models are the same configuration, except that config.json of Ministral-8B has no pattern of
    layers."""
    new = Mistral3Config.from_dict(from_params(MINISTRAL3_8B_PARAMS))
    old = Mistral3Config.from_dict(ministral3("8B"))
    assert new == old
    assert {k: v for k, v in to_params(ministral3("8B")).items() if k != "architectures"} == {
        key: value for key, value in MINISTRAL3_8B_PARAMS.items() if value is not None
    }
    fp8 = MINISTRAL3_8B_PARAMS | {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    assert from_params(fp8)["quantization_config"]["quant_method"] == "fp8"
    assert to_params(ministral3("8B", fp8=True))["quantization"] == fp8["quantization"]

    ragged = MinistralConfig.from_dict(from_params(MINISTRAL_8B_PARAMS))
    windowed = MinistralConfig.from_dict(MINISTRAL_8B)
    assert ragged.layer_types == MinistralConfig.published_layer_types(36) and ragged.sliding_window == 32768
    assert dataclasses.replace(windowed, layer_types=ragged.layer_types) == ragged
    assert to_params(ragged.to_dict()) == MINISTRAL_8B_PARAMS | {"tied_embeddings": False}
    for key in ("sliding_window", "_sliding_window"):
        scalar = {k: v for k, v in MINISTRAL_8B_PARAMS.items() if k != "sliding_window"} | {key: 32768}
        assert MinistralConfig.from_dict(from_params(scalar)) == windowed
    underscored = {k: v for k, v in scalar.items()} | {"_sliding_window": [None, 32768, 32768, 32768]}
    assert MinistralConfig.from_dict(from_params(underscored)) == ragged
    dialects = [MINISTRAL_8B | {"layer_types": ragged.layer_types}, ragged.to_dict()]  # "mistral" with it, "ministral"
    assert all(MinistralConfig.from_dict(config) == ragged for config in dialects)


def test_the_scale_of_yarn():
    """`apply_scale` decides if scores are multiplied by (0.1 ln 16 + 1)^2. It is false in the published models."""
    for apply, factor in ((False, 1.0), (True, 0.1 * math.log(16) + 1)):
        params = copy.deepcopy(MINISTRAL3_8B_PARAMS)
        params["yarn"]["apply_scale"] = apply
        text = Mistral3Config.from_dict(from_params(params)).text_config
        assert YarnRotaryEmbedding(text).attention_factor() == pytest.approx(factor, abs=1e-12)
        assert to_params(from_params(params))["yarn"] == params["yarn"]


@pytest.mark.parametrize("scheme, name", [("static", "TENSOR"), ("dynamic", "NO_SCALES")])
def test_how_activations_of_fp8_are_scaled(scheme, name):
    config = ministral3("8B", fp8=True)
    config["quantization_config"]["activation_scheme"] = scheme
    params = to_params(config)
    assert params["quantization"]["qscheme_act"] == name
    assert from_params(params)["quantization_config"]["activation_scheme"] == scheme


def changed(path, value):
    """MINISTRAL3_8B_PARAMS with one value changed; a path is keys joined by dots."""
    params = copy.deepcopy(MINISTRAL3_8B_PARAMS)
    *parents, key = path.split(".")
    where = params
    for parent in parents:
        where = where[parent]
    if value is KeyError:
        del where[key]
    else:
        where[key] = value
    return params


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("dim", KeyError, "params.json has dim=None"),
        ("dim", "big", "params.json has dim='big'"),
        ("yarn.apply_scale", KeyError, "params.json has apply_scale=None"),
        ("yarn.apply_scale", 1, "params.json has apply_scale=1"),
        ("yarn", 3, "params.json has yarn=3"),
        ("llama_4_scaling.original_max_position_embeddings", 8192, "yarn and llama_4_scaling differ in original_max"),
        ("sliding_window", [None, 5, 5], r"sliding_window=\[None, 5, 5\]; allowed: .* repeated over 34 layers"),
        ("sliding_window", [5, 6], r"sliding_window=\[5, 6\]; allowed: null, one number"),
        ("sliding_window", 0, "sliding_window=0; allowed"),
        ("sliding_window", [[1]], "sliding_window=.*; allowed"),
        ("sliding_window", [None, 4096], "windows for some layers only: Transformers has no such model"),
        ("n_layers", 34.0, r"n_layers=34\.0; allowed: a whole number above 0"),
        ("n_layers", 2**31 - 1, "n_layers=2147483647; allowed: a whole number from 1 to 1000"),
        ("dim", True, "dim=True; allowed: a whole number above 0"),
        ("norm_eps", "small", "norm_eps='small'; allowed: a number"),
        ("sliding_window", [], "sliding_window=.*; allowed"),
        ("sliding_window", "wide", "sliding_window=.*wide"),
        ("moe", {"num_experts": 8}, "params.json has moe=.*another function"),
        ("q_lora_rank", 64, "params.json has q_lora_rank=64, which is another function"),
        ("vision_encoder.mm_projector_id", "", "needs mm_projector_id='patch_merge'"),
        ("vision_encoder.add_pre_mm_projector_layer_norm", False, "needs add_pre_mm_projector_layer_norm=true"),
        ("vision_encoder.hidden_size", None, "params.json has hidden_size=None"),
        ("quantization", {"qformat_weight": "nvfp4"}, r"quantized weights \(nvfp4\) are not supported; allowed: fp8"),
        ("quantization", "fp8", "quantization='fp8'"),
    ],
)
def test_params_of_other_models_are_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_params(changed(path, value))


def test_both_names_of_the_window_must_agree():
    with pytest.raises(ValueError, match="sliding_window"):
        from_params(MINISTRAL_8B_PARAMS | {"_sliding_window": 5})
    assert from_params(MINISTRAL_8B_PARAMS | {"_sliding_window": MINISTRAL_8B_PARAMS["sliding_window"]})


def test_unknown_params_are_named():
    with pytest.warns(UserWarning, match=r"params\.json: ignored unknown keys a_new_one"):
        from_params(MINISTRAL_8B_PARAMS | {"a_new_one": 3, "nothing": None})


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("text_config", {"hidden_act": "gelu"}, "params.json has no field for hidden_act='gelu'; supported: silu"),
        ("rope", {"truncate": False}, "no field for truncate=False"),
        ("rope", {"mscale": 0.7}, "no field for mscale=0.7"),
        ("rope", {"attention_factor": 1.3}, "no field for attention_factor=1.3"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act='gelu'"),
        (None, {"vision_feature_layer": -2}, "no field for vision_feature_layer=-2"),
        (None, {"projector_hidden_act": "silu"}, "no field for projector_hidden_act='silu'"),
    ],
)
def test_params_have_no_field_for_it(part, change, message):
    config = ministral3("8B")
    where = config["text_config"]["rope_parameters"] if part == "rope" else config[part] if part else config
    where.update(change)
    with pytest.raises(ValueError, match=message):
        to_params(config)


def test_one_set_of_files_is_read_and_never_both(tmp_path):
    """Transformers' files if they are complete, whatever other files there are. Otherwise Mistral's."""
    first, second = (draw_model(random.Random(seed), "ministral", torch.float32) for seed in (5, 6))
    first.save_pretrained(tmp_path / "both")
    second.save_pretrained(tmp_path / "second")
    convert(tmp_path / "second", tmp_path / "mistral", format="mistral")
    for name in ("params.json", "consolidated.safetensors"):
        shutil.copy(tmp_path / "mistral" / name, tmp_path / "both" / name)
    assert_same_weights(load_model(tmp_path / "both"), first)
    (tmp_path / "both" / "model.safetensors").unlink()  # config.json alone is no model
    assert_same_weights(load_model(tmp_path / "both"), second)
    (tmp_path / "both" / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .*found config\.json, consol"):
        load_model(tmp_path / "both")
    (tmp_path / "mistral" / "consolidated.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither consolidated\.safetensors nor"):
        load_model(tmp_path / "mistral")


def test_shards_in_mistrals_layout_and_what_is_left_out(tmp_path):
    """Large models in Mistral's layout are shards with an index. Ranges of fake quantisation are not weights."""
    model = draw_model(random.Random(1), "ministral3", torch.float32)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", path := tmp_path / "mistral", format="mistral")
    tensors = load_file(path / "consolidated.safetensors")
    tensors["layers.0.attention.k_fake_quantizer.qscale_act"] = torch.tensor(1.0)
    names = [f"consolidated-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves):
        save_file(half, path / name)
    weight_map = {tensor: name for name, half in zip(names, halves) for tensor in half}
    (path / "consolidated.safetensors").unlink()
    (path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(load_model(path), model)
    halves[0]["layers.0.attention.surprise.weight"] = torch.ones(1)
    save_file(halves[0], path / names[0])
    weight_map["layers.0.attention.surprise.weight"] = names[0]
    (path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.surprise\.weight is no tensor of Mistral's"):
        load_model(path)


# --------------------------------------------------------------------------------------------------------- FP8


def dequantized(weight, scale, dtype):
    """Dequantise with Transformers, or by the formula if its version does not support scales without dimensions."""
    theirs = finegrained_fp8.Fp8Dequantize(None)
    if hasattr(theirs, "_dequantize_one"):
        return theirs._dequantize_one(weight, scale, dtype)
    grid = scale if scale.ndim else scale[None, None]
    rows, columns = (n // blocks for n, blocks in zip(weight.shape, grid.shape))
    spread = grid.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (weight.float() * spread).to(dtype)


@given(rngs, st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_fp8_is_dequantised_as_transformers_does(rng, dtype):
    """Bit for bit, for one scale without dimensions or a grid of them, whichever type the scale has."""
    grid = rng.choice([None, (1, 1), (2, 1), (3, 4)])
    rows, columns = (grid or (1, 1))[0] * rng.choice([1, 5, 16]), (grid or (1, 1))[1] * rng.choice([1, 7, 16])
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    weight = (torch.randn(rows, columns, generator=g) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = (torch.rand(grid or (), generator=g) * 1e-3).to(rng.choice([torch.float32, torch.bfloat16]))
    expected = dequantized(weight, scale, dtype)
    computed = dequantize(weight, scale, dtype)
    assert computed.dtype == expected.dtype == dtype and computed.equal(expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ministral3", "mistral3"])
@pytest.mark.parametrize("grid, scale_dtype", [(None, torch.float32), (None, torch.bfloat16), ((2, 2), torch.float32)])
def test_fp8_models(tmp_path, kind, grid, scale_dtype):
    """Both layouts load to the same bits: products of numbers and scales, and all other tensors unchanged."""
    rng = random.Random(3)
    model = draw_model(rng, kind, torch.bfloat16)
    model.save_pretrained(tmp_path / "fp8")
    if kind == "mistral3":
        hub_names(tmp_path / "fp8")
    quantize(tmp_path / "fp8", scale_dtype, grid)
    with pytest.warns(UserWarning, match=r"\d+ FP8 weights become bfloat16; activation scales are left out: this"):
        loaded = load_model(tmp_path / "fp8")
    stored, state, quantized = load_file(tmp_path / "fp8" / "model.safetensors"), loaded.state_dict(), 0
    for name, tensor in stored.items():
        if f"{name}_scale_inv" in stored:
            tensor = dequantized(tensor, stored[f"{name}_scale_inv"], torch.bfloat16)
            quantized += 1
        if not name.endswith(("_scale_inv", "activation_scale")):
            assert state[loaded.own_name(name)].equal(tensor), name
    assert quantized == 7 * model.config.get_text_config().num_hidden_layers
    ids = draw_ids(rng)
    if grid is None:  # the numbers move with their rows
        convert(tmp_path / "fp8", tmp_path / "mistral", format="mistral")
        converted = load_file(tmp_path / "mistral" / "consolidated.safetensors")
        assert converted["layers.0.attention.wq.weight"].dtype == torch.float8_e4m3fn
        for name in ("layers.0.attention.wq.qscale_weight", "layers.1.feed_forward.w2.qscale_act"):
            assert converted[name].shape == ()
        with pytest.warns(UserWarning, match="FP8 weights become bfloat16"):
            other = load_model(tmp_path / "mistral")
        assert_same_weights(other, loaded)
        assert_same(copy.deepcopy(other)(ids).logits, copy.deepcopy(loaded)(ids).logits)
        convert(tmp_path / "mistral", tmp_path / "back")
        with pytest.warns(UserWarning, match="FP8 weights become bfloat16"):
            assert_same_weights(load_model(tmp_path / "back"), loaded)
        back = load_file(tmp_path / "back" / "model.safetensors")
        assert all(t.view(torch.uint8).equal(back[n.removeprefix("model.") if n not in back else n].view(torch.uint8))
                   for n, t in stored.items() if t.dtype == torch.float8_e4m3fn)  # fmt: skip
    else:
        with pytest.raises(ValueError, match=r"weight_scale_inv is a grid, .*give a dtype"):
            convert(tmp_path / "fp8", tmp_path / "mistral", format="mistral")
    convert(tmp_path / "fp8", tmp_path / "bf16", torch.bfloat16, format="mistral")
    assert_same_weights(load_model(tmp_path / "bf16"), loaded)
    assert "quantization" not in json.loads((tmp_path / "bf16" / "params.json").read_text())
    convert(tmp_path / "fp8", tmp_path / "hf16", torch.bfloat16)
    written = json.loads((tmp_path / "hf16" / "config.json").read_text())
    assert "quantization_config" not in written and written["dtype"] == "bfloat16"
    assert not any("scale" in name for name in load_file(tmp_path / "hf16" / "model.safetensors"))
    with pytest.warns(UserWarning, match="FP8 weights become float32"):
        exact = load_model(tmp_path / "fp8", dtype=torch.float32)
    assert not exact.state_dict()[loaded.own_name(next(n for n in stored if f"{n}_scale_inv" in stored))].equal(
        state[loaded.own_name(next(n for n in stored if f"{n}_scale_inv" in stored))].float()
    )  # rounded once, not to bfloat16 first
    loaded.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert_same_weights(load_model(tmp_path / "saved"), loaded)


def test_broken_fp8_is_refused(tmp_path):
    model = draw_model(random.Random(3), "ministral3", torch.bfloat16)
    model.save_pretrained(tmp_path)
    quantize(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for change, message in (
        ({f"{name}_scale_inv": torch.ones(3, 2)}, r"up_proj\.weight: scales \[3, 2\] for a tensor"),
        ({f"{name}_scale_inv": torch.ones(2)}, r"scales \[2\] for a tensor"),
        ({f"{name}_scale_inv": torch.ones(0, 4)}, r"scales \[0, 4\] for a tensor"),
        ({name: whole[name].flatten()}, "1 tensors misshapen"),
        ({f"{name}_scale_inv": torch.ones((), dtype=torch.uint8)}, "uint8; allowed: one number"),
        ({f"{name}_scale_inv": torch.tensor(1.0).to(torch.float8_e4m3fn)}, "float8_e4m3fn; allowed: .* of 16 bits"),
        ({name: whole[name].bfloat16()}, "has a scale but is not stored as F8_E4M3"),
        ({name: whole[name].float().to(torch.float8_e5m2)}, "has a scale but is not stored as F8_E4M3"),
        ({f"{name}_scale_inv": None}, f"{name} is F8_E4M3"),
    ):
        tensors = {k: v for k, v in (whole | change).items() if v is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for quantization, message in (
        *(({"quant_method": method}, rf"quantized weights \({method}\) are not supported; allowed: fp8 e4m3")
          for method in ("gptq", "bitsandbytes", "compressed-tensors")),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"quantized weights \(fp8 e5m2\) are not supported"),
        ("fp8", "quantization_config='fp8' is impossible; allowed: an object"),
        *(({"quant_method": "fp8", "weight_block_size": block}, "weight_block_size=.* is impossible")
          for block in (1, [128], [0, 0], [-1, 2], [None, None], {})),
    ):  # fmt: skip
        config["quantization_config"] = quantization
        (tmp_path / "config.json").write_text(json.dumps(config))
        for operation in (load_model, describe, lambda path: convert(path, tmp_path / "new")):
            with pytest.raises(ValueError, match=message):
                operation(tmp_path)


def test_the_size_of_blocks_is_checked(tmp_path):
    """A grid for blocks of another size than in config.json would give wrong numbers if both sizes divide the
    matrix."""
    model = Ministral3ForCausalLM(Ministral3Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=50))  # fmt: skip
    model.save_pretrained(tmp_path)
    quantize(tmp_path, grid=(2, 2))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [8, 8]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"scale of shape \[2, 2\].*allowed: one number, or \[1, 1\]"), pytest.warns():
        load_model(tmp_path)
    config["quantization_config"]["weight_block_size"] = [5, 6]  # as many blocks, but the last ones are not whole
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="each for a whole block"), pytest.warns():
        load_model(tmp_path)


def test_the_type_that_fp8_becomes(tmp_path):
    """The type in config.json, under each of its names; without one, the type of the other tensors, or bfloat16."""
    model = draw_model(random.Random(3), "ministral3", torch.float16)
    for entry, expected in (({"dtype": "float16"}, torch.float16), ({"torch_dtype": "float16"}, torch.float16),
                           ({}, torch.float16), ({"dtype": "bfloat16"}, torch.bfloat16)):  # fmt: skip
        model.save_pretrained(tmp_path)
        quantize(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config | entry))
        assert checkpoint.Checkpoint(tmp_path).dtype == expected


# ----------------------------------------------------------------------------------- ties and text of vision models


@torch.no_grad()
@pytest.mark.parametrize("published_names", [True, False])
def test_a_text_model_loads_from_the_files_of_a_vision_model(tmp_path, published_names):
    """Transformers has random weights in this case."""
    for seed in range(4):
        model = draw_model(random.Random(seed), "mistral3", torch.float32)
        model.save_pretrained(path := tmp_path / str(seed))
        if published_names:
            hub_names(path)
        convert(path, tmp_path / f"{seed}-mistral", format="mistral")
        ids = draw_ids(random.Random(seed))
        for directory in (path, tmp_path / f"{seed}-mistral"):
            text = Ministral3ForCausalLM.from_pretrained(directory)
            assert_same(copy.deepcopy(text)(ids).logits, model(ids).logits)
            assert text.config.tie_word_embeddings == model.config.tie_word_embeddings
            assert_same_weights(Ministral3Model.from_pretrained(directory), model.model.language_model)
        with pytest.warns(UserWarning, match=r"has no score\.weight: initialised"):
            classifier = Ministral3ForSequenceClassification.from_pretrained(path)
        assert_same_weights(classifier.model, model.model.language_model)
        with pytest.raises(ValueError, match="model_type 'ministral3' computes another function"):
            MinistralForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("entry", [True, False, None])
@pytest.mark.parametrize("stored", ["none", "same", "other"])
@pytest.mark.parametrize("kind", ["ministral3", "mistral3"])
def test_the_head_is_the_one_that_is_stored(tmp_path, recwarn, entry, stored, kind):
    """Without a stored head it is the embeddings. The entry in config.json counts only for two equal tensors. A warning
    is given where they disagree."""
    rng = random.Random(0)
    model = draw_model(rng, kind, torch.float32)
    model.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    embeddings = next(tensor for name, tensor in tensors.items() if "embed_tokens" in name)
    tensors.pop("lm_head.weight", None)
    if stored != "none":
        tensors["lm_head.weight"] = embeddings.clone() + (stored == "other")
    save_file(tensors, tmp_path / "model.safetensors")
    for part in (config, config.get("text_config", {})):
        part.pop("tie_word_embeddings", None)
    if entry is not None:
        config["tie_word_embeddings"] = entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path)
    backbone = loaded.model.language_model if kind == "mistral3" else loaded.model
    tied = stored == "none" or (stored == "same" and entry is not False)
    assert loaded.config.tie_word_embeddings == tied == (loaded.lm_head.weight is backbone.embed_tokens.weight)
    assert loaded.lm_head.weight.equal(embeddings + (stored == "other"))
    assert len(recwarn.list) == ((stored, entry) in (("none", False), ("other", True)))


# ---------------------------------------------------------------------------------------------- convert and info


run = functools.partial(run_command, program=main)  # of python -m checkpoint


def test_the_convert_command(tmp_path, capsys):
    """The bundled model in both directions, with its tokenizer."""
    code, out, err = run(capsys, "convert", BUNDLED, tmp_path / "m", "--format", "mistral", "--dtype", "fp32")
    assert (code, out, err) == (0, "", f"{tmp_path / 'm'} is written\n")
    left_out = {"model.safetensors", "config.json", "loss.png", "training_log.json", "evaluation.json"}
    others = {path.name for path in BUNDLED.iterdir()} - left_out
    assert {"tekken.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"} <= others
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"consolidated.safetensors", "params.json", *others}
    assert run(capsys, "convert", tmp_path / "m", tmp_path / "hf", "--dtype", "bfloat16")[0] == 0
    assert_same_weights(load_model(tmp_path / "hf"), load_model(BUNDLED))
    lines = [run(capsys, "info", path)[1].splitlines() for path in (BUNDLED, tmp_path / "hf")]
    assert lines[0] == lines[1]
    code, out, err = run(capsys, "convert", BUNDLED, tmp_path / "hf")
    assert code == 2 and err.count("\n") == 1 and "holds something already; give a new or empty directory" in err


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    model = draw_model(random.Random(0), "ministral3", torch.float32)
    model.save_pretrained(tmp_path / "hf")

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.writer, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(tmp_path / "hf", tmp_path / "new", format="mistral")
    assert os.listdir(tmp_path) == ["hf"]
    tensors = load_file(tmp_path / "hf" / "model.safetensors") | {"model.layers.0.mlp.gate.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate\.weight has no name in the mistral layout"):
        convert(tmp_path / "hf", tmp_path / "new", format="mistral")
    assert os.listdir(tmp_path) == ["hf"]


def test_names_of_transformers_in_mistrals_file_are_refused(tmp_path):
    """Their rows are in Transformers' order already."""
    model = draw_model(random.Random(0), "ministral3", torch.float32)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mistral", format="mistral")
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "mistral" / "consolidated.safetensors")
    with pytest.raises(ValueError, match="is no tensor of Mistral's layout"):
        load_model(tmp_path / "mistral")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="granite"), "model_type 'granite' computes another function"),
        (dict(model_type="qwen2"), "model_type 'qwen2' computes another function"),
        (dict(attention_bias=True), "biases make it another function"),
        (dict(rope_parameters=None), "has rope_theta=None for rotary positions; allowed: a number"),
        (dict(rope_parameters=3), "rope_parameters=3 is impossible; allowed: an object"),
        (dict(head_dim=None), "has head_dim=None; allowed: a whole number from 1 to 2147483647"),
        (dict(num_key_value_heads=None), "has num_key_value_heads=None"),
        (dict(hidden_size=-4), "has hidden_size=-4"),
        (dict(num_attention_heads=0), "has num_attention_heads=0"),
        (dict(layer_types=True), "layer_types=True; allowed"),
        (dict(layer_types=["sliding_attention"] * 2), "a window for sliding ones"),
        (dict(sliding_window="x"), "sliding_window='x'"),
        (dict(text_config=3), "text_config=3 is impossible; allowed: an object"),
        (dict(model_type="mistral3"), "a mistral3 model needs vision_config"),
        (dict(model_type=["x"]), r"model_type=\['x'\] is impossible"),
        (dict(rms_norm_eps=None), "rms_norm_eps=None"),
    ],
)
def test_unclear_arguments_are_refused(tmp_path, capsys, change, message):
    """Models of other types, and configurations that leave out required fields, are not converted or described."""
    rng = random.Random(0)
    models = iter(lambda: draw_model(rng, "ministral3"), 0)
    model = next(m for m in models if m.config.num_hidden_layers == 2 and m.config.sliding_window is None)
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | change
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    for command in (["info", tmp_path / "hf"], ["convert", tmp_path / "hf", tmp_path / "new", "--format", "mistral"]):
        code, out, err = run(capsys, *command)
        assert code == 2 and out == "" and re.search(message, err) and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


junk = st.sampled_from([None, 0, -1, 1, 3, 2.5, True, "x", "", [], [1], [None], {}, {"a": 1}, 60, float("inf")])


@given(rngs, st.sampled_from(["ministral", "ministral3", "mistral3"]), st.data())
def test_no_configuration_is_a_traceback(tmp_path_factory, rng, kind, data):
    """Every value in every place of a config.json or params.json works, or gives a ValueError of one line."""
    path = tmp_path_factory.mktemp("junk")
    draw_model(rng, kind, torch.float32).save_pretrained(path / "hf")
    convert(path / "hf", path / "mistral", format="mistral")
    file = data.draw(st.sampled_from([path / "hf" / "config.json", path / "mistral" / "params.json"]))
    content = json.loads(file.read_text())
    where = content
    while True:
        key = data.draw(st.sampled_from(sorted(where)))
        if not isinstance(where[key], dict) or data.draw(st.booleans()):
            break
        where = where[key]
    where[key] = data.draw(junk)
    file.write_text(json.dumps(content))
    for operation in (load_model, describe, lambda p: convert(p, path / "a"),
                      lambda p: convert(p, path / "b", format="mistral")):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                operation(file.parent)
            except ValueError as error:
                assert "\n" not in str(error)


def test_heads_that_the_rows_do_not_have(tmp_path):
    """Rows are reordered head by head, so a wrong number of heads is refused before anything is written."""
    model = next(m for m in (draw_model(random.Random(i), "ministral3", torch.float32) for i in itertools.count())
                 if m.config.num_attention_heads == 4 and m.config.num_key_value_heads == 1)  # fmt: skip
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for heads in (60, 2, 1):  # 2 and 1 would divide the rows
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": heads}))
        with pytest.raises(ValueError, match=r"q_proj\.weight is \[16, \d+\], the configuration asks for"):
            convert(tmp_path / "hf", tmp_path / "new", format="mistral")
    assert os.listdir(tmp_path) == ["hf"]


def test_where_a_conversion_may_go(tmp_path, capsys):
    """Inside the source, through a link, with folders in the source named like files that are copied. Permissions are
    the usual ones."""
    source = tmp_path / "source"
    shutil.copytree(BUNDLED, source)
    (source / "LICENSES").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for destination in (source / "new", tmp_path / "link", tmp_path / "dangling", f"{tmp_path}/slash/"):
        assert run(capsys, "convert", source, destination)[0] == 0
        assert_same_weights(load_model(destination), load_model(source))
    modes = {(tmp_path / "empty" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    assert run(capsys, "info", "~no-such-user/x")[0] == 2
    code, _, err = run(capsys, "convert", source, source)
    assert code == 2 and "holds something already" in err
    code, _, err = run(capsys, "convert", source, "")
    assert code == 2 and "an empty name of a directory" in err


def test_info_does_not_hide_damage(tmp_path, capsys):
    draw_model(random.Random(0), "ministral").save_pretrained(tmp_path, max_shard_size=3000)
    (tmp_path / "model-00001-of-00002.safetensors").unlink(missing_ok=True)
    next(tmp_path.glob("model-00002*")).unlink()
    code, out, err = run(capsys, "info", tmp_path)
    assert code == 2 and out == "" and "does not exist, though the index names it" in err


def test_frequencies_of_old_versions_are_not_converted(tmp_path):
    model = draw_model(random.Random(0), "ministral", torch.float32)
    model.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    for format in ("hf", "mistral"):
        convert(tmp_path / "hf", tmp_path / f"new-{format}", format=format)
        assert not any("inv_freq" in name for name in checkpoint.Checkpoint(tmp_path / f"new-{format}").names())


PUBLISHED = {  # parameters, bytes of weights, bytes of cache per token
    "3B": (ministral3("3B"), 3_849_090_048, 2 * 3_849_090_048, 106_496),
    "3B FP8": (ministral3("3B", fp8=True), 3_849_090_048, 3_026_190_336 + 2 * 822_899_712, 106_496),
    "8B": (ministral3("8B"), 8_918_026_240, 2 * 8_918_026_240, 139_264),
    "14B": (ministral3("14B"), 13_945_031_680, 2 * 13_945_031_680, 163_840),
    "14B FP8": (ministral3("14B", fp8=True), 13_945_031_680, 12_163_481_600 + 2 * 1_781_550_080, 163_840),
    "8B-2410": (MINISTRAL_8B, 8_019_808_256, 2 * 8_019_808_256, 147_456),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes(tmp_path, capsys, name):
    """`info` of the configuration alone. FP8: 4.67 and 15.7 GB, as the Hub lists the files."""
    config, parameters, nbytes, cache = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "info", tmp_path)
    assert code == 0 and f"parameters  {parameters:,} (text" in out
    assert f"({nbytes:,} bytes not here; by its configuration)" in out and f"{cache:,} bytes per token" in out
    assert f"context     {config.get('text_config', config)['max_position_embeddings']:,} tokens" in out
    if name == "3B FP8":
        assert "weights     4.7 GB" in out and "3,026,190,336 F8_E4M3, 822,899,712 bfloat16" in out
        assert "(text 3,429,006,336, vision 403,305,472, projector 16,778,240)" in out


def test_the_pattern_of_windows_shows_in_the_cache(tmp_path, capsys):
    (tmp_path / "params.json").write_text(json.dumps(MINISTRAL_8B_PARAMS))
    out = run(capsys, "info", tmp_path)[1]
    assert "147,456 bytes per token in bfloat16, 110,592 of them up to 32,768 tokens only" in out
    assert "8,019,808,256 (text 8,019,808,256)" in out and "layout      Mistral" in out


@given(rngs, st.sampled_from(["ministral", "ministral3", "mistral3"]), st.booleans())
def test_info_counts_what_is_there(tmp_path_factory, rng, kind, fp8):
    """The formula from the configuration equals the tensors of the file, and those of the model; the cache has the
    type of the weights."""
    path, model = tmp_path_factory.mktemp("info"), draw_model(rng, kind)
    model.save_pretrained(path)
    if fp8:
        quantize(path)
    counts = count_parameters(checkpoint.read_config(path))
    total = sum(p.numel() for p in model.parameters())
    assert counts["text"] + counts["vision"] + counts["projector"] == total
    out = "\n".join(describe(path))
    tensors = load_file(path / "model.safetensors")
    assert f"{total:,} (text {counts['text']:,}" in out
    assert f"({sum(t.nbytes for t in tensors.values()):,} bytes of tensors)" in out
    cache, dtype = kv_cache_bytes(model.config.get_text_config(), 1, model.dtype.itemsize), str(model.dtype)
    assert f"cache       {cache:,} bytes per token in {dtype.removeprefix('torch.')}" in out
    if fp8:
        assert f"{counts['fp8']:,} F8_E4M3" in out
        assert counts["fp8"] == sum(t.numel() for t in tensors.values() if t.dtype == torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required"),
        (["info", "/no/such/place"], "no model directory /no/such/place"),
        (["info", "{tmp}"], "config.json does not exist"),
        (["info", "{tmp}", "--revision", "v1"], "revision='v1' is impossible for the directory"),
        (["convert", "{tmp}"], "the following arguments are required"),
        (["convert", "{tmp}", "{tmp}/new"], "config.json does not exist"),
        (["convert", "{tmp}", "{tmp}/new", "--dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_wrong_use_of_the_commands(tmp_path, capsys, arguments, message):
    code, out, err = run(capsys, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_info_of_half_a_configuration(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "ministral3", "hidden_size": 8}')
    code, _, err = run(capsys, "info", tmp_path)
    assert code == 2 and "config.json has intermediate_size=None; allowed: a whole number" in err
    assert err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- the Hub


class Hub:
    """A replacement of `snapshot_download`, which copies the files that match the patterns."""

    def __init__(self, remote, local):
        self.remote, self.local, self.asked = remote, local, []

    def __call__(self, repo_id, allow_patterns, **options):
        self.asked.append((repo_id, options))
        self.local.mkdir(exist_ok=True)
        for path in self.remote.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.local / path.name)
        return str(self.local)


@pytest.mark.parametrize("layouts", [("hf",), ("mistral",), ("hf", "mistral"), ("shards", "mistral")])
def test_one_set_of_weights_is_fetched_and_no_pickle(tmp_path, monkeypatch, layouts):
    model = draw_model(random.Random(1), "ministral", torch.float32)
    model.save_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "shards", max_shard_size=5000)
    convert(tmp_path / "hf", tmp_path / "mistral", format="mistral")
    (remote := tmp_path / "remote").mkdir()
    for layout in layouts:
        for path in (tmp_path / layout).iterdir():
            shutil.copy(path, remote / path.name)
    others = {"tekken.json", "generation_config.json", "processor_config.json", "SYSTEM_PROMPT.txt", "tokenizer.json",
              "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}  # fmt: skip
    for name in ("pytorch_model.bin", "consolidated.00.pth", "README.md", "model.gguf", "training.pt", *others):
        (remote / name).write_text("{}" if name == "generation_config.json" else "x")
    hub = Hub(remote, tmp_path / "local")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    checkpoint.find("owner/name", parts="config")
    assert {path.name for path in hub.local.iterdir()} <= {"config.json", "params.json"}
    options = {"token": "secret", "cache_dir": tmp_path, "local_files_only": True}
    checkpoint.find("owner/name", "abc", parts="tokenizer", **options)
    assert hub.asked[-1] == ("owner/name", {"revision": "abc"} | options)
    fetched = {path.name for path in hub.local.iterdir()}
    assert fetched >= others and not any("safetensors" in name for name in fetched)
    assert_same_weights(load_model("owner/name", revision="abc"), model)
    assert hub.asked[-1][1]["revision"] == "abc"
    fetched = {path.name for path in hub.local.iterdir()}
    sets = {"hf": "model.safetensors", "mistral": "consolidated.safetensors", "shards": "model-00001-of-"}
    assert any(name.startswith(sets[layouts[0]]) for name in fetched)
    assert not any(name.startswith(sets[other]) for name in fetched for other in layouts[1:])
    assert not fetched & {"pytorch_model.bin", "consolidated.00.pth", "README.md", "model.gguf", "training.pt"}
    assert fetched >= others
    convert("owner/name", tmp_path / "converted")
    assert {path.name for path in (tmp_path / "converted").iterdir()} >= others


@pytest.mark.parametrize(
    "error, message",
    [
        (GatedRepoError, "accept its terms at https://huggingface.co/owner/name, then log in: `hf auth login`, or set"),
        (RepositoryNotFoundError, "check the name; if the repository is private, log in: `hf auth login`"),
        (LocalEntryNotFoundError, "give a directory, or check name, revision and network"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_a_cure(monkeypatch, error, message):
    def refuse(*_, **__):
        raised = error.__new__(error)  # its arguments differ from version to version
        raised.args = ("cannot\nbe had",)
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=re.escape(message)) as caught:
        load_model("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_cache_serves_without_a_network(tmp_path):
    """A repository in huggingface_hub's cache is found by name and by revision with HF_HUB_OFFLINE=1."""
    commit, repository = "0" * 40, tmp_path / "models--owner--name"
    for name, revision in (("refs", "main"), ("refs", "v1")):
        (repository / name).mkdir(parents=True, exist_ok=True)
        (repository / name / revision).write_text(commit)
    (repository / "snapshots").mkdir()
    shutil.copytree(BUNDLED, repository / "snapshots" / commit)
    program = "import sys, checkpoint; print(checkpoint.find('owner/name', *sys.argv[1:]))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    for arguments in ([], ["v1"], [commit], ["v2"]):
        result = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True,
                                text=True, cwd=Path(checkpoint.__file__).parent.parent)  # fmt: skip
        if arguments == ["v2"]:
            assert result.returncode and "owner/name is no directory here and could not be fetched" in result.stderr
        else:
            assert result.stdout.strip() == str(repository / "snapshots" / commit), result.stderr


def test_transformers_loads_what_is_converted(tmp_path):
    """The three families, from Mistral's layout to Transformers'."""
    for kind in ("ministral", "ministral3", "mistral3"):
        model = draw_model(random.Random(7), kind, torch.float32)
        model.save_pretrained(tmp_path / kind)
        convert(tmp_path / kind, tmp_path / f"{kind}-m", format="mistral")
        convert(tmp_path / f"{kind}-m", tmp_path / f"{kind}-hf")
        auto = transformers.AutoModelForImageTextToText if kind == "mistral3" else transformers.AutoModelForCausalLM
        theirs, info = auto.from_pretrained(tmp_path / f"{kind}-hf", output_loading_info=True)
        assert type(theirs).__name__ == type(model).__name__ and not any(info.values()), info
        assert_same_weights(model, theirs)
