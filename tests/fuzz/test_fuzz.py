"""20,000 hostile inputs with `--all`, a tenth of them without: each is read, or refused in one line."""

import pytest

from tests.fuzz.surfaces import SURFACES, run


@pytest.mark.parametrize("name", SURFACES)
def test_hostile_inputs_are_refused_in_one_line(request, name):
    _, cases = SURFACES[name]
    if not request.config.getoption("--all"):
        cases //= 10
    found = {run(name, number) for number in range(cases)}
    # Every id that a model writes is an answer, and a damaged cache is made again.
    assert "refused" in found or name in ("answers", "tokenizer cache") or cases < 60
    assert "accepted" in found or cases < 60


def test_a_fault_is_found(monkeypatch):
    """An error of another kind, and a message of two lines."""

    def fails(rng):
        raise [IndexError("x"), ValueError("a\nb"), ValueError("x" * 999)][rng.randrange(3)]

    monkeypatch.setitem(SURFACES, "broken", (fails, 9))
    for number in range(9):
        with pytest.raises((IndexError, AssertionError)):
            run("broken", number)
