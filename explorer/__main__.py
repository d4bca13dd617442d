"""`python -m explorer` writes one HTML file in which a model runs in the browser, open to its last number.

The file holds everything: weights, vocabulary, scripts, styles, and the Python sources that it shows. It makes no
request. Whatever comes from a model or a prompt is stored as data (JSON or base64), and the page shows it as text only.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
import webbrowser
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint import GENERATION, GenerationConfig, read_config, read_json, replace_file
from checks import brief
from cli import Parser, exit_code, format_bytes
from model_types import BUNDLED, MODEL_DIRECTORY, model_class
from tokenizer import from_tekken

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 64_000_000  # bytes of weights
MODEL_TYPES = ("ministral", "ministral3", "mistral3")
# In the order in which they run; page.js has the order of the tabs. A name in one of the views does not collide with
# the same name in another.
SCRIPTS = ("model.js", "worker.js", "page.js", "views_text.js", "views_state.js", "views_compare.js", "tour.js")
SOURCES = ("ministral.py", "ministral3.py", "vision.py", "generate.py")


def read_model(directory: Path) -> tuple[dict[str, Any], bytes]:
    """The parts of a model directory that are not weights, as the page takes them, and the bytes of its weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model is too large, of another type, or one that `generate.py` refuses, too.
    """
    weights = directory / "model.safetensors"
    config = read_config(directory)
    found = config.get("model_type")
    if found not in MODEL_TYPES:
        raise ValueError(f"{directory}: model_type is {brief(found)}; supported: {', '.join(MODEL_TYPES)}")
    model_class(config).config_class.from_dict(config)
    tekken = read_json(directory / "tekken.json")
    from_tekken(tekken, str(directory / "tekken.json"))
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist; the explorer needs all weights in one file")
    size = weights.stat().st_size
    if size > LIMIT:
        reason = "a browser would need minutes for each token"
        raise ValueError(
            f"{weights} has {format_bytes(size)}; the explorer takes up to {format_bytes(LIMIT)}, because {reason}"
        )
    generation = {}
    if (directory / GENERATION).is_file():
        GenerationConfig.from_pretrained(directory)
        generation = read_json(directory / GENERATION)
    parts = {
        "name": directory.resolve().name, "config": config, "tekken": tekken, "generation": generation,
        "examples": examples(directory),
    }  # fmt: skip
    return parts, weights.read_bytes()


def examples(directory: Path) -> list[dict[str, str]]:
    """Texts to begin with: {title, mode ("text" or "chat"), text}, the best for the bundled models."""
    known = read_json(HERE / "examples.json")
    name = directory.resolve().name
    if directory.resolve().parent == MODEL_DIRECTORY and name in known:
        return known[name]
    return known["other"]


def compress(content: bytes) -> str:
    """Weights as base64 text of a zlib stream. Of each 16-bit number, the bytes with exponents compress well and those
    with fractions do not, so bytes at even places come first, and those at odd places after them. Weights do not
    repeat: the search for repetitions would take 30 times as long and give a larger stream."""
    compressor = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    stream = compressor.compress(content[0::2] + content[1::2]) + compressor.flush()
    return base64.b64encode(stream).decode("ascii")


def as_json(value: Any) -> str:
    """JSON that can stand in a script element: no text in it ends the element or begins a comment."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def script_of(name: str) -> str:
    """The text of a script. Those of the page run in functions of their own, so that names do not collide."""
    text = (HERE / name).read_text(encoding="utf-8")
    if name in ("model.js", "worker.js"):
        return text
    return f"(() => {{\n{text}}})();\n"


def digest(text: str) -> str:
    """A source expression of a Content-Security-Policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def assemble(directory: Path, prompt: str | None = None) -> str:
    """The page for a model (raises as `read_model`).

    Args:
        directory: the model.
        prompt: the text to begin with; None: the first example.
    """
    parts, content = read_model(directory)
    if prompt is not None:
        parts["examples"] = [{"title": "Your text", "mode": "text", "text": prompt}, *parts["examples"]]
    parts["sources"] = {name: (ROOT / name).read_text(encoding="utf-8") for name in SOURCES}
    style = (HERE / "style.css").read_text(encoding="utf-8")
    scripts = {name: script_of(name) for name in SCRIPTS}
    elements = []
    for name, text in scripts.items():
        kind = ""
        if name == "worker.js":  # it is run by the worker only
            kind = ' type="text/plain"'
        elements.append(f'<script id="{name}"{kind}>{text}</script>')
    allowed = " ".join(digest(text) for name, text in scripts.items() if name != "worker.js")
    fields = {
        "policy": f"default-src 'none'; script-src {allowed}; style-src {digest(style)}; worker-src blob:; "
                  "img-src data: blob:; base-uri 'none'; form-action 'none'",
        "style": style,
        "data": f'<script id="data" type="application/json">{as_json(parts)}</script>',
        "weights": f'<script id="weights" type="text/plain">{compress(content)}</script>',
        "scripts": "\n".join(elements),
    }  # fmt: skip
    page = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], page)


def run(options: argparse.Namespace) -> int:
    """Write the page, and open it if that is asked for."""
    output = options.output
    print(f"packing {options.model} ...", file=sys.stderr)
    text = assemble(options.model, options.prompt)
    replace_file(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{output}: {format_bytes(output.stat().st_size)}; open it in a browser")
    if options.open:
        webbrowser.open(output.resolve().as_uri())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m explorer", description="Write one HTML file in which a small model runs.")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="directory of the model (default: the bundled one)")
    parser.add_argument("-o", "--output", type=Path, default=Path("ministral.html"), help="(default: ministral.html)")
    parser.add_argument("--prompt", help="the text to begin with")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
