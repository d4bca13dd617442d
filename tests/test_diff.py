"""`python -m reference diff` and `record`: they name where a port diverges first; a right port does not diverge."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_types import BUNDLED, load_model
from reference import golden
from reference.__main__ import main
from reference.compare import compare, computed_in, narrowest
from reference.golden import HERE
from reference.mutants import MUTANTS
from reference.oracle import forward
from reference.trace import load, record
from tests.test_reference import TINY, golden_inputs, numpy


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
    "query_scale_before_rope": ("ministral3", "layers.0.attention.q_rotated"),
    "query_scale_by_cache_position": ("ministral3", "layers.0.attention.q_scaled"),
    "query_scale_one_early": ("ministral3", "layers.0.attention.q_scaled"),
    "window_plus_1": ("ministral", "layers.1.attention.mask"),
    "window_minus_1": ("ministral", "layers.1.attention.mask"),
    "window_on_all_layers": ("ministral", "layers.0.attention.mask"),
    "window_on_no_layer": ("ministral", "layers.1.attention.mask"),
    "positions_through_padding": ("ministral", "layers.0.attention.q_rotated"),
    "gqa_tiled": ("ministral", "layers.0.attention.scores"),
    "head_dim_from_hidden_size": ("ministral", "layers.0.attention.scores"),
    "head_tied": ("ministral", "logits"),
    "merger_patch_by_patch": ("mistral3", "projector.merged"),
    "vision_axes_swapped": ("mistral3", "vision.cos"),
}
FEW = ("window_plus_1", "yarn_magnitude_1_277", "vision_axes_swapped")
OTHERS = [pytest.param(mistake, marks=pytest.mark.slow) for mistake in FIRST if mistake not in FEW]


@pytest.mark.parametrize("mistake", [*FEW, *OTHERS])
def test_the_first_divergence_and_its_cause_are_named(capsys, mutated, mistake):
    model, first = FIRST[mistake]
    code, out, _ = diff(capsys, mutated(model, mistake), HERE / model / "float64.safetensors")
    assert code == 1 and out.startswith(f"{first} diverges first. ")
    assert f"match mutant {mistake!r}" in out.splitlines()[1]


def test_a_hidden_key_that_is_seen_is_described(capsys, mutated):
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


def test_other_shapes_names_types_and_files(capsys, tmp_path):
    """Transposed, flattened, without the batch of one, float16, .npz, renamed: none of that is a mistake."""
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
    (tmp_path / "map.json").write_text(json.dumps({"my.logits": "logits", "my.norm": "final_norm"}))
    reference = HERE / "mistral3" / "float64.safetensors"
    code, out, _ = diff(capsys, tmp_path / "mine.npz", reference, "--map", tmp_path / "map.json", "--json")
    report = json.loads(out)
    assert code == 0 and report["first"] is None and report["mutant"] is None
    assert len(report["stages"]) == 6 and not report["misshapen"] and not report["unknown"]
    hows = {stage["name"]: stage["how"] for stage in report["stages"]}
    assert hows["layers.0.attention.k"] == "heads split" and hows["layers.0.attention.heads"] == "heads joined"
    code, out, _ = diff(capsys, tmp_path / "mine.npz", reference)
    assert code == 0 and "names that the reference does not have: my.logits (my.logits: is it logits?)" in out


def test_heads_of_a_text_of_one_token():
    """Without the dimensions of one, they are (H, D), which has no dimension of tokens to move."""
    reference = {"layers.0.attention.heads": torch.arange(32, dtype=torch.float64).view(1, 1, 32)}
    port = {"layers.0.attention.heads": torch.arange(32.0).view(4, 8)}
    report = compare(port, reference, {})
    assert report.stages[0].error == 0


def test_a_mistake_that_acts_later_than_the_first_divergence_is_not_named(capsys, mutated, tmp_path):
    expected, _ = load(HERE / "ministral" / "bfloat16.safetensors")
    logits, _ = load(mutated("ministral", "window_plus_1"))
    for factor, name in ((1, "window_plus_1"), (2, None)):  # no window makes embeddings twice as large
        mine = {"embedding": expected["embedding"] * factor, "logits": logits["logits"]}
        save_file(mine, tmp_path / "two.safetensors")
        out = diff(capsys, tmp_path / "two.safetensors", HERE / "ministral" / "float64.safetensors", "--json")[1]
        assert json.loads(out)["mutant"] == name


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
        expected = forward(json.loads((HERE / name / "hf" / "config.json").read_text()), weights, **numpy(given))
        np.savez(tmp_path / "oracle.npz", **expected)
        bfloat16, _ = load(HERE / name / "bfloat16.safetensors")
        np.savez(tmp_path / "wide.npz", logits=bfloat16["logits"].float().flatten(0, 1).numpy(),
                 final_norm=bfloat16["final_norm"].float().numpy())  # fmt: skip
        model = load_model(HERE / name / "hf", torch.bfloat16)
        fused = model(**given, use_cache=False).logits.detach()
        save_file({"logits": fused.float()}, tmp_path / "fused.safetensors")
        for file in ("oracle.npz", "wide.npz", "fused.safetensors"):
            code, out, _ = diff(capsys, tmp_path / file, reference)
            assert code == 0 and "mutant" not in out, (name, file, out)


def dumped(capsys, tmp_path, tensors, name="ministral"):
    """The first line of the report about tensors that are right, and the ways in which they were made to fit."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "dump.safetensors")
    code, out, _ = diff(capsys, tmp_path / "dump.safetensors", HERE / name / "float64.safetensors", "--json")
    report = json.loads(out)
    assert code == 0 and report["agrees"], report["sentence"]
    return report["sentence"], {stage["how"] for stage in report["stages"]}


