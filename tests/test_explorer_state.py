"""The explorer's views of the state (cache, positions, mistakes, image, sizes and code): their arithmetic in Node, and the
views themselves in Chromium, against the Python models."""

import ast
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
from reference.mutants import MUTANTS
from reference.trace import POINTS, record
from training import shapes

ROOT = Path(__file__).resolve().parent.parent
MODELS = {name: ROOT / "models" / name for name in ("ministral", "ministral3")}
NODE, CHROMIUM, DRIVER = shutil.which("node"), shutil.which("chromium"), shutil.which("chromedriver")
STATE_VIEWS = ("cache", "positions", "mistakes", "image", "sizes")
TEXT = "To be, or not to be: that is the question.\nTo be, or not"

needs_node = pytest.mark.skipif(NODE is None, reason="needs node")
needs_browser = pytest.mark.skipif(
    None in (CHROMIUM, DRIVER) or importlib.util.find_spec("selenium") is None,
    reason="needs chromium, chromedriver and selenium",
)


def in_node(expression, **values):
    """The value of a JavaScript expression in which the functions of views_state.js and `values` are known."""
    scripts = [str(ROOT / "explorer" / name) for name in ("model.js", "views_state.js")]
    program = """
        const fs = require("fs"), vm = require("vm");
        const { scripts, expression, values } = JSON.parse(fs.readFileSync(0, "utf-8"));
        Object.assign(globalThis, values, { VIEWS: [] });
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
        "cases.map(([past, fresh, window]) => { const step = cacheStep(past, fresh, window); return [step.slots, step.keys, "
        "step.overwritten.map(({slot, old}) => [slot, old]).sort((a, b) => a[0] - b[0])]; })",
        cases=cases,
    )
    assert found == expected


@needs_node
@pytest.mark.parametrize("text", ["bundled", "published", "plain", "no ramp"])
def test_angles_and_query_scale_are_those_of_the_model(text):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.3, "beta_fast": 1.0, "beta_slow": 1.0}  # fmt: skip
    config = {
        "bundled": lambda: load_config("ministral3"), "published": Ministral3Config, "plain": lambda: load_config("ministral"),
        "no ramp": lambda: Ministral3Config(head_dim=64, rope_parameters=rope),
    }[text]()  # fmt: skip
    is_plain = isinstance(config, MinistralConfig) and not isinstance(config, Ministral3Config)
    embedding = (RotaryEmbedding if is_plain else YarnRotaryEmbedding)(config)
    given = {"head_dim": config.head_dim, "rope_parameters": config.rope_parameters}
    positions = [0, 5, 63, 64, 255, 256, 4095, 16384, 200000]
    pairs, scales = in_node(
        "[rotaryPairs(text), positions.map((position) => queryScale(text, position))]", text=given, positions=positions
    )
    assert [pair["used"] for pair in pairs] == pytest.approx(embedding.inverse_frequencies(torch.float32).tolist(), rel=1e-6)
    plain = RotaryEmbedding.inverse_frequencies(embedding, torch.float32).tolist()
    assert [pair["plain"] for pair in pairs] == pytest.approx(plain, rel=1e-6)
    if is_plain:
        assert {pair["zone"] for pair in pairs} == {None} and set(scales) == {1}
        return
    expected = embedding(torch.zeros(1), torch.tensor([positions]))[2].flatten().tolist()
    assert scales == pytest.approx(expected, rel=1e-6)
    low, high = (embedding.ramp_end(key) for key in ("beta_fast", "beta_slow"))
    zones = ["kept" if i <= math.floor(low) else "stretched" if i >= math.ceil(high) else "blended" for i in range(len(pairs))]
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
    weights, cached = in_node(
        "[weightCounts(config), lengths.map((length) => cacheBytes(text, length))]", config=config, text=given, lengths=lengths
    )
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
    places = {tuple(place) for name in POINTS for config in ({"model_type": "ministral"}, {"vision_config": {}, "text_config": {}})
              for place in in_node_sources(name, config)}  # fmt: skip
    files = {file: (ROOT / file).read_text() for file, _, _ in places}
    found = in_node(
        "places.map(([file, name]) => functionLines(files[file], name))", places=sorted(places), files=files
    )
    for (file, name, part), lines in zip(sorted(places), found):
        assert file in explorer.SOURCES
        first, last = python_function(file, name)
        assert (lines["first"], lines["first"] + len(lines["lines"]) - 1) == (first, last), name
        assert sum(part in line for line in lines["lines"]) == 1, (name, part)


SOURCES_OF = {}


def in_node_sources(name, config):
    """The places of a point in a model, of all points at once."""
    key = json.dumps(config)
    if key not in SOURCES_OF:
        SOURCES_OF[key] = in_node(
            "Object.fromEntries(names.map((name) => [name, sourcesOf(name, config)]))", names=list(POINTS), config=config
        )
    return SOURCES_OF[key][name]
