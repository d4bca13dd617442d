"""Read a port's tensors in the shapes and layouts that dumps have, and bring them to the reference's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor

from checkpoint import half_split, interleave
from reference.trace import dimensions

# How many times the largest right score a mark is below 0, at least.
FAR_BELOW = 100.0
TRANSPOSED, SIZES_REVERSED = "dimensions in reverse order", "sizes in reverse order"
REVERSED = (TRANSPOSED, SIZES_REVERSED)
Rearranged = tuple[str, Tensor]  # by which rearrangement, in words, and the result


def as_dumped(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Iterator[Rearranged]:
    """A port's tensor without what dumps often have in addition.

    These are heads that repeat a mask or a key head, columns of a padded vocabulary, keys up to a round number, the
    numbers that are added to scores for a mask, and True for hidden.
    """
    dims = dimensions(name).split()
    more_keys = tensor.shape[-1:] > shape[-1:] and tensor.shape[-2:-1] == shape[-2:-1]
    if dims[-1:] == ["T"] and more_keys and tensor.numel() != math.prod(shape):  # and no heads that are joined
        for how, part in as_dumped(name, tensor[..., : shape[-1]], shape):
            yield joined(f"the first {shape[-1]} keys", how), part
    elif name.endswith(".mask"):
        yield from as_masks(tensor)
    elif name == "logits" and tensor.shape[-1:] > shape[-1:]:
        yield f"the first {shape[-1]} columns", tensor[..., : shape[-1]]
    else:
        if repeats_heads(name, tensor, shape):
            axis = dims.index("G")
            groups = tensor.reshape(*tensor.shape[:axis], shape[axis], -1, *tensor.shape[axis + 1 :])
            once = groups.narrow(axis + 1, 0, 1)
            if bool((groups == once).all()):
                yield "one of each repeated head", once.squeeze(axis + 1)
                return
        yield "", tensor


def as_masks(tensor: Tensor) -> Iterator[Rearranged]:
    """A mask as bool, True for visible; from numbers that are added to scores, and from True for hidden."""
    if tensor.ndim == 4 and bool((tensor == tensor[:, :1]).all()):
        tensor = tensor[:, 0]
    if tensor.is_floating_point() and bool((tensor < 0).any()):
        visible = tensor == 0
        yield "as added to scores", visible
    else:
        visible = tensor != 0
        yield "", visible
    yield "True is hidden", ~visible


def repeats_heads(name: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """True if a tensor has a multiple of the key heads that it should have."""
    if " G " not in dimensions(name) or tensor.ndim != len(shape):
        return False
    axis = dimensions(name).split().index("G")
    count, wanted = tensor.shape[axis], shape[axis]
    return count > wanted and count % wanted == 0


def rearranged(tensor: Tensor, shape: tuple[int, ...]) -> Iterator[Rearranged]:
    """The ways in which a tensor can be brought to a shape.

    These are: as it is, without or with a dimension of one, with its dimensions in another order, heads joined or
    split.
    """
    if tensor.shape == shape:
        yield "", tensor
    squeezed = tensor.squeeze()
    wanted = [n for n in shape if n != 1]
    same_size = tensor.numel() == math.prod(shape)
    if squeezed.ndim == len(wanted) <= 4:
        yield from transposed(squeezed, shape, skip_identity=tensor.shape == shape)
    if len(shape) >= 3 and squeezed.ndim == len(wanted) - 1 and same_size:  # (B, S, H * D) for (B, H, S, D)
        *batch, H, S, D = shape
        if squeezed.shape[-2:] == (S, H * D):
            yield "heads split", squeezed.reshape(*batch, S, H, D).transpose(-3, -2)
    if same_size and tensor.ndim != len(shape) and tensor.shape[-1:] != shape[-1:]:
        yield "last dimensions joined", tensor.reshape(shape)  # (B, S, H, D) for (B, S, H * D)
    if tensor.ndim == len(shape) - 1 > 1 and tensor.shape == (shape[0] * shape[1], *shape[2:]):
        yield "texts split", tensor.reshape(shape)  # (B * S, E) for (B, S, E), (B * H, S, D) for (B, H, S, D)
    if len(shape) >= 2 and squeezed.ndim == len(wanted) + 1 and same_size:
        heads = squeezed
        if heads.ndim >= 3:  # (H, D) has one token only
            heads = heads.transpose(-3, -2)
        yield "heads joined", heads.reshape(shape)  # (B, H, S, D) for (B, S, H * D)


def transposed(squeezed: Tensor, shape: tuple[int, ...], skip_identity: bool) -> Iterator[Rearranged]:
    """All orders of the dimensions of a tensor (which has none of one) that give a shape, dimensions of one aside."""
    wanted = [n for n in shape if n != 1]
    identity = tuple(range(squeezed.ndim))
    for axes in permutations(identity):
        if [squeezed.shape[axis] for axis in axes] != wanted:
            continue
        if axes != identity:
            yield f"transposed {list(axes)}", squeezed.permute(axes).reshape(shape)
        elif not skip_identity:
            yield "without dimensions of one", squeezed.reshape(shape)


def fits(
    name: str, tensor: Tensor, shape: tuple[int, ...], padding_mask: Tensor | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """All ways to bring a port's tensor to the reference's shape: how, the tensor, and which entries are given."""
    everything = torch.ones(shape, dtype=torch.bool)
    for axes, turned in axis_orders(tensor):
        for dumped, part in as_dumped(name, turned, shape):
            before = joined(axes, dumped)
            for how, fit in rearranged(part, shape):
                yield joined(before, how), fit, everything
            if name == "logits":
                yield from last_logits(before, part, shape, padding_mask)


def axis_orders(tensor: Tensor) -> Iterator[Rearranged]:
    """A tensor as it is, then with its dimensions in reverse order, as ggml counts them: [D, S, H, B] for (B, H, S, D).

    A dump of ggml's may be transposed, or only have the sizes of its dimensions in that order: the numbers lie as in
    (B, H, S, D), and the shape says [D, S, H, B].
    """
    yield "", tensor
    if tensor.ndim > 1:
        yield TRANSPOSED, tensor.permute(*reversed(range(tensor.ndim)))
        yield SIZES_REVERSED, tensor.reshape(tensor.shape[::-1])


def joined(*words: str) -> str:
    """The words that are not empty, with commas between them."""
    return ", ".join(word for word in words if word)


def last_logits(
    dumped: str, logits: Tensor, shape: tuple[int, ...], padding_mask: Tensor | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Logits of the last n tokens of each text, put to their places in (B, S, V): how, the tensor, and which of its
    entries are given. Nothing if the reference has no more tokens than that."""
    if len(shape) != 3 or logits.ndim > 3 or logits.shape[-1:] != shape[-1:]:
        return
    B, S, V = shape
    n = logits.numel() // (B * V)
    shapes: list[tuple[int, ...]] = [(B, n, V)]
    if n == 1:
        shapes.append((B, V))
    if B == 1:
        shapes += [(n, V), (V,)]
    if not 0 < n < S or logits.shape not in shapes:
        return
    last = torch.full((B,), S - 1)
    first_text = torch.zeros(B, dtype=torch.int64)
    if padding_mask is not None:
        last = torch.where(padding_mask, torch.arange(S), 0).amax(1)
        first_text = padding_mask.int().argmax(1)
    if bool((last - n + 1 < first_text).any()):  # a text is shorter
        return
    places = last[:, None] + torch.arange(1 - n, 1)  # (B, n)
    rows = torch.arange(B)[:, None]
    full = torch.zeros(shape, dtype=logits.dtype)
    full[rows, places] = logits.reshape(B, n, V)
    given = torch.zeros(shape, dtype=torch.bool)
    given[rows, places] = True
    tokens = "of the last token"
    if n > 1:
        tokens = f"of the last {n} tokens"
    yield joined(dumped, tokens), full, given


