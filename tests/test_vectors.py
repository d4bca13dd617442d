"""The golden files that need no weights, against the oracles: Transformers, mistral-common, `reference/oracle.py`; and
the comparison that needs no PyTorch."""

import base64
import importlib.util
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers import image, instruct
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, TokenizerVersion
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from PIL import Image
from safetensors.numpy import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model_types import BUNDLED, load_model
from reference import golden, oracle
from reference.golden import HERE
from reference.mutants import MUTANTS
from reference.published import MINISTRAL_8B, ministral3
from reference.trace import CACHE_POINTS, LAYER, POINTS, dimensions, load, record
from reference.vectors import as_lines, published_vocabulary, sha256, write
from tests.test_reference import ROOT, TINY, golden_inputs, numpy
from tokenizer import SPECIAL_TOKENS, VERSIONS

VECTORS = HERE / "vectors"
TABLES = json.loads((HERE / "tables.json").read_text())["models"]
CHAT = json.loads((VECTORS / "chat.json").read_text())
SAMPLER = json.loads((VECTORS / "sampler.json").read_text())
TEXT_CONFIGS = {f"Ministral-3-{size}-2512": ministral3(size)["text_config"] for size in ("3B", "8B", "14B")}
COMPARE = HERE / "compare.py"


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("depth", range(4))
def test_a_file_reads_as_what_was_written(tmp_path, depth):
    content = {"a": [0.1, 1e-300, {"b": [1, [2]], "c": {}}], "d": [], "é\u0301": {"e": None}}
    write(tmp_path / "new" / "x.json", content, depth)
    text = (tmp_path / "new" / "x.json").read_text("ascii")
    assert json.loads(text) == content and text == as_lines(content, depth) + "\n"


def test_names_of_vectors_are_not_those_of_a_tokenizer():
    """A directory with them is not taken for a model. (tokenizer.json would be.)"""
    names = {path.name for path in VECTORS.iterdir()}
    assert not names & {"tekken.json", "tokenizer.json", "tokenizer_config.json", "config.json"}


