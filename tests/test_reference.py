"""The numerical reference: the oracle, traces and golden files."""

import ast
import hashlib
import json
import platform
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

import checkpoint
from model_types import BUNDLED, BUNDLED_2410, load_model
from reference import golden
from reference.__main__ import main
from reference.compare import compare
from reference.golden import HERE
from reference.mutants import MUTANTS
from reference.oracle import forward
from reference.trace import LAYER, POINTS, dimensions, load, order, record
from tests.cases import SCALES_BY_POSITION, VOCAB, draw_case, draw_config, pair, run_chunked
from tests.test_vision import draw_case as draw_vision_case

rngs = st.randoms(use_true_random=False)
ROOT = Path(__file__).resolve().parent.parent
TINY = ("ministral", "ministral3", "mistral3")
# Two float64 computations differ by less, relative to the largest number; what passes through float32 by more.
# (The largest float32 error in 1,853 drawn traces was 723 roundings; as many roundings of float64 are 2e-13.)
FLOAT64 = 1e-10


def text_inputs(rng, case):
    """attention_mask and position_ids: none, those that skip padding, or any that grow."""
    inputs = {} if case.mask is None else {"attention_mask": case.mask}
    kind = rng.choice(["none", "skip", "far"])
    if kind == "skip" and case.mask is not None:
        inputs["position_ids"] = (case.mask.cumsum(1) - 1).clamp(min=0)
    if kind == "far":
        steps = torch.tensor([[rng.randint(1, 9) for _ in row] for row in case.ids])
        inputs["position_ids"] = steps.cumsum(1)
    return inputs


