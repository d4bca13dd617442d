"""Mutations of JSON and of bytes. All randomness comes from a `random.Random`."""

from __future__ import annotations

import copy
import random
from typing import Any

# Values that programs do not expect: wrong kinds, ends of ranges, texts that mean something elsewhere.
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5,
    64.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\n", "\x00", "\x1b[31m", "\ud800", "é" * 50, "x" * 20_000, "[INST]", "</s>", "[THINK]",
    "../../etc/passwd", "/dev/zero", "1e5", "-5", "true", "null", "yarn", "default", "sliding_attention", "bfloat16",
    "(a+)+$", "{", "[[",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], [1, "a"], {"": None}, {"type": "text"})


def hostile(rng: random.Random) -> Any:
    """A value that is probably wrong."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS))))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys: Any = ()
        if isinstance(container, dict):
            keys = list(container)
        elif isinstance(container, list):
            keys = range(min(len(container), 50))
        for key in keys:
            found.append((container, key))
            waiting.append(container[key])
    return found


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found or rng.random() < 0.01:
            return hostile(rng)
        container, key = rng.choice(found)
        change = rng.randrange(7)
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, dict):
            container[str(hostile(rng))[:100]] = container[key]
        elif change == 2 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif change == 3:
            other, other_key = rng.choice(found)
            container[key] = copy.deepcopy(other[other_key])
        elif change == 4:
            container[key] = [container[key]]
        else:
            container[key] = hostile(rng)
    return value


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A copy of some bytes, damaged in one to three places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randrange(min(len(data), 400) + 1) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 8, 100))
        change = rng.randrange(5)
        if change == 0:
            data = data[:start]
        elif change == 1:
            del data[start : start + length]
        elif change == 2:
            data[start:start] = rng.randbytes(length)
        elif change == 3:
            data[start : start + length] = bytes([rng.choice((0, 255, 48))]) * length
        elif start < len(data):
            data[start] ^= 1 << rng.randrange(8)
    return bytes(data)
