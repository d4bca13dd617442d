"""Attention without masks, block by block: the entry "blockwise" of `ministral.ATTENTION`, for long prompts.

A mask for S queries and K keys is slow: it has S x K entries to write and to read, and the fastest kernels take no
mask. Here, a block of queries attends to at most three parts of its keys. Each part is visible to the whole block or
causal, so that no part needs a mask. Three queries at positions 7 to 9, in a sliding layer with a window of 6:

                edge     middle   own
         key    2 3 4    5 6      7 8 9       #: the query sees the key
    query 7     # # #    # #      # . .
          8     . # #    # #      # # .
          9     . . #    # #      # # #

    own     the keys of the block itself. A causal part.
    middle  keys that every query of the block sees. No key is hidden.
    edge    keys that leave the window within the block. Causal if the order of queries and keys is reversed.

A full layer has no edge. Each part returns its result and the log-sum-exps of its scores, which give the weights by
which the results are joined, as in FlashAttention (https://arxiv.org/abs/2205.14135).

A sliding layer costs (queries x window), not (queries x keys). Prompts of 4,096 and 32,768 tokens, in chunks of 512
through six layers (one full and two sliding, twice), were read 1.1 and 1.6 times as fast as with masks (float32, two
cores of an AMD EPYC).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Part = tuple[Tensor, Tensor]  # the result of one part of the keys (B, H, S, D), its log-sum-exps (B, H, S)


@dataclass(frozen=True)
class CausalWindow:
    """A rule that replaces a mask: a query sees the last `size` keys up to its own position. None: it sees all keys up
    to its own position."""

    size: int | None = None


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | CausalWindow, scaling: float, dropout: float
) -> tuple[Tensor, None]:
    """Attention of S new tokens to the keys of P earlier tokens and to their own keys.

    Args:
        q: (B, H, S, D).
        k, v: (B, G, P + S, D), in the order of positions. (In any order if S = 1 and the query sees all keys.)
        mask: which keys a query sees: a `CausalWindow`, or, for padding, bool (B or 1, 1, S, P + S), True at visible
            keys. With a bool mask, PyTorch's fused attention is used, without blocks.
        scaling: the factor of the scores.
        dropout: the probability of dropout. Must be 0 with a `CausalWindow`.

    Returns:
        The result (B, H, S, D), and None in the place of the probabilities, which are not kept.

    Raises:
        ValueError: dropout with a `CausalWindow`.
    """
    heads = q.shape[1]
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast, and from a cache with fewer digits, they may differ
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
    """The start and the end (exclusive) of each block of queries.

    A full layer needs one block. In a sliding layer, the queries whose windows reach back to the first key are one
    block, without an edge. Each other block has fewer queries than the window has keys. Then all its queries see the
    keys between edge and own, and the edge has as many keys as the block has queries, as a causal part must."""
    if window is None:
        return [(0, new)]
    all_visible = 0  # the number of queries that see all keys before them
    if past < window - 1:
        all_visible = min(window - past, new)
    bounds = {0, all_visible, new, *range(all_visible, new, max(window - 1, 1))}
    return list(pairwise(sorted(bounds)))


def attend_to_parts(
    q: Tensor, k: Tensor, v: Tensor, position: int, window: int | None, scaling: float
) -> Iterator[Part]:
    """Attention of a block q (B, H, S, D) to each part of its keys, one part at a time. k and v are (B, G, K, D);
    `position` is the index of the first query's own key in them."""
    B, H, S, D = q.shape
    G = k.shape[1]
    # The keys that the block sees: from `first` to `end` (exclusive). The parts own and edge are cut off below.
    first = 0
    if window is not None:
        first = max(position - window + 1, 0)
    end = position + S

    # Own. A single query needs no parts: its keys are all visible.
    if S > 1:
        own_k, own_v = (repeat_heads(x[:, :, position:end], H) for x in (k, v))
        yield attend(q, own_k, own_v, True, scaling)
        end = position

    # Edge, if the window of the last query begins after the first key.
    if S > 1 and window is not None and position + S > window:
        edge_k, edge_v = (repeat_heads(x[:, :, first : first + S], H).flip(2) for x in (k, v))
        out, logsumexp = attend(q.flip(2), edge_k, edge_v, True, scaling)
        yield out.flip(2), logsumexp.flip(2)
        first += S

    # Middle. The query heads that share a key/value head become rows of one head, so that no key is repeated.
    if end > first:
        rows = q.reshape(B, G, H // G * S, D)
        out, logsumexp = attend(rows, k[:, :, first:end], v[:, :, first:end], False, scaling)
        yield out.reshape(B, H, S, D), logsumexp.reshape(B, H, S)


def join(parts: Iterator[Part]) -> Tensor:
    """Attention to all keys (B, H, S, D): the mean of the parts' results, each weighted by its sum of exponentials."""
    joined, logsumexp = next(parts)
    for part, part_logsumexp in parts:
        weight = torch.sigmoid(part_logsumexp - logsumexp)[..., None]  # this part's share of both sums
        joined = torch.lerp(joined.to(weight.dtype), part.to(weight.dtype), weight)
        logsumexp = torch.logaddexp(logsumexp, part_logsumexp)
    return joined


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, G, K, D) -> (B, heads, K, D): neighbouring query heads share a key/value head."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


