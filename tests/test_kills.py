"""Commands that are killed, 4 times each; 16 times with `--all` (tests/kills.py)."""

import os

import pytest

from tests.kills import COMMANDS, Kills

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


SLOW = pytest.param("training", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*(name for name in COMMANDS if name != "training"), SLOW])
def test_a_killed_command_leaves_the_old_version_or_the_new_one(request, tmp_path, name):
    kills = Kills(name, tmp_path)
    count = 16 if request.config.getoption("--all") else 4
    assert {kills.kill(number) for number in range(count)} <= {"old", "new", "finish", "too late"}
