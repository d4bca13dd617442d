"""explorer/model.js in Node and in Chromium: every stage of the golden models, the known mistakes, ids, greedy texts,
sampling. One process of Node serves a group of checks (tests/port.js)."""

import base64
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
from chat import encode_messages
from generate import Sampling, filter_logits
from images import load_image, preprocess
from model_types import load_model
from reference import golden
from reference.__main__ import main
from reference.compare import computed_in
from reference.golden import HERE
from reference.judge import Judge
from reference.mutants import MUTANTS
from reference.trace import load, record, take_inputs
from reference.vectors import published_vocabulary
from tests.miniature import CONSTANTS, MODELS, QUESTIONS, SHAPES, TOKENS, user
from tokenizer import Tokenizer
from tokenizer.bpe import SPLIT, TextTokenizer, read_tekken
from training import corpus

ROOT = Path(__file__).resolve().parent.parent
PORT = ROOT / "explorer" / "model.js"
NODE, CHROMIUM = shutil.which("node"), shutil.which("chromium")
WRITTEN = json.loads(CONSTANTS.read_text())
VECTORS = HERE / "vectors"

needs_node = pytest.mark.skipif(NODE is None, reason="needs node")
needs_chromium = pytest.mark.skipif(NODE is None or CHROMIUM is None, reason="needs node and chromium")

# The golden files that a port of one text can be compared with: the name of a model and of its reference.
GOLDEN = (
    ("ministral", "one_text"), ("ministral3", "one_text"), ("ministral3_wide", "float64"), ("mistral3", "float64"),
    ("ministral", "decoding"), ("ministral3", "decoding"),
)  # fmt: skip
# Other steps of the same 20 tokens: chunks longer than the window of 5, chunks that pass the end of the ring.
CHUNKS = ([9, 2, 1, 7, 1], [3, 4, 5, 1, 6, 1], [1] * 20)
# The models on which the known mistakes act.
MISTAKES = (
    ("yarn_missing", "ministral3"), ("yarn_magnitude_1_277", "ministral3"), ("query_scale_missing", "ministral3"),
    ("window_plus_1", "ministral"), ("rope_interleaved", "ministral"), ("rope_interleaved", "mistral3"),
)  # fmt: skip


