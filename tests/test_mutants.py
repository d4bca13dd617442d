"""Our own tests, checked: every mistake of the catalogue, put into the model, turns at least one of them red."""

import subprocess
import sys
from pathlib import Path

import pytest

from reference.mutants import MUTANTS
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
