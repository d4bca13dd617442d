"""All Python blocks and command lines of the README run as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import generate

ROOT = Path(generate.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Beginnings of command lines that are not run here, and why.
NOT_RUN = {
    "pip install": "changes the environment; .ci/run does it",
    "pytest": "these tests",
    "python -m notebooks": "minutes; .ci/run does it",
    "python -m examples.verse": "minutes; test_training.py runs it in short",
    "python -m training": "minutes to hours",
    "python -m benchmarks": "minutes; the test of their usage is below",
    "python generate.py --model mistralai/": "needs published weights",
    "python -m checkpoint info mistralai/": "needs the network",
    "torchrun": "needs a directory of the reader's; test_tensor_parallel.py runs it",
    "vllm": "is another program",
    "hf": "needs an account",
    "python -m tests.processors": "minutes; .ci/run does it",
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = {}
    for number, block in enumerate(blocks("python"), 1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert "model" in names


@pytest.fixture
def working_copy(tmp_path):
    """A copy of this folder, in which commands may write, and a `python` that is this interpreter."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def test_command_lines_run_in_order(working_copy):
    environment = os.environ | {"PATH": f"{working_copy / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for line in "".join(blocks("sh")).splitlines():
        if not line.strip() or line.startswith("#") or line.startswith(tuple(NOT_RUN)):
            continue
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=working_copy, env=environment,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        ran += 1
    assert ran >= 3


def test_commands_in_the_text_are_there():
    """`python -m module` takes no argument that the README does not name; `pytest file` is a file."""
    in_blocks = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    in_text = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    for code in filter(None, in_text + in_blocks):
        words = code.split()
        if words[0] == "pytest" and len(words) > 1:
            files = [word for word in words if word.endswith(".py")]
            assert files and all((ROOT / file).is_file() for file in files), code
        module = re.fullmatch(r"(?:python -m )?(benchmarks\.\w+)", code)
        if module:
            done = subprocess.run([sys.executable, "-m", module[1], "--help"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stderr}"
            usage = done.stdout.partition("\n\n")[0].partition(module[1])[2]
            assert not re.sub(r"\[[^]]*\]|\[.*?\.\.\.\]", "", usage).strip(" ]\n"), f"{code} needs {usage}"
