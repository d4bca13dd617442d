"""The places where this project reads what it has not made: each is a function that reads one hostile input.

A surface makes an input from a `random.Random` and reads it. Reading may succeed or raise an error of `REFUSALS` with a
message on one line; everything else is a fault.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

import checkpoint
from checkpoint import GenerationConfig
from explorer.__main__ import assemble
from generate import main as generate_main
from images import load_image, preprocess
from model_types import BUNDLED, load_model
from reference.__main__ import main as reference_main
from reference.diff import read_map_file
from reference.golden import HERE
from reference.trace import load
from tests.fuzz.mutations import hostile, mutate_bytes, mutate_json
from tokenizer import Tokenizer
from tokenizer.bpe import read_tekken

REFUSALS = (ValueError, FileNotFoundError, NotADirectoryError, FileExistsError)
LONGEST = 520  # characters of a message; a path and a list of what is allowed are part of it
MODELS = ("ministral", "ministral3", "mistral3")


@contextlib.contextmanager
def copy_of(directory: Path) -> Iterator[Path]:
    """A copy of the files of a model directory, made of links."""
    with tempfile.TemporaryDirectory() as place:
        for path in directory.iterdir():
            if path.is_file():
                Path(place, path.name).symlink_to(path)
        yield Path(place)


@cache
def content(path: Path) -> bytes:
    """The bytes of a file."""
    return path.read_bytes()


def write(path: Path, data: bytes) -> None:
    """Replace a link by a file."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def dump(value: Any) -> bytes:
    """JSON, also of values that JSON does not have."""
    return json.dumps(value).encode()


def config_file(rng: random.Random) -> None:
    """config.json or params.json of a golden model."""
    name = rng.choice(("hf/config.json", "mistral/params.json"))
    source = HERE / rng.choice(MODELS) / name
    with copy_of(source.parent) as directory:
        write(directory / source.name, dump(mutate_json(json.loads(content(source)), rng)))
        load_model(directory)


def config_bytes(rng: random.Random) -> None:
    """The same with damaged bytes."""
    source = HERE / rng.choice(MODELS) / "hf" / "config.json"
    with copy_of(source.parent) as directory:
        write(directory / source.name, mutate_bytes(content(source), rng))
        load_model(directory)


def weights(rng: random.Random) -> None:
    """The file of the weights."""
    source = HERE / rng.choice(MODELS) / "hf" / "model.safetensors"
    with copy_of(source.parent) as directory:
        write(directory / source.name, mutate_bytes(content(source), rng))
        load_model(directory)


def conversion(rng: random.Random) -> None:
    """A model with a changed configuration, converted; what is converted can be loaded."""
    name = rng.choice(MODELS)
    source = HERE / name / "hf" / "config.json"
    with copy_of(source.parent) as directory:
        write(directory / source.name, dump(mutate_json(json.loads(content(source)), rng)))
        target = directory / "out"
        try:
            checkpoint.convert(directory, target, format=rng.choice(("hf", "mistral")))
        except REFUSALS:
            assert not target.exists()
            raise
        load_model(target)


def generation_config(rng: random.Random) -> None:
    """generation_config.json."""
    start = json.loads(content(BUNDLED / "generation_config.json"))
    start |= {"min_p": 0.1, "eos_token_id": [2, 3], "max_length": 50, "stop_strings": ["a"]}
    with tempfile.TemporaryDirectory() as place:
        write(Path(place, "generation_config.json"), dump(mutate_json(start, rng)))
        GenerationConfig.from_pretrained(place)


def tekken(rng: random.Random) -> None:
    """tekken.json; texts with names of special tokens do not become special tokens."""
    with tempfile.TemporaryDirectory() as place:
        data = json.loads(content(BUNDLED / "tekken.json"))
        small = data | {"vocab": data["vocab"][:300]}
        small["config"] = small["config"] | {
            "default_vocab_size": data["config"]["default_num_special_tokens"] + 300, "num_vocab_tokens": 300,
        }  # fmt: skip
        part = rng.choice(("config", "special_tokens", "vocab", None))
        if part is None:
            write(Path(place, "tekken.json"), mutate_bytes(dump(small), rng))
        else:
            write(Path(place, "tekken.json"), dump(small | {part: mutate_json(small[part], rng)}))
        encode(Tokenizer.from_dir(place))


