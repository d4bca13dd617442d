"""`python -m reference diff` for ports as they are: one text without padding, 16-bit caches, types that do not show."""

import json
import re
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ministral
from model_types import load_model
from reference import golden
from reference.golden import HERE
from reference.mutants import MUTANTS
from reference.names import LLAMA_CPP, module_output
from reference.texts import choose_text, one_text
from reference.trace import load, record
from tests.conftest import older
from tests.test_diff import diff
from tests.test_readme import ROOT
from tests.test_reference import golden_inputs

pytestmark = pytest.mark.slow

TEXT_MODELS = ("ministral", "ministral3")


def reference(name):
    return HERE / name / "float64.safetensors"


def row_of(name, text):
    """The ids of one text of a golden trace, without padding."""
    given = golden_inputs(name)[1]
    return given["input_ids"][text][given["attention_mask"][text].bool()]


def port_of(name, text, dtype=torch.float32):
    """What a port without batches computes for one text: positions from 0, no mask."""
    model = load_model(HERE / name / "hf", dtype)
    trace = record(model, input_ids=row_of(name, text)[None])
    return {key: tensor.contiguous() for key, tensor in trace.items()}


# --------------------------------------------------------------------------------------------------------- one text


@pytest.mark.parametrize("name", TEXT_MODELS)
@pytest.mark.parametrize("text", [0, 1])
def test_a_text_alone_is_compared(capsys, tmp_path, name, text):
    """Found by its ids, in any shape, or given by `--text`; all stages, without the dimension of the batch, too."""
    trace, ids = port_of(name, text), row_of(name, text)
    mine = tmp_path / "mine.safetensors"
    for shape in ((-1,), (1, -1)):
        save_file({**trace, "input.input_ids": ids.reshape(shape)}, mine)
        code, out, err = diff(capsys, mine, reference(name))
        assert code == 0 and f"{len(trace)} stages agree" in out and f"text {text} of the reference" in err
    save_file({key: tensor.squeeze(0).contiguous() for key, tensor in trace.items()}, mine)
    code, out, _ = diff(capsys, mine, reference(name), "--text", text)
    assert code == 0 and f"{len(trace)} stages agree" in out


@pytest.mark.parametrize("last", [1, 3, 15])
def test_logits_of_the_last_tokens(capsys, tmp_path, last):
    """Of one text, in a .npy file, with every shape; and of all texts."""
    logits = port_of("ministral3", 0)["logits"]
    V = logits.shape[2]
    tail = logits[0, -last:].numpy()
    shapes = [(last, V), (1, last, V)] + [(V,)] * (last == 1)
    for shape in shapes:
        np.save(tmp_path / "mine.npy", tail.reshape(shape))
        code, out, _ = diff(capsys, tmp_path / "mine.npy", reference("ministral3"), "--text", 0, "--json")
        report = json.loads(out)
        words = "of the last token" if last == 1 else f"of the last {last} tokens"
        assert code == 0 and report["stages"][0]["how"] == words, report["sentence"]
    np.save(tmp_path / "mine.npy", np.roll(tail, 1))
    assert diff(capsys, tmp_path / "mine.npy", reference("ministral3"), "--text", 0)[0] == 1

    both, _ = load(HERE / "ministral" / "float32.safetensors")
    shown = golden_inputs("ministral")[1]["attention_mask"].sum(1).min()
    np.save(tmp_path / "both.npy", both["logits"][:, -last:].numpy())
    code, out, _ = diff(capsys, tmp_path / "both.npy", reference("ministral"))
    assert (code == 0) == (last <= shown), out