def run(*tasks):
    """The answers of one process of Node to tasks of tests/port.js."""
    arguments = [NODE, str(Path(__file__).with_name("port.js"))]
    done = subprocess.run(arguments, input=json.dumps(tasks), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def golden_inputs(name, file):
    """The inputs in a golden file, and the same as a task for the port."""
    trace, _ = load(HERE / name / f"{file}.safetensors")
    given = take_inputs(trace)
    task = {"task": "trace", "model": str(HERE / name / "hf"), "ids": given["input_ids"][0].tolist()}
    if "step_lengths" in given:
        task["steps"] = given["step_lengths"].tolist()
    if "pixel_values" in given:
        sizes = given["image_sizes"].tolist()
        task["images"] = [
            {"pixels": pixels[:, :h, :w].flatten().tolist(), "height": h, "width": w}
            for pixels, (h, w) in zip(given["pixel_values"], sizes)
        ]
    return given, task


def task_of_mistake(mistake, name):
    """Inputs and a task in which a model makes a mistake."""
    given, task = golden_inputs(name, "float64" if name == "mistral3" else "one_text")
    return given, task | {"mistakes": [mistake]}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The files of all traces, made by one process: key -> path."""
    folder = tmp_path_factory.mktemp("port")
    tasks = {key: golden_inputs(*key)[1] for key in GOLDEN}
    for place, steps in enumerate(CHUNKS):
        _, task = golden_inputs("ministral", "one_text")
        tasks["chunks", place] = task | {"steps": steps}
    for mistake, name in MISTAKES:
        _, tasks[mistake, name] = task_of_mistake(mistake, name)
    _, decoding = golden_inputs("ministral", "decoding")
    tasks["window_plus_1", "decoding"] = decoding | {"mistakes": ["window_plus_1"]}
    paths = {key: folder / f"{'_'.join(map(str, key))}.safetensors" for key in tasks}
    run(*(task | {"output": str(paths[key])} for key, task in tasks.items()))
    return paths


def compare_with_model(path, name, given):
    """The report on a trace of the port, compared with what this model computes in float64; and the latter."""
    port, _ = load(path)
    assert take_inputs(port)["input_ids"].equal(given["input_ids"])

    def model(dtype):
        return load_model(HERE / name / "hf", dtype)

    reference = record(model(torch.float64), **golden.arguments(given, torch.float64))
    assert list(reference) == list(port)
    judge = Judge(port, reference, given, None, model)
    return judge.compare(computed_in(port, reference)), reference


# ------------------------------------------------------------------------------------------------------ every stage


@needs_node
@pytest.mark.parametrize("name, file", GOLDEN)
def test_every_stage(traces, capsys, name, file):
    """`python -m reference diff` finds no divergence, and no known mistake within the noise."""
    reference, _ = load(HERE / name / f"{file}.safetensors")
    take_inputs(reference)
    assert main(["diff", str(traces[name, file]), str(HERE / name / f"{file}.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agrees"] and report["mutant"] is None
    assert len(report["stages"]) == len(reference) and not report["missing"] and not report["misshapen"]
    assert not {stage["dtype"] for stage in report["stages"]} & {"float16", "bfloat16"}


@needs_node
@pytest.mark.parametrize("place", range(len(CHUNKS)))
def test_every_stage_in_steps(traces, place):
    """Scores, masks, the cache and all others, with the keys in the order of `SlidingLayerCache`."""
    given, _ = golden_inputs("ministral", "one_text")
    given["step_lengths"] = torch.tensor(CHUNKS[place])
    report, _ = compare_with_model(traces["chunks", place], "ministral", given)
    assert report.agrees, report.sentence


@needs_node
@pytest.mark.parametrize("mistake, name", [*MISTAKES, ("window_plus_1", "decoding")])
def test_known_mistakes(traces, mistake, name):
    """All stages are those of the same mistake in `reference/mutants`, and not those of the right model."""
    if name == "decoding":
        given, _ = golden_inputs("ministral", "decoding")
        model = "ministral"
    else:
        given, _ = task_of_mistake(mistake, name)
        model = name
    with MUTANTS[mistake].applied():
        report, _ = compare_with_model(traces[mistake, name], model, given)
    assert report.agrees, report.sentence
    report, _ = compare_with_model(traces[mistake, name], model, given)
    assert not report.agrees


@needs_node
def test_errors():
    """What is not supported is named, with what is."""
    ministral = {"task": "error", "model": str(HERE / "ministral" / "hf"), "mistakes": [], "changes": {}}
    errors = run(
        ministral,
        ministral | {"mistakes": ["no_norm"]},
        ministral | {"changes": {"hidden_act": "relu"}},
        ministral | {"changes": {"model_type": "gpt2"}},
        ministral | {"changes": {"rope_parameters": {"rope_type": "linear"}}},
        ministral | {"changes": {"num_hidden_layers": 4}},
    )
    assert errors[0] == ""
    starts = (
        "mistakes: no_norm; supported: yarn_missing, ", "hidden_act: relu; supported: silu, ",
        "model_type: gpt2; supported: ministral, ", "rope_type: linear; supported: default, yarn",
        "weights lack: model.layers.3.self_attn.q_proj; supported: ",
    )  # fmt: skip
    assert all(error.startswith(start) for error, start in zip(errors[1:], starts, strict=True)), errors


# -------------------------------------------------------------------------------------------------------------- ids


def random_text(draw, plays):
    """Pieces of all kinds: words of plays, digits, white space, letters of many scripts, names of special tokens."""
    special = ("<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<SPECIAL_35>", "[THINK]", "<pad>")
    spaces = 16 * " " + "\t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\ufeff"
    ranges = ((0, 0x7F), (0x80, 0x24F), (0x250, 0x5FF), (0x600, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0xD7FF),
              (0xE000, 0xFFFF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF))  # fmt: skip
    text = ""
    for _ in range(draw.randint(0, 12)):
        kind = draw.randrange(6)
        if kind == 0:
            start = draw.randrange(len(plays) - 60)
            text += plays[start : start + draw.randint(1, 60)]
        elif kind == 1:
            text += str(draw.randrange(10 ** draw.randint(1, 6)))
        elif kind == 2:
            text += "".join(draw.choices(spaces, k=draw.randint(1, 4)))
        elif kind == 3:
            text += "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 5)))
        elif kind == 4:
            text += draw.choice(special)
        else:
            text += "".join(draw.choices("aaab'Bé/.,!-\u0301\U0001f600", k=draw.randint(1, 9)))
    return text


def artificial_vocabulary(seed):
    """A tekken.json whose words are random, so that merges do not reach all of them."""
    draw = random.Random(seed)
    words = {"".join(draw.choices("ab", k=draw.randint(2, 6))) for _ in range(draw.choice((3, 10, 40)))}
    vocab = [bytes([i]) for i in range(256)] + [word.encode() for word in draw.sample(sorted(words), len(words))]
    entries = [{"rank": i, "token_bytes": base64.b64encode(word).decode()} for i, word in enumerate(vocab)]
    config = {"pattern": SPLIT, "default_num_special_tokens": 20, "default_vocab_size": 20 + len(entries)}
    return {"config": config | {"num_vocab_tokens": len(entries), "version": "v3"}, "vocab": entries}


@needs_node
def test_the_order_of_merges(tmp_path):
    """With vocabularies that no training makes: words without a path of merges, several cuts of one word."""
    draw = random.Random("merges")
    tasks, expected = [], []
    for seed in range(30):
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps(artificial_vocabulary(seed)))
        tokenizer = TextTokenizer(*read_tekken(path))
        texts = ["".join(draw.choices("ab", k=draw.randint(2, 16))) for _ in range(40)]
        tasks.append({"task": "encode", "tekken": str(path), "texts": texts})
        expected.append([[tokenizer.encode(text), text] for text in texts])
    assert run(*tasks) == expected


@needs_node
def test_ids():
    """Those of the tokenizer for a thousand texts, with both vocabularies; and those of the published vocabulary that
    reference/golden/vectors has."""
    draw = random.Random("ids")
    plays = "".join(corpus.load()["test"])
    texts = [random_text(draw, plays) for _ in range(900)]
    cases = json.loads((VECTORS / "texts.json").read_text())["cases"]
    texts += ["".join(draw.choices("a b", weights=(8, 1, 1), k=draw.randint(2, 40))) for _ in range(100)]
    texts += [case["text"] for case in cases]
    tasks = [{"task": "encode", "tekken": str(path / "tekken.json"), "texts": texts} for path in MODELS.values()]
    published = {"task": "encode", "tekken": str(published_vocabulary()), "texts": [case["text"] for case in cases]}
    broken = ["\ud800", "a\udc00b \ud83d", "\ud83d\ude00"]  # halves of surrogate pairs, and a pair in two halves
    *answers, known, halves = run(*tasks, published, tasks[0] | {"texts": broken})
    for path, answer in zip(MODELS.values(), answers):
        tokenizer = Tokenizer.from_dir(path)
        for text, (ids, decoded) in zip(texts, answer, strict=True):
            assert ids == tokenizer.encode(text), repr(text)
            assert decoded == tokenizer.decode(ids) == text
    assert [ids for ids, _ in halves] == [Tokenizer.from_dir(MODELS["ministral3"]).encode(text) for text in broken]
    for case, (ids, decoded) in zip(cases, known, strict=True):
        assert ids == [1, *case["published"]] and decoded == case["text"]


# ------------------------------------------------------------------------------------------------------- what it writes


@needs_node
def test_greedy_texts_and_answers():
    """Those of generate.py in float32 (tests/miniature.json), for both models, with an image."""
    tasks, expected = [], []
    for name, path in MODELS.items():
        tokenizer, config = Tokenizer.from_dir(path), load_model(path, torch.float32).config
        prompts = [{"ids": tokenizer.encode(WRITTEN[name]["prompt"])}]
        texts = [WRITTEN[name]["text"]]
        for kind in WRITTEN[name].keys() & QUESTIONS[name].keys():
            content, tools = QUESTIONS[name][kind]
            ids, pixels, sizes = encode_messages(user(content), tokenizer, config, tools)
            prompt = {"ids": ids[0].tolist()}
            if pixels is not None:
                (height, width) = sizes[0]
                prompt["images"] = [{"pixels": pixels.flatten().tolist(), "height": height, "width": width}]
            prompts.append(prompt)
            texts.append(WRITTEN[name][kind])
        tasks.append({"task": "write", "model": str(path), "prompts": prompts, "tokens": TOKENS})
        expected.append((name, tokenizer, prompts, texts))
    for (name, tokenizer, prompts, texts), answers in zip(expected, run(*tasks)):
        assert len(answers[0]) == TOKENS
        whole = tokenizer.decode([*prompts[0]["ids"], *answers[0]])
        assert [whole, *(tokenizer.decode(ids, False) for ids in answers[1:])] == texts, name


@needs_node
def test_an_image_becomes_the_same_ids_and_pixels():
    """Those of `encode_messages`, for an image of the size that the encoder reads."""
    path = MODELS["ministral3"]
    config = load_model(path, torch.float32).config
    image = load_image(SHAPES).convert("RGB")
    rgb = np.asarray(image)
    text = "What do you see?"
    content = [{"type": "image", "path": SHAPES}, {"type": "text", "text": text}]
    ids, _, sizes = encode_messages(user(content), Tokenizer.from_dir(path), config)
    assert tuple(sizes[0]) == rgb.shape[:2]
    task = {"task": "chat", "model": str(path), "text": text, "rgb": rgb.flatten().tolist()}
    [(found, pixels)] = run(task | {"height": rgb.shape[0], "width": rgb.shape[1]})
    assert found == ids[0].tolist()
    assert np.array_equal(np.array(pixels, np.float32), preprocess(image, config).flatten().numpy())


# --------------------------------------------------------------------------------------------------------- sampling


def undecided(logits, settings, noise):
    """Whether rounding of float32 can change which tokens are kept or drawn: a sum of probabilities is close to its
    bound, a probability is close to the least one, or two quotients are close. Equal numbers are equal in any type."""
    temperature, top_k, top_p, min_p = settings.values()
    if temperature == 0:
        return False
    exact, near = logits.double(), False
    if top_p is not None and top_p < 1:
        sums = filter_logits(exact, Sampling(temperature, top_k)).softmax(-1).sort().values.cumsum(-1)
        near |= bool(((sums - (1 - top_p)).abs() < 1e-6).any())
    if min_p is not None:
        probs = filter_logits(exact, Sampling(temperature, top_k, top_p)).softmax(-1)
        distances = (probs - min_p * probs.max()).abs()
        near |= bool(((distances > 0) & (distances < 1e-6 * probs.max())).any()) and min_p > 0
    quotients = (filter_logits(exact, Sampling(**settings)).softmax(-1) / noise.double()).sort(descending=True).values
    return near or bool(quotients[1] > quotients[0] * (1 - 1e-5))


def sampling_cases():
    """Settings, logits (V,), and the seed of the noise. Every second one has logits with many ties."""
    draw = random.Random("sampling")
    cases = []
    for place in range(600):
        V = draw.choice((2, 3, 5, 12, 40, 300))
        generator = torch.Generator().manual_seed(place)
        logits = torch.randn(V, generator=generator) * draw.choice((0.5, 2.0, 8.0))
        if place % 2:
            logits = logits.round()
        settings = {
            "temperature": draw.choice((0.0, 1e-30, 1e-8, 1e-3, 0.3, 0.8, 1.0, 1.5, 2.0)),
            "top_k": draw.choice((None, 0, 1, 2, 5, 50)),
            "top_p": draw.choice((None, 1.0, 0.99, 0.9, 0.5, 0.1)),
            "min_p": draw.choice((None, 0.0, 0.05, 0.3, 1.0)),
        }
        cases.append((settings, logits, place))
    return cases


@needs_node
def test_sampling():
    """The token that `generate.sample` draws with the same noise, and the tokens that it keeps."""
    tasks, expected, left_out = [], [], 0
    for settings, logits, seed in sampling_cases():
        noise = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(seed))
        if undecided(logits, settings, noise):
            left_out += 1
            continue
        sampling = Sampling(**settings)
        drawn = generate.sample(logits[None], sampling, [torch.Generator().manual_seed(seed)]).item()
        kept, steps = [], []
        if sampling.temperature > 0:
            kept = filter_logits(logits, sampling).isfinite().nonzero().flatten().tolist()
            on = (True, settings["top_k"], settings["top_p"] not in (None, 1.0), settings["min_p"] is not None)
            steps = [name for name, is_on in zip(settings, on, strict=True) if is_on]
        tasks.append({"settings": settings, "logits": logits.tolist(), "noise": noise.tolist()})
        expected.append((drawn, kept, steps))
    assert left_out < 60
    [answers] = run({"task": "sample", "cases": tasks})
    compared = 0
    for task, (drawn, kept, steps), (found, mine, *rest) in zip(tasks, expected, answers, strict=True):
        logits = task["logits"]
        assert sorted(logits[token] for token in mine) == sorted(logits[token] for token in kept), task["settings"]
        assert rest[1:] in ([], [steps]), task["settings"]
        # Where top-p drops some of several equal tokens, the order of torch.sort, which is not stable, decides.
        dropped = {logit for token, logit in enumerate(logits) if token not in kept}
        if not dropped & {logits[token] for token in kept}:
            assert [found, mine] == [drawn, kept], task["settings"]
            compared += 1
    assert compared > 450


# Settings and logits at the ends of the rules: sums of probabilities that equal the bound, the most likely token, which
# top-p never drops, and quotients that float32 does not have.
ENDS = [
    *(({"temperature": 1.0, "top_p": p}, [1.0] * V) for V in (2, 4, 5, 8, 10) for p in (0.2, 0.25, 0.4, 0.5, 0.75)),
    ({"temperature": 1.0, "top_p": 1e-9}, [1.0, 3.0, 2.0]),
    ({"temperature": 1e-30}, [1e9, 3e9, -2e9]),
    ({"temperature": 1e-50}, [1.0, 3.0, 2.0]),
    ({"temperature": 1e-50, "top_k": 2}, [-1.0, -3.0, -1.0]),
]


@needs_node
def test_the_ends_of_the_rules():
    """The numbers of tokens that are kept, and their logits, are those of `filter_logits`."""
    [answers] = run({"task": "sample", "cases": [
        {"settings": settings, "logits": logits, "noise": [1.0] * len(logits)} for settings, logits in ENDS
    ]})  # fmt: skip
    for (settings, logits), (drawn, found, _, _) in zip(ENDS, answers, strict=True):
        kept = filter_logits(torch.tensor(logits), Sampling(**settings)).isfinite().nonzero().flatten().tolist()
        assert sorted(logits[token] for token in found) == sorted(logits[token] for token in kept), settings
        assert logits[drawn] == max(logits)


@needs_node
def test_the_vectors_of_a_sampler():
    """reference/golden/vectors/sampler.json: the tokens that are kept and their probabilities, without penalty."""
    cases = json.loads((VECTORS / "sampler.json").read_text())["cases"]
    cases = [case for case in cases if case["repetition_penalty"] == 1]
    names = ("temperature", "top_k", "top_p", "min_p")
    tasks = [
        {"settings": {name: case[name] for name in names}, "logits": case["logits"],
         "noise": [1.0] * len(case["logits"])}
        for case in cases
    ]  # fmt: skip
    [answers] = run({"task": "sample", "cases": tasks})
    assert len(cases) >= 30
    for case, (drawn, kept, probabilities, *_) in zip(cases, answers, strict=True):
        if case["temperature"] == 0:
            assert [drawn] == case["kept"], case["name"]
            continue
        likely = [token for token, p in zip(kept, probabilities, strict=True) if p > 0]
        assert likely in (case["kept"], kept) and set(case["kept"]) <= set(kept), case["name"]
        probabilities = [p for p in probabilities if p > 0]
        assert np.allclose(probabilities, case["probabilities"], rtol=1e-5, atol=1e-7), case["name"]


# --------------------------------------------------------------------------------------------------------- Chromium


@needs_chromium
def test_chromium_computes_the_same_bits(tmp_path):
    """A page with the script and a golden model, opened as a file: its logits are those of Node."""
    name = "mistral3"
    _, task = golden_inputs(name, "float64")
    hf = HERE / name / "hf"
    content = {
        "config": json.loads((hf / "config.json").read_text()),
        "weights": base64.b64encode((hf / "model.safetensors").read_bytes()).decode(),
        "ids": task["ids"], "images": task["images"],
    }  # fmt: skip
    page = f"""<!doctype html><meta charset="utf-8"><script>{PORT.read_text(encoding="utf-8")}</script><script>
        const content = {json.dumps(content)};
        const bytes = Uint8Array.from(atob(content.weights), (letter) => letter.charCodeAt(0));
        const model = new Model(content.config, readWeights(bytes.buffer));
        const images = content.images.map((image) => ({{ ...image, pixels: Float32Array.from(image.pixels) }}));
        const logits = model.forward(content.ids, model.newCache(), {{ images }});
        document.write(`<p>logits ${{JSON.stringify([...logits])}} end</p>`);
    </script>"""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(re.search(r"logits (\[.*?\]) end", done.stdout)[1])
    [whole] = run({"task": "logits", **{key: task[key] for key in ("model", "ids", "images")}})
    assert found == whole and len(found) == len(set(found)) == 40