# ------------------------------------------------------------------------------------------------------- kernels


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> Part:
    """Attention of q (B, H, S, D) to one part of the keys, k and v (B, H, K, D), by the fastest kernel for these
    tensors. `causal` hides keys after the query, and needs S = K."""
    kernel = choose_kernel(q, k, v, causal)
    if kernel == "formula":
        return formula(q, k, v, causal, scaling)
    # `F.scaled_dot_product_attention` calls the same functions, but does not return the log-sum-exps.
    function = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    out, logsumexp, *_ = function(q, k, v, *OPTIONS[kernel], 0.0, causal, scale=scaling)
    S = q.shape[2]
    # "efficient_attention" pads the log-sum-exps to more than S rows, cuDNN's kernel adds a last dimension of size 1.
    return out, logsumexp.flatten(2)[:, :, :S]


# The arguments of the kernels between v and the dropout: a mask (None), and whether to return the log-sum-exps.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "flash_attention_for_cpu": (),
    "flash_attention": (),  # FlashAttention 2: 313 TFLOPS on an H200 (benchmarks/RESULTS.md)
    "efficient_attention": (None, True),  # the only one for float32
    "cudnn_attention": (None, True),  # 654 TFLOPS on an H200
}


def choose_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """A name of `OPTIONS`, or "formula".

    On a GPU it is the kernel that PyTorch selects for these tensors. The formula is used where PyTorch selects none of
    these kernels, where the size of a head is not a multiple of 8, and where gradients are needed: the kernels have no
    gradient of the log-sum-exps."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "formula"
    if q.device.type == "cpu":
        return "flash_attention_for_cpu"
    if not has_kernels(q.device) or q.shape[3] % 8 != 0:
        return "formula"
    # The values of `torch.nn.attention.SDPBackend`.
    names = {1: "flash_attention", 2: "efficient_attention", 3: "cudnn_attention"}
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal)
    return names.get(choice, "formula")


def has_kernels(device: torch.device) -> bool:
    """Whether PyTorch has kernels that return log-sum-exps on a device. (On AMD GPUs they have had another base.)"""
    return device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None)


def formula(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> Part:
    """Attention as it is defined, in float32 or float64, with S x K scores in memory. Arguments and results as
    `attend`. In 16 bits, rounded log-sum-exps would give probabilities whose sum is not 1."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(dtype), k.to(dtype).transpose(2, 3)) * scaling
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    logsumexp = scores.logsumexp(dim=-1)
    probs = (scores - logsumexp[..., None]).exp()
    return torch.matmul(probs, v.to(dtype)).to(q.dtype), logsumexp