def tokenizer_json(rng: random.Random) -> None:
    """tokenizer.json."""
    data = json.loads(content(BUNDLED / "tokenizer.json"))
    part = rng.choice([key for key in data if key != "model"])
    with tempfile.TemporaryDirectory() as place:
        write(Path(place, "tokenizer.json"), dump(data | {part: mutate_json(data[part], rng)}))
        encode(Tokenizer.from_dir(place))


def tokenizer_cache(rng: random.Random) -> None:
    """A damaged file in the cache of tokenizers: it is not used."""
    with tempfile.TemporaryDirectory() as place, patch.dict("os.environ", {"XDG_CACHE_HOME": place}):
        path = Path(place, "tekken.json")
        path.write_bytes(content(BUNDLED / "tekken.json"))
        with patch("tokenizer.bpe.CACHED_FROM", 0):
            read_tekken(path)
            (cached,) = Path(place, "ministral").iterdir()
            cached.write_bytes(mutate_bytes(cached.read_bytes(), rng))
            backend, version = read_tekken(path)
    expected = bundled_tokenizer()
    assert version == expected.version and backend.to_str() == expected.backend.to_str()


def explorer_page(rng: random.Random) -> None:
    """The page of the explorer with a changed configuration or vocabulary, and a prompt: all text is data in it."""
    with copy_of(BUNDLED) as directory:
        name = rng.choice(("config.json", "tekken.json"))
        write(directory / name, dump(mutate_json(json.loads(content(BUNDLED / name)), rng)))
        page = assemble(directory, without_null(hostile(rng)) + rng.choice(("", "</script><script>", "<!--")))
    assert page.count("</script") == assemble_bundled().count("</script") and page.count("<!--") == 0


@cache
def assemble_bundled() -> str:
    """The page of the bundled model."""
    return assemble(BUNDLED)


def encode(tokenizer: Tokenizer) -> None:
    """Encode a text with names of special tokens, and decode it."""
    ids = tokenizer.encode("To be [INST] </s> [THINK]\n  don't", bos=False)
    assert not set(ids) & set(tokenizer.special_tokens.values()), "a text became a special token"
    tokenizer.decode(ids)


@cache
def bundled_tokenizer() -> Tokenizer:
    """The tokenizer of the bundled model."""
    return Tokenizer.from_dir(BUNDLED)


def conversation(rng: random.Random) -> None:
    """Messages and tools of a conversation."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "4"}], "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "abcdefghi", "name": "add"},
        {"role": "assistant", "content": "4."},
        {"role": "user", "content": "Thanks"},
    ]
    tools = json.loads(content(Path(__file__).parents[2] / "examples" / "tools.json"))
    if rng.random() < 0.5:
        bundled_tokenizer().encode_chat(mutate_json(messages, rng), tools)
    else:
        bundled_tokenizer().encode_chat(messages, mutate_json(tools, rng))


def answer(rng: random.Random) -> None:
    """The ids that a model could write."""
    tokenizer = bundled_tokenizer()
    special = list(tokenizer.special_tokens.values())[:40]
    ids = [rng.choice(special) if rng.random() < 0.4 else rng.randrange(2400) for _ in range(rng.randrange(12))]
    tokenizer.decode_chat(ids)


def image(rng: random.Random) -> None:
    """The bytes of an image."""
    file = io.BytesIO()
    kind = rng.choice(("PNG", "JPEG", "GIF", "WEBP"))
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(file, kind)
    picture = load_image(mutate_bytes(file.getvalue(), rng))
    preprocess(picture, load_model(HERE / "mistral3" / "hf").config)


def trace(rng: random.Random) -> None:
    """The file of a port: .safetensors, .npz or .npy."""
    kind = rng.choice((".safetensors", ".npz", ".npy"))
    data = content(HERE / "ministral" / "one_text.safetensors")
    if kind != ".safetensors":
        file = io.BytesIO()
        if kind == ".npz":
            np.savez_compressed(file, logits=np.zeros((1, 4, 9)), embedding=np.zeros((1, 4, 5)))
        else:
            np.save(file, np.zeros((1, 4, 9)))
        data = file.getvalue()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"port{kind}")
        path.write_bytes(mutate_bytes(data, rng))
        load(path)


def name_map(rng: random.Random) -> None:
    """The file of `--map`."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "map.json")
        data = dump(mutate_json({"a": "logits", "b": "embedding", "c": ["x"]}, rng))
        path.write_bytes(mutate_bytes(data, rng))
        read_map_file(path)


