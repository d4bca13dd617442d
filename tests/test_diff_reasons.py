"""What `python -m reference diff` says about planted faults: which mistake, two of them, or what is wrong with the
inputs. A right port agrees in each layout."""

import json
import math
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import save_file

from model_types import load_model
from reference import golden
from reference.explain import examine
from reference.golden import HERE
from reference.judge import NEARER
from reference.layouts import hidden_keys
from reference.mutants import MUTANTS
from reference.trace import dimensions, load, record
from tests.test_diff import diff
from tests.test_diff_ports import TEXT_MODELS, port_of, reference
from tests.test_explain import embeddings_scaled, scores_not_divided, sine_negative
from tests.test_reference import golden_inputs

pytestmark = pytest.mark.slow


def port_with(name, *mistakes, dtype=torch.float32, **arguments):
    """The trace of a port with known or unknown mistakes, for the golden inputs or others."""
    inputs = arguments or golden.arguments(golden_inputs(name)[1], dtype)
    with ExitStack() as stack:
        for mistake in mistakes:
            if mistake in MUTANTS:
                stack.enter_context(MUTANTS[mistake].applied())
            else:
                mistake(stack)
        return dict(record(load_model(HERE / name / "hf", dtype), **inputs))


@pytest.fixture
def report(capsys, tmp_path):
    """Exit code and report of `diff` for a port's tensors."""

    def compare(trace, name, *arguments):
        mine = tmp_path / "mine.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in trace.items()}, mine)
        code, out, _ = diff(capsys, mine, reference(name), "--json", *arguments)
        return code, json.loads(out)

    return compare


# ------------------------------------------------------------------------------------------------- masks in scores

LOWEST = torch.finfo(torch.float32).min
MARKS = {"zero": 0.0, "infinite": -math.inf, "nan": math.nan, "lowest": LOWEST, "low": -1e4}


def marked(trace, mark):
    """A trace without masks and probabilities, whose scores are marked where the port does not look."""
    changed = {}
    for key, tensor in trace.items():
        if key.endswith(".scores"):
            hidden = ~trace[key.replace("scores", "mask")][:, None]
            changed[key] = tensor.masked_fill(hidden, MARKS[mark])
        elif not key.endswith((".mask", ".probabilities")):
            changed[key] = tensor
    return changed


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("mistake", ["window_plus_1", "window_minus_1"])
def test_marked_scores_tell_the_window(report, mark, mistake):
    """Of a whole trace of zeros, and of other scores alone."""
    dump = marked(port_with("ministral", mistake), mark)
    if mark != "zero":
        dump = {key: tensor for key, tensor in dump.items() if key.endswith(".scores")}
    code, found = report(dump, "ministral")
    assert code == 1 and found["first"] == "layers.1.attention.mask", found["sentence"]
    assert found["mutant"] == mistake, found["verdict"]


@pytest.mark.parametrize("mark", MARKS)
def test_marked_scores_of_a_right_port_agree(report, mark):
    trace = marked(port_with("ministral"), mark)
    code, found = report(trace, "ministral")
    assert code == 0 and len(found["stages"]) == len(trace) and "agree" in found["sentence"], found["sentence"]


def test_scores_with_marks_at_some_hidden_keys_only(report):
    """Blocks of 8 keys are computed: later stages say that the mask is right. It is unknown after the last."""
    trace = marked(port_with("ministral"), "zero")
    raw = port_with("ministral")
    blocks = torch.arange(20) // 8
    for key in (key for key in trace if key.endswith(".scores")):
        trace[key] = torch.where(blocks[:, None] == blocks, raw[key], trace[key])
    assert report(trace, "ministral")[0] == 0
    code, found = report({key: trace[key] for key in trace if key.endswith(".scores")}, "ministral")
    assert code == 1 and found["first"] == "layers.2.attention.mask"


def test_zeros_that_are_no_mask_are_wrong_scores():
    """One head of zeros, and zeros everywhere."""
    scores = torch.randn(1, 2, 4, 4).double()
    counted = torch.ones(1, 2, 4, 4, dtype=torch.bool).tril()
    assert hidden_keys(scores, counted, 1.0) is None
    scores[:, 0] = 0
    assert hidden_keys(scores, counted, 1.0) is None
    scores[:] = 0
    assert hidden_keys(scores, counted, 1.0) is None
    scores = torch.randn(1, 2, 4, 4).double().masked_fill(~counted, -65504)
    assert hidden_keys(scores, counted, 1.0).equal(~counted[:, 0])


# --------------------------------------------------------------------------------------------------------- layouts


def reversed_sizes(tensor):
    """The sizes in reverse order, the numbers where they were."""
    return tensor.contiguous().reshape(tensor.shape[::-1])


def transposed(tensor):
    return tensor.permute(*reversed(range(tensor.ndim))).contiguous()


