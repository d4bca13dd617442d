"""Statistics of samples beside those of held-out texts: how the settings in `generation_config.json` were chosen."""

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

PROMPTS = (
    "To be, or not to be", "HAMLET.\n", "Shall I compare thee", "JULIET.\nO Romeo,", "Enter the King.\n",
)  # fmt: skip
LENGTH = 200  # tokens of a sample
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
SPEAKER = re.compile(r"(?:[A-Z][A-Z .]+|[A-Z][a-z]{1,6})\.")  # a speaker's name: "HAMLET.", "Ham."
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
    """The statistics of one text that COLUMNS names, each from 0 to 1.

    They are: distinct 4-grams (four words in a row) among all 4-grams; distinct words among all words; words that are
    in `vocabulary`; lines that are a speaker's name; and whether the text loops (a 4-gram occurs three times or more).
    """
    listed = words(text)
    grams = Counter(zip(listed, listed[1:], listed[2:], listed[3:]))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    known = sum(word in vocabulary for word in listed)
    speakers = sum(SPEAKER.fullmatch(line) is not None for line in lines)
    return (
        len(grams) / max(grams.total(), 1),
        len(set(listed)) / max(len(listed), 1),
        known / max(len(listed), 1),
        speakers / max(len(lines), 1),
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


def samples(
    model: MinistralForCausalLM, tokenizer: Tokenizer, count: int, settings: dict[str, Any]
) -> Iterator[str]:  # fmt: skip
    """`count` continuations of the prompts, with the seeds 0, 1, 2, ... for each prompt."""
    seeds = list(range(count // len(PROMPTS)))
    for prompt in PROMPTS:
        row = tokenizer.encode(prompt)
        ids = torch.tensor([row] * len(seeds), device=model.device)
        tokens = generate(model, ids, max_new_tokens=LENGTH, seed=seeds, **settings)
        for new in tokens[:, len(row) :].tolist():
            yield tokenizer.decode(new)


def report(model: MinistralForCausalLM, tokenizer: Tokenizer, count: int) -> None:
    """Print a table: passages of the test plays first, then samples under each of SETTINGS."""
    texts = corpus.load()
    vocabulary = set(words("\n".join(texts["train"])))

    def print_row(name: str, passages: Iterator[str]) -> None:
        statistics = torch.tensor([figures(text, vocabulary) for text in passages])
        means = "".join(f"{mean:>10.3f}" for mean in statistics.mean(0).tolist())
        print(f"{name:<{WIDTH}}{means}", flush=True)

    print(" " * WIDTH + "".join(f"{column:>10}" for column in COLUMNS))
    print_row("Hamlet and Twelfth Night", passages(tokenizer, texts["test"], count))
    for settings in SETTINGS:
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        name = name.replace("repetition_", "")
        print_row(name, samples(model, tokenizer, count, settings))
