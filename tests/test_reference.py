"""The numerical reference: the oracle, traces, golden files, and what is said about a stranger's port."""

import ast
import copy
import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

import checkpoint
from generate import BUNDLED, load_model
from reference import golden
from reference.__main__ import main
from reference.compare import MARGIN, compare, explain
from reference.golden import HERE
from reference.mutants import MUTANTS, ROUNDING
from reference.oracle import forward
from reference.trace import LAYER, POINTS, dimensions, load, order, record
from tests.cases import SCALES_BY_POSITION, VOCAB, draw_case, draw_config, pair, run_chunked
from tests.test_vision import draw_case as draw_seeing_case
from vision import Mistral3Config

rngs = st.randoms(use_true_random=False)
ROOT = Path(__file__).resolve().parent.parent
TINY = ("ministral", "ministral3", "mistral3")


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
    """Every intermediate of every configuration, to 1e-12: windows, padding, positions, YaRN with and without rounded
    ends, all rules for its magnitude, query scales."""
    case = draw_case(rng, dtype=torch.float32)
    model, inputs = case.truth(), text_inputs(rng, case)
    trace = record(model, case.ids, **inputs)
    truth = forward(model.config.to_dict(), numpy(model.state_dict()), case.ids.numpy(), **numpy(inputs))
    assert list(trace) == list(truth)
    report = compare({k: torch.from_numpy(v) for k, v in truth.items()}, trace, {}, case.real)
    assert not report.misshapen and max(stage.relative for stage in report.stages) < 1e-12


@given(rngs)
def test_chunks_through_the_cache_are_the_oracle(rng):
    case = draw_case(rng, dtype=torch.float32)
    case.ours = model = case.truth()
    mask = None if case.mask is None else case.mask.numpy()
    truth = forward(model.config.to_dict(), numpy(model.state_dict()), case.ids.numpy(), mask)["logits"]
    found = run_chunked(model, case).numpy()
    assert np.abs(found - truth)[case.real.numpy()].max() < 1e-12 * np.abs(truth).max()