def numpy(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------------- oracle


@torch.no_grad()
@given(rngs)
def test_the_oracle_is_the_model_in_float64(rng):
    """Every intermediate of every configuration: windows, padding, positions, YaRN with and without rounded ends, all
    rules for its magnitude, query scales."""
    case = draw_case(rng, dtype=torch.float32)
    model, inputs = case.truth(), text_inputs(rng, case)
    trace = record(model, case.ids, **inputs)
    expected = forward(model.config.to_dict(), numpy(model.state_dict()), case.ids.numpy(), **numpy(inputs))
    assert list(trace) == list(expected)
    report = compare({k: torch.from_numpy(v) for k, v in expected.items()}, trace, {}, case.padding_mask)
    assert not report.misshapen and max(stage.relative for stage in report.stages) < FLOAT64


@given(rngs)
def test_chunks_through_the_cache_are_the_oracle(rng):
    case = draw_case(rng, dtype=torch.float32)
    case.ours = model = case.truth()
    mask = None if case.mask is None else case.mask.numpy()
    expected = forward(model.config.to_dict(), numpy(model.state_dict()), case.ids.numpy(), mask)["logits"]
    chunked = run_chunked(model, case).numpy()
    assert np.abs(chunked - expected)[case.padding_mask.numpy()].max() < FLOAT64 * np.abs(expected).max()


def test_the_oracle_stands_alone():
    """NumPy and the standard library; under 250 lines; it reads a config.json as published."""
    source = (ROOT / "reference" / "oracle.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "math", "collections.abc", "functools", "typing", "numpy"}
    assert len(source.splitlines()) < 250
    ids = np.array([[1, 50, 60, 70, 80]])
    for directory in (BUNDLED, BUNDLED_2410):
        config = json.loads((directory / "config.json").read_text())
        config = config.get("text_config", config)
        stored = load_file(directory / "model.safetensors").items()
        weights = {name.replace("language_model.", ""): tensor.double().numpy() for name, tensor in stored}
        expected = load_model(directory, torch.float64)(torch.from_numpy(ids)).logits.detach().numpy()
        logits = forward(config, weights, ids)["logits"]
        assert np.abs(logits - expected).max() < 1e-12 * np.abs(logits).max()


# ------------------------------------------------------------------------------------------------------- traces


@torch.no_grad()
@given(rngs)
def test_recording_changes_nothing_and_leaves_nothing_behind(rng):
    case = draw_case(rng)
    case.ours.config.attn_implementation = "eager"
    before = case.ours(case.ids, case.mask, use_cache=False).logits
    inputs = {} if case.mask is None else {"attention_mask": case.mask}
    trace = record(case.ours, case.ids, **inputs)
    assert trace["logits"].equal(before) and case.ours(case.ids, case.mask, use_cache=False).logits.equal(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.ours.modules())
    out = case.ours(case.ids, case.mask, output_hidden_states=True, output_attentions=True, use_cache=False)
    for layer, probabilities in enumerate(out.attentions):
        assert trace[f"layers.{layer}.attention.probabilities"].equal(probabilities)
        assert layer == 0 or trace[f"layers.{layer - 1}.mlp_residual"].equal(out.hidden_states[layer])
    assert trace["embedding"].equal(out.hidden_states[0]) and trace["final_norm"].equal(out.hidden_states[-1])
    some = record(case.ours, case.ids, keep=lambda name: name.endswith("scores"), **inputs)
    assert set(some) == {name for name in trace if name.endswith("scores")}


def test_every_point_is_recorded_in_the_order_of_computing():
    case = draw_vision_case(random.Random(1), images=2)
    trace = record(case.ours, **{k: v for k, v in case.arguments().items() if v is not None})
    assert {LAYER.sub("N", name) for name in trace} == POINTS.keys()
    assert list(trace) == order(reversed(trace)) and list(trace)[-1] == "logits"
    for name, tensor in trace.items():
        assert tensor.ndim == len(dimensions(name).split()), name
    # In the encoder one thing follows from the other, too.
    for layer in range(case.ours.config.vision_config.num_hidden_layers):
        at = f"vision.layers.{layer}."
        x = trace["vision.ln_pre"] if layer == 0 else trace[f"vision.layers.{layer - 1}.mlp_residual"]
        assert trace[f"{at}attention_residual"].equal(x + trace[f"{at}attention.output"])
        assert trace[f"{at}mlp_residual"].equal(trace[f"{at}attention_residual"] + trace[f"{at}mlp.down"])
        assert trace[f"{at}mlp.product"].equal(trace[f"{at}mlp.activation"] * trace[f"{at}mlp.up"])


# ------------------------------------------------------------------------------------------------------- golden


def golden_inputs(name):
    trace, about = load(HERE / name / "float64.safetensors")
    given = {n.removeprefix("input."): trace.pop(n) for n in list(trace) if n.startswith("input.")}
    return trace, given, about


def test_the_golden_files_come_out_the_same():
    """Bit for bit, in a process whose arithmetic is the same on every x86-64 processor, with the torch of the
    manifest; they are small, and the manifest has their hashes. Elsewhere
    `test_the_golden_weights_give_the_golden_traces` compares them in float64."""
    manifest = json.loads((HERE / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((HERE / name).read_bytes()).hexdigest() == entry["sha256"], name
    files = [path for path in HERE.rglob("*") if path.is_file()]
    assert len(files) == len(manifest["files"]) + 1 and sum(path.stat().st_size for path in files) < 6_000_000
    made_with = {"torch": torch.__version__, "machine": platform.machine()}
    for name, version in made_with.items():
        if manifest["versions"][name] != version:
            pytest.skip(f"made with {name} {manifest['versions'][name]}, this is {version}")
    done = subprocess.run([sys.executable, "-m", "reference", "golden", "--check"], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", TINY)
def test_every_feature_fires_in_the_golden_traces(name):
    trace, given, _ = golden_inputs(name)
    config = checkpoint.text_config(checkpoint.read_config(HERE / name / "hf"))
    S = given["input_ids"].shape[1]
    assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"] and S <= 40
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    if name == "ministral":
        assert not trace["layers.1.attention.mask"].equal(trace["layers.0.attention.mask"])  # the window hides keys
        assert config["sliding_window"] < S // 3
    else:
        model = load_model(HERE / name / "hf", torch.float64)
        rotary = (model.model.language_model if name == "mistral3" else model.model).rotary_emb
        plain = 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
        trained = (rotary.inverse_frequencies(torch.float64) / plain - 0.25) / 0.75
        assert trained[0] > 0.999 and trained[-1] < 1e-3 and ((trained > 0.1) & (trained < 0.9)).any()  # three zones
        rotated, scaled = (trace[f"layers.0.attention.q_{kind}"] for kind in ("rotated", "scaled"))
        assert len((scaled / rotated)[0, 0, :, 0].round(decimals=6).unique()) >= 3
    if name != "mistral3":
        assert not given["attention_mask"].all() and given["position_ids"][1, 5] == 0  # padding on the left
    assert trace["layers.1.attention.probabilities"].std() > 0.05  # attention is not uniform


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_golden_weights_give_the_golden_traces(name):
    """Both layouts, and the FP8 copy; the oracle for the text models; cached in chunks longer than the window."""
    trace, given, about = golden_inputs(name)
    assert about["dtype"] == "float64" and about["dimensions"]["logits"] == "B S V"
    padding_mask = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    for layout in ("hf", "mistral"):
        model = load_model(HERE / name / layout, torch.float64)
        computed = record(model, **golden.arguments(given, torch.float64))
        assert list(computed) == list(trace)
        report = compare(computed, trace, {}, padding_mask)
        assert max(stage.relative for stage in report.stages) < 1e-12
    if name != "mistral3":
        w = numpy(model.state_dict())
        expected = forward(model.config.to_dict(), w, **numpy(given))
        assert np.abs(expected["logits"] - trace["logits"].numpy())[padding_mask.numpy()].max() < 1e-11
        cache, start, chunks = None, 0, (3, 9, 1, 7)
        for length in chunks:
            end = start + length
            mask, positions = given["attention_mask"][:, :end], given["position_ids"][:, start:end]
            out = model(given["input_ids"][:, start:end], mask, positions, cache, use_cache=True)
            cache, part = out.past_key_values, trace["logits"][:, start:end]
            assert (out.logits - part)[padding_mask[:, start:end]].abs().max() < 1e-11
            start = end
        assert start == padding_mask.shape[1]
    fp8, about = load(HERE / name / "fp8" / "float64.safetensors")
    with pytest.warns(UserWarning, match="FP8 weights become float64"):
        model = load_model(HERE / name / "fp8", torch.float64)
    logits = record(model, keep="logits".__eq__, **golden.arguments(given, torch.float64))["logits"]
    assert (logits - fp8["logits"])[padding_mask].abs().max() < 1e-11
    assert (logits - trace["logits"])[padding_mask].abs().max() > 1e-3  # FP8 is another model


def documented_readers():
    """The functions of docs/numerics.md that read 16-bit and 8-bit numbers, {"bfloat16": ..., "fp8": ...}."""
    read = {}
    page = (ROOT / "docs" / "numerics.md").read_text()
    exec(re.search(r"```python\n(import numpy .*?)```", page, re.DOTALL)[1], read)
    return read


@pytest.mark.parametrize("name", TINY)
def test_numpy_alone_reads_the_golden_weights(name):
    """Transformers' layout as it is; bfloat16 and FP8 with the lines of docs/numerics.md, which are run here."""
    read = documented_readers()
    assert np.isnan(read["fp8"](b"\x7f\xff")).all()
    ours = load_file(HERE / name / "hf" / "model.safetensors")
    for key, array in load_numpy(HERE / name / "hf" / "model.safetensors").items():
        assert array.dtype == np.float32 and torch.from_numpy(array).equal(ours[key].bfloat16().float()), key
    for file, kind in (("mistral/consolidated", "bfloat16"), ("fp8/model", "fp8")):
        for tensor in load_file(HERE / name / f"{file}.safetensors").values():
            if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
                data = tensor.view(torch.uint8).numpy().tobytes()
                numbers = read[kind if tensor.dtype != torch.bfloat16 else "bfloat16"](data)
                assert torch.from_numpy(numbers).double().equal(tensor.double().flatten())


@pytest.mark.parametrize("name", TINY)
def test_the_noise_of_the_golden_traces(name):
    """float32 and bfloat16 differ from float64 as these types do: the table of docs/numerics.md."""
    trace, given, _ = golden_inputs(name)
    padding_mask = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    for kind, least, most in (("float32", 1e-8, 1e-5), ("bfloat16", 1e-3, 0.2)):
        computed, _ = load(HERE / name / f"{kind}.safetensors")
        report = compare({n: t for n, t in computed.items() if not n.endswith("mask")}, trace, {}, padding_mask)
        worst = max(stage.relative for stage in report.stages if not stage.name.endswith((".cos", ".sin")))
        assert least < worst < most, (kind, worst)


@pytest.mark.parametrize("command", ["noise", "stages"])
def test_the_tables_of_the_documentation_are_printed(capsys, command):
    assert main([command]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "numerics.md").read_text()


@torch.no_grad()
@pytest.mark.skipif(SCALES_BY_POSITION, reason="this Transformers scales queries by position, as is right")
def test_transformers_before_44860_is_a_mutant():
    """Versions before pull request 44860 compute what `query_scale_by_cache_position` computes."""
    for seed in range(20):
        rng = random.Random(seed)
        rope = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=8,
                    llama_4_scaling_beta=0.5)  # fmt: skip
        config = draw_config(rng, "ministral3", rope_parameters=rope, attn_implementation="eager")
        ours, theirs = pair(config, torch.float32, seed)
        ids, positions = torch.randint(1, VOCAB, (1, 12)), torch.arange(5, 17)[None]
        mask = torch.ones_like(ids)
        right = ours(ids, mask, positions).logits
        with MUTANTS["query_scale_by_cache_position"].applied():
            wrong = ours(ids, mask, positions).logits
        assert theirs(ids, attention_mask=mask, position_ids=positions).logits.equal(wrong) and not wrong.equal(right)