@pytest.mark.parametrize("mistake", ["window_plus_1", "rope_interleaved", "gqa_tiled"])
def test_a_mistake_in_a_text_alone_is_named(capsys, tmp_path, mistake):
    with MUTANTS[mistake].applied():
        trace = port_of("ministral", 0)
    np.save(tmp_path / "mine.npy", trace["logits"][0].numpy())
    code, out, _ = diff(capsys, tmp_path / "mine.npy", reference("ministral"), "--text", 0)
    assert code == 1 and f"match mutant {mistake!r}" in out.splitlines()[1]


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_one_text_of_a_reference_is_what_the_model_computes_for_it(name):
    traced, _ = load(reference(name))
    inputs = {key.removeprefix("input."): traced.pop(key) for key in list(traced) if key.startswith("input.")}
    model = load_model(HERE / name / "hf", torch.float64)
    for text in range(2):
        cut, chosen = one_text(traced, inputs, text)
        assert chosen["input_ids"][0].tolist() == row_of(name, text).tolist()
        for key, tensor in record(model, **golden.arguments(chosen, torch.float64)).items():
            assert tensor.shape == cut[key].shape, key
            visible = cut.get(key.replace("scores", "mask"), torch.ones(1, dtype=torch.bool)).bool()
            if key.endswith("scores"):
                tensor, cut[key] = tensor * visible[:, None], cut[key] * visible[:, None]
            torch.testing.assert_close(tensor.double(), cut[key].double(), rtol=0, atol=1e-12)


def test_texts_that_do_not_fit(capsys, tmp_path):
    ids = row_of("ministral", 0)
    np.save(tmp_path / "mine.npy", np.zeros((len(ids), 40), np.float32))
    code, out, _ = diff(capsys, tmp_path / "mine.npy", reference("ministral"))
    assert code == 2 and "The reference has 2 texts: 0: " in out and "give --text N for one" in out.splitlines()[0]
    code, _, err = diff(capsys, tmp_path / "mine.npy", reference("ministral"), "--text", 2)
    assert code == 2 and err == "error: --text 2 is impossible; allowed: 0 to 1, one of the reference's texts\n"
    code, _, err = diff(capsys, tmp_path / "mine.npy", reference("mistral3"), "--text", 0)
    assert code == 2 and "the reference has images, which belong to all texts" in err
    with pytest.raises(ValueError, match="does not hold input"):
        choose_text({}, {}, 0)
    other = {"input.input_ids": ids + 1}
    assert choose_text(other, golden_inputs("ministral")[1], None) is None


# ------------------------------------------------------------------------------------------------------------ types


@contextmanager
def a_cache_of(dtype):
    """Round keys and values, as a cache of 16 bits does."""

    def rounded(attend):
        def attend_to_rounded(q, k, v, *rest):
            return attend(q, k.to(dtype).to(k.dtype), v.to(dtype).to(v.dtype), *rest)

        return attend_to_rounded

    changed = {name: rounded(attend) for name, attend in ministral.ATTENTION.items()}
    with patch.dict(ministral.ATTENTION, changed):
        yield