def in_other_layouts(name: str, tensor: Tensor, head_dim: int) -> Iterator[Rearranged]:
    """Other forms of a tensor: queries and keys with rotary pairs as neighbours, or as halves; scores before they are
    scaled."""
    if name.endswith(".scores") and head_dim:
        yield f"division by sqrt({head_dim})", tensor.double() / math.sqrt(head_dim)
    if not name.endswith((".q", ".k", "_rotated", ".q_scaled")):
        return
    D = tensor.shape[-1]
    rows = torch.arange(D)[:, None]
    yield "half-split -> interleaved", tensor[..., interleave(rows, 1)[:, 0]]
    yield "interleaved -> half-split", tensor[..., half_split(rows, 1)[:, 0]]


def hidden_keys(scores: Tensor, counted: Tensor, size: float) -> Tensor | None:
    """bool (B, S, T): the keys that a port's scores mark as hidden, which are those that it does not look at.

    A mark is the same for all heads: 0, NaN, -inf, or a number far below all scores, such as -3.4e38 or -10000. The
    result is None if there are no marks, or if a query would see no key.

    Args:
        scores: (B, H, S, T).
        counted: the same shape, False at padding.
        size: the largest absolute value of the right scores.
    """
    if scores.ndim != 4:
        return None
    marked = scores.isnan() | (scores == 0) | (scores < -FAR_BELOW * max(size, 1.0))
    hidden = marked.all(1)
    queries = counted.any(1).any(-1)  # (B, S)
    sees_nothing = hidden.all(-1) & queries
    if not bool(hidden.any()) or bool(sees_nothing.any()):
        return None
    return hidden
