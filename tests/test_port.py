"""`examples/port.c`: it is built with the system's compiler and compared with float64 traces, also with mistakes."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from generate import generate
from ministral3 import Ministral3ForCausalLM
from model_types import BUNDLED, BUNDLED_2410, load_model
from reference.__main__ import main
from reference.golden import HERE
from tests.test_readme import ROOT
from tokenizer import Tokenizer

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler `cc` on this machine")

SOURCE = (ROOT / "examples" / "port.c").read_text(encoding="utf-8")
# 25 tokens: five windows of ministral, three original contexts of ministral3.
IDS = [1, 5, 7, 39, 4, 8, 15, 16, 23, 38, 2, 3, 1, 9, 12, 31, 33, 0, 3, 17, 8, 5, 29, 30, 6]


def text(ids):
    return ",".join(map(str, ids))


def build(directory, source=SOURCE):
    """Compile a source without a warning; returns the program."""
    file, program = directory / "port.c", directory / "port"
    file.write_text(source, encoding="utf-8")
    flags = ["-O2", "-std=c99", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([COMPILER, *flags, "-o", program, file, "-lm"], check=True)
    return program


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    return build(tmp_path_factory.mktemp("port"))


def run(program, directory, *arguments):
    done = subprocess.run([program, directory, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def diff(capsys, tmp_path):
    """Exit code and report of `diff` for what a program computes for IDS, against a float64 trace."""

    def compare(program, directory):
        mine, truth = tmp_path / "mine.safetensors", tmp_path / "truth.safetensors"
        run(program, directory, "--ids", text(IDS), "-o", mine)
        assert main(["record", "--model", str(directory), "--ids", text(IDS), "-o", str(truth)]) == 0
        capsys.readouterr()
        code = main(["diff", str(mine), str(truth), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return compare


def changed_model(directory, name, config=None, tensors=None):
    """A copy of a golden model with other fields and tensors; None removes one."""
    golden = HERE / name / "hf"
    fields = json.loads((golden / "config.json").read_text()) | (config or {})
    weights = load_file(golden / "model.safetensors") | (tensors or {})
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file({key: value for key, value in weights.items() if value is not None}, directory / "model.safetensors")
    return directory


def rope(**changes):
    """The rope_parameters of ministral3 with changes; None removes a key."""
    config = json.loads((HERE / "ministral3" / "hf" / "config.json").read_text())
    parameters = config["rope_parameters"] | changes
    return {"rope_parameters": {key: value for key, value in parameters.items() if value is not None}}


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("name, stages", [("ministral", 57), ("ministral3", 39)])
def test_every_stage_agrees(port, diff, name, stages):
    code, report = diff(port, HERE / name / "hf")
    assert code == 0 and report["agrees"] and report["mutant"] is None, report["sentence"]
    assert len(report["stages"]) == stages and not report["unknown"] and not report["misshapen"]
    assert all(stage["floor"] for stage in report["stages"])


CHANGES = {
    "attention_factor": ("ministral3", rope(attention_factor=1.3)),
    "mscale alone": ("ministral3", rope(mscale=1.0, mscale_all_dim=0.0)),
    "two mscales": ("ministral3", rope(mscale=0.7, mscale_all_dim=0.5)),
    "no mscale": ("ministral3", rope(mscale=None, mscale_all_dim=None)),
    "truncate": ("ministral3", rope(truncate=False)),
    "beta_fast and beta_slow": ("ministral3", rope(beta_fast=2.0, beta_slow=0.5)),
    "plain rope": ("ministral3", rope(rope_type="default")),
    "no query scale": ("ministral3", rope(llama_4_scaling_beta=None)),
    "all layers slide": ("ministral3", {"sliding_window": 4}),
    "one key head": ("ministral", {"num_key_value_heads": 1}),
    "no layer_types": ("ministral", {"layer_types": None}),
    "wide window": ("ministral", {"sliding_window": 24}),
    "window of one": ("ministral", {"sliding_window": 1}),
    "larger eps": ("ministral", {"rms_norm_eps": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_other_configurations_agree(port, diff, tmp_path, change):
    name, config = CHANGES[change]
    tensors = {}
    if change == "one key head":
        stored = load_file(HERE / name / "hf" / "model.safetensors")
        tensors = {key: value[:8].contiguous() for key, value in stored.items() if re.search("[kv]_proj", key)}
    code, report = diff(port, changed_model(tmp_path / "model", name, config, tensors))
    assert code == 0, report["sentence"]


FAULTS = {  # what is replaced, by what, model, the first stage that diverges, the name of the known mistake
    "eps outside the root": (
        "sqrtf(dot(x, x, m->E) / m->E + (float)m->rms_norm_eps)",
        "(sqrtf(dot(x, x, m->E) / m->E) + (float)m->rms_norm_eps)", "ministral", "layers.0.input_norm", None),
    "window minus 1": ("fmin(m->T, sliding_window)", "fmin(m->T, sliding_window - 1)", "ministral",
                       "layers.1.attention.mask", "window_minus_1"),
    "window plus 1": ("fmin(m->T, sliding_window)", "fmin(m->T, sliding_window + 1)", "ministral",
                      "layers.1.attention.mask", "window_plus_1"),
    "ring of values off by one": ("layer->values + (size_t)(t % window) * K",
                                  "layer->values + (size_t)((t + (t >= window)) % window) * K", "ministral",
                                  "layers.1.attention.heads", None),
    "no floor in the query scale": ("floor(last / m->original_context)", "last / m->original_context", "ministral3",
                                    "layers.0.attention.q_scaled", None),
    "factor left out": ("slowed / factor", "slowed", "ministral3", "layers.0.attention.q_rotated", None),
    "magnitude 1.277": ("if (a == 0 || b == 0) quotient", "quotient", "ministral3",
                        "layers.0.attention.q_rotated", "yarn_magnitude_1_277"),
    "key heads tiled": ("h / (m->H / m->G) * D", "h % m->G * D", "ministral", "layers.0.attention.scores",
                        "gqa_tiled"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_diff_finds_a_mistake(diff, tmp_path, fault):
    right, wrong, name, first, mutant = FAULTS[fault]
    assert SOURCE.count(right) == 1
    code, report = diff(build(tmp_path, SOURCE.replace(right, wrong)), HERE / name / "hf")
    assert code == 1 and report["first"] == first, report["sentence"]
    assert mutant in (None, report["mutant"]), report["verdict"]


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("bundled", [BUNDLED, BUNDLED_2410], ids=lambda path: path.name)
def test_the_bundled_models_continue_a_text(port, tmp_path, bundled):
    """The port reads text models: of the vision model, the text model is written first."""
    tokenizer = Tokenizer.from_dir(bundled)
    ids = tokenizer.encode("To be, or not to be")
    model = load_model(bundled, torch.float32)
    if bundled == BUNDLED:
        Ministral3ForCausalLM.from_pretrained(bundled).save_pretrained(tmp_path)
        bundled = tmp_path
    settings = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": (), "fast": False}
    expected = generate(model, torch.tensor([ids]), max_new_tokens=100, **settings)[0, len(ids):].tolist()
    out = [int(line) for line in run(port, bundled, "--ids", text(ids), "--generate", 100).splitlines()]
    assert out == expected and len(set(out)) > 10


def random_numbers(seed):
    """The generator of the port."""
    whole = 2**64 - 1
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & whole
        z = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & whole
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & whole
        yield ((z ^ z >> 31) >> 11) / 2**53


def test_sampling_follows_the_seed_and_the_temperature(port):
    """The same noise on the model's float32 logits gives the same tokens."""
    name = HERE / "ministral" / "hf"
    model = load_model(name, torch.float32)
    arguments = ["--ids", text(IDS[:6]), "--generate", 40, "--temperature", 1.5, "--seed"]
    out = [int(line) for line in run(port, name, *arguments, 7).splitlines()]
    numbers = random_numbers(7)
    logits = model(torch.tensor([IDS[:6] + out])).logits[0, 5:-1]
    for row, id in zip(logits.tolist(), out, strict=True):
        noisy = [logit / 1.5 - math.log(-math.log(next(numbers))) for logit in row]
        assert noisy[id] > max(noisy) - 1e-4
    assert out != [int(line) for line in run(port, name, *arguments, 8).splitlines()]
    assert len(set(out)) > 10