def logits_with_a_cache_of(dtype, name, tmp_path):
    """A port in float32 with such a cache; its logits are the last ones of each text."""
    model = load_model(HERE / name / "hf", torch.float32)
    with a_cache_of(dtype), torch.no_grad():
        logits = model(**golden_inputs(name)[1], use_cache=False).logits
    save_file({"logits": logits.contiguous()}, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


@pytest.mark.parametrize(
    ("name", "mistake"),
    [("ministral", "window_on_no_layer"), ("ministral", "rope_interleaved"), ("ministral3", "query_scale_missing"),
     ("ministral3", "yarn_magnitude_1_277")],
)  # fmt: skip
def test_a_16_bit_cache_does_not_hide_the_name(capsys, tmp_path, name, mistake):
    with MUTANTS[mistake].applied():
        mine = logits_with_a_cache_of(torch.float16, name, tmp_path)
    code, out, _ = diff(capsys, mine, reference(name))
    assert code == 1 and f"match mutant {mistake!r}" in out, out


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_right_port_with_a_16_bit_cache(capsys, tmp_path, name):
    """It is told what to do, and that this proves nothing; then it agrees, and the test is called weaker."""
    mine = logits_with_a_cache_of(torch.float16, name, tmp_path)
    code, out, _ = diff(capsys, mine, reference(name))
    assert code == 1 and "no larger than the noise of float16, which proves nothing" in out
    code, out, _ = diff(capsys, mine, reference(name), "--dtype", "float16")
    assert code == 0 and "this is a weaker test than without --dtype" in out


def test_the_mistakes_that_a_coarser_type_hides_are_named(capsys, tmp_path):
    """A port in float32 whose error is larger than its noise, but smaller than that of bfloat16."""
    exact, _ = load(reference("ministral3"))
    noise = torch.randn(exact["logits"].shape, generator=torch.Generator().manual_seed(0))
    save_file({"logits": (exact["logits"] + 1e-4 * noise).float()}, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral3"))
    assert code == 1
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral3"), "--dtype", "bfloat16")
    assert code == 0 and "your numbers have more digits than bfloat16" in out
    hidden = out.splitlines()[1].partition("its noise hides ")[2].split(", ")
    assert set(hidden) <= set(MUTANTS) and "rope_interleaved" not in hidden


def test_the_type_of_each_stage_is_printed_and_can_be_tightened(capsys, tmp_path):
    """A port that accumulates in float16 and stores float32: its numbers are float16, and pass as such."""
    model = load_model(HERE / "ministral3" / "hf", torch.float16)
    trace = record(model, **golden_inputs("ministral3")[1])
    wide = {key: tensor.contiguous() for key, tensor in trace.items()}
    wide |= {key: tensor.float() for key, tensor in wide.items() if tensor.is_floating_point()}
    save_file(wide, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral3"))
    lines = [line for line in out.splitlines() if line.startswith("logits ")]
    assert code == 0 and lines[0].split()[4] == "float16"
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral3"), "--dtype", "float32")
    lines = [line for line in out.splitlines() if line.startswith("logits ")]
    assert code == 1 and lines[0].split()[4] == "float32"


# --------------------------------------------------------------------------------------------------- forms of tensors


def test_keys_with_tokens_before_heads(capsys, tmp_path):
    """(B, S, G, D), for numbers of tokens that are multiples of the number of key heads, and others."""
    for text in (0, 1):
        trace = port_of("ministral", text)
        names = [key for key in trace if key.endswith((".k", ".v", "k_rotated"))]
        mine = {key: trace[key].transpose(1, 2).contiguous() for key in names}
        save_file(mine, tmp_path / "mine.safetensors")
        code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral"), "--text", text)
        assert code == 0 and f"{len(mine)} stages agree" in out, out


def test_keys_up_to_a_round_number(capsys, tmp_path):
    """Scores, masks and probabilities with columns that hold no key; scores before they are divided by sqrt(D)."""
    trace = port_of("ministral", 0)
    mine = {}
    for key, tensor in trace.items():
        if key.endswith((".scores", ".probabilities", ".mask")):
            filler = torch.full((*tensor.shape[:-1], 256 - tensor.shape[-1]), 7).to(tensor.dtype)
            mine[key] = torch.cat((tensor, filler), dim=-1)
    save_file(mine, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral"), "--text", 0)
    assert code == 0 and f"{len(mine)} stages agree" in out and "the first 20 keys" in out, out

    D = trace["layers.0.attention.q"].shape[-1]
    unscaled = {key: trace[key] * D**0.5 for key in trace if key.endswith(".scores")}
    save_file(unscaled, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral"), "--text", 0)
    assert code == 0 and f"after division by sqrt({D})" in out.splitlines()[0]
    save_file({key: tensor * 1.01 for key, tensor in unscaled.items()}, tmp_path / "mine.safetensors")
    assert diff(capsys, tmp_path / "mine.safetensors", reference("ministral"), "--text", 0)[0] == 1


def test_the_headline_of_a_failure_does_not_say_that_all_agrees(capsys, tmp_path):
    trace = port_of("ministral", 0)
    trace["final_norm"] = trace["final_norm"][:, :, :3].contiguous()
    save_file(trace, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral"), "--text", 0)
    assert code == 1 and out.startswith(f"1 of {len(trace)} stages cannot be compared: final_norm is [1, 20, 3]")


# ------------------------------------------------------------------------------------------------------------ names


def hooked(name, text):
    """What forward hooks of Transformers' module names see of one text."""
    model, dump = load_model(HERE / name / "hf", torch.float32), {}

    def note(label):
        def hook(module, arguments, output):
            if torch.is_tensor(output):
                dump[label] = output.detach().contiguous()

        return hook

    for label, module in model.named_modules():
        if label:
            module.register_forward_hook(note(label))
    with torch.no_grad():
        model(row_of(name, text)[None], use_cache=False)
    return {label: tensor for label, tensor in dump.items() if module_output(label)}


@pytest.mark.parametrize("program", ["transformers", "mlx"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_names_of_modules(capsys, tmp_path, name, program):
    """Outputs of modules, with and without what stands before their names in a vision model."""
    dump = hooked(name, 0)
    for prefix in ("", "language_model."):
        save_file({prefix + label: tensor for label, tensor in dump.items()}, tmp_path / "mine.safetensors")
        code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference(name), "--text", 0, "--map", program)
        assert code == 0 and f"{len(dump)} stages agree" in out and len(dump) > 15, out


def test_the_names_of_llama_cpp(capsys, tmp_path):
    """As its callback gives them: tokens before heads, keys up to a round number, scores before they are scaled."""
    trace = port_of("ministral", 0)
    dump = {}
    D = trace["layers.0.attention.q"].shape[-1]
    for label, point in LLAMA_CPP.items():
        for layer in range(2):
            tensor = trace[point.replace("N", str(layer))][0]
            if "cur" in label:
                tensor = tensor.transpose(0, 1)
            if label.startswith(("kq-", "kq_soft")):
                tensor = torch.nn.functional.pad(tensor, (0, 256 - tensor.shape[-1]))
            if label == "kq-N":
                tensor = tensor * D**0.5
            if label not in ("embd", "kq_soft_max_ext-N", "ffn_swiglu-N"):  # other names of the same
                dump[label.replace("N", str(layer))] = tensor.contiguous()
    save_file(dump, tmp_path / "mine.safetensors")
    code, out, _ = diff(
        capsys, tmp_path / "mine.safetensors", reference("ministral"), "--text", 0, "--map", "llama.cpp"
    )
    assert code == 0 and f"{len(dump)} stages agree" in out, out


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["logit"], "logit: is it logits?"),
        (["layers.0.attention.qs"], "layers.0.attention.qs: is it layers.0.attention.q?"),
        (["l_out-0"], "they look like those of llama.cpp: give --map llama.cpp"),
        (["model.layers.0.mlp.up_proj"], "they look like those of transformers: give --map transformers"),
        (["xyzzy"], "give --map FILE.json, or --map transformers, mlx or llama.cpp"),
    ],
)
def test_other_names_get_advice(capsys, tmp_path, names, words):
    tensors = {name: torch.zeros(3) for name in names}
    save_file(tensors, tmp_path / "mine.safetensors")
    code, out, _ = diff(capsys, tmp_path / "mine.safetensors", reference("ministral"))
    assert code == 2 and f"names that the reference does not have: {names[0]} ({words})" in out


def test_a_map_that_does_not_fit(capsys, tmp_path):
    save_file({"xyzzy": torch.zeros(3)}, tmp_path / "mine.safetensors")
    for given, words in (("llama.cpp", "knows none of your names, 'xyzzy' for example"), ("none.json", "no such file")):
        code, _, err = diff(capsys, tmp_path / "mine.safetensors", reference("ministral"), "--map", given)
        assert code == 2 and f"--map {given}" in err and words in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------- the documented comparison


@pytest.mark.skipif(older("transformers", 5, 24), reason="the modules of other versions return other things")
def test_the_first_comparison_of_the_documentation(capsys, tmp_path, monkeypatch):
    """The script and the command of docs/numerics.md print what stands there. Numbers may differ by the processor."""
    section = (ROOT / "docs" / "numerics.md").read_text().partition("## A first comparison\n")[2].partition("\n## ")[0]
    script, command, text = re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)
    (tmp_path / "reference").symlink_to(ROOT / "reference")
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    code, out, err = diff(capsys, *command.split()[4:])
    assert code == 1 and "text 0" in err

    def without_numbers(line):
        return re.sub(r"(?<![\w.])\d[\d.e+-]*", "#", " ".join(line.split()))

    printed = [without_numbers(line) for line in out.splitlines()]
    shown = [without_numbers(line) for line in text.splitlines() if line != "..."]
    assert shown == [line for line in printed if line in shown]
    assert len(script.splitlines()) <= 15 and "window_plus_1" in text
