"""Bits per byte of a text under a model, and under an n-gram model of its bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tokenizer import Tokenizer

Integers = NDArray[np.int64]


@torch.no_grad()
def model_bits(model: Any, tokenizer: Tokenizer, text: str, window: int, batch: int = 8) -> float:
    """Bits that the model needs to predict `text` after <s>.

    The text is read in windows of `window` tokens, which start half a window apart and so overlap. Each token is scored
    once, in the window where more text precedes it (at least half a window, except at the start)."""
    ids = torch.tensor(tokenizer.encode(text), device=model.device)
    half = window // 2
    total = 0.0
    starts = list(range(0, max(len(ids) - half, 1), half))
    for first in range(0, len(starts), batch):
        group = starts[first : first + batch]
        rows = [ids[start : start + window] for start in group]
        x = pad_sequence(rows, batch_first=True)  # padding comes last, so the causal mask hides it
        y = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
        for row, start in enumerate(group):
            if start > 0:
                y[row, : half - 1] = -100  # the previous window has scored these
        logits = model(x, use_cache=False, return_dict=True).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum")
        total += loss.item()
    return total / math.log(2)


def bits_per_byte(model: Any, tokenizer: Tokenizer, texts: list[str], window: int) -> float:
    """Bits per byte over several texts together."""
    bits = sum(model_bits(model, tokenizer, text, window) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return bits / size


def ngram_bits_per_byte(train: str, test: str, n: int = 5) -> float:
    """An n-gram model over bytes with Witten-Bell smoothing (Witten and Bell 1991), counts from `train`:

    p(c | h) = (count(hc) + kinds(h) * p(c | shorter h)) / (count(h) + kinds(h)), kinds(h) = different c after h,
    down to 1/256 for every byte. n is at most 7, so that an n-gram fits in 64 bits."""
    train_bytes, test_bytes = _bytes(train), _bytes(test)
    p = np.full(len(test_bytes), 1 / 256)
    for order in range(1, n + 1):
        # Counts in the training text: each n-gram, each history, and the different bytes after a history.
        grams, counts = np.unique(_grams(train_bytes, order), return_counts=True)
        histories, first = np.unique(grams >> 8, return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(grams)))

        # The same counts for every place of the test text.
        places = _grams(test_bytes, order)
        count = _look_up(grams, places, counts)
        total = _look_up(histories, places >> 8, totals)
        kind = _look_up(histories, places >> 8, kinds)

        # p(c | h) replaces p(c | shorter h) where the training text has the history h.
        known = total > 0
        p_shorter = p[order - 1 :]
        numerator = count + kind * p_shorter
        denominator = total + kind
        p_shorter[known] = numerator[known] / denominator[known]
    return float(-np.log2(p).mean())


def _bytes(text: str) -> Integers:
    """The bytes of a text."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def _grams(x: Integers, n: int) -> Integers:
    """Every n consecutive bytes as one number, the last byte in the lowest bits."""
    length = len(x) - n + 1
    out = np.zeros(length, np.int64)
    for i in range(n):
        out <<= 8
        out |= x[i : i + length]
    return out


def _look_up(keys: Integers, wanted: Integers, values: Integers) -> Integers:
    """The values at those of the sorted `keys` that equal `wanted`, and 0 where no key does."""
    index = np.searchsorted(keys, wanted)
    index = np.minimum(index, len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