def test_dumps_as_ports_make_them_are_compared(capsys, tmp_path):
    trace, _ = load(HERE / "ministral" / "bfloat16.safetensors")
    logits, mask = trace["logits"], trace["layers.1.attention.mask"]
    for last in (logits[:, -1], logits[:, -1:]):
        assert dumped(capsys, tmp_path, {"logits": last}) == ("1 stage agrees", {"of the last token"})
    wide = torch.cat((logits, torch.zeros_like(logits)), -1)
    assert dumped(capsys, tmp_path, {"logits": wide})[1] == {"the first 40 columns"}
    assert dumped(capsys, tmp_path, {"logits": wide[:, -1]})[1] == {"the first 40 columns, of the last token"}
    heads = {name: trace[f"layers.0.attention.{name}"] for name in ("q", "k", "k_rotated", "v", "scores")}
    flat = {f"layers.0.attention.{name}": tensor.flatten(0, 1) for name, tensor in heads.items()}
    assert dumped(capsys, tmp_path, flat) == ("5 stages agree", {"texts split"})
    again = {f"layers.0.attention.{name}": heads[name].repeat_interleave(2, 1) for name in ("k", "k_rotated", "v")}
    assert dumped(capsys, tmp_path, again) == ("3 stages agree", {"one of each repeated head"})
    name = "layers.1.attention.mask"
    assert dumped(capsys, tmp_path, {name: mask[:, None].expand(-1, 4, -1, -1)})[1] == {""}
    for lowest in (-torch.inf, torch.finfo(torch.bfloat16).min):
        added = torch.zeros(mask.shape).masked_fill(~mask, lowest)
        assert dumped(capsys, tmp_path, {name: added[:, None]})[1] == {"as added to scores"}
    assert dumped(capsys, tmp_path, {name: ~mask})[1] == {"True is hidden"}
    assert dumped(capsys, tmp_path, {name: mask.long()})[1] == {""}


@pytest.mark.slow
def test_a_wrong_dump_still_diverges(capsys, tmp_path):
    """A mask with one number wrong, last logits of another token, infinities, whole numbers."""
    trace, _ = load(HERE / "ministral" / "bfloat16.safetensors")
    mask = trace["layers.1.attention.mask"].clone()
    mask[0, 9, 9] = False
    for wrong, words in (({"layers.1.attention.mask": ~mask}, "layer 1, query 9, key 9"),
                         ({"logits": trace["logits"][:, 3].clone()}, "position 19"),
                         ({"logits": trace["logits"] * torch.inf}, "logits diverges first"),
                         ({"logits": torch.zeros(2, 20, 40, dtype=torch.int32)}, "holds 0")):  # fmt: skip
        save_file(wrong, tmp_path / "wrong.safetensors")
        code, out, _ = diff(capsys, tmp_path / "wrong.safetensors", HERE / "ministral" / "float64.safetensors")
        assert code == 1 and words in out.splitlines()[0]


