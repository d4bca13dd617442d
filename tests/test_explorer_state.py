"""The explorer's views of the state (cache, positions, mistakes, image, sizes and code) against the Python models: the
arithmetic runs in Node, the views themselves in Chromium."""

import ast
import base64
import importlib.util
import json
import math
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import explorer.__main__ as explorer
from generate import generate
from images import MEAN, STD
from ministral import KVCache, LayerCache, MinistralConfig, RotaryEmbedding, SlidingLayerCache
from ministral3 import Ministral3Config, YarnRotaryEmbedding
from model_types import load_model
from reference.__main__ import main as reference_main
from reference.mutants import MUTANTS
from reference.trace import MODULES, POINTS, record
from tests.explorer_page import MINUS, MODELS, ROOT, TIMES, needs_browser, open_browser, percent, slow_in_browser
from tokenizer import Tokenizer
from training import shapes

NODE = shutil.which("node")
STATE_VIEWS = ("cache", "positions", "mistakes", "image", "sizes")
TEXT = "To be, or not to be: that is the question.\nTo be, or not"

EMPTY = "\N{EN DASH}"

needs_node = pytest.mark.skipif(NODE is None, reason="needs node")


def in_node(expression, **values):
    """The value of a JavaScript expression that knows `values` and the functions of these views and of the worker."""
    names = ("model.js", "worker.js", "views_state.js", "views_compare.js")
    scripts = [str(ROOT / "explorer" / name) for name in names]
    program = """
        const fs = require("fs"), vm = require("vm");
        const { scripts, expression, values } = JSON.parse(fs.readFileSync(0, "utf-8"));
        Object.assign(globalThis, values, { fs, VIEWS: [], chosen: {} });
        for (const script of scripts) vm.runInThisContext(fs.readFileSync(script, "utf-8"), script);
        process.stdout.write(JSON.stringify(vm.runInThisContext(expression)));
    """
    given = json.dumps({"scripts": scripts, "expression": expression, "values": values})
    done = subprocess.run([NODE, "-e", program], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------------- arithmetic


def cache_of(window):
    """An empty cache of one layer."""
    if window is None:
        return LayerCache()
    return SlidingLayerCache(window)


def read_positions(cache, new):
    """Read new tokens whose keys are their positions; returns what attention gets, and the slots afterwards."""
    positions = torch.arange(cache.length, cache.length + new, dtype=torch.float32)[None, None, :, None]
    keys, _ = cache.update(positions, positions)
    used = cache.length
    if cache.window is not None:
        used = min(used, cache.window)
    return keys.flatten().int().tolist(), cache.keys[0, 0, :used, 0].int().tolist()


@needs_node
@pytest.mark.parametrize("name", MODELS)
def test_a_text_in_chunks_gives_the_numbers_of_one_pass(name):
    expression = """(() => {
        const bytes = fs.readFileSync(directory + "/model.safetensors");
        const weights = readWeights(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
        const model = new Model(JSON.parse(fs.readFileSync(directory + "/config.json")), weights);
        const ids = Array.from({ length: 129 }, (_, place) => 300 + (place * place) % 500); // one more than two chunks
        const told = [];
        const { logits } = advance(model, ids, [], null, ({ done }) => told.push(done));
        return [told, model.forward(ids).every((value, id) => value === logits[id])];
    })()"""
    assert in_node(expression, directory=str(MODELS[name])) == [[0, 64], True]


@needs_node
def test_slots_and_keys_are_those_of_the_cache():
    draw = random.Random(0)
    cases, expected = [], []
    for _ in range(60):
        window = draw.choice((None, 1, 3, 4, 8, 64))
        cache = cache_of(window)
        for _ in range(12):
            past, new = cache.length, draw.choice((1, 1, 1, 2, 5, 9, 70))
            before = cache.keys.clone() if cache.length else None
            keys, slots = read_positions(cache, new)
            overwritten = []
            if before is not None:
                pairs = enumerate(zip(before[0, 0, :, 0].int().tolist(), slots))
                known = past if window is None else min(past, window)
                overwritten = sorted([slot, old] for slot, (old, now) in pairs if slot < known and old != now)
            cases.append([past, new, window])
            expected.append([slots, keys, overwritten])
    found = in_node(
        """cases.map((item) => cacheStep(...item)).map(({ slots, keys, overwritten }) =>
            [slots, keys, overwritten.map(({ slot, old }) => [slot, old]).sort((a, b) => a[0] - b[0])])""",
        cases=cases,
    )
    assert found == expected


@needs_node
@pytest.mark.parametrize("text", ["bundled", "published", "plain", "no ramp"])
def test_angles_and_query_scale_are_those_of_the_model(text):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.3, "beta_fast": 1.0, "beta_slow": 1.0}  # fmt: skip
    makers = {
        "bundled": lambda: load_config("ministral3"), "plain": lambda: load_config("ministral"),
        "published": Ministral3Config, "no ramp": lambda: Ministral3Config(head_dim=64, rope_parameters=rope),
    }  # fmt: skip
    config = makers[text]()
    is_plain = isinstance(config, MinistralConfig) and not isinstance(config, Ministral3Config)
    embedding = (RotaryEmbedding if is_plain else YarnRotaryEmbedding)(config)
    given = {"head_dim": config.head_dim, "rope_parameters": config.rope_parameters}
    positions = [0, 5, 63, 64, 255, 256, 4095, 16384, 200000]
    pairs, scales = in_node(
        "[rotaryPairs(text), positions.map((position) => queryScale(text, position))]", text=given, positions=positions
    )
    used = embedding.inverse_frequencies(torch.float32).tolist()
    assert [pair["used"] for pair in pairs] == pytest.approx(used, rel=1e-6)
    plain = RotaryEmbedding.inverse_frequencies(embedding, torch.float32).tolist()
    assert [pair["plain"] for pair in pairs] == pytest.approx(plain, rel=1e-6)
    if is_plain:
        assert {pair["zone"] for pair in pairs} == {None} and set(scales) == {1}
        return
    expected = embedding(torch.zeros(1), torch.tensor([positions]))[2].flatten().tolist()
    assert scales == pytest.approx(expected, rel=1e-6)
    low, high = (embedding.ramp_end(key) for key in ("beta_fast", "beta_slow"))
    low, high = math.floor(low), math.ceil(high)
    zones = ["kept"] * (low + 1) + ["blended"] * (high - low - 1)
    zones += ["stretched"] * (len(pairs) - len(zones))
    assert [pair["zone"] for pair in pairs] == zones


