"""Samples beside held-out texts, in figures: how the settings in `generation_config.json` were chosen."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from generate import generate
from ministral import MinistralForCausalLM
from tokenizer import Tokenizer
from training import corpus

PROMPTS = ("To be, or not to be", "HAMLET.\n", "Shall I compare thee", "JULIET.\nO Romeo,", "Enter the King.\n")
LENGTH = 200  # tokens of a sample
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
SPEAKER = re.compile(r"(?:[A-Z][A-Z .]+|[A-Z][a-z]{1,6})\.")  # a line that holds a name only: "HAMLET.", "Ham."
GREEDY: dict[str, Any] = {"temperature": 0.0}
SETTINGS: tuple[dict[str, Any], ...] = (
    GREEDY,
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
)
COLUMNS = ("4-grams", "words", "known", "speakers", "loops")
WIDTH = 50  # of the first column


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text.lower())


def figures(text: str, vocabulary: set[str]) -> tuple[float, ...]:
    """One text in the figures of COLUMNS, each from 0 to 1: the share of distinct ones among its 4-grams (four words in
    a row) and among its words; the share of words in `vocabulary`; the share of lines that hold a speaker's name only;
    whether it loops (a 4-gram occurs three times or more).
    """
    found = words(text)
    grams = Counter(zip(found, found[1:], found[2:], found[3:]))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return (
        len(grams) / max(grams.total(), 1),
        len(set(found)) / max(len(found), 1),
        sum(word in vocabulary for word in found) / max(len(found), 1),
        sum(SPEAKER.fullmatch(line) is not None for line in lines) / max(len(lines), 1),
        float(max(grams.values(), default=0) >= 3),
    )


def passages(tokenizer: Tokenizer, texts: list[str], count: int) -> Iterator[str]:
    """Random pieces of LENGTH tokens."""
    ids = [tokenizer.encode(text, bos=False) for text in texts]
    draw = random.Random(0)
    for _ in range(count):
        work = draw.choice(ids)
        start = draw.randrange(len(work) - LENGTH)
        yield tokenizer.decode(work[start : start + LENGTH])


def samples(model: MinistralForCausalLM, tokenizer: Tokenizer, count: int, settings: dict[str, Any]) -> Iterator[str]:
    """`count` continuations of the prompts, the seeds being 0, 1, 2, ... for each prompt."""
    seeds = list(range(count // len(PROMPTS)))
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)] * len(seeds), device=model.device)
        rows = generate(model, ids, max_new_tokens=LENGTH, seed=seeds, **settings)
        yield from (tokenizer.decode(row) for row in rows[:, ids.shape[1] :].tolist())


def report(model: MinistralForCausalLM, tokenizer: Tokenizer, count: int) -> None:
    """Print a table: passages of the test plays first, then samples under each of SETTINGS."""
    texts = corpus.load()
    vocabulary = set(words("\n".join(texts["train"])))

    def row(name: str, found: Iterator[str]) -> None:
        means = torch.tensor([figures(text, vocabulary) for text in found]).mean(0).tolist()
        print(f"{name:<{WIDTH}}" + "".join(f"{mean:>10.3f}" for mean in means), flush=True)

    print(" " * WIDTH + "".join(f"{column:>10}" for column in COLUMNS))
    row("Hamlet and Twelfth Night", passages(tokenizer, texts["test"], count))
    for settings in SETTINGS:
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        row(name.replace("repetition_", ""), samples(model, tokenizer, count, settings))