def test_draws_have_the_probabilities_of_softmax(port):
    """400 tokens, each from another seed: the frequencies are those of softmax(logits / 2)."""
    name = HERE / "ministral" / "hf"
    probabilities = (load_model(name, torch.float64)(torch.tensor([IDS[:3]])).logits[0, -1] / 2).softmax(-1)
    counts = torch.zeros(40)
    for seed in range(400):
        counts[int(run(port, name, "--ids", text(IDS[:3]), "--generate", 1, "--temperature", 2, "--seed", seed))] += 1
    expected = 400 * probabilities
    likely = expected > 5
    distance = ((counts - expected).square() / expected)[likely].sum()
    assert distance < int(likely.sum()) + 4 * math.sqrt(2 * int(likely.sum()))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("config, words", [
    ({"model_type": "llama"}, 'model_type="llama" is not supported; supported: "ministral"'),
    ({"attention_bias": True}, "attention_bias=true is not supported; supported: false"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported; supported: "silu"'),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0}}, 'rope_type="linear" is not supported'),
    ({"rope_parameters": {"type": "yarn", "rope_theta": 100.0}}, 'type="yarn" is not supported'),
    (rope(), 'model_type="ministral" is not supported; supported: "ministral3"'),
    ({"hidden_size": 0}, "hidden_size=0 is not supported; supported: sizes above 0"),
    ({"hidden_size": "many"}, 'hidden_size="many" is not supported; supported: a number'),
    ({"rms_norm_eps": None}, "config.json has no rms_norm_eps"),
    ({"sliding_window": 0}, "sliding_window=0; supported: 1 and above"),
    ({"head_dim": 7}, "4 heads, 2 key heads of size 7"),
    ({"layer_types": ["full_attention"]}, "layer_types: ]"),
    ({"layer_types": ["full_attention", "chunked_attention", "x"]}, 'layer_types: "chunked_attention"'),
    ({"intermediate_size": 25}, "model.layers.0.mlp.gate_proj.weight is cut off, or not (25, 16)"),
    ({"num_hidden_layers": 4, "layer_types": None}, "has no model.layers.3.input_layernorm.weight"),
])  # fmt: skip
def test_fields_that_are_refused(port, tmp_path, config, words):
    fails(port, changed_model(tmp_path / "model", "ministral", config), ["--ids", "1,2", "--generate", "1"], words)


@pytest.mark.parametrize("tensors, words", [
    ({"lm_head.weight": None}, "model.safetensors has no lm_head.weight"),
    ({"lm_head.weight": torch.zeros(40, 16, dtype=torch.float16)}, 'lm_head.weight is "F16",; supported: F32, BF16'),
    ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "biases in model.safetensors are not supported"),
])  # fmt: skip
def test_tensors_that_are_refused(port, tmp_path, tensors, words):
    directory = changed_model(tmp_path / "model", "ministral", None, tensors)
    fails(port, directory, ["--ids", "1,2", "--generate", "1"], words)


