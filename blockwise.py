"""Attention without masks, block by block: the entry "blockwise" of `ministral.ATTENTION`, for long prompts.

A mask for S queries and K keys is slow: it has S x K entries, and the fastest kernels take none. Almost all of its
entries are equal. So a block of queries attends to at most three parts of its keys, and no part needs a mask. Three
queries, positions 7 to 9, in a sliding layer with a window of 6:

                edge     middle   own
         key    2 3 4    5 6      7 8 9
    query 7     # # #    # #      # . .       edge: these keys leave the window within the block. In reversed order,
          8     . # #    # #      # # .             the part is causal.
          9     . . #    # #      # # #       middle: every query sees these keys.
                                              own: the keys of the block itself. The part is causal.

A full layer has no edge. Each part gives the logarithm of its sum of exponentials, by which the results are joined, as
in FlashAttention (https://arxiv.org/abs/2205.14135).

A sliding layer costs (queries x window), not (queries x keys). Prompts of 4,096 and 32,768 tokens, in chunks of 512
through one full and two sliding layers, repeated, were read 1.1 and 1.6 times as fast as with masks (two cores of an AMD
EPYC, float32).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Part = tuple[Tensor, Tensor]  # results (B, H, S, D), and logarithms of the sums of exponentials (B, H, S)


@dataclass(frozen=True)
class CausalWindow:
    """The rule by which a query sees a key, in the place of a mask: the key is not later, and it is one of the last
    `size` up to the query. None: of all."""

    size: int | None = None


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | CausalWindow, scaling: float, dropout: float
) -> tuple[Tensor, None]:
    """Attention of S new tokens to P earlier keys and to their own.

    Args:
        q: (B, H, S, D).
        k, v: (B, G, P + S, D), in the order of positions. (For one query, which sees all of them, in any order.)
        mask: the rule. With a bool mask (B or 1, 1, S, P + S), as for padding, this is PyTorch's fused attention.
        scaling: factor of the scores.
        dropout: 0 with a rule.

    Returns:
        (B, H, S, D), and None for the probabilities, which are not kept.

    Raises:
        ValueError: dropout with a rule.
    """
    heads = q.shape[1]
    if isinstance(mask, Tensor):
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling), None
    if dropout:
        conflict = "with attn_implementation='blockwise', which has no dropout"
        raise ValueError(f"attention_dropout={dropout} {conflict}; use 'sdpa'")
    new = q.shape[2]
    past = k.shape[2] - new
    blocks = []
    for start, end in query_blocks(past, new, mask.size):
        parts = attend_to_parts(q[:, :, start:end], k, v, past + start, mask.size, scaling)
        blocks.append(join(parts).to(q.dtype))
    if len(blocks) == 1:
        return blocks[0], None
    return torch.cat(blocks, dim=2), None


def query_blocks(past: int, new: int, window: int | None) -> list[tuple[int, int]]:
    """The first query of each block, and the one after its last.

    In a sliding layer, the queries that see all keys are one block. The others are in blocks that are shorter than the
    window, so that no query sees keys that only a part of the block sees, and the edge is a square."""
    if window is None:
        return [(0, new)]
    all_visible = min(max(window - 1 - past, 0), new)
    bounds = {0, all_visible, new, *range(all_visible, new, max(window - 1, 1))}
    return list(pairwise(sorted(bounds)))


def attend_to_parts(
    q: Tensor, k: Tensor, v: Tensor, position: int, window: int | None, scaling: float
) -> Iterator[Part]:
    """The parts of a block q (B, H, S, D), one at a time. `position` is that of its first query in k and v."""
    B, H, S, D = q.shape
    G = k.shape[1]
    first, last = 0, position + S  # the keys that the block sees
    if window is not None:
        first = max(position - window + 1, 0)

    if S > 1:
        last = position
        own = [repeat_heads(x[:, :, position : position + S], H) for x in (k, v)]
        yield attend(q, own[0], own[1], True, scaling)
    if S > 1 and window is not None and position + S > window:
        edge = [repeat_heads(x[:, :, first : first + S], H).flip(2) for x in (k, v)]
        out, total = attend(q.flip(2), edge[0], edge[1], True, scaling)
        yield out.flip(2), total.flip(2)
        first += S
    if last > first:
        # The heads of a group become rows of queries over one key/value head, so nothing is repeated.
        rows = q.reshape(B, G, H // G * S, D)
        out, total = attend(rows, k[:, :, first:last], v[:, :, first:last], False, scaling)
        yield out.reshape(B, H, S, D), total.reshape(B, H, S)


def join(parts: Iterator[Part]) -> Tensor:
    """Attention to all keys from that to each part: a weighted mean, by the parts' sums of exponentials."""
    joined, total = next(parts)
    for out, more in parts:
        weight = torch.sigmoid(more - total)[..., None]
        joined = torch.lerp(joined.to(weight.dtype), out.to(weight.dtype), weight)
        total = torch.logaddexp(total, more)
    return joined


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, G, K, D) -> (B, heads, K, D): neighbouring query heads share a key/value head."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


# ------------------------------------------------------------------------------------------------------- kernels


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> Part:
    """Attention of q (B, H, S, D) to one part of the keys, k and v (B, H, K, D), by the fastest kernel for these
    tensors. `causal` needs S = K."""
    kernel = choose_kernel(q, k, v, causal)
    if kernel == "formula":
        return formula(q, k, v, causal, scaling)
    # `F.scaled_dot_product_attention` calls the same functions, but returns no sums.
    function = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    out, total, *_ = function(q, k, v, *OPTIONS[kernel], 0.0, causal, scale=scaling)
    S = q.shape[2]
    return out, total.flatten(2)[:, :, :S]  # one kernel fills up the rows, and cuDNN's adds a dimension of size 1


# Arguments of the kernels before the dropout: a mask, and whether they return the sums.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "flash_attention_for_cpu": (),
    "flash_attention": (),  # FlashAttention 2: 313 TFLOPS on an H200
    "efficient_attention": (None, True),  # also for float32
    "cudnn_attention": (None, True),  # 654 TFLOPS on an H200
}


def choose_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """A name of `OPTIONS`, or "formula".

    On a GPU, the kernel that PyTorch takes for these tensors. The formula is for what that does not cover, for sizes of
    a head that are no multiple of 8, and for gradients (the kernels have none of the sums)."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "formula"
    if q.device.type == "cpu":
        return "flash_attention_for_cpu"
    if q.device.type != "cuda" or q.shape[3] % 8 != 0:
        return "formula"
    names = {1: "flash_attention", 2: "efficient_attention", 3: "cudnn_attention"}  # as in `torch.nn.attention`
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal)
    return names.get(choice, "formula")


def formula(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> Part:
    """The definition, with S x K scores in memory."""
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    total = scores.logsumexp(dim=-1)
    weights = (scores - total[..., None]).exp()
    return torch.matmul(weights, v), total