@pytest.mark.parametrize("change", [transposed, reversed_sizes])
@pytest.mark.parametrize("squeezed", [False, True])
def test_dimensions_in_reverse_order(report, change, squeezed):
    """As ggml counts them: [D, H, S, B] or [D, H, S], logits [V, S]; a mistake in them is named."""
    for mistake in ((), ("head_tied",)):
        with ExitStack() as stack:
            for name in mistake:
                stack.enter_context(MUTANTS[name].applied())
            trace = port_of("ministral", 0)
        dump = {}
        for key, tensor in trace.items():
            if dimensions(key).startswith(("B H S D", "B G S D")):
                tensor = tensor.transpose(1, 2)
            if squeezed:
                tensor = tensor[0]
            dump[key] = change(tensor)
        code, found = report(dump, "ministral", "--text", 0)
        assert [found["mutant"]] == [*mistake, None][:1], found["verdict"]
        assert code == len(mistake) and not found["misshapen"], found["sentence"]


@pytest.mark.parametrize("shape", [(40, 20), (40, 20, 1), (40, 1), (40, 3)])
def test_logits_in_reverse_order(report, shape):
    logits = port_of("ministral3", 0)["logits"][0, -shape[1] :].T
    code, found = report({"logits": logits.reshape(shape)}, "ministral3", "--text", 0)
    assert code == 0, found["sentence"]


def interleaved(trace):
    """Queries and keys with rotary pairs as neighbours."""
    changed = dict(trace)
    for key, tensor in trace.items():
        if key.endswith((".q", ".k", "_rotated", "q_scaled")):
            changed[key] = tensor.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return changed


@pytest.mark.parametrize(
    ("name", "mistake", "first"),
    [("ministral3", "query_scale_on_keys", "layers.0.attention.q_scaled"),
     ("ministral", "positions_through_padding", "layers.0.attention.q_rotated")],
)  # fmt: skip
def test_a_mistake_in_the_other_order_of_rotary_pairs_is_named(report, name, mistake, first):
    """From a whole trace, from queries and keys of a layer, and from the stage that diverges alone."""
    trace = interleaved(port_with(name, mistake))
    names = [key for key in trace if "layers.0.attention" in key and dimensions(key).endswith("S D")]
    layer = {key: trace[key] for key in names}
    for dump in (trace, layer, {first: trace[first]}):
        code, found = report(dump, name)
        assert code == 1 and found["first"] == first and mistake in found["verdict"], found["verdict"]
        if len(dump) > 1:
            hows = {stage["name"]: stage["how"] for stage in found["stages"]}
            assert hows[first].endswith("interleaved -> half-split")
        assert found["mutant"] == mistake or dump is not trace


# ----------------------------------------------------------------------------------- names that agree with all given


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_missing_first_token_is_named_from_the_last_logits(report, name):
    """Of all texts, one of which is padded; of one text; of the last three tokens."""
    logits = port_with(name, "bos_missing")["logits"]
    for last in (logits[:, -1], logits[:, -3:], logits):
        code, found = report({"logits": last}, name)
        assert code == 1 and found["mutant"] == "bos_missing", found["verdict"]
    code, found = report({"logits": logits[0, -1]}, name, "--text", 0)
    assert code == 1 and found["mutant"] == "bos_missing", found["verdict"]


def test_a_missing_first_token_of_a_padded_text_is_padding(report):
    """A port whose texts have no <s>; positions begin at 0 at the second token of each text."""
    given = golden_inputs("ministral3")[1]
    mask = given["attention_mask"].clone()
    mask[range(2), mask.argmax(1)] = 0
    mask = mask[:, 1:]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = given["input_ids"][:, 1:]
    trace = port_with("ministral3", input_ids=ids, attention_mask=mask, position_ids=positions)
    code, found = report({"logits": trace["logits"][:, -1]}, "ministral3")
    assert code == 1 and found["mutant"] == "bos_missing", found["verdict"]


def test_a_mistake_that_contradicts_another_tensor_is_no_explanation(report):
    """The scores are those of a known mistake, the logits those of this and an unknown one."""
    trace = port_with("ministral", "window_plus_1", sine_negative)
    known = port_with("ministral", "window_plus_1")
    mask = "layers.1.attention.mask"
    code, found = report({mask: known[mask], "logits": trace["logits"]}, "ministral")
    assert code == 1 and found["first"] == mask and found["mutant"] is None
    assert found["parts"] == ["window_plus_1"]
    assert "It explains this stage, not your logits" in found["verdict"]
    code, found = report({mask: known[mask], "logits": known["logits"]}, "ministral")
    assert found["mutant"] == "window_plus_1" and not found["parts"]


def test_an_impossible_mistake_is_not_the_headline():
    """Positions that are ignored, without padding: the logits are also those of positions through padding."""
    ids = golden_inputs("ministral3")[1]["input_ids"][:1]
    inputs = {"input_ids": ids, "position_ids": torch.arange(100, 100 + ids.shape[1])[None]}
    models = [load_model(HERE / "ministral3" / "hf", dtype) for dtype in (torch.float32, torch.float64)]
    with MUTANTS["positions_through_padding"].applied():
        mine = record(models[0], **inputs)["logits"]
    suspects = [suspect.name for suspect in examine(mine, *models, inputs).suspects]
    assert suspects[-1] == "positions_through_padding" and "query_scale_by_cache_position" in suspects[:-1]


# ------------------------------------------------------------------------------------------------------ two mistakes


