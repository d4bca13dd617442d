"""The golden files of one text, of decoding, of FP8 weights, of the wide model and of names."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoint
from model_types import load_model
from reference import golden
from reference.__main__ import main
from reference.diff import read_map
from reference.golden import HERE, STEP_LENGTHS
from reference.mutants import MUTANTS
from reference.names import KNOWN_MAPS, translate
from reference.oracle import forward
from reference.trace import LAYER, MODULES, dimensions, load, order, record, save
from tests.test_reference import TINY, documented_readers, golden_inputs, numpy
from tests.test_vectors import answer, run, script  # noqa: F401

TEXT_MODELS = ("ministral", "ministral3")
ALL_MODELS = (*TINY, "ministral3_wide")


def decoding(name):
    """The decoding trace of a model without its inputs, and these."""
    trace, about = load(HERE / name / "decoding.safetensors")
    given = {key: trace.pop(f"input.{key}") for key in ("input_ids", "step_lengths")}
    assert about["dtype"] == "float64" and given["step_lengths"].tolist() == STEP_LENGTHS
    return trace, given


# ---------------------------------------------------------------------------------------------------- one text


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_one_text_is_that_text_of_the_batch(name):
    """It has no padding and no other inputs than its ids; `--text 0` compares with the same numbers."""
    batch, given, _ = golden_inputs(name)
    trace, about = load(HERE / name / "one_text.safetensors")
    assert trace.pop("input.input_ids").equal(given["input_ids"][:1]) and bool(given["attention_mask"][0].all())
    assert list(trace) == list(batch) and about["model"] == "hf"
    assert all(trace[key].equal(batch[key][:1]) for key in trace)


def test_a_port_without_batches_is_compared(tmp_path, capsys):
    trace, _ = load(HERE / "ministral3" / "one_text.safetensors")
    np.save(tmp_path / "mine.npy", trace["logits"][0].float().numpy())
    reference = HERE / "ministral3" / "one_text.safetensors"
    assert main(["diff", str(tmp_path / "mine.npy"), str(reference)]) == 0
    assert "1 stage agrees" in capsys.readouterr().out
    np.savez(tmp_path / "mine.npz", **numpy(trace))
    assert run(tmp_path / "mine.npz", reference, "--dtype", "float64") == (0, "43 stages agree in float64\n")


# ---------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_cache_of_the_decoding_trace(name):
    """Slot by slot from the trace of the whole text: position p of a sliding layer is in slot p % 5."""
    trace, given = decoding(name)
    whole, _ = load(HERE / name / "one_text.safetensors")
    kinds = ["full_attention"] * 2
    if name == "ministral":
        kinds = checkpoint.read_config(HERE / name / "hf")["layer_types"]
    end = 0
    for step, length in enumerate(given["step_lengths"].tolist()):
        end += length
        for layer, kind in enumerate(kinds):
            slots = {position: position for position in range(end)}
            if kind == "sliding_attention":
                slots = {position % 5: position for position in range(end)}  # the last one stays
            expected = [slots[slot] for slot in sorted(slots)]
            at = f"step.{step}.cache.layers.{layer}."
            assert trace[f"{at}positions"].tolist() == expected
            for point in ("k_rotated", "v"):
                stored = whole[f"layers.{layer}.attention.{point}"][:, :, expected]
                assert (trace[at + point] - stored).abs().max() < 1e-12
    assert end == given["input_ids"].shape[1] > 2 * 5 and 3 in STEP_LENGTHS
    assert min(STEP_LENGTHS) == 1 and STEP_LENGTHS[0] < 5


@torch.no_grad()
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_decoding_trace_is_the_whole_text_in_pieces(name):
    """Its stages, joined, are those of the whole text; scores, masks and probabilities are not in the file; the model
    gives it again."""
    trace, given = decoding(name)
    whole, _ = load(HERE / name / "one_text.safetensors")
    steps = range(len(STEP_LENGTHS))
    stages = [key for key in whole if not key.startswith("input.")]
    stages = [key for key in stages if not key.endswith((".scores", ".mask", ".probabilities"))]
    for key in stages:
        axis = dimensions(key).split().index("S")
        joined = torch.cat([trace[f"step.{step}.{key}"] for step in steps], axis)
        assert (joined - whole[key].narrow(axis, 0, 13)).abs().max() < 1e-11, key
    model = load_model(HERE / name / "hf", torch.float64)
    computed = record(model, **given)
    assert list(trace) == [key for key in computed if key in trace] == order(reversed(trace))
    numbers = [int(key.split(".")[1]) for key in trace]
    assert numbers == sorted(numbers) and list(trace)[-1] == f"step.7.cache.layers.{len(model.model.layers) - 1}.v"
    assert len(trace) == len(steps) * (len(stages) + 3 * len(model.model.layers))
    assert all((computed[key] - trace[key]).abs().max() < 1e-11 for key in trace)


@torch.no_grad()
def test_steps_of_a_padded_batch_are_recorded():
    whole, given, _ = golden_inputs("ministral3")
    model = load_model(HERE / "ministral3" / "hf", torch.float64)
    trace = record(model, keep=lambda name: name.endswith("logits"), step_lengths=[7, 1, 12], **given)
    joined = torch.cat([trace[f"step.{step}.logits"] for step in range(3)], 1)
    padding_mask = given["attention_mask"].bool()
    assert (joined - whole["logits"])[padding_mask].abs().max() < 1e-11


@torch.no_grad()
def test_images_belong_to_the_first_step():
    whole, given, _ = golden_inputs("mistral3")
    model = load_model(HERE / "mistral3" / "hf", torch.float64)
    S = given["input_ids"].shape[1]
    inputs = golden.arguments(given, torch.float64)
    trace = record(model, step_lengths=[S - 2, 1, 1], **inputs)
    joined = torch.cat([trace[f"step.{step}.logits"] for step in range(3)], 1)
    assert (joined - whole["logits"]).abs().max() < 1e-11
    assert "step.0.projector.output" in trace and "step.1.projector.output" not in trace
    assert next(iter(trace)) == "step.0.vision.patches"


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """A float32 port that decodes with a window of one key more."""
    given = decoding("ministral")[1]
    path = tmp_path_factory.mktemp("decoding") / "mine.safetensors"

    def keep(stage):
        return stage.endswith((".heads", ".mlp_residual", "logits"))

    with MUTANTS["window_plus_1"].applied():
        trace = record(load_model(HERE / "ministral" / "hf", torch.float32), keep=keep, **given)
    save(path, trace, given, {})
    return path


def test_diff_compares_steps(tmp_path, capsys, mistaken):
    """`record --steps` writes what it compares; the mistake is named; without the model the table is used."""
    reference = HERE / "ministral" / "decoding.safetensors"
    ids = ",".join(map(str, decoding("ministral")[1]["input_ids"][0].tolist()))
    steps = ",".join(map(str, STEP_LENGTHS))
    mine = tmp_path / "mine.safetensors"
    arguments = ["record", "--model", str(HERE / "ministral" / "hf"), "--ids", ids, "--steps", steps]
    keep = r"layers\.[02]\.(positions|k_rotated|v|mlp_residual)|logits"
    assert main([*arguments, "--dtype", "float32", "--keep", keep, "-o", str(mine)]) == 0
    assert main(["diff", str(mine), str(reference)]) == 0
    alone = tmp_path / "elsewhere" / "reference.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(reference.read_bytes())
    assert capsys.readouterr().out.startswith("72 stages agree\n")
    assert main(["diff", str(mine), str(alone)]) == 0
    assert capsys.readouterr().out.startswith("72 stages agree\n")  # all are judged

    assert main(["diff", str(mistaken), str(reference)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("step.5.layers.1.attention.heads diverges first. layer 1, query 1,")
    assert "match mutant 'window_plus_1', bit for bit" in said


def test_the_comparison_without_pytorch_compares_steps(script, tmp_path, mistaken):  # noqa: F811
    reference = HERE / "ministral" / "decoding.safetensors"
    names = list(decoding("ministral")[0])
    assert sorted(reversed(names), key=script.place) == names
    code, said = run(mistaken, reference)
    assert code == 1 and said.startswith("step.5.layers.1.attention.heads differs first, at [0, 1,")
    trace, _ = load(reference)
    np.savez(tmp_path / "mine.npz", **{key: tensor.float().numpy() for key, tensor in trace.items()})
    assert run(tmp_path / "mine.npz", reference) == (0, "504 stages agree in float32\n")
    trace["step.6.cache.layers.2.positions"] += 1
    np.savez(tmp_path / "mine.npz", **numpy(trace))
    code, said = run(tmp_path / "mine.npz", reference)
    assert code == 1 and said.startswith("step.6.cache.layers.2.positions differs first, at [0]: is 11, should be 10 ")


@pytest.mark.parametrize("steps", [[4, 1], [13, 1], [0, 13], [14, -1]])
def test_impossible_steps(steps):
    ids = decoding("ministral")[1]["input_ids"]
    model = load_model(HERE / "ministral" / "hf", torch.float32)
    with pytest.raises(ValueError, match="allowed: at least 1 each, together 13"):
        record(model, ids, step_lengths=steps)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["record", "--ids", "1,2", "--steps", "1,x", "-o", "{mine}"], "--steps '1,x' is impossible"),
        (["record", "--ids", "1,2", "--steps", "2,2", "-o", "{mine}"], "steps of [2, 2] tokens are impossible"),
        (["diff", "{golden}", "{golden}", "--text", "0"], "--text 0: the reference is a decoding trace"),
    ],
)
def test_commands_about_steps_say_what_is_wrong(arguments, message, tmp_path, capsys):
    places = {"mine": tmp_path / "mine.safetensors", "golden": HERE / "ministral" / "decoding.safetensors"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- FP8


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_dequantized_matrices(name):
    """From the bytes, by the lines of docs/numerics.md and NumPy; they are the weights of the model that is read."""
    read = documented_readers()
    stored = load_file(HERE / name / "fp8" / "model.safetensors")
    steps = numpy(load_file(HERE / name / "fp8" / "dequantized.safetensors"))
    with pytest.warns(UserWarning, match="FP8 weights become"):
        weights = load_model(HERE / name / "fp8", torch.bfloat16).state_dict()
    matrices = [key for key in steps if key.endswith(".weight")]
    assert [key.split(".")[-2] for key in sorted(matrices)] == ["q_proj", "down_proj"] and len(steps) == 8
    for matrix in matrices:
        codes = read["fp8"](stored[matrix].view(torch.uint8).numpy().tobytes()).reshape(stored[matrix].shape)
        assert np.array_equal(steps[f"{matrix}.codes"], codes)
        scale = stored[f"{matrix}_scale_inv"].float().numpy()
        assert np.array_equal(steps[f"{matrix}.scale"], scale)
        if name == "ministral3_wide":
            assert scale.shape == tuple(size // 16 for size in codes.shape) and scale.size > 1
            scale = scale.repeat(16, 0).repeat(16, 1)
        assert np.array_equal(steps[matrix], codes.astype(np.float32) * scale)
        rounded = torch.from_numpy(steps[f"{matrix}.bfloat16"])
        assert rounded.equal(weights[matrix].float()) and rounded.equal(torch.from_numpy(steps[matrix]).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_stages_of_the_fp8_models(name):
    """The outputs of all quantized matrices, and the logits: the model gives them, and, for texts, the oracle."""
    trace, about = load(HERE / name / "fp8" / "float64.safetensors")
    given = {key.removeprefix("input."): trace.pop(key) for key in list(trace) if key.startswith("input.")}
    with pytest.warns(UserWarning, match="FP8 weights become float64"):
        model = load_model(HERE / name / "fp8", torch.float64)
    points = {LAYER.sub("N", key) for key in trace}
    assert len(points) == 9 and {f"layers.N.mlp.{point}" for point in ("gate", "up", "down")} <= points
    padding_mask = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    computed = [record(model, **golden.arguments(given, torch.float64))]
    if name != "mistral3":
        expected = forward(model.config.to_dict(), numpy(model.state_dict()), **numpy(given))
        computed.append({key: torch.from_numpy(array) for key, array in expected.items()})
    assert about["model"] == "."
    for other in computed:
        for key, tensor in trace.items():
            S = dimensions(key).split().index("S")
            exact, mine = (each.movedim(S, 1)[padding_mask] for each in (tensor, other[key]))
            assert (exact - mine).abs().max() < 1e-11


def test_blocks_of_scales_are_those_of_the_configuration():
    config = checkpoint.read_config(HERE / "ministral3_wide" / "fp8")["quantization_config"]
    assert config == {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    stored = load_file(HERE / "ministral3_wide" / "fp8" / "model.safetensors")
    assert not [key for key in stored if "activation" in key]
    assert len([key for key in stored if key.endswith("_scale_inv")]) == 14


# -------------------------------------------------------------------------------------------------------- wide


@torch.no_grad()
def test_the_wide_model():
    """Sizes and ratios that the other models do not have; the oracle gives the trace."""
    config = checkpoint.read_config(HERE / "ministral3_wide" / "hf")
    assert config["head_dim"] == 32 and config["num_attention_heads"] // config["num_key_value_heads"] == 4
    assert config["head_dim"] * config["num_attention_heads"] == 4 * config["hidden_size"]
    trace, given, _ = golden_inputs("ministral3_wide")
    model = load_model(HERE / "ministral3_wide" / "hf", torch.float64)
    expected = forward(model.config.to_dict(), numpy(model.state_dict()), **numpy(given))
    assert list(expected) == list(trace)
    assert max(np.abs(expected[key] - trace[key].numpy()).max() for key in trace if not key.endswith("mask")) < 1e-11
    plain = 1e6 ** (-torch.arange(0, 32, 2).double() / 32)
    trained = (model.model.rotary_emb.inverse_frequencies(torch.float64) / plain - 1 / 16) / (15 / 16)
    assert trained[0] > 0.999 and trained[-1] < 1e-3 and ((trained > 0.1) & (trained < 0.9)).sum() >= 3  # zones
    scale = trace["layers.0.attention.q_scaled"] / trace["layers.0.attention.q_rotated"]
    assert len(scale[0, 0, :, 0].round(decimals=6).unique()) == 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tolerances_hold_for_the_wide_model(answer, tmp_path, dtype):  # noqa: F811
    """They are measured with the three others."""
    _, given, _ = golden_inputs("ministral3_wide")
    trace = record(load_model(HERE / "ministral3_wide" / "hf", golden.DTYPES[dtype]), **given)
    save_file({key: tensor.float().contiguous() for key, tensor in trace.items()}, tmp_path / "mine.safetensors")
    code, said, error = answer(tmp_path / "mine.safetensors", "ministral3_wide", "--dtype", dtype)
    assert (code, said) == (0, "43 stages agree in " + dtype + "\n"), error


# -------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_maps_are_those_of_the_names(name):
    """The same as `--map NAME`, for stages of the trace, in the order of computing."""
    trace, _, _ = golden_inputs(name)
    for program in KNOWN_MAPS:
        path = HERE / name / "maps" / f"{program}.json"
        names = json.loads(path.read_text())
        assert translate(program, names) == names
        given = list(dict(zip(names.values(), names)).values())  # one for each stage
        assert read_map(path, given) == {key: names[key] for key in given}
        assert set(names.values()) <= trace.keys()
        assert list(dict.fromkeys(names.values())) == order(set(names.values()))


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_map_of_transformers_has_the_names_of_its_modules(name):
    """All outputs of modules that are points, under the names that Transformers has."""
    kind = transformers.AutoModelForCausalLM
    points = {after for _, after in MODULES.values() if after is not None} | {"layers.N.mlp.activation"}
    if name == "mistral3":
        kind = transformers.AutoModelForImageTextToText
    else:
        points = {point for point in points if not point.startswith(("vision.", "projector."))} | {"embedding"}
    config = transformers.AutoConfig.from_pretrained(HERE / name / "hf")
    with torch.device("meta"):
        theirs = {path for path, _ in kind.from_config(config).named_modules()}
    names = json.loads((HERE / name / "maps" / "transformers.json").read_text())
    assert names.keys() <= theirs
    assert {LAYER.sub("N", point) for point in names.values()} == points
    mlx = json.loads((HERE / name / "maps" / "mlx.json").read_text())
    text = {"language_model.model.norm", "language_model.lm_head"} if name == "mistral3" else {"model.norm", "lm_head"}
    assert text <= mlx.keys()