def test_the_documentation_counts_and_lists_them():
    page = (ROOT / "docs" / "numerics.md").read_text().partition("## Test vectors\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    files = json.loads((HERE / "manifest.json").read_text())["files"]
    assert {*listed} == {"manifest.json", *(name for name in files if not (HERE / name.split("/")[0] / "hf").is_dir())}
    texts = json.loads((VECTORS / "texts.json").read_text())["cases"]
    assert f"{len(texts)} texts" in page and f"{len(CHAT['cases'])} conversations" in page


# ------------------------------------------------------------------------------------------------------- tables


def test_the_tables_are_those_of_the_published_models():
    assert TABLES.keys() == {*TEXT_CONFIGS, "Ministral-8B-Instruct-2410"}
    for name, table in TABLES.items():
        far = [131071, 262143] if "Ministral-3" in name else [32767]
        assert table["positions"] == [0, 1, 16383, 16384, *far]
        assert {len(table[key]) for key in ("cosines", "sines", "query_scales")} == {len(table["positions"])}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_equal_the_oracle(name):
    table = TABLES[name]
    config = {"head_dim": table["head_dim"], "rope_parameters": table["rope_parameters"]}
    frequencies, positions = np.array(table["inverse_frequencies"]), np.array(table["positions"])
    np.testing.assert_allclose(frequencies, oracle.angles_per_position(config), rtol=1e-14)
    assert table["attention_factor"] == oracle.magnitude(config) == 1.0
    angles = positions[:, None] * frequencies
    np.testing.assert_allclose(table["cosines"], np.cos(angles), rtol=0, atol=1e-15)
    np.testing.assert_allclose(table["sines"], np.sin(angles), rtol=0, atol=1e-15)
    scales = [oracle.query_scale(config, position) for position in table["positions"]]
    np.testing.assert_allclose(table["query_scales"], scales, rtol=1e-15)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_equal_transformers(name):
    """Its tables are float32: the angle is rounded as `about` in the file says."""
    table = TABLES[name]
    if name in TEXT_CONFIGS:
        config = transformers.Ministral3Config(**TEXT_CONFIGS[name])
        rotary = transformers.models.ministral3.modeling_ministral3.Ministral3RotaryEmbedding(config)
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
        assert factor == table["attention_factor"]
        torch.testing.assert_close(rotary.inv_freq, frequencies)
    else:
        config = transformers.MistralConfig(**MINISTRAL_8B)
        rotary = transformers.models.mistral.modeling_mistral.MistralRotaryEmbedding(config)
    exact = torch.tensor(table["inverse_frequencies"], dtype=torch.float64)
    torch.testing.assert_close(rotary.inv_freq.double(), exact, rtol=3e-7, atol=0)
    positions = torch.tensor([table["positions"]])
    for theirs, key in zip(rotary(torch.empty(0), positions), ("cosines", "sines")):
        error = (theirs[0, :, :64].double() - torch.tensor(table[key], dtype=torch.float64)).abs()
        assert (error <= 2**-22 * (1 + positions[0, :, None] * exact)).all()
        assert error.max() > 1e-4  # and that matters


# ---------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("name", ["bundled", "published"])
def test_the_ids_of_texts_equal_mistral_common(name):
    path = {"bundled": BUNDLED / "tekken.json", "published": published_vocabulary()}[name]
    content = json.loads((VECTORS / "texts.json").read_text())
    assert content["sha256"][name] == sha256(path) and len(content["cases"]) >= 100
    theirs = Tekkenizer.from_file(path)
    for case in content["cases"]:
        assert case[name] == theirs.encode(case["text"], bos=False, eos=False), case["text"]
        assert theirs.decode(case[name]) == case["text"]


def test_a_missing_vocabulary_is_reported(monkeypatch, tmp_path):
    cure = "pip install -r requirements-test.txt"
    monkeypatch.setattr("reference.vectors.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"mistral-common is not installed; .*{cure}"):
        published_vocabulary()
    package = tmp_path / "mistral_common" / "__init__.py"
    monkeypatch.setattr("reference.vectors.find_spec", lambda name: type("Spec", (), {"origin": str(package)}))
    with pytest.raises(FileNotFoundError, match=f"tekken_240911.json does not exist; .*{cure}"):
        published_vocabulary()
    (package.parent / "data").mkdir(parents=True)
    (package.parent / "data" / "tekken_240911.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has the SHA-256 44136fa3\w+; allowed: 1948e2d4\w+$"):
        published_vocabulary()


# --------------------------------------------------------------------------------------------------------- chat


@pytest.fixture(scope="module")
def encoders():
    """mistral-common's encoders of all layouts, with its own image encoder (whose pixels need a library that is not
    there), on the vocabulary of the vectors."""
    assert CHAT["sha256"] == sha256(BUNDLED / "tekken.json")
    encoders = {}
    for name in VERSIONS:
        tekkenizer = Tekkenizer.from_file(BUNDLED / "tekken.json")
        tekkenizer._version = TokenizerVersion(name)
        images = ImageEncoder(ImageConfig(14, 1540, 2), SpecialImageIDs(img=10, img_break=12, img_end=13))
        encoders[name] = getattr(instruct, f"InstructTokenizer{name.upper()}")(tekkenizer, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "transform_image", lambda picture, size: np.zeros((3, 1, 1)))
        yield encoders


def as_data(name):
    """An image of the vectors as a data: URI."""
    height, width = CHAT["image_sizes"][name]
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.parametrize("case", CHAT["cases"], ids=lambda case: f"{case['version']} {case['name']}")
def test_the_ids_of_conversations_equal_mistral_common(encoders, case):
    version = TokenizerVersion(case["version"])
    messages = json.loads(json.dumps(case["messages"]))
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image_url":
                part["image_url"]["url"] = as_data(part["image_url"]["url"])
    if any("reasoning_content" in message for message in messages):
        request = ChatCompletionRequest.from_openai(messages, case["tools"])
    else:
        request = ChatCompletionRequest(messages=messages, tools=case["tools"])
    get_validator(version, ValidationMode.test).validate_request(request)
    request = get_normalizer(version).from_chat_completion_request(request)
    expected = encoders[case["version"]].encode_instruct(request)
    assert case["ids"] == expected.tokens
    tekkenizer = encoders[case["version"]].tokenizer
    assert case["text"] == tekkenizer.decode(case["ids"], special_token_policy=SpecialTokenPolicy.KEEP)


def test_the_conversations_have_everything():
    """Every version has tools, calls, results, images where there are any, and a prefix; and text that is no token."""
    for version in VERSIONS:
        cases = [case for case in CHAT["cases"] if case["version"] == version]
        ids = {i for case in cases for i in case["ids"]}
        needed = {"<s>", "</s>", "[INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"}
        if version != "v3":
            needed |= {"[SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"}
        assert {SPECIAL_TOKENS.index(name) for name in needed} <= ids
        newer = {"v11": {32, 33}, "v13": {32, 34, 35}}.get(version, set())
        assert ids & {32, 33, 34, 35} == newer
        assert any(case["messages"][-1].get("prefix") for case in cases)
        joined = [case for case in cases if "".join(case["text"].split("[INST]")[1:]).count("[/INST]") > 1]
        assert joined and len(cases) >= 20


def test_ids_are_not_those_of_the_text(encoders):
    """A port that encodes the conversation as one text fails in most cases."""
    tekkenizer = encoders["v13"].tokenizer
    wrong = 0
    for case in CHAT["cases"]:
        wrong += tekkenizer.encode(case["text"], bos=False, eos=False) != case["ids"]
    assert wrong == len(CHAT["cases"])


# ------------------------------------------------------------------------------------------------------ sampler


def warpers(case):
    """Transformers' processors for the settings of a case, in its order."""
    chain = transformers.LogitsProcessorList()
    if case["repetition_penalty"] != 1:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    if case["temperature"]:
        chain.append(transformers.TemperatureLogitsWarper(case["temperature"]))
    if case["top_k"]:
        chain.append(transformers.TopKLogitsWarper(case["top_k"]))
    if case["top_p"] is not None:
        chain.append(transformers.TopPLogitsWarper(case["top_p"]))
    if case["min_p"] is not None:
        chain.append(transformers.MinPLogitsWarper(case["min_p"]))
    return chain


@pytest.mark.parametrize("case", SAMPLER["cases"], ids=lambda case: case["name"])
def test_sampling_equals_transformers(case):
    logits = torch.tensor([case["logits"]], dtype=torch.float64)
    scores = warpers(case)(torch.tensor([case["previous_ids"]], dtype=torch.long), logits)[0]
    if case["temperature"] == 0:
        assert case["kept"] == [scores.argmax().item()] and case["probabilities"] == [1.0]
    else:
        probabilities = scores.softmax(-1)
        assert case["kept"] == probabilities.nonzero().flatten().tolist()
        expected = probabilities[case["kept"]].numpy()
        np.testing.assert_allclose(case["probabilities"], expected, rtol=1e-12)
    edges = np.cumsum(case["probabilities"])
    assert len(case["draws"]) >= 4
    for draw in case["draws"]:
        assert draw["token"] == case["kept"][np.searchsorted(edges, draw["number"], side="right")]
        assert draw["number"] == 0 or abs(edges - draw["number"]).min() > 1e-4


def test_every_setting_of_sampling_takes_effect():
    """In some case, another value of it gives other tokens; and the ties are ties."""
    cases = {case["name"]: case for case in SAMPLER["cases"]}
    assert len(cases) == len(SAMPLER["cases"]) >= 50
    for key in ("top_k", "top_p", "min_p"):
        changed = [case for case in cases.values() if case["temperature"] and case[key]]
        fewer = [case for case in changed if len(case["kept"]) < len(warped_without(case, key))]
        assert len(fewer) >= 8, key
    assert cases["greedy, ties: the lowest id"]["kept"] == [1]
    assert cases["greedy with penalty, ties"]["kept"] == [2]
    assert len(cases["top-k, ties with the k-th are kept"]["kept"]) == 6  # of 5
    assert cases["top-k 1, ties"]["kept"] == cases["min-p 1, ties"]["kept"] == [1, 2, 4]
    once, several = cases["penalty"], cases["penalty counts a token once"]
    assert once["probabilities"] == several["probabilities"] and once["previous_ids"] != several["previous_ids"]


def warped_without(case, key):
    """The tokens that are kept without one of the settings."""
    logits = torch.tensor([case["logits"]], dtype=torch.float64)
    scores = warpers(case | {key: None})(torch.tensor([case["previous_ids"]], dtype=torch.long), logits)
    return scores.softmax(-1).nonzero()


# --------------------------------------------------------------------------------- tolerances and the comparison


def test_the_tolerances_are_the_measured_noise():
    """The numbers of the table in docs/numerics.md, which test_reference.py compares with `golden.noise`."""
    content = json.loads((HERE / "tolerances.json").read_text())
    assert list(content["stages"]) == [*POINTS, *CACHE_POINTS]
    noise = golden.noise()
    for name, entry in content["stages"].items():
        assert entry.pop("dimensions") == dimensions(name).split()
        if name.endswith((".mask", ".positions")):
            assert set(entry.values()) == {0.0}
        else:
            assert entry == {"float64": 1e-12, **noise[name]}


@pytest.fixture(scope="module")
def script():
    """The comparison as a module."""
    spec = importlib.util.spec_from_file_location("golden_compare", COMPARE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    """The comparison in a process in which PyTorch cannot be imported: exit code, and what it printed."""
    block = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    block += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", block, COMPARE, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_the_comparison_runs_without_pytorch(tmp_path):
    """From another directory; its three answers; .npy, .npz and .safetensors."""
    reference = HERE / "ministral" / "float64.safetensors"
    code, said = run(HERE / "ministral" / "float32.safetensors", reference)
    assert (code, said) == (0, "63 stages agree in float32\n")
    trace, given, _ = golden_inputs("ministral")
    np.save(tmp_path / "mine.npy", trace["logits"].float().numpy())
    assert run(tmp_path / "mine.npy", reference) == (0, "1 stages agree in float32\n")
    arrays = numpy(trace)
    arrays["layers.1.attention.q"] = arrays["layers.1.attention.q"].copy()
    arrays["layers.1.attention.q"][0, 3, 2, 1] += 0.5
    arrays["layers.2.mlp.up"] = -arrays["layers.2.mlp.up"]
    np.savez(tmp_path / "mine.npz", **arrays, **{"input.input_ids": given["input_ids"].numpy(), "other": np.zeros(3)})
    code, said = run(tmp_path / "mine.npz", reference, "--dtype", "float64")
    assert code == 1
    place = r"layers\.1\.attention\.q differs first, at \[0, 3, 2, 1\]"
    assert re.fullmatch(place + r": is \S+, should be \S+ within \S+\n", said)
    code, said = run(tmp_path / "missing.npz", reference)
    assert code == 2 and "missing.npz" in said and said.count("\n") == 1


def test_the_comparison_is_one_short_file():
    text = COMPARE.read_text()
    assert text.count("\n") < 100
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - {"numpy", "safetensors"} <= sys.stdlib_module_names


@pytest.fixture
def answer(script, monkeypatch, capsys):
    """Compares in this process: exit code, output, error."""

    def compare(path, name="ministral", *options):
        arguments = ["compare.py", path, HERE / name / "float64.safetensors", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        code = script.main()
        return code, *capsys.readouterr()

    return compare


def changed_trace(path, **changes):
    """Write the float32 trace of a golden model in which some tensors are others."""
    trace, _ = load(HERE / "ministral" / "float32.safetensors")
    arrays = numpy(trace) | changes
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_right_traces_agree(answer, tmp_path, name, dtype):
    trace, _ = load(HERE / name / f"{dtype}.safetensors")
    arrays = {}
    for key, tensor in trace.items():
        arrays[key] = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    np.savez(tmp_path / "mine.npz", **arrays)
    stages = len([key for key in trace if not key.startswith("input.")])
    code, said, _ = answer(tmp_path / "mine.npz", name, "--dtype", dtype)
    assert (code, said) == (0, f"{stages} stages agree in {dtype}\n")
    finer = {"float32": "float64", "bfloat16": "float32"}.get(dtype)
    if finer:
        assert answer(tmp_path / "mine.npz", name, "--dtype", finer)[0] == 1


def test_padding_and_hidden_keys_are_not_compared_but_leaks_are(answer, tmp_path):
    trace, given, _ = golden_inputs("ministral")
    logits, scores = trace["logits"].numpy().copy(), trace["layers.1.attention.scores"].numpy().copy()
    logits[given["attention_mask"].numpy() == 0] = np.nan
    scores[~np.broadcast_to(trace["layers.1.attention.mask"].numpy()[:, None], scores.shape)] = -np.inf
    changes = {"logits": logits, "layers.1.attention.scores": scores}
    mine = tmp_path / "mine.safetensors"
    changed_trace(mine, **changes)
    assert answer(mine) == (0, "63 stages agree in float32\n", "")

    probabilities = trace["layers.1.attention.probabilities"].numpy().copy()
    probabilities[0, 2, 12, 3] = 2e-6  # 9 positions away, with a window of 5
    changed_trace(mine, **changes, **{"layers.1.attention.probabilities": probabilities})
    code, said, _ = answer(mine)
    assert code == 1 and said.startswith("layers.1.attention.probabilities differs first, at [0, 2, 12, 3]: is 2e-06")

    logits[0, 0, 0] = np.nan  # no padding
    changed_trace(mine, **changes)
    code, said, _ = answer(mine)
    assert code == 1 and said.startswith("logits differs first, at [0, 0, 0]: is nan")

    mask = trace["layers.1.attention.mask"].numpy().copy()
    mask[0, 12, 3] = True
    changed_trace(mine, **{"layers.1.attention.mask": mask})
    code, said, _ = answer(mine)
    assert code == 1 and said.startswith("layers.1.attention.mask differs first, at [0, 12, 3]: is 1, should be 0")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"logits": np.zeros((1, 20, 40))}, r"logits is float64 \[1, 20, 40\]; allowed: real, \[2, 20, 40\]"),
        ({"logits": np.zeros((2, 20, 40), np.complex64)}, "logits is complex64"),
        ({"other": np.zeros(3)}, "nothing can be compared"),
        ({"input.input_ids": np.ones((2, 20), int), "logits": np.zeros((2, 20, 40))}, "is about other inputs than"),
        (b"junk", "."),
        (b"", "."),
        (b"PK\x03\x04", "."),
        (torch.zeros(2, 20, 40, dtype=torch.bfloat16), "allowed: bfloat16 stored as float32"),
    ],
)
def test_what_cannot_be_compared(answer, tmp_path, content, message):
    paths = [tmp_path / "mine.safetensors"]
    if isinstance(content, dict):
        paths.append(tmp_path / "mine.npz")
        np.savez(paths[1], **content)
        save_file(content, paths[0])
    elif isinstance(content, bytes):
        paths += [tmp_path / "mine.npz", tmp_path / "mine.npy"]
        for path in paths:
            path.write_bytes(content)
    else:
        safetensors.torch.save_file({"logits": content}, paths[0])
    for path in paths:
        code, said, error = answer(path)
        assert code == 2 and re.search(message, error) and error.count("\n") == 1 and not said