@pytest.mark.parametrize(
    ("name", "pair"),
    [("ministral", ("gqa_tiled", "window_plus_1")), ("ministral3", ("yarn_missing", "query_scale_missing"))],
)  # fmt: skip
def test_two_mistakes_are_a_combination(report, name, pair):
    """From a whole trace and from logits alone."""
    trace = port_with(name, *pair)
    for dump in (trace, {"logits": trace["logits"]}):
        code, found = report(dump, name)
        assert code == 1 and found["mutant"] is None and set(found["parts"]) == set(pair), found["verdict"]
        assert found["verdict"].startswith("a combination: mutants ")


def test_a_part_of_the_explanation_has_a_figure(report):
    """How much nearer the known one of two mistakes brings the logits. An unknown one alone has none."""
    trace = port_with("ministral", "head_tied", scores_not_divided)
    code, found = report({"logits": trace["logits"]}, "ministral")
    assert code == 1 and found["parts"] == ["head_tied"], found["verdict"]
    words = found["verdict"].partition("the distance of your logits falls from ")[2].split()
    assert float(words[2]) <= NEARER * float(words[0]) and " ".join(words[3:6]) == "times the noise;"
    trace = port_with("ministral", embeddings_scaled)
    code, found = report({"logits": trace["logits"]}, "ministral")
    assert code == 1 and not found["parts"] and found["verdict"].startswith("no known mistake reproduces")


# ------------------------------------------------------------------------------------------------- suspicious inputs


def test_a_port_without_the_attention_mask(report):
    given = golden_inputs("ministral")[1]
    logits = port_with("ministral", input_ids=given["input_ids"])["logits"]
    code, found = report({"logits": logits}, "ministral")
    words = "the texts without padding agree; text 1 is padded, with 5 tokens of padding: give your port "
    assert code == 1 and found["hints"][0].startswith(words), found["hints"]
    code, found = report({"logits": logits * 2}, "ministral")
    assert code == 1 and not found["hints"]


def test_other_ids(report, capsys, tmp_path):
    ids = golden_inputs("ministral")[1]["input_ids"].clone()
    ids[0, 3] += 1
    mask = golden_inputs("ministral")[1]["attention_mask"]
    trace = port_with("ministral", input_ids=ids, attention_mask=mask)
    code, found = report({key: trace[key] for key in ("embedding", "logits")}, "ministral")
    words = "your embeddings are those of other ids: text 0, token 3: 19, the reference 18 (1 of 35 tokens differ)"
    assert code == 1 and words in found["hints"], found["hints"]
    save_file({"input.input_ids": ids}, tmp_path / "mine.safetensors")
    code, _, err = diff(capsys, tmp_path / "mine.safetensors", reference("ministral"))
    assert code == 2 and err.rstrip().endswith(": text 0, token 3: 19, the reference 18")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_wrong_golden_model(report, dtype):
    logits = port_with("ministral3", dtype=dtype)["logits"]
    code, found = report({"logits": logits}, "ministral")
    assert code == 1 and len(found["hints"]) == 1 and "ministral3/float64" in found["hints"][0], found["hints"]


def test_the_copy_in_fp8(report):
    fp8, _ = load(HERE / "ministral" / "fp8" / "bfloat16.safetensors")
    code, found = report({"logits": fp8["logits"]}, "ministral")
    assert code == 1 and "ministral/fp8/float64" in found["hints"][0], found["hints"]


def test_another_vocabulary(report):
    trace = port_with("ministral")
    code, found = report({"logits": trace["logits"][..., :30]}, "ministral")
    words = "your logits are [2, 20, 30], and the reference's vocabulary is 40: is it another model?"
    assert code == 2 and found["hints"] == [words]


def test_log_probabilities_are_recognised(report):
    trace = port_with("ministral")
    code, found = report({"logits": trace["logits"].log_softmax(-1)}, "ministral")
    assert code == 1 and found["hints"] == [
        "your logits differ from the right ones by one number for each token: are they log-probabilities?"
    ]


def test_a_small_error_of_one_logit_is_no_log_probability(report):
    logits = port_with("ministral")["logits"].clone()
    logits[0, -1, 3] += 1e-3
    code, found = report({"logits": logits}, "ministral")
    assert code == 1 and found["hints"] == []


def test_a_named_mistake_within_the_noise_fails(report):
    """The values are float16, so the noise is that of float16; the mistake is named all the same."""
    trace = port_with("ministral", "norm_epsilon")
    value = trace["layers.1.attention.v"].half()
    tensors = {"layers.0.attention.v": trace["layers.0.attention.v"].half(), "layers.1.attention.v": value}
    code, found = report({**tensors, "logits": trace["logits"]}, "ministral")
    assert found["agrees"] and found["mutant"] == "norm_epsilon" and code == 1


def test_logits_without_dimensions(report, capsys, tmp_path):
    code, found = report({"logits": torch.tensor(1.0)}, "ministral")
    assert code == 2 and found["sentence"].startswith("nothing to compare")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral"))
    assert code == 2 and out.startswith("nothing to compare")
    assert "max error" not in out  # no table without lines