def test_the_oracle_stands_alone():
    """NumPy and the standard library; under 250 lines; it reads a config.json as published."""
    source = (ROOT / "reference" / "oracle.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "math", "collections.abc", "functools", "typing", "numpy"}
    assert len(source.splitlines()) < 250
    config = json.loads((BUNDLED / "config.json").read_text())
    weights = {name: tensor.double().numpy() for name, tensor in load_file(BUNDLED / "model.safetensors").items()}
    ids = np.array([[1, 50, 60, 70, 80]])
    model = load_model(BUNDLED, torch.float64)
    logits = forward(config, weights, ids)["logits"]
    assert np.abs(logits - model(torch.from_numpy(ids)).logits.detach().numpy()).max() < 1e-12 * np.abs(logits).max()


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
    case = draw_seeing_case(random.Random(1), pictures=2)
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
    """Bit for bit, in a process whose arithmetic does not depend on the processor (on the versions in the manifest);
    they are small, and the manifest has their hashes."""
    manifest = json.loads((HERE / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((HERE / name).read_bytes()).hexdigest() == entry["sha256"], name
    files = [path for path in HERE.rglob("*") if path.is_file()]
    assert len(files) == len(manifest["files"]) + 1 and sum(path.stat().st_size for path in files) < 3_000_000
    if manifest["versions"]["torch"] != torch.__version__:
        pytest.skip(f"made with torch {manifest['versions']['torch']}")
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
        kept = (rotary.inverse_frequencies(torch.float64) / plain - 0.25) / 0.75
        assert kept[0] > 0.999 and kept[-1] < 1e-3 and ((kept > 0.1) & (kept < 0.9)).any()  # the three zones
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
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    for layout in ("hf", "mistral"):
        model = load_model(HERE / name / layout, torch.float64)
        found = record(model, **golden.arguments(given, torch.float64))
        assert list(found) == list(trace)
        report = compare(found, trace, {}, real)
        assert max(stage.relative for stage in report.stages) < 1e-12
    if name != "mistral3":
        w = numpy(model.state_dict())
        truth = forward(model.config.to_dict(), w, **numpy(given))
        assert np.abs(truth["logits"] - trace["logits"].numpy())[real.numpy()].max() < 1e-11
        cache, start, chunks = None, 0, (3, 9, 1, 7)
        for length in chunks:
            end = start + length
            mask, positions = given["attention_mask"][:, :end], given["position_ids"][:, start:end]
            out = model(given["input_ids"][:, start:end], mask, positions, cache, use_cache=True)
            cache, part = out.past_key_values, trace["logits"][:, start:end]
            assert (out.logits - part)[real[:, start:end]].abs().max() < 1e-11
            start = end
        assert start == real.shape[1]
    fp8, _ = load(HERE / name / "fp8.safetensors")
    with pytest.warns(UserWarning, match="FP8 weights become float64"):
        model = load_model(HERE / name / "fp8", torch.float64)
    logits = record(model, keep="logits".__eq__, **golden.arguments(given, torch.float64))["logits"]
    assert (logits - fp8["logits.float64"])[real].abs().max() < 1e-11
    assert (logits - trace["logits"])[real].abs().max() > 1e-3  # FP8 is another model


@pytest.mark.parametrize("name", TINY)
def test_the_noise_of_the_golden_traces(name):
    """float32 and bfloat16 differ from float64 as these types do: the table of docs/numerics.md."""
    trace, given, _ = golden_inputs(name)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    for kind, least, most in (("float32", 1e-8, 1e-5), ("bfloat16", 1e-3, 0.2)):
        found, _ = load(HERE / name / f"{kind}.safetensors")
        report = compare({n: t for n, t in found.items() if not n.endswith("mask")}, trace, {}, real)
        worst = max(stage.relative for stage in report.stages if not stage.name.endswith((".cos", ".sin")))
        assert least < worst < most, (kind, worst)


def test_the_tolerances_of_the_documentation_are_measured(capsys):
    assert main(["noise"]) == 0
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


# --------------------------------------------------------------------------------------------------- divergence


@pytest.fixture
def mutated(tmp_path):
    """Writes what the golden model computes with a mistake, in a type; returns the file."""

    def write(model, mistake, dtype=torch.bfloat16, change=lambda trace: trace, file="mine.safetensors"):
        _, given, _ = golden_inputs(model)
        with MUTANTS[mistake].applied():
            trace = record(load_model(HERE / model / "hf", dtype), **golden.arguments(given, dtype))
        save_file({name: tensor.contiguous() for name, tensor in change(dict(trace)).items()}, tmp_path / file)
        return tmp_path / file

    return write


def diff(capsys, *arguments):
    """Exit code, standard output and standard error of `python -m reference diff`."""
    try:
        code = main(["diff", *map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    out = capsys.readouterr()
    return code, out.out, out.err


FIRST = {  # mistake -> (model, where the trace diverges first)
    "rope_interleaved": ("ministral", "layers.0.attention.q_rotated"),
    "rope_keys_not_permuted": ("ministral", "layers.0.attention.k_rotated"),
    "rope_keys_permuted_by_query_heads": ("ministral3", "layers.0.attention.k_rotated"),
    "yarn_magnitude_1_277": ("ministral3", "layers.0.attention.q_rotated"),
    "yarn_ramp_reversed": ("ministral3", "layers.0.attention.q_rotated"),
    "yarn_ends_not_rounded": ("ministral3", "layers.0.attention.q_rotated"),
    "yarn_on_positions": ("ministral3", "layers.0.attention.q_rotated"),
    "yarn_missing": ("ministral3", "layers.0.attention.q_rotated"),
    "query_scale_missing": ("ministral3", "layers.0.attention.q_scaled"),
    "query_scale_on_keys": ("ministral3", "layers.0.attention.q_scaled"),
    "query_scale_by_cache_position": ("ministral3", "layers.0.attention.q_scaled"),
    "query_scale_one_early": ("ministral3", "layers.0.attention.q_scaled"),
    "window_plus_1": ("ministral", "layers.1.attention.mask"),
    "window_minus_1": ("ministral", "layers.1.attention.mask"),
    "window_on_all_layers": ("ministral", "layers.0.attention.mask"),
    "window_on_no_layer": ("ministral", "layers.1.attention.mask"),
    "positions_through_padding": ("ministral", "layers.0.attention.q_rotated"),
    "gqa_tiled": ("ministral", "layers.0.attention.probabilities"),
    "head_dim_from_hidden_size": ("ministral", "layers.0.attention.scores"),
    "head_tied": ("ministral", "logits"),
    "merger_patch_by_patch": ("mistral3", "projector.merged"),
    "vision_axes_swapped": ("mistral3", "vision.cos"),
}


@pytest.mark.parametrize("mistake", FIRST)
def test_the_first_divergence_and_its_cause_are_named(capsys, mutated, mistake):
    model, first = FIRST[mistake]
    code, out, _ = diff(capsys, mutated(model, mistake), HERE / model / "float64.safetensors")
    assert code == 1 and out.startswith(f"{first} diverges first. ")
    assert f"match mutant {mistake!r}" in out.splitlines()[1]


def test_a_hidden_key_that_is_seen_is_said_in_words(capsys, mutated):
    path = mutated("ministral", "window_plus_1", change=lambda t: {k: v for k, v in t.items() if "mask" not in k})
    code, out, _ = diff(capsys, path, HERE / "ministral" / "float64.safetensors")
    assert code == 1 and "layers.1.attention.probabilities diverges first. layer 1, " in out
    line = out.splitlines()[0]
    assert line.endswith("should be masked")
    query, key = (int(line.split(f"{word} ")[1].split(",")[0].split(":")[0]) for word in ("query", "key"))
    assert query - key == 5  # one beyond the window


def test_logits_alone_are_enough(capsys, mutated):
    for model, mistake in (("ministral3", "yarn_magnitude_1_277"), ("ministral", "gqa_tiled"),
                           ("mistral3", "merger_patch_by_patch")):  # fmt: skip
        path = mutated(model, mistake, change=lambda trace: {"logits": trace["logits"]})
        code, out, _ = diff(capsys, path, HERE / model / "float64.safetensors")
        assert code == 1 and f"your logits match mutant {mistake!r}" in out and "not given: " in out


def test_other_shapes_names_types_and_files(capsys, mutated, tmp_path):
    """Transposed, flattened, without the batch of one, float16, .npz, renamed: all that is not a mistake."""
    trace, _, _ = golden_inputs("mistral3")
    mine = {
        "embedding": trace["embedding"][0].half(),
        "layers.0.attention.q": trace["layers.0.attention.q"].transpose(1, 2),
        "layers.0.attention.k": trace["layers.0.attention.k"][0].transpose(0, 1).flatten(1),
        "layers.0.attention.heads": trace["layers.0.attention.heads"].unflatten(-1, (4, 8)).transpose(1, 2),
        "layers.0.mlp.gate": trace["layers.0.mlp.gate"][0].T,
        "my.logits": trace["logits"].float(),
    }
    np.savez(tmp_path / "mine.npz", **numpy(mine))
    (tmp_path / "map.json").write_text(json.dumps({"my.logits": "logits"}))
    reference = HERE / "mistral3" / "float64.safetensors"
    code, out, _ = diff(capsys, tmp_path / "mine.npz", reference, "--map", tmp_path / "map.json", "--json")
    report = json.loads(out)
    assert code == 0 and report["first"] is None and report["mutant"] is None
    assert len(report["stages"]) == 6 and not report["misshapen"] and not report["unknown"]
    hows = {stage["name"]: stage["how"] for stage in report["stages"]}
    assert hows["layers.0.attention.k"] == "heads split" and hows["layers.0.attention.heads"] == "heads joined"
    code, out, _ = diff(capsys, tmp_path / "mine.npz", reference)
    assert code == 0 and "names that the reference does not have: my.logits (see --map)" in out


def test_a_mistake_within_the_noise_is_named_from_logits_alone(capsys, mutated):
    for mistake in ("norm_epsilon", "norm_weight_before_rounding", "softmax_not_in_float32"):
        path = mutated("ministral3", mistake, change=lambda trace: {"logits": trace["logits"]})
        code, out, _ = diff(capsys, path, HERE / "ministral3" / "float64.safetensors")
        assert f"match mutant {mistake!r}" in out and code in (0, 1)


def test_right_ports_agree(capsys, tmp_path):
    """In float64 by the oracle; bfloat16 stored as float32, which is what .npz holds; flattened batches; fused."""
    for name in ("ministral", "ministral3"):
        reference = HERE / name / "float64.safetensors"
        _, given, _ = golden_inputs(name)
        weights = numpy({n: t.double() for n, t in load_file(HERE / name / "hf" / "model.safetensors").items()})
        truth = forward(json.loads((HERE / name / "hf" / "config.json").read_text()), weights, **numpy(given))
        np.savez(tmp_path / "oracle.npz", **truth)
        bfloat16, _ = load(HERE / name / "bfloat16.safetensors")
        np.savez(tmp_path / "wide.npz", logits=bfloat16["logits"].float().flatten(0, 1).numpy(),
                 final_norm=bfloat16["final_norm"].float().numpy())  # fmt: skip
        model = load_model(HERE / name / "hf", torch.bfloat16)
        fused = model(**given, use_cache=False).logits.detach()
        save_file({"logits": fused.float()}, tmp_path / "fused.safetensors")
        for file in ("oracle.npz", "wide.npz", "fused.safetensors"):
            code, out, _ = diff(capsys, tmp_path / file, reference)
            assert code == 0 and "mutant" not in out, (name, file, out)


def test_a_leak_through_the_mask_is_seen_however_small(capsys, tmp_path):
    trace, _ = load(HERE / "ministral3" / "bfloat16.safetensors")
    probabilities = trace["layers.0.attention.probabilities"].clone()
    probabilities[0, 2, 5, 9] = 0.001
    save_file({"layers.0.attention.probabilities": probabilities}, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", HERE / "ministral3" / "float64.safetensors")
    assert code == 1 and "layer 0, head 2, query 5, key 9: holds 0.000999" in out and "should be masked" in out


def test_the_plot(capsys, mutated, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    arguments = [mutated("ministral", "window_plus_1"), HERE / "ministral" / "float64.safetensors"]
    assert diff(capsys, *arguments, "--plot", tmp_path / "out.png")[0] == 1
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_other_rotary_layout_is_recognised(capsys, mutated):
    """A port in Mistral's order of rows is right; its queries and keys are only laid out in another way."""

    def interleaved(trace):
        for name, tensor in trace.items():
            if name.endswith((".q", ".k", "_rotated", "q_scaled")):
                halves = tensor.unflatten(-1, (2, -1))
                trace[name] = halves.transpose(-1, -2).flatten(-2)
        return trace

    path = mutated("ministral3", "head_tied", torch.float32, interleaved)  # (its head is tied: no mistake)
    code, out, _ = diff(capsys, path, HERE / "ministral3" / "float64.safetensors")
    assert code == 1 and "Equal after interleaved -> half-split" in out
    assert "layers.0.attention.q diverges first." in out and "mutant" not in out
    changed = {line.split()[0].rpartition(".")[2] for line in out.splitlines() if "equal after" in line}
    assert {"q", "k", "q_rotated", "k_rotated", "q_scaled"} <= changed


def test_a_trace_of_ones_own(capsys, tmp_path):
    """record, then diff with itself in another type, for the bundled model; positions; a part of the names."""
    for dtype in ("float64", "bfloat16"):
        code = main(["record", "--prompt", "To be", "--dtype", dtype, "-o", str(tmp_path / f"{dtype}.safetensors")])
        assert code == 0
    capsys.readouterr()
    code, out, _ = diff(capsys, tmp_path / "bfloat16.safetensors", tmp_path / "float64.safetensors")
    assert code == 0 and "stages agree" in out
    code = main(["record", "--ids", "1,50,60", "--positions", "0,1000-1001", "--keep", "logits|q_scaled",
                 "-o", str(tmp_path / "far.safetensors")])  # fmt: skip
    trace, about = load(tmp_path / "far.safetensors")
    assert code == 0 and trace["input.position_ids"].tolist() == [[0, 1000, 1001]] and about["dtype"] == "float64"
    assert {name.rpartition(".")[2] for name in trace if not name.startswith("input")} == {"logits", "q_scaled"}
    truth = record(load_model(BUNDLED, torch.float64), torch.tensor([[1, 50, 60]]),
                   position_ids=torch.tensor([[0, 1000, 1001]]))  # fmt: skip
    assert trace["logits"].equal(truth["logits"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["diff", "/no/such", "{golden}"], "/no/such does not exist"),
        (["diff", "{junk}", "{golden}"], "is no trace"),
        (["diff", "{golden}", "{golden}", "--map", "{junk}"], "must hold a JSON object"),
        (["diff", "{golden}", "{golden}", "--model", "/no/such"], "no model directory /no/such"),
        (["diff", "{golden}", "{golden}", "--model", str(HERE / "ministral3" / "hf")], "did not make"),
        (["diff", "{golden}", "{bfloat16}"], "is bfloat16; allowed: a float64 trace (is it the other way?)"),
        (["diff", "{ids}", "{golden}"], "about other input_ids"),
        (["diff", "{golden}", "{golden}", "--map", "{list}"], "must hold a JSON object"),
        (["diff", "{golden}", "{golden}", "--map", "{twice}"], "gives several tensors the name 'logits'"),
        (["diff", "{empty}", "{golden}"], "is no trace"),
        (["record", "--ids", "1,2", "--positions", "0-99999999999999", "-o", "x"], "allowed: below 2**31"),
        (["record", "-o", "x"], "give --prompt TEXT or --ids 1,2,3"),
        (["record", "--ids", "1,x", "-o", "x"], "--ids '1,x' is impossible"),
        (["record", "--ids", "1,2", "--positions", "1", "-o", "x"], "--positions 1 has 1 numbers; allowed: 2"),
        (["record", "--ids", "1,2", "--positions", "a", "-o", "x"], "'a' is neither a number nor a range"),
        (["record", "--ids", "1,2", "--keep", "(", "-o", "x"], "error: "),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_wrong_use_is_one_line(capsys, tmp_path, arguments, message):
    (tmp_path / "junk").write_text("[1]")
    (tmp_path / "empty.npz").write_text("")
    (tmp_path / "list").write_text('{"logits": ["logits"]}')
    (tmp_path / "twice").write_text('{"embedding": "logits"}')
    places = {name: tmp_path / name for name in ("junk", "list", "twice")} | {"empty": tmp_path / "empty.npz"}
    places |= {"golden": HERE / "ministral" / "float64.safetensors"}
    places |= {"bfloat16": HERE / "ministral" / "bfloat16.safetensors"}
    save_file({"input.input_ids": torch.zeros(2, 20, dtype=torch.long)}, tmp_path / "ids.safetensors")
    places["ids"] = tmp_path / "ids.safetensors"
    try:
        code = main([argument.format(**places) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    out = capsys.readouterr()
    assert code == 2 and message in out.err and out.err.count("\n") == 1 and out.err.startswith("error: ")


# ------------------------------------------------------------------------------------------------------ mutants


def draw_model(rng, mistake):
    """A bfloat16 model of a kind that can make a mistake, its float64 copy, and an input."""
    if MUTANTS[mistake].name in ("merger_patch_by_patch", "vision_axes_swapped"):
        case = draw_seeing_case(rng, dtype=torch.bfloat16, pictures=rng.randint(1, 2))
        model, inputs = case.ours, {name: v for name, v in case.arguments().items() if v is not None}
    else:
        family = {"yarn": "ministral3", "quer": "ministral3", "wind": "ministral"}.get(mistake[:4])
        model = pair(draw_config(rng, family), torch.bfloat16, rng.randrange(2**31))[0]
        ids = torch.tensor([[rng.randrange(1, VOCAB) for _ in range(rng.randint(20, 40))]])
        inputs = {"input_ids": ids.repeat(rng.randint(1, 2), 1)}
        if mistake in ("positions_through_padding", "query_scale_by_cache_position") or (
                mistake != "bos_missing" and rng.random() < 0.3):  # fmt: skip
            mask = torch.ones_like(inputs["input_ids"])
            for row in mask:
                row[: rng.randint(1, 9)] = 0
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    exact = type(model)(model.config)
    exact.load_state_dict(model.state_dict())
    return model.eval(), exact.double().eval(), inputs


def logits_of(model, inputs):
    return record(model, keep="logits".__eq__, **inputs)["logits"]


def in_float32(model, inputs):
    """Another right implementation: every number of the computation float32, the result rounded to bfloat16."""
    inputs = {name: t.float() if name == "pixel_values" else t for name, t in inputs.items()}
    return logits_of(copy.deepcopy(model).float(), inputs).bfloat16()


@pytest.mark.parametrize("mistake", MUTANTS)
def test_the_right_mutant_is_named_from_logits_alone(mistake):
    """In models it has never seen, in bfloat16. (200 models, 8 for each of the 27 mutants here: `MUTANT_RUNS=n`.)"""
    runs, named, tried, seed = int(os.environ.get("MUTANT_RUNS", 3)), 0, 0, 0
    while tried < runs:
        seed += 1
        model, exact, inputs = draw_model(random.Random(f"{mistake} {seed}"), mistake)
        right, truth = logits_of(model, inputs), logits_of(exact, inputs)
        with MUTANTS[mistake].applied():
            mine, moved = logits_of(model, inputs), logits_of(exact, inputs)
        if mine.equal(right) if mistake in ROUNDING else torch.allclose(moved, truth[:, -moved.shape[1] :]):
            continue  # it makes no difference here
        tried += 1
        named += mistake in explain(mine, model, exact, inputs)[1]
    assert named >= 0.95 * tried


@given(rngs, st.sampled_from(list(MUTANTS)))
def test_a_right_port_is_never_accused(rng, kind):
    """Neither one that computes in float32, nor one with fused attention, nor this one."""
    model, exact, inputs = draw_model(rng, kind)
    with torch.no_grad():
        fused = copy.deepcopy(model)
        config = fused.config
        parts = [config.text_config, config.vision_config] if isinstance(config, Mistral3Config) else [config]
        for part in parts:
            part.attn_implementation = "sdpa"
        ports = [logits_of(model, inputs), in_float32(model, inputs), fused(**inputs, use_cache=False).logits]
    for mine in ports:
        assert explain(mine, model, exact, inputs)[0] is None


def permuted(model, rng):
    """Another right implementation: hidden and intermediate units in another order, so that all sums are rounded in
    another way. Returns it, and how to bring its tensors back into order."""
    model, config = copy.deepcopy(model), model.config
    e, f = (torch.tensor(rng.sample(range(n), n)) for n in (config.hidden_size, config.intermediate_size))
    for name, p in list(model.named_parameters()):
        weight = p.detach()
        if name.endswith(("norm.weight", "o_proj.weight", "down_proj.weight")):
            weight = weight[e]
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weight = weight[f]
        if weight.ndim == 2 and not name.endswith("o_proj.weight"):
            weight = weight[:, f if "down_proj" in name else e]
        p.data.copy_(weight)
    back = {"E": e.argsort(), "F": f.argsort()}
    return model, lambda name, t: t[..., back[d]] if (d := dimensions(name).split()[-1]) in back else t


def test_two_right_ports_agree_within_the_margin():
    """Errors of a right port over the floor of noise, at every stage of 60 models: what MARGIN comes from."""
    ratios = []
    for seed in range(60):
        rng = random.Random(seed)
        model, exact, inputs = draw_model(rng, rng.choice(["yarn_missing", "window_plus_1"]))
        model = model.to(rng.choice([torch.bfloat16, torch.float32]))
        other, back = permuted(model, rng)
        mine = {name: back(name, tensor) for name, tensor in record(other, **inputs).items()}
        real = inputs.get("attention_mask")
        report = compare(mine, record(exact, **inputs), record(model, **inputs), None if real is None else real.bool())
        ratios += [stage.error / stage.floor for stage in report.stages if stage.floor > 0]
        assert report.first is None
    ratios = sorted(ratios)
    print(f"{len(ratios)} stages: median {ratios[len(ratios) // 2]:.2f}, 99 % {ratios[int(0.99 * len(ratios))]:.2f}, "
          f"largest {ratios[-1]:.2f}")  # fmt: skip
    assert 0.9 < ratios[len(ratios) // 2] < 1.1 and ratios[-1] < MARGIN


def test_the_catalogue_changes_nothing_when_it_is_not_applied():
    case = draw_case(random.Random(0))
    before = case.ours(case.ids, case.mask).logits
    for mutant in MUTANTS.values():
        with mutant.applied():
            pass
        assert case.ours(case.ids, case.mask).logits.equal(before) and mutant.mistake
    assert replace(MUTANTS["window_plus_1"], name="x").name == "x" and len(MUTANTS) >= 20