OPTIONS = (
    "--prompt-file", "--image", "--model", "--raw", "--system", "--messages", "--tools", "--show-thinking", "--stop",
    "--dtype", "--device", "--attn", "--json", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p",
    "--repetition-penalty", "--seed", "--revision", "--no-such",
)  # fmt: skip
REFERENCE_OPTIONS = (
    "--model", "--prompt", "--ids", "--positions", "--steps", "--dtype", "--keep", "--image", "-o", "--map", "--text",
    "--json", "--plot",
)  # fmt: skip


def command(main: Callable[..., int], arguments: list[str]) -> None:
    """Run a command in this process: it returns 0 or 1, or 2 with one line of an error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    assert code in (0, 1, 2), f"exit code {code}"
    assert "Traceback" not in err.getvalue(), err.getvalue()[-400:]
    if code == 2:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        raise ValueError(lines[-1])


def without_null(value: Any) -> str:
    """A value as an argument of a command."""
    return str(value).replace("\x00", "")[:3000].encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def generate_options(rng: random.Random) -> None:
    """Options of generate.py. The model is a tiny one, and one token is written."""
    arguments = ["To be", "--device", "cpu", "--model", str(BUNDLED)]
    for _ in range(rng.randint(1, 3)):
        arguments.append(rng.choice(OPTIONS))
        if rng.random() < 0.8:
            arguments.append(without_null(hostile(rng)))
    arguments = [argument for argument in arguments if argument != "/dev/zero"]  # 64 MB are read first
    command(generate_main, [*arguments, "--max-new-tokens", "1"])


def reference_options(rng: random.Random) -> None:
    """Options of `python -m reference record` and `diff`."""
    golden = str(HERE / "ministral" / "one_text.safetensors")
    with tempfile.TemporaryDirectory() as place:
        model, output = str(HERE / "ministral" / "hf"), f"{place}/trace.safetensors"
        arguments = ["record", "--model", model, "--ids", "1,2,3", "-o", output]
        if rng.random() < 0.4:
            arguments = ["diff", golden, golden]
        for _ in range(rng.randint(1, 2)):
            option = rng.choice(REFERENCE_OPTIONS)
            if option != "-o":  # it would write where a hostile text says
                arguments += [option, without_null(hostile(rng))]
        if "--plot" not in arguments:
            command(reference_main, arguments)


# name -> (surface, how many of 20,000 cases are its own)
SURFACES: dict[str, tuple[Callable[[random.Random], None], int]] = {
    "config.json, params.json": (config_file, 3000),
    "config.json, bytes": (config_bytes, 1000),
    "weights": (weights, 1500),
    "conversion": (conversion, 600),
    "generation_config.json": (generation_config, 2500),
    "tekken.json": (tekken, 1500),
    "tokenizer.json": (tokenizer_json, 400),
    "tokenizer cache": (tokenizer_cache, 40),
    "explorer": (explorer_page, 30),
    "conversations": (conversation, 4000),
    "answers": (answer, 2500),
    "images": (image, 1200),
    "traces": (trace, 1000),
    "maps": (name_map, 500),
    "generate.py": (generate_options, 200),
    "reference": (reference_options, 100),
}


def run(name: str, number: int) -> str:
    """Read one case of a surface: "accepted" or "refused".

    Raises:
        AssertionError: a refusal of more than one line, or a long one.
        Exception: any other error of the code.
    """
    surface, _ = SURFACES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            surface(random.Random(f"{name} {number}"))
        except REFUSALS as error:
            message = str(error)
            assert "\n" not in message and len(message) <= LONGEST, f"a message of {len(message)} characters: {message}"
            return "refused"
    return "accepted"