def test_what_is_computed_from_coarse_numbers_has_their_noise(capsys, tmp_path):
    """Scores, softmax and head in float32 in a model in bfloat16; embeddings, which are exact, prove no type."""
    trace, _ = load(HERE / "ministral3" / "bfloat16.safetensors")
    model = load_model(HERE / "ministral3" / "hf", torch.float32)
    logits = trace["final_norm"].float() @ model.model.embed_tokens.weight.detach().T
    mixed = {name: t for name, t in trace.items() if name.endswith(("input_norm", "mlp_residual"))} | {"logits": logits}
    dumped(capsys, tmp_path, mixed, "ministral3")
    reference = HERE / "ministral3" / "float64.safetensors"
    save_file({"logits": logits}, tmp_path / "head.safetensors")
    code, out, _ = diff(capsys, tmp_path / "head.safetensors", reference)
    assert code == 1 and "no larger than the noise of bfloat16, which proves nothing" in out.splitlines()[1]
    code, out, _ = diff(capsys, tmp_path / "head.safetensors", reference, "--dtype", "bfloat16")
    assert code == 0 and out.startswith("1 stage agrees")
    expected, _ = load(reference)
    assert set(computed_in(expected, expected).values()) == {torch.float64}
    exact, _ = load(HERE / "ministral3" / "float32.safetensors")
    assert set(computed_in(exact, expected).values()) == {torch.float32}
    assert narrowest(exact["embedding"]) == torch.bfloat16  # though it was computed in float32


def test_padding_of_any_content_hides_no_type(capsys, tmp_path):
    trace, given, _ = golden_inputs("ministral")
    trace, _ = load(HERE / "ministral" / "bfloat16.safetensors")
    wide = trace["logits"].float()
    wide[~given["attention_mask"].bool()] = torch.nan
    np.savez(tmp_path / "mine.npz", logits=wide.numpy())
    code, out, _ = diff(capsys, tmp_path / "mine.npz", HERE / "ministral" / "float64.safetensors")
    assert code == 0 and out.startswith("1 stage agrees")
    for hidden in (torch.nan, -torch.inf, torch.finfo(torch.float32).min):
        assert narrowest(torch.tensor([1.0, hidden])) == torch.bfloat16


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_a_right_port_agrees_without_the_model(capsys, tmp_path, name, kind):
    """With traces beside the reference, and with nothing beside it; a mistake still shows."""
    shutil.copy(HERE / name / "float64.safetensors", tmp_path)
    mine = HERE / name / f"{kind}.safetensors"
    for copied in ([], ["float32", "bfloat16"]):
        for other in copied:
            shutil.copy(HERE / name / f"{other}.safetensors", tmp_path)
        code, out, err = diff(capsys, mine, tmp_path / "float64.safetensors")
        assert code == 0 and " stages agree" in out and "mistake" not in out
        assert ("the traces beside it" if copied else "the table in docs/numerics.md") in err
    trace, _ = load(mine)
    save_file({"embedding": trace["embedding"] * 2}, tmp_path / "bfloat16.safetensors")  # no trace: not used
    code, out, _ = diff(capsys, tmp_path / "bfloat16.safetensors", tmp_path / "float64.safetensors")
    assert code == 1 and out.startswith("embedding diverges first")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_fp8_copies_are_references(capsys, name):
    here = HERE / name / "fp8"
    code, out, err = diff(capsys, here / "bfloat16.safetensors", here / "float64.safetensors")
    count = 7 * {"ministral": 3}.get(name, 2) + 2  # matrices of all layers, final_norm, logits
    assert code == 0 and out.startswith(f"{count} stages agree") and "no model" not in err
    code, out, _ = diff(capsys, HERE / name / "float32.safetensors", here / "float64.safetensors")
    assert code == 1  # FP8 is another model; bfloat16 logits of a right port can be as far away as it is


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("layers.1.attention.k", (2, 2, 20, 8), "layer 1, text 1, key head 1, key 19, number 7"),
        ("layers.1.attention.v", (2, 2, 20, 8), "layer 1, text 1, key head 1, key 19, number 7"),
        ("layers.1.attention.k_rotated", (2, 2, 20, 8), "layer 1, text 1, key head 1, key 19, number 7"),
        ("layers.1.attention.q_scaled", (2, 4, 20, 8), "layer 1, text 1, head 3, query 19, number 7"),
        ("layers.1.attention.scores", (2, 4, 20, 20), "layer 1, text 1, head 3, query 19, key 19"),
        ("layers.0.mlp.gate", (1, 20, 24), "layer 0, position 19, number 23"),
        ("logits", (1, 20, 40), "position 19, token 39"),
        ("vision.layers.0.attention.q", (2, 48, 8), "vision layer 0, head 1, patch 47, number 7"),
        ("vision.layers.0.mlp.down", (48, 16), "vision layer 0, patch 47, number 15"),
    ],
)
def test_places_are_described(name, shape, words):
    right, wrong = torch.zeros(shape), torch.zeros(shape)
    wrong.view(-1)[-1] = torch.inf
    stage = compare({name: wrong}, {name: right.double()}, {}).stages[0]
    assert stage.words().startswith(f"{words}: holds ")