def load_config(name):
    """The text configuration of a bundled model."""
    return load_model(MODELS[name], torch.bfloat16).config.get_text_config()


def middle_of_each_draw():
    """A generator for `training.shapes.paint` without chance."""
    return SimpleNamespace(randint=lambda low, high: (low + high) // 2, uniform=lambda low, high: (low + high) / 2)


def paint(*chosen):
    """The image that the page paints."""
    return shapes.paint([shapes.Shape(*shape) for shape in chosen], middle_of_each_draw())


@needs_node
def test_images_are_painted_as_in_training():
    assert in_node("[KINDS, PLACES, COLOURS]") == [
        list(shapes.KINDS), list(shapes.PLACES), {name: list(rgb) for name, rgb in shapes.COLOURS.items()}]  # fmt: skip
    chosen = [(0, "circle", "red"), (1, "square", "yellow"), (3, "triangle", "green")]
    given = [{"place": place, "kind": kind, "colour": colour} for place, kind, colour in chosen]
    found = np.array(in_node("Array.from(paintShapes(shapes))", shapes=given)).reshape(64, 64, 3)
    difference = np.abs(found - paint(*chosen).astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # halves are rounded in another way


@needs_node
@pytest.mark.parametrize("name", list(MODELS))
def test_sizes_are_those_of_the_model(name):
    model = load_model(MODELS[name], torch.bfloat16)
    config = json.loads((MODELS[name] / "config.json").read_text())
    text = model.config.get_text_config()
    lengths = (1, 40, 64, 300)
    given = {"layer_types": text.layer_types, "sliding_window": text.sliding_window, "head_dim": text.head_dim,
             "num_key_value_heads": text.num_key_value_heads}  # fmt: skip
    expression = "[weightCounts(config), lengths.map((length) => cacheBytes(text, length))]"
    weights, cached = in_node(expression, config=config, text=given, lengths=lengths)
    assert sum(count for _, count in weights) == sum(weight.numel() for weight in model.parameters())
    for length, size in zip(lengths, cached):
        cache = KVCache(text, expected=length)
        keys = torch.zeros(1, text.num_key_value_heads, length, text.head_dim, dtype=torch.bfloat16)
        for layer in cache.layers:
            layer.update(keys, keys)
        assert size == cache.nbytes()


def python_function(file, name):
    """First and last line of "function" or "Class.function" in a Python file."""
    node = ast.parse((ROOT / file).read_text())
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node.lineno, node.end_lineno


@needs_node
def test_every_point_has_its_lines():
    sources = in_node("SOURCES")
    assert {name: entry[0] for name, entry in sources.items()} == {name: point[0] for name, point in POINTS.items()}
    assert list(sources) == list(POINTS)
    configs = ({"model_type": "ministral"}, {"vision_config": {}, "text_config": {}})
    expression = "configs.flatMap((config) => names.flatMap((name) => sourcesOf(name, config)))"
    places = in_node(expression, names=list(POINTS), configs=configs)
    files = {file: (ROOT / file).read_text() for file, _, _ in places}
    found = in_node("places.map(([file, name]) => functionLines(files[file], name))", places=places, files=files)
    for (file, name, part), lines in zip(places, found):
        assert file in explorer.SOURCES
        first, last = python_function(file, name)
        assert (lines["first"], lines["first"] + len(lines["lines"]) - 1) == (first, last), name
        assert sum(part in line for line in lines["lines"]) == 1, (name, part)


@needs_node
def test_the_line_of_a_point_calls_its_module():
    sources = in_node("SOURCES")
    for module, (_, point) in MODULES.items():
        name = module.rsplit(".", 1)[-1]
        if point is None or name in ("N", "patch_merger"):  # whole layers; the merger calls its only module
            continue
        lines = []
        for file, function, part in sources[point][1:]:
            first, last = python_function(file, function)
            text = (ROOT / file).read_text().splitlines()[first - 1 : last]
            lines += [line for line in text if part in line]
        assert any(f"self.{name}(" in line or f"(self.{name}," in line for line in lines), point


# ------------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    yield from open_browser(tmp_path_factory.mktemp("explorer"), "--prompt", TEXT)


def choose_mistake(page, name):
    """Turn a mistake on, and wait for the result."""
    page.open_view("mistakes")
    page("document.querySelector(`input[value=${arguments[0]}]`).click()", name)
    page.wait("!document.querySelector('.state-lead').textContent.startsWith('Computing')")


@slow_in_browser
@pytest.mark.parametrize("window", ["model", "8"])
def test_cache_view(page, window):
    page.open("ministral")
    page.open_view("cache")
    page.set("Layer", 1)
    page.set("Window", window)
    size = 64 if window == "model" else 8
    for steps in (3, 20, 9 + size):
        cache = cache_of(size)
        for _ in range(steps):
            keys, slots = read_positions(cache, 1)
        page.set("Step", steps)
        shown = page.contents(".state-slot b")
        assert shown == [str(position) for position in slots] + [EMPTY] * (size - len(slots))
        assert page.contents(".state-keys li") == [str(position) for position in keys]
        if len(slots) > 3:
            page("document.querySelectorAll('.state-slot')[3].click()")
            assert f"Slot 3 holds position {slots[3]}" in page.content(".state-note")
        assert f"{steps - 1} % {size} = {(steps - 1) % size}" in page.content(".state-lead")


def open_demonstration(page):
    """Open the cache view with a window of 8 tokens for layer 1."""
    page.open("ministral")
    page.open_view("cache")
    page.set("Layer", 1)
    page.set("Window", 8)


@slow_in_browser
def test_cache_view_with_the_prompt_in_one_step(page):
    open_demonstration(page)
    page.set("The prompt is read", "once")
    prompt = len(page.ids())
    cache = cache_of(8)
    keys, slots = read_positions(cache, prompt)
    page.set("Step", 1)
    assert page.contents(".state-slot b") == [str(position) for position in slots]
    assert page.contents(".state-keys li") == [str(position) for position in keys] == [str(n) for n in range(prompt)]
    _, slots = read_positions(cache, 1)
    page.set("Step", 2)
    assert page.contents(".state-slot b") == [str(position) for position in slots]
    page.set("Layer", 0)
    page.set("Window", "model")
    assert "Its cache only grows" in page.content()
    assert "Layers 1, 2, 3, 5, 6, 7 have a ring of 64 slots" in page.content()


@slow_in_browser
def test_a_demonstration_is_of_one_layer(page):
    open_demonstration(page)
    assert "Demonstration" in page.content()
    page.set("Layer", 0)
    assert "Demonstration" not in page.content() and "Its cache only grows" in page.content()
    assert page.contents("#view select option:checked")[1] == "none: every position is kept"


@slow_in_browser
def test_slots_are_reached_by_arrow_keys(page):
    page.open("ministral")
    page.open_view("cache")
    page.set("Window", 8)
    page.set("The prompt is read", "single")
    page.set("Step", 20)
    press = """document.querySelectorAll(".state-slot")[3].focus();
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: arguments[0], bubbles: true }))"""
    page(press, "ArrowRight")
    assert page.content(".state-note").startswith("Slot 4 holds position 12")
    assert page("return document.activeElement.ariaPressed + document.activeElement.tabIndex") == "true0"


def numbers(text):
    """A number as the page writes it."""
    text = text.replace(MINUS, "-").replace(",", "").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    return float(text.replace("\N{NO-BREAK SPACE}·\N{NO-BREAK SPACE}10", "e"))


@slow_in_browser
def test_positions_view(page):
    page.open("ministral3")
    page.open_view("positions")
    embedding = YarnRotaryEmbedding(load_config("ministral3"))
    used = embedding.inverse_frequencies(torch.float64)
    plain = RotaryEmbedding.inverse_frequencies(embedding, torch.float64)
    for position, scale in ((5, 1.0), (4000, 1 + 0.1 * math.log(16))):
        page.set("Position (", position)
        rows = page.rows()
        assert [numbers(row[1]) for row in rows] == pytest.approx((position * plain).tolist(), rel=1e-3)
        assert [numbers(row[2]) for row in rows] == pytest.approx((position * used).tolist(), rel=1e-3)
        assert [row[4].split(",")[0] for row in rows] == ["kept"] + 6 * ["blended"] + 9 * ["stretched"]
        assert f"= {scale:.4f}." in page.content()
    page.set("Position (", 5)
    lead = page.content(".state-lead")
    assert "YaRN changes the angles of 15 of 16 pairs. It changes pair 2 most: 1.5811 rad without" in lead
    zones = page.contents(".state-zones li")
    assert zones[0].startswith("kept, pair 0. It turns more than ")
    assert zones[2].startswith("stretched, pairs 7 to 15. They turn less than ")
    assert "pair 2: 1.1576 radians, 1.5811 without YaRN, blended" in page(
        "return [...document.querySelectorAll('.state-dial svg')].map((dial) => dial.getAttribute('aria-label'))"
    )


@slow_in_browser
def test_a_position_that_is_not_supported(page):
    page.open("ministral3")
    page.open_view("positions")
    page.set("Position (", 7)
    page.set("Position (", 5000)
    words = "Position: 5000; supported: whole numbers from 0 to 4,095. Position 7 stays."
    assert page.content(".state-refusal") == words and page.content(".state-lead").startswith("Position 7 ")
    page.set("Position (", 8)
    assert page.content(".state-refusal") == ""


def largest_differences(name, mistake, ids):
    """The first point that a mistake changes, and the largest difference of each layer's output and of the logits."""
    model = load_model(MODELS[name], torch.float32)
    right = record(model, torch.tensor([ids]))
    with MUTANTS[mistake].applied():
        wrong = record(model, torch.tensor([ids]))
        text = generate(model, torch.tensor([ids]), max_new_tokens=24, temperature=0, fast=False)[0, len(ids) :]
    sizes = {point: (right[point].float() - wrong[point].float()).abs().max().item() for point in right}
    first = next(point for point, size in sizes.items() if size > 0)
    layers = range(model.config.get_text_config().num_hidden_layers)
    return first, [sizes[f"layers.{layer}.mlp_residual"] for layer in layers] + [sizes["logits"]], text.tolist()


@slow_in_browser
@pytest.mark.parametrize("mistake", ["yarn_missing", "yarn_magnitude_1_277"])
def test_mistakes_view(page, mistake):
    page.open("ministral3")
    choose_mistake(page, mistake)
    first, sizes, text = largest_differences("ministral3", mistake, page.ids())
    assert page.content(".state-lead").startswith(f"The first stage that differs is {first}, ")
    assert [numbers(value) for value in page.contents(".state-bars span")] == pytest.approx(sizes, rel=0.01)
    assert page.contents(".state-text p")[1] == Tokenizer.from_pretrained(MODELS["ministral3"]).decode(text)


@slow_in_browser
def test_mistakes_that_need_a_longer_text(page):
    page.open("ministral")
    choose_mistake(page, "window_plus_1")
    assert "No number differs in this text. It shows in texts of 65 tokens and more" in page.content()
    page("""globalThis.said = [];
        const note = () => said.push(document.querySelector(".state-lead")?.textContent);
        new MutationObserver(note).observe(document.getElementById("view"), { childList: true, subtree: true });""")
    page.press_in_view("Repeat the text up to 80 tokens")
    page.wait("document.querySelector('.state-bars') !== null")
    assert "Computing with both models: layer 1 of 8 …" in page("return said")
    layer, head = page("return [explorer.run.selected.layer, explorer.run.selected.head]")
    assert "Nothing changes" not in page.content()
    page.press_in_view("Find the head that changes most")
    assert page("return [explorer.run.selected.layer, explorer.run.selected.head]") == [layer, head]
    ids = page.ids()
    ids += (ids[1:] * 9)[: 80 - len(ids)]  # without <s>
    first, sizes, _ = largest_differences("ministral", "window_plus_1", ids)
    assert first == "layers.1.attention.mask"
    assert page.content(".state-lead").startswith(f"The first stage that differs is {first}, ")
    assert [numbers(value) for value in page.contents(".state-bars span")] == pytest.approx(sizes, rel=0.01)
    disabled = page("return [...document.querySelectorAll('#view input:disabled')].map((input) => input.value)")
    assert disabled == ["yarn_missing", "yarn_magnitude_1_277", "query_scale_missing"]
    choose_mistake(page, "no_cache")
    read = len(page.ids())
    with_cache, without = read + 11, sum(range(read, read + 12))
    assert page.content(".state-lead") == "The text is the same. To write 12 tokens, the model reads " \
        f"{with_cache} positions with a cache and {without:,} without."  # fmt: skip


@slow_in_browser
def test_image_view(page):
    page.open("ministral3")
    page.open_view("image")
    page.press_in_view("Ask")
    page.wait("explorer.run.steps.length > 0 && !explorer.busy && document.querySelector('.state-tokens')")
    answer = "A red circle at the top left and a blue square at the bottom right."
    assert page.content(".state-answer .state-big") == answer
    corners = page("return [...document.querySelectorAll('.state-places fieldset')].map((one) => "
                   "[one.offsetLeft, one.offsetTop])")  # fmt: skip
    (left, top), (right, bottom) = corners[0], corners[3]
    assert corners[1:3] == [[right, top], [left, bottom]]  # two rows of two
    ids, layer, query = page.ids(), *page("const { layer, query } = explorer.run.selected; return [layer, query]")
    pixels = paint((0, "circle", "red"), (3, "square", "blue")).astype(np.float32) / np.float32(255)
    pixels = torch.from_numpy((pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(2, 0, 1)[None]
    model = load_model(MODELS["ministral3"], torch.float32)
    trace = record(model, torch.tensor([ids]), pixel_values=pixels)
    patches = [place for place, id in enumerate(ids) if id == model.config.image_token_id]
    head = int(page("return [...document.querySelectorAll('#view select')].at(-1).value"))
    shares = trace[f"layers.{layer}.attention.probabilities"][0, head, query, patches]
    assert f"gives {percent(shares.sum().item())} of its attention to the 16 merged patches" in page.content()
    row, column = divmod(int(shares.argmax()), 4)
    largest = percent(shares.max().item())
    assert f"The largest share, {largest}, goes to row {row + 1}, column {column + 1}." in page.content()
    everywhere = [trace[f"layers.{n}.attention.probabilities"][0, :, query, patches].max() for n in range(7)]
    assert shares.max() == max(everywhere)  # the page has found the head that looks at one patch most


@slow_in_browser
def test_a_click_on_a_stage_shows_its_lines(page):
    page.open("ministral3")
    page.open_view("sizes")
    page.set("Layer", 2)
    page.press_in_view("layers.2.attention.q_scaled")
    first, last = python_function("ministral3.py", "Ministral3Attention.rotate")
    assert page.content(".state-code h4") == f"Ministral3Attention.rotate ministral3.py, line {first}"
    assert page.contents(".state-hit") == [f"{last}        return q * scale, k"]
    row = page.rows()[[name for name, *_ in page.rows()].index("layers.2.attention.scores")]
    S = len(page.ids())
    assert row[1:3] == ["B H S T", TIMES.join(("1", "8", f"{S}", f"{S}"))]


# ---------------------------------------------------------------------------------------------- made for people


SMALL_TEXT = """return [...document.querySelectorAll("#view *")]
    .filter((element) => parseFloat(getComputedStyle(element).fontSize) < 12)
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
    .map((element) => element.outerHTML.slice(0, 200))"""


@slow_in_browser
@pytest.mark.parametrize(("name", "width", "theme"), [("ministral", 1200, "light"), ("ministral3", 360, "dark")])
def test_views_are_accessible(page, name, width, theme):
    page.open(name)
    page.resize(width)
    page("document.documentElement.dataset.theme = arguments[0]; select({})", theme)
    axe = importlib.util.find_spec("axe_core_python")
    for view in STATE_VIEWS:
        page.open_view(view)
        assert page("return document.documentElement.scrollWidth") <= width, view
        assert page(SMALL_TEXT) == [], view
        if axe is not None:
            script = Path(axe.origin).with_name("axe.min.js").read_text(encoding="utf-8")
            assert page.violations(script, "'#panel'") == [], view


@needs_browser
def test_the_saved_trace_is_read_by_reference_diff(page, tmp_path, capsys):
    """What the button saves agrees with the reference at every stage."""
    page.open("ministral3", is_new=True)  # without an image
    page.open_view("sizes")
    page("""globalThis.saved = null; const create = URL.createObjectURL;
        URL.createObjectURL = (blob) => { saved = blob; return create(blob); };""")
    page.press_in_view("Save the trace")
    content = page.driver.execute_async_script("""
        const reader = new FileReader();
        reader.onload = () => arguments[0](reader.result.split(",")[1]);
        reader.readAsDataURL(saved);""")
    (tmp_path / "mine.safetensors").write_bytes(base64.b64decode(content))
    ids = ",".join(map(str, page.ids()))
    model, reference = str(MODELS["ministral3"]), str(tmp_path / "reference.safetensors")
    assert reference_main(["record", "--model", model, "--ids", ids, "-o", reference]) == 0
    assert reference_main(["diff", str(tmp_path / "mine.safetensors"), reference]) == 0
    assert "agree" in capsys.readouterr().out
