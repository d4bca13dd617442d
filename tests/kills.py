"""Commands that are killed: what lies there then is the old version, the new one, or an error that says how to finish.

    python -m tests.kills 200

A command runs in a process of its own, which ends by SIGKILL: before one of its steps (a file is opened to be written,
renamed or removed, a directory is made or removed), or after a random time. Then it runs again, and must succeed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import safetensors.torch
import torch
from tqdm import tqdm

import checkpoint
from checkpoint import writer
from explorer.__main__ import main as explorer_main
from model_types import BUNDLED, load_model
from reference.__main__ import main as reference_main
from reference.golden import HERE
from reference.trace import load
from tests.test_training import CPU, TINY, small_corpus
from tokenizer import Tokenizer, bpe
from training import train

TINY_MODEL = HERE / "ministral" / "hf"
STEPS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")
CURE = "rename each .NAME.NUMBER.tmp to NAME"


class Command(NamedTuple):
    """Attributes:
    old: writes the version that is there before; None: nothing is there.
    run: writes the new version into the same directory.
    read: what can be read of either; None for nothing.
    """

    old: Callable[[Path], object] | None
    run: Callable[[Path], object]
    read: Callable[[Path], Any]


# ------------------------------------------------------------------------------------------------------- processes


def killed(run: Callable[[], object], step: int | None = None, seconds: float | None = None) -> tuple[bool, int]:
    """Run in a process of its own, and kill that before a step, counted from 1, or after a time.

    Returns:
        Whether it was killed, and the number of its steps.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            torch.set_num_threads(1)  # the threads of the parent are not in this process
            tqdm.set_lock(threading.RLock())  # the usual lock is shared by processes, and a killed one may have held it
            writer.save_file = save_file_in_steps
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                sys.addaudithook(Steps(writing, step))
                run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as pipe:
        steps = len(pipe.read())
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"it failed with status {status}"
    return status != 0, steps


