"""Bits per byte of a text under a model, and under an n-gram model of its bytes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from tokenizer import Tokenizer


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
    down to 1/256 for every byte. Where `train` does not have h, p(c | h) is p(c | shorter h)."""
    train_bytes = train.encode()
    test_bytes = test.encode()
    p = [1 / 256] * len(test_bytes)
    for order in range(1, n + 1):
        grams = Counter(train_bytes[end - order : end] for end in range(order, len(train_bytes) + 1))
        totals = Counter[bytes]()
        kinds = Counter[bytes]()
        for gram, count in grams.items():
            history = gram[:-1]
            totals[history] += count
            kinds[history] += 1
        for place in range(order - 1, len(test_bytes)):
            gram = test_bytes[place - order + 1 : place + 1]
            history = gram[:-1]
            if history in totals:
                p[place] = (grams[gram] + kinds[history] * p[place]) / (totals[history] + kinds[history])
    return -sum(map(math.log2, p)) / len(p)
