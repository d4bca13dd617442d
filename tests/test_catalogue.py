"""Mistakes that `diff` names in golden models, and those that show only in models of other configurations."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ministral import KVCache, MinistralForCausalLM
from ministral3 import Ministral3ForCausalLM
from model_types import load_model
from reference import golden
from reference.golden import HERE
from reference.mutants import MUTANTS
from reference.trace import record, save
from tests.test_diff import diff
from tests.test_reference import golden_inputs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*FP8 weights become")]


def compare(capsys, tmp_path, directory, given, mistake, keep=lambda name: True):
    """The first line and the verdict of `diff` for a float32 port of a model directory that makes a mistake."""
    about = {"model": str(directory), "dtype": "float64"}
    exact = load_model(directory, torch.float64)
    truth = record(exact, **golden.arguments(given, torch.float64))
    save(tmp_path / "truth.safetensors", truth, given, about)
    arguments = golden.arguments(given, torch.float32)
    model = load_model(directory, torch.float32)
    with MUTANTS[mistake].applied():
        trace = record(model, keep=keep, **arguments)
    save_file({name: tensor.contiguous() for name, tensor in trace.items()}, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", tmp_path / "truth.safetensors")
    lines = out.splitlines()
    return code, lines[0], lines[1]


FIRST = {  # mistake -> (model directory, where the trace diverges first)
    "fp8_bytes_as_numbers": ("ministral/fp8", "layers.0.attention.q"),
    "fp8_scale_ignored": ("ministral3/fp8", "layers.0.attention.q"),
    "fp8_scale_divided": ("ministral/fp8", "layers.0.attention.q"),
    "rope_theta_10000": ("ministral/hf", "layers.0.attention.q_rotated"),
    "rope_theta_1000000": ("ministral/hf", "layers.0.attention.q_rotated"),
    "rope_table_in_bfloat16": ("ministral/hf", "layers.0.attention.q_rotated"),
    "rope_angles_in_float16": ("ministral/hf", "layers.0.attention.q_rotated"),
    "rope_angles_in_bfloat16": ("ministral3/hf", "layers.0.attention.q_rotated"),
    "yarn_betas_32_1": ("ministral3/hf", "layers.0.attention.q_rotated"),
    "yarn_betas_swapped": ("ministral3/hf", "layers.0.attention.q_rotated"),
    "query_scale_without_floor": ("ministral3/hf", "layers.0.attention.q_scaled"),
    "positions_from_1": ("ministral/hf", "layers.0.attention.q_rotated"),
    "padding_visible": ("ministral/hf", "layers.0.attention.mask"),
    "ring_slot_off_by_one": ("ministral/hf", "layers.1.attention.mask"),
    "norm_epsilon_outside_root": ("ministral/hf", "layers.0.input_norm"),
    "gate_and_up_swapped": ("ministral/hf", "layers.0.mlp.gate"),
}


@pytest.mark.parametrize("mistake", FIRST)
def test_a_mistake_in_a_golden_model_is_named(capsys, tmp_path, mistake):
    """From the whole trace, and from logits alone where they show it."""
    place, first = FIRST[mistake]
    _, given, _ = golden_inputs(place.partition("/")[0])
    code, line, verdict = compare(capsys, tmp_path, HERE / place, given, mistake)
    assert code == 1 and line.startswith(f"{first} diverges first. "), line
    assert f"match mutant {mistake!r}" in verdict
    if mistake != "positions_from_1":  # distances are the same
        code, _, verdict = compare(capsys, tmp_path, HERE / place, given, mistake, "logits".__eq__)
        assert code == 1 and f"your logits match mutant {mistake!r}" in verdict


KEYS = [  # mistake, the keys of rope_parameters with which it shows
    ("yarn_magnitude_1", {"mscale": 0.7, "mscale_all_dim": 0.0}),
    ("yarn_mscale_all_dim_ignored", {"mscale": 0.7, "mscale_all_dim": 0.0}),
    ("yarn_magnitude_1_277", {"mscale": 0.707, "mscale_all_dim": 0.5}),
    ("yarn_mscale_ignored", {"mscale": 0.707, "mscale_all_dim": 0.5}),
    ("yarn_mscale_all_dim_ignored", {"mscale": 0.707, "mscale_all_dim": 0.5}),
    ("yarn_attention_factor_ignored", {"mscale": 0.7, "mscale_all_dim": 1.0, "attention_factor": 1.3}),
    ("yarn_truncate_ignored", {"truncate": False}),
    ("yarn_betas_4_1", {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64,
                        "truncate": False}),
]  # fmt: skip


@pytest.mark.parametrize("mistake, keys", KEYS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_in_a_model_of_another_configuration_is_named(capsys, tmp_path, mistake, keys):
    model = golden.models()["ministral3"]
    config = replace(model.config, rope_parameters={**model.config.rope_parameters, **keys})
    other = Ministral3ForCausalLM(config).to(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path / "model")
    _, given, _ = golden_inputs("ministral3")
    for keep in (lambda name: True, "logits".__eq__):
        code, _, verdict = compare(capsys, tmp_path, tmp_path / "model", given, mistake, keep)
        assert code == 1 and f"match mutant {mistake!r}" in verdict, verdict


def test_mistakes_about_fp8_change_no_other_model(tmp_path):
    """Neither one that was not read from files, nor one with plain weights, nor one whose directory is gone."""
    _, given, _ = golden_inputs("ministral")
    fp8 = load_model(HERE / "ministral" / "fp8", torch.float64)
    made, gone = (MinistralForCausalLM(fp8.config).double().eval() for _ in range(2))
    gone.name_or_path = str(tmp_path / "gone")
    plain = load_model(HERE / "ministral" / "hf", torch.float64)
    before = {name: tensor.clone() for name, tensor in fp8.state_dict().items()}
    for name in (name for name in MUTANTS if name.startswith("fp8")):
        for model in (made, gone, plain):
            right = model(**given, use_cache=False).logits
            with MUTANTS[name].applied():
                assert model(**given, use_cache=False).logits.equal(right), name
        right = fp8(**given, use_cache=False).logits
        with MUTANTS[name].applied():
            assert not fp8(**given, use_cache=False).logits.equal(right), name
    assert all(tensor.equal(before[name]) for name, tensor in fp8.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_text_at_once_is_what_the_wrong_ring_decodes(window):
    """With the slot off by one: token by token through the ring, and at once with the mask of that."""
    config = replace(golden.models()["ministral"].config, sliding_window=window, attn_implementation="eager")
    model = MinistralForCausalLM(config).double().eval()
    ids = golden_inputs("ministral")[1]["input_ids"][:1]
    right = model(ids, use_cache=False).logits
    with MUTANTS["ring_slot_off_by_one"].applied():
        at_once = model(ids, use_cache=False).logits
        cache = KVCache(config)
        steps = [model(ids[:, p : p + 1], past_key_values=cache).logits for p in range(ids.shape[1])]
        assert model(ids).logits.equal(right)  # a prompt that is read into the cache is right
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once, rtol=0, atol=1e-12)
    assert torch.allclose(at_once, right) == (window == 1)
    assert torch.allclose(at_once[:, :window], right[:, :window])