def save_file_in_steps(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' `save_file`, whose temporary file and its renaming are seen by an audit hook. The library itself
    writes in Rust, which no hook sees."""
    temporary = path.with_name(f".tmp{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata))
    os.rename(temporary, path)


class Steps:
    """An audit hook that writes a byte for each step, and kills the process before one of them."""

    def __init__(self, pipe: int, last: int | None) -> None:
        self.pipe = pipe
        self.last = last
        self.count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and arguments[0] != os.devnull
        if event not in STEPS and not opened:
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(self.pipe, b".")


# -------------------------------------------------------------------------------------------------------- commands


def save(value: float, size: str, directory: Path) -> None:
    """Save a model whose parameters all have a value."""
    model = load_model(TINY_MODEL, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model.save_pretrained(directory / "model", max_shard_size=size)


def read_values(directory: Path) -> set[float]:
    """The values of the parameters."""
    return {value for p in load_model(directory / "model").parameters() for value in p.flatten().tolist()}


def read_converted(directory: Path) -> Any:
    """The weights of a converted model, in a folder that is made for it."""
    path = directory / "new" / "model"
    if not path.exists():
        return None
    return [p.double().sum().item() for p in load_model(path).parameters()]


def record(ids: str, directory: Path) -> None:
    """Record a trace."""
    arguments = ["record", "--model", str(TINY_MODEL), "--ids", ids, "-o", str(directory / "trace.safetensors")]
    assert reference_main(arguments) == 0


def read_trace(directory: Path) -> Any:
    """The ids of a trace, and how many tensors it has."""
    trace, _ = load(directory / "trace.safetensors")
    return trace["input.input_ids"].tolist(), len(trace)


def explore(prompt: str, directory: Path) -> None:
    """Write the page of the explorer."""
    assert explorer_main(["--prompt", prompt, "-o", str(directory / "page.html")]) == 0


def read_vocabulary(directory: Path) -> None:
    """Read a vocabulary, with the cache in a directory."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(directory)), patch.object(bpe, "CACHED_FROM", 0):
        Tokenizer.from_dir(BUNDLED)


def read_cache(directory: Path) -> Any:
    """The ids of a text by the stored tokenizer; None if there is none."""
    files = list(directory.glob("ministral/*.json"))
    if not files:
        return None
    backend, version = bpe._read_cache(files[0])
    return version, backend.encode("To be, or not to be").ids


def run_training(directory: Path) -> None:
    """Train, or go on: three stages, of which each step writes a state."""
    with patch.object(train, "SAVE_EVERY", 0), small_corpus():
        train.Trainer(TINY, directory / "run", CPU).run()


def read_training(directory: Path) -> Any:
    """The sum of the weights of a training that is complete; None for another. Every file can be read."""
    run = directory / "run"
    if (run / "training_log.json").exists():
        checkpoint.read_json(run / "training_log.json")
    if (run / "config.json").exists():
        load_model(run)
    if not (run / "state.pt").exists():
        return None
    state = torch.load(run / "state.pt", weights_only=True)
    if state["progress"]["stage"] < len(TINY.stages):
        return None
    return [weight.double().sum().item() for weight in state["model"].values()]


COMMANDS = {
    "save_pretrained, one file": Command(
        lambda path: save(1.0, "5GB", path), lambda path: save(2.0, "5GB", path), read_values
    ),
    "save_pretrained, shards": Command(
        lambda path: save(1.0, "5GB", path), lambda path: save(2.0, "5KB", path), read_values
    ),
    "checkpoint convert": Command(
        None,
        lambda path: checkpoint.convert(TINY_MODEL, path / "new" / "model", format="mistral"),
        read_converted,
    ),
    "reference record": Command(
        lambda path: record("1,2", path), lambda path: record("1,2,3", path), read_trace
    ),
    "training": Command(None, run_training, read_training),
    "tokenizer cache": Command(None, read_vocabulary, read_cache),
    "explorer": Command(
        lambda path: explore("old", path),
        lambda path: explore("new", path),
        lambda path: (path / "page.html").read_bytes(),
    ),
}


# ----------------------------------------------------------------------------------------------------------- kills


def names(directory: Path) -> list[str]:
    """The names of all files and directories in a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


class Kills:
    """A command with what it writes when nothing kills it.

    Args:
        place: an empty directory.
    """

    def __init__(self, name: str, place: Path) -> None:
        self.command = COMMANDS[name]
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        whole = place / "whole"
        whole.mkdir()
        self.old = self.write_old(whole)
        start = time.monotonic()
        was_killed, self.steps = killed(lambda: self.command.run(whole))
        self.seconds = time.monotonic() - start
        assert not was_killed and self.steps > 0
        self.order = random.Random(name).sample(range(1, self.steps + 1), self.steps)
        self.new = self.command.read(whole)
        self.names = names(whole)
        assert self.new != self.old

    def write_old(self, directory: Path) -> Any:
        """Write the old version; returns what is read of it."""
        if self.command.old is None:
            return None
        with redirect_stdout(None), redirect_stderr(None):
            self.command.old(directory)
        return self.command.read(directory)

    def kill(self, number: int) -> str:
        """Kill the command once: before a step if the number is even, else after a time. Returns what was left: "old",
        "new", "finish" for an error with its cure, or "too late" if the command ended first."""
        rng = random.Random(number)
        directory = self.place / f"kill {number}"
        directory.mkdir()
        self.write_old(directory)
        step, seconds = None, None
        if number % 2 == 0:
            step = self.order[number // 2 % self.steps]
        else:
            seconds = rng.uniform(0, self.seconds)
        was_killed, _ = killed(lambda: self.command.run(directory), step, seconds)
        found = self.found(directory)
        if found == "new" and names(directory) == self.names:
            return found if was_killed else "too late"
        again, _ = killed(lambda: self.command.run(directory))
        assert not again and self.command.read(directory) == self.new
        assert names(directory) == self.names, f"left over: {set(names(directory)) - set(self.names)}"
        return found

    def found(self, directory: Path) -> str:
        """What lies there."""
        try:
            value = self.command.read(directory)
        except FileNotFoundError as error:
            assert CURE in str(error), error
            return "finish"
        assert value in (self.old, self.new), value
        return "new" if value == self.new else "old"


def main(total: int) -> int:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    print("| command | kills | old version | new version | error with the cure | faults |")
    print("|---|---|---|---|---|---|")
    faults = 0
    for place, name in enumerate(COMMANDS):
        count = total * (place + 1) // len(COMMANDS) - total * place // len(COMMANDS)
        results: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as directory:
            kills = Kills(name, Path(directory))
            number = 0
            while results.total() - results["too late"] < count:
                try:
                    results[kills.kill(number)] += 1
                except Exception as error:
                    print(f"{name} {number}: {type(error).__name__}: {error}", file=sys.stderr)
                    results["fault"] += 1
                number += 1
        faults += results["fault"]
        counts = " | ".join(str(results[kind]) for kind in ("old", "new", "finish", "fault"))
        print(f"| {name} | {count} | {counts} |", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
