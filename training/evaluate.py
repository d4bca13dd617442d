"""Bits per byte of a text: what a model needs, and what two compressors that know no words need."""

from __future__ import annotations

import lzma
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ministral import MinistralForCausalLM
from tokenizer import Tokenizer


@torch.inference_mode()
def model_bits(model: MinistralForCausalLM, tokenizer: Tokenizer, text: str, window: int, batch: int = 8) -> float:
    """Bits that the model needs to predict `text` after <s>. The text is read in overlapping windows of `window`
    tokens, half a window apart, each token scored once, where it has the longer context (at least half a window,
    except at the start)."""
    ids = torch.tensor(tokenizer.encode(text), device=model.device)
    half, total = window // 2, 0.0
    starts = list(range(0, max(len(ids) - half, 1), half))
    for first in range(0, len(starts), batch):
        group = starts[first : first + batch]
        rows = [ids[start : start + window] for start in group]
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # padding comes after, where causality hides it
        y = torch.nn.utils.rnn.pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
        for row, start in enumerate(group):
            y[row, : half - 1 if start else 0] = -100  # the previous window has scored these
        logits = model(x, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum").item()
    return total / math.log(2)


def bits_per_byte(model: MinistralForCausalLM, tokenizer: Tokenizer, texts: list[str], window: int) -> float:
    """Bits per byte over several texts together."""
    bits = sum(model_bits(model, tokenizer, text, window) for text in texts)
    return bits / sum(len(text.encode()) for text in texts)


def xz_bits_per_byte(train: str, test: str) -> float:
    """What `xz -9e` adds to its output when `test` follows `train`, a dictionary of 64 MiB over both."""

    def size(text: str) -> int:
        return len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    return 8 * (size(train + test) - size(train)) / len(test.encode())


def ngram_bits_per_byte(train: str, test: str, n: int = 5) -> float:
    """An n-gram model over bytes with Witten-Bell smoothing (Witten and Bell 1991), counts from `train`:

    p(c | h) = (count(hc) + kinds(h) * p(c | shorter h)) / (count(h) + kinds(h)), kinds(h) = different c after h,
    down to 1/256 for every byte. n is at most 7, so that an n-gram fits in 64 bits."""
    a, b = (np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in (train, test))
    p = np.full(len(b), 1 / 256)
    for order in range(1, n + 1):
        grams, counts = np.unique(_grams(a, order), return_counts=True)
        histories, first = np.unique(grams >> 8, return_index=True)
        totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))
        wanted = _grams(b, order)
        count = _look_up(grams, wanted, counts)
        total, kind = (_look_up(histories, wanted >> 8, values) for values in (totals, kinds))
        tail = p[order - 1 :]
        known = total > 0
        tail[known] = (count[known] + kind[known] * tail[known]) / (total[known] + kind[known])
    return float(-np.log2(p).mean())


def _grams(x: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Every n consecutive bytes as one number, most recent byte lowest."""
    out = np.zeros(len(x) - n + 1, np.int64)
    for i in range(n):
        out <<= 8
        out |= x[i : len(x) - n + 1 + i]
    return out


def _look_up(keys: NDArray[np.int64], wanted: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """values at the places where the sorted `keys` equal `wanted`, 0 where none does."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
