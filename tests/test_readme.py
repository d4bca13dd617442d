"""The examples of README.md, CONTRIBUTING.md and docs/ run as they are written: Python blocks and command lines."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import generate

ROOT = Path(generate.__file__).parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_FILES = [ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "models").glob("*/README.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES + OTHER_FILES}

# Beginnings of command lines that are not run here, and why.
NOT_RUN = {
    "pip install": "changes the environment; .ci/run does it",
    "pytest": "these tests",
    "python -m notebooks": "minutes; .ci/run does it",
    "python -m examples.verse": "minutes; test_training.py runs it in short",
    "python -m examples.lora": "minutes; test_lora.py runs it in short",
    "python -m checkpoint merge": "needs an adapter; test_lora.py runs it",
    "python -m training": "minutes to hours",
    "python -m tests.fuzz": "minutes; tests/fuzz runs a part",
    "python -m benchmarks": "minutes; the test of their usage is below",
    "python generate.py --model mistralai/": "needs published weights",
    "python -m checkpoint info mistralai/": "needs the network",
    "torchrun": "needs a directory of the reader's; test_tensor_parallel.py runs it",
    "vllm": "is another program",
    "hf": "needs an account",
    "python -m tests.processors": "minutes; .ci/run does it",
    "python -m tests.code_mutants": "half an hour; test_mutants.py runs a small file",
    "git worktree": "changes the repository",
    "python tests/equality.py": "minutes, and needs a second version",
    "python -m reference golden": "writes reference/golden; test_reference.py runs it",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_in_order(monkeypatch, capsys, working_copy, page):
    monkeypatch.chdir(working_copy)
    names = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, Python block {number}", "exec"), names)


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


def commands(page):
    """The command lines of a page that are run here."""
    lines = [line for line in "".join(blocks(page, "sh")).splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines if not line.startswith(tuple(NOT_RUN))]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_command_lines_run_in_order(working_copy, page):
    environment = os.environ | {"PATH": f"{working_copy / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    for line in commands(page):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=working_copy, env=environment,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_examples_are_found():
    assert "generate(model, ids" in "".join(blocks("README.md", "python"))
    assert sum(len(commands(page)) for page in PAGES) >= 10 and len(commands("README.md")) >= 3


@functools.cache
def usage(module):
    """The usage of a module's command line, without its name."""
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{module}\n{done.stderr}"
    return done.stdout.partition("\n\n")[0].partition(module)[2]


SLOW_PAGES = {"docs/performance.md"}  # a command of it takes 2 seconds to import Transformers


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW_PAGES else []) for page in PAGES]
)
def test_commands_in_the_text_are_there(page):
    """`python -m module` takes no argument that the page does not name; `pytest file` is a file."""
    in_blocks = [line.partition("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    in_text = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    for code in filter(None, in_text + in_blocks):
        words = code.removesuffix(" --all").removesuffix(" -n auto").split()
        if "pytest" in words and len(words) > 1 and words[-1] != "pytest":
            files = [word for word in words if word.endswith(".py")]
            assert files and all((ROOT / file).is_file() for file in files), code
        module = re.fullmatch(r"(?:python -m )?(benchmarks\.\w+)", code)
        if module:
            needed = re.sub(r"\[[^]]*\]|\[.*?\.\.\.\]", "", usage(module[1])).strip(" ]\n")
            assert not needed, f"{code} needs {needed}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        name, _, heading = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


def test_the_readme_names_every_file_and_fits():
    """The table of files has every Python file at the root and every folder. The README has at most 200 lines."""
    table = PAGES["README.md"].partition("## Files\n")[2].partition("\n## ")[0]
    named = re.findall(r"\]\(([^)]+)\)", table)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    files = {top for top in tops if top.endswith(".py")}
    folders = {top for top in tops if (ROOT / top).is_dir() and not top.startswith(".")}
    assert files | folders <= set(named)
    assert PAGES["README.md"].count("\n") <= 200