@pytest.mark.parametrize("arguments, words", [
    ("--ids 1,40 --generate 1", "--ids 40 is not supported; supported: from 0 to 39"),
    ("--ids 1,x --generate 1", "--ids x is not supported"),
    ("--ids 1, --generate 1", "--ids "),
    ("--ids 1.5 --generate 1", "--ids 1.5 is not supported"),
    ("--ids 1 --generate 3,4", "--generate 3,4 is not supported"),
    ("--ids 1 --generate 1 --temperature -1", "--temperature -1 is not supported"),
    ("--ids 1 --words 1", "--words is no option"),
    ("--ids 1", "usage: port DIR"),
    ("--ids 1 --generate", "usage: port DIR"),
    ("--ids 1 -o /nowhere/mine.safetensors", "cannot write /nowhere/mine.safetensors"),
])  # fmt: skip
def test_arguments_that_are_refused(port, arguments, words):
    fails(port, HERE / "ministral" / "hf", arguments.split(), words)


def test_files_that_are_missing_or_cut_off(port, tmp_path):
    arguments = ["--ids", "1", "--generate", "1"]
    fails(port, tmp_path / "none", arguments, "cannot read " + str(tmp_path / "none" / "config.json"))
    directory = changed_model(tmp_path / "model", "ministral")
    content = (directory / "model.safetensors").read_bytes()
    for length, words in ((0, "cut off"), (7, "cut off"), (100, "cut off"), (len(content) - 4, "is cut off, or not")):
        (directory / "model.safetensors").write_bytes(content[:length])
        fails(port, directory, arguments, words)


def fails(program, directory, arguments, words):
    """The program prints one line with these words to stderr, nothing else, and exits with 2."""
    done = subprocess.run([program, directory, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and words in done.stderr, done.stderr
    assert done.stderr.startswith("port: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ the source


def test_the_source_stays_readable():
    lines = SOURCE.splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 100
    start = 0
    for number, line in enumerate(lines):
        if re.match(r"\w.*\{", line):
            start = number
        if line == "}":
            assert number - start < 60, lines[start]
    assert not re.search(r"^\s*#\s*(define|if)", SOURCE, re.MULTILINE)


def test_the_commands_of_the_documentation_run(tmp_path):
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    section = page.partition("\n## A port in C\n")[2].partition("\n## ")[0]
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    for path in ("examples", "models", "reference"):
        (tmp_path / path).symlink_to(ROOT / path)
    lines = commands.replace("python -m", f"PYTHONPATH='{ROOT}' '{sys.executable}' -m")
    done = subprocess.run(["bash", "-e", "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "stages agree" in done.stdout, done.stderr