def test_another_reference_than_float64_is_refused(script, monkeypatch, capsys):
    path = str(HERE / "ministral" / "float32.safetensors")
    monkeypatch.setattr(sys, "argv", ["compare.py", path, path])
    assert script.main() == 2 and "allowed: stages of a float64 trace" in capsys.readouterr().err


@torch.no_grad()
def test_known_mistakes_are_found_from_logits(script):
    """In float32 all that change the logits; in bfloat16 the tolerances hide many. docs/numerics.md says so."""
    found = {"float64": set(), "float32": set(), "bfloat16": set()}
    for name in TINY:
        trace, given, _ = golden_inputs(name)
        reference = numpy(trace) | {f"input.{key}": tensor.numpy() for key, tensor in given.items()}
        for kind in found:
            model = load_model(HERE / name / "hf", golden.DTYPES[kind])
            arguments = golden.arguments(given, golden.DTYPES[kind])
            for mutant in MUTANTS.values():
                with mutant.applied():
                    logits = record(model, keep="logits".__eq__, **arguments)["logits"].double().numpy()
                if logits.shape != trace["logits"].shape:
                    with pytest.raises(ValueError, match="logits is float64"):
                        script.difference("logits", logits, reference, kind)
                elif script.difference("logits", logits, reference, kind):
                    found[kind].add(mutant.name)
    rounding = {"norm_weight_before_rounding", "softmax_not_in_float32"}  # of 16-bit types
    assert found["float32"] == found["float64"] - rounding and len(found["float32"]) >= 23
    assert found["bfloat16"] < found["float32"] and 3 * len(found["bfloat16"]) < 2 * len(found["float32"])


def test_stages_are_sorted_in_the_order_of_computing(script):
    trace, _ = load(HERE / "mistral3" / "float64.safetensors")
    names = [name for name in trace if not name.startswith("input.")]
    assert sorted(reversed(names), key=script.place) == names
    assert {LAYER.sub("N", name) for name in names} == POINTS.keys()
