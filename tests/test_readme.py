"""The examples of README.md, CONTRIBUTING.md and docs/ run as they are written: Python blocks and command lines."""

import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest

import generate

ROOT = Path(generate.__file__).parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = [ROOT / "explorer", ROOT / "notebooks", *sorted((ROOT / "models").iterdir())]
OTHER_FILES = [ROOT / "benchmarks" / "RESULTS.md", *(path / "README.md" for path in FOLDERS if path.is_dir())]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES + OTHER_FILES}

# Beginnings of command lines that are not run here, and why.
NOT_RUN = {
    "pip install": "changes the environment; .ci/run does it",
    "pytest": "these tests",
    "python -m notebooks": "minutes; .ci/run does it",
    "python -m examples.verse": "minutes; test_heads.py runs it in short",
    "python -m examples.lora": "minutes; test_lora.py runs it in short",
    "python -m checkpoint merge": "needs an adapter; test_lora.py runs it",
    "python -m training": "minutes to hours",
    "python -m tests.fuzz": "minutes; tests/fuzz runs a part",
    "python -m tests.kills": "minutes; test_kills.py runs a part",
    "python -m tests.code_mutants": "an hour; test_mutants.py runs it on a small file",
    "python -m benchmarks": "minutes; the test of their usage is below",
    "python generate.py --model mistralai/": "needs published weights",
    "python -m checkpoint info mistralai/": "needs the network",
    "torchrun": "needs a directory of the reader's; test_tensor_parallel.py runs it",
    "vllm": "is another program",
    "hf": "needs an account",
    "python -m tests.processors": "minutes; .ci/run does it",
    "git worktree": "changes the repository",
    "python tests/equality.py": "minutes, and needs a second version",
    "python -m reference golden": "writes reference/golden; test_reference.py runs it",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_in_order(monkeypatch, working_copy, page):
    monkeypatch.chdir(working_copy)
    names = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, Python block {number}", "exec"), names)


@pytest.fixture
def working_copy(tmp_path):
    """A copy of this folder, in which commands may write."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def commands(page):
    """The command lines of a page that are run here."""
    lines = [line for line in "".join(blocks(page, "sh")).splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines if not line.startswith(tuple(NOT_RUN))]


def run_line(line, monkeypatch):
    """Run a command line in this process: `python` with a file or a module, and what `printf` writes into it."""
    given, _, python = line.rpartition(" | ")
    _, *words = shlex.split(python, comments=True)
    text = ""
    if given:
        text = subprocess.run(["bash", "-c", given], capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    with pytest.raises(SystemExit) as ended:
        if words[0] == "-m":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
        sys.exit(0)
    return ended.value.code


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_command_lines_run_in_order(working_copy, monkeypatch, capsys, page):
    """Each in this process, where PyTorch is imported. Other tests run the commands as processes of their own."""
    monkeypatch.chdir(working_copy)
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    for line in commands(page):
        assert run_line(line, monkeypatch) in (None, 0), f"{line}\n{capsys.readouterr().err}"


def test_the_examples_are_found():
    assert "generate(model, ids" in "".join(blocks("README.md", "python"))
    assert sum(len(commands(page)) for page in PAGES) >= 10 and len(commands("README.md")) >= 3


def usage(module, monkeypatch, capsys):
    """The usage of a module's command line, without its name."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert not ended.value.code, module
    return capsys.readouterr().out.partition("\n\n")[0].partition(module)[2]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_are_there(monkeypatch, capsys, page):
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
            needed = re.sub(r"\[[^]]*\]|\[.*?\.\.\.\]", "", usage(module[1], monkeypatch, capsys)).strip(" ]\n")
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
