"""Our own tests, checked: every mistake of the catalogue, put into the model, turns at least one of them red."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from reference.mutants import MUTANTS
from tests import code_mutants
from tests.conftest import newer_transformers
from tests.mutation import RIGHT


@pytest.mark.slow
@newer_transformers
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that hold torch")
def test_every_mutant_turns_a_test_red():
    """And without a mistake they are green. (Half a minute on an idle machine; see tests/mutation.py.)"""
    done = subprocess.run([sys.executable, "-m", "tests.mutation"], cwd=Path(__file__).parent.parent, text=True,
                          capture_output=True)  # fmt: skip
    codes = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert [codes.pop(name, None) for name in RIGHT] == ["0"] * len(RIGHT), done.stdout + done.stderr
    assert codes == dict.fromkeys(MUTANTS, "1"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that hold torch")
def test_a_changed_operator_is_killed_or_reported(tmp_path, monkeypatch):
    """In a small file with one good test. The second run has nothing left to do."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tiny.py").write_text("def larger(a, b):\n    if a > b:\n        return a\n    return b\n")
    test = "from tiny import larger\n\n\ndef test_larger():\n    assert larger(1, 2) == larger(2, 1) == 2\n"
    (tmp_path / "tests" / "test_tiny.py").write_text(test)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(code_mutants, "ROOT", tmp_path)
    monkeypatch.setattr(code_mutants, "TESTS", ("tiny",))
    monkeypatch.setattr(gc, "freeze", lambda: None)
    for _ in range(2):
        assert code_mutants.main(["tiny.py", "--results", "results"]) == 0
    entries = [line.split("\t")[:3] for line in Path("results/tiny.txt").read_text().splitlines()]
    killed = ["killed", "tests/test_tiny.py::test_larger"]
    assert entries == [
        ["tiny.py:2:4: if a > b: return a  ->  if True: return a", *killed],
        ["tiny.py:2:4: if a > b: return a  ->  if False: return a", *killed],
        ["tiny.py:2:7: a > b  ->  a >= b", "survived", ""],
        ["tiny.py:2:7: a > b  ->  a <= b", *killed],
    ]