def test_what_cannot_be_compared_comes_first_where_it_is_most(capsys, tmp_path):
    trace, _ = load(HERE / "ministral" / "float64.safetensors")
    cut = {name: tensor[..., 1:].contiguous() for name, tensor in trace.items() if ".mlp." in name}
    save_file(cut | {"embedding": trace["embedding"]}, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", HERE / "ministral" / "float64.safetensors")
    assert code == 1 and out.startswith("15 of 16 stages cannot be compared: layers.0.mlp.gate is [2, 20, 23], ")
    assert "1 stage agrees" in out.splitlines()[0] and "no known mistake" not in out


def test_a_leak_through_the_mask_is_reported_however_small(capsys, tmp_path):
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
    code, out, err = diff(capsys, *arguments, "--plot", tmp_path / "no" / "out.png")
    assert code == 2 and out == "" and "error: " in err  # before the work
    code, out, err = diff(capsys, *arguments, "--plot", tmp_path / "out.xyz")
    assert code == 2 and out == "" and "out.xyz: .xyz is not supported; supported: " in err and "png" in err


def test_the_other_rotary_layout_is_recognised(capsys, mutated):
    """A port in Mistral's order of rows is right; its queries and keys are only laid out in another way."""

    def interleaved(trace):
        for name, tensor in trace.items():
            if name.endswith((".q", ".k", "_rotated", "q_scaled")):
                halves = tensor.unflatten(-1, (2, -1))
                trace[name] = halves.transpose(-1, -2).flatten(-2)
        return trace

    path = mutated("ministral3", "head_tied", torch.float32, interleaved)  # (its head is tied: no mistake)
    reference = HERE / "ministral3" / "float64.safetensors"
    code, out, _ = diff(capsys, path, reference)
    assert code == 0 and out.startswith("43 stages agree, 10 of them after interleaved -> half-split\n")
    assert "mutant" not in out and "mistake" not in out
    changed = {line.split()[0].rpartition(".")[2] for line in out.splitlines() if "equal after" in line}
    assert changed == {"q", "k", "q_rotated", "k_rotated", "q_scaled"}
    report = json.loads(diff(capsys, path, reference, "--json")[1])
    assert report["agrees"] and report["first"] is None and report["mutant"] is None


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
    expected = record(load_model(BUNDLED, torch.float64), torch.tensor([[1, 50, 60]]),
                      position_ids=torch.tensor([[0, 1000, 1001]]))  # fmt: skip
    assert trace["logits"].equal(expected["logits"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["diff", "/no/such", "{golden}"], "/no/such does not exist"),
        (["diff", "{junk}", "{golden}"], "is no trace"),
        (["diff", "{golden}", "{golden}", "--map", "{junk}"], "must hold a JSON object"),
        (["diff", "{golden}", "{golden}", "--model", "/no/such"], "--model '/no/such' is no directory"),
        (["diff", "{golden}", "{golden}", "--model", str(HERE / "ministral3" / "hf")], "did not make"),
        (["diff", "{golden}", "{bfloat16}"], "is bfloat16; allowed: a float64 trace (is it the other way?)"),
        (["diff", "{ids}", "{golden}"], "about other input_ids"),
        (["diff", "{golden}", "{golden}", "--map", "."], "--map .: a directory; allowed: a JSON file"),
        (["diff", "{golden}", "{golden}", "--map", "{list}"], "must hold a JSON object"),
        (["diff", "{golden}", "{golden}", "--map", "{twice}"], "gives several tensors the name 'logits'"),
        (["diff", "{empty}", "{golden}"], "is no trace"),
        (["record", "--ids", "1,2", "--positions", "0-99999999999999", "-o", "x"], "allowed: below 2**31"),
        (["record", "--ids", "1,2", "--positions", "5-3", "-o", "x"], "5-3 ends before it begins"),
        (["record", "--ids", "1,2", "-o", "no/x"], "no/x cannot be written: no is no directory"),
        (["diff", "{golden}", "{golden}", "--plot", "no/x.png"], "no/x.png cannot be written: no is no directory"),
        (["diff", "{golden}", "{golden}", "--model", ""], "--model '' is no directory"),
        (["diff", ".", "{golden}"], ". is a directory; give a file"),
        (["record", "-o", "x"], "give --prompt TEXT or --ids 1,2,3"),
        (["record", "--ids", "1,x", "-o", "x"], "--ids '1,x' is impossible"),
        (["record", "--ids", "9" * 30, "-o", "x"], "allowed: whole numbers of up to 9 digits"),
        (["record", "--ids", "1,2", "--positions", "1", "-o", "x"], "--positions '1' has 1 numbers; allowed: 2"),
        (["record", "--ids", "1,2", "--positions", "a", "-o", "x"], "'a' is neither a number nor a range"),
        (["record", "--ids", "1,2", "--keep", "(", "-o", "x"], "error: "),
        (["record", "--ids", "1,2", "--keep", "nothing", "-o", "x"], "'nothing' matches no name"),
        (["record", "--ids", "1,2", "--image", "x.png", "-o", "x"], "--image goes with --prompt"),
        (["diff", "{mask}", "{golden}"], "about other attention_mask"),
        (["diff", "{positions}", "{golden}"], "about other position_ids"),
        (["diff", "{golden}", "{odd}"], "input.foo is no input; allowed: attention_mask,"),
        (["diff", "{golden}", "{golden}", "--map", "{other}"], "names 'elsewhere' and others; allowed: some"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_wrong_use_is_one_line(capsys, tmp_path, arguments, message):
    (tmp_path / "junk").write_text("[1]")
    (tmp_path / "empty.npz").write_text("")
    (tmp_path / "list").write_text('{"logits": ["logits"]}')
    (tmp_path / "other").write_text('{"elsewhere": "logits"}')
    (tmp_path / "twice").write_text('{"embedding": "logits"}')
    places = {name: tmp_path / name for name in ("junk", "list", "twice", "other")} | {"empty": tmp_path / "empty.npz"}
    places |= {"golden": HERE / "ministral" / "float64.safetensors"}
    places |= {"bfloat16": HERE / "ministral" / "bfloat16.safetensors"}
    save_file({"input.input_ids": torch.zeros(2, 20, dtype=torch.long)}, tmp_path / "ids.safetensors")
    given = golden_inputs("ministral")[1]
    ids, mask, positions = given["input_ids"], given["attention_mask"], given["position_ids"]
    save_file({"input.attention_mask": torch.ones_like(mask)}, tmp_path / "mask.safetensors")
    save_file({"input.position_ids": positions + 1}, tmp_path / "positions.safetensors")
    save_file({"input.input_ids": ids, "input.foo": ids + 0}, tmp_path / "odd.safetensors")
    places |= {name: tmp_path / f"{name}.safetensors" for name in ("ids", "mask", "positions", "odd")}
    try:
        code = main([argument.format(**places) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    out = capsys.readouterr()
    assert code == 2 and message in out.err and out.err.count("\n") == 1 and out.err.startswith("error: ")




def test_damaged_and_oversized_files_are_one_line(capsys, tmp_path):
    """Files of a port, of a reference and of names that claim what they do not hold."""
    golden_trace = HERE / "ministral" / "float64.safetensors"
    np.savez_compressed(tmp_path / "zeros.npz", logits=np.zeros((1, 2**14, 2**14), np.float32))
    np.savez_compressed(tmp_path / "damaged.npz", logits=np.arange(4000.0))
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "damaged.npz").write_bytes(content)
    with (tmp_path / "claims.npy").open("wb") as file:
        claim = {"descr": "<f8", "fortran_order": False, "shape": (9, 999999999999)}
        np.lib.format.write_array_header_1_0(file, claim)
    tensors = load_file(golden_trace)
    flat = tensors | {"final_norm": tensors["final_norm"].flatten()}
    save_file(tensors | {"embedding": tensors["embedding"][:, :, :3].contiguous()}, tmp_path / "narrow.safetensors")
    save_file(flat, tmp_path / "flat.safetensors")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    save_file({"logits": torch.zeros(1)}, tmp_path / "deep.safetensors", metadata={"trace": "[" * 100_000})
    for arguments, message in (
        ([tmp_path / "zeros.npz", golden_trace], "is no trace (ValueError"),
        ([tmp_path / "damaged.npz", golden_trace], "is no trace ("),
        ([tmp_path / "claims.npy", golden_trace], "is no trace ("),
        ([golden_trace, tmp_path / "flat.safetensors"], "allowed: 3 dimensions (B S E)"),
        ([golden_trace, tmp_path / "narrow.safetensors"], "where E is"),
        ([golden_trace, tmp_path / "deep.safetensors"], "is no trace (RecursionError"),
        ([golden_trace, golden_trace, "--map", tmp_path / "deep.json"], "must hold a JSON object"),
    ):
        code, _, err = diff(capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and len(err) < 420
