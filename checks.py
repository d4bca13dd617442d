"""Checks of arguments: a wrong value is refused in one line that says what was found and what is supported.

Types and shapes are checked always, values only where reading them costs nothing (`may_read`).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor


def may_read(tensor: Tensor) -> bool:
    """Whether a check may read the numbers of a tensor: on the CPU (another device would have to finish its work
    first), and not while `torch.compile` or `torch.export` traces the model, when there are no numbers yet."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_number(value: Any, kind: type, least: float, most: float = math.inf) -> bool:
    """Whether `value` is a finite number from `least` to `most`: an int for int, an int or a float for float. With
    `numbers.Integral` and `numbers.Real` those of NumPy are numbers, too."""
    kinds = (int, float) if kind is float else (kind,)
    of_kind = isinstance(value, kinds) and not isinstance(value, bool)
    return of_kind and least <= value <= most and value < math.inf


def is_size(value: object) -> bool:
    """Whether `value` is a whole number above 0."""
    return is_number(value, int, 1)


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers (of 8 to 64 bits)."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


# -------------------------------------------------------------------------------------------- any kind of argument


def expect_kind(name: str, value: object, kind: type | tuple[type, ...], said: str) -> None:
    """Raise ValueError unless the value is None or of the kind; `said` is that kind in words."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be {said}; found {type(value).__name__} {str(value)[:40]!r}")


def expect_tensor(name: str, value: object) -> None:
    """Raise ValueError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, as torch.tensor([[1, 2, 3]]) is; found {type(value).__name__}")


def expect(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless the value is a tensor of one of the shapes."""
    expect_tensor(name, tensor)
    if tensor.shape not in shapes:
        allowed = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {allowed}; found {tuple(tensor.shape)}")


def expect_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless a tensor is where the weights are (those on the meta device are still to come)."""
    if tensor.device != weight.device and not weight.is_meta:
        cure = f"move one of them: {name}.to(model.device)"
        raise ValueError(f"{name} is on {tensor.device}, the model on {weight.device}; {cure}")


def as_device(device: Any, device_map: Any = None) -> torch.device:
    """The device that an argument names, the CPU for None. `device_map` is another name of the argument.

    Raises:
        ValueError: no such device here, or both names with different values.
    """
    if device is not None and device_map not in (None, device):
        raise ValueError(f"device={device!r} and device_map={device_map!r} differ; give one of the two")
    wanted = device_map if device is None else device
    if wanted is None:
        return torch.device("cpu")
    try:
        found = torch.device(wanted)
        torch.empty(1, device=found)
    except Exception as error:  # of many kinds, one for each device
        reason = str(error).strip().partition("\n")[0]
        supported = "one device of this machine, such as 'cpu', 'cuda' or 'cuda:0' (a type is given as dtype=)"
        raise ValueError(f"device={wanted!r} is not supported ({reason}); supported: {supported}") from error
    return found


# --------------------------------------------------------------------------------------------- arguments of forward


def expect_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless these are token ids (B, S) of the vocabulary."""
    expect_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
        wanted = "(batch, tokens) of whole numbers (torch.int64 or torch.int32), not empty: at least one token"
        raise ValueError(f"input_ids must be {wanted}; found {tuple(input_ids.shape)} of {input_ids.dtype}")
    last = vocab_size - 1
    if may_read(input_ids) and not 0 <= input_ids.min() <= input_ids.max() <= last:
        raise ValueError(f"input_ids from {input_ids.min()} to {input_ids.max()}; allowed: 0 to {last}")


def expect_embeds(inputs_embeds: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless these are embeddings (B, S, E) of the kind that the weight (V, E) has."""
    expect_tensor("inputs_embeds", inputs_embeds)
    size = weight.shape[1]
    if inputs_embeds.ndim != 3 or inputs_embeds.numel() == 0 or inputs_embeds.shape[2] != size:
        found = tuple(inputs_embeds.shape)
        raise ValueError(f"inputs_embeds must be (batch, tokens, {size}), not empty; found {found}")
    expect_device("inputs_embeds", inputs_embeds, weight)
    converted = torch.is_autocast_enabled(weight.device.type)  # every product converts its inputs
    if inputs_embeds.dtype != weight.dtype and not converted:
        cure = f"inputs_embeds.to({weight.dtype})"
        raise ValueError(f"inputs_embeds of {inputs_embeds.dtype}, weights of {weight.dtype}; convert one: {cure}")


def as_padding_mask(attention_mask: Tensor, batch: int, length: int) -> Tensor:
    """`attention_mask` as bool (batch, length): True at text, False at padding. Floating-point 1 and 0 are taken.

    Raises:
        ValueError: no such mask.
    """
    supported = "(batch, tokens), earlier tokens in the cache included, 1 at text and 0 at padding"
    expect_tensor("attention_mask", attention_mask)
    if attention_mask.ndim == 4:
        packed = "packed texts need no mask, see position_ids"
        raise ValueError(f"attention_mask of 4 dimensions is not supported; supported: {supported} ({packed})")
    expect("attention_mask", attention_mask, (batch, length))
    if attention_mask.is_floating_point() and not torch.compiler.is_compiling():
        ones = attention_mask == 1
        additive = not (ones | (attention_mask == 0)).all() or not ones.any()
        if additive:  # 0 at text, -inf at padding: zeros alone would be read as nothing but padding
            found = f"{attention_mask.min():g} to {attention_mask.max():g}"
            raise ValueError(f"attention_mask of numbers from {found} is not supported; supported: {supported}")
    return attention_mask.bool()


def expect_positions(position_ids: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless these are positions (B or 1, S)."""
    expect("position_ids", position_ids, (batch, length), (1, length))
    if not is_whole(position_ids):
        raise ValueError(f"position_ids of {position_ids.dtype} are not supported; supported: whole numbers")


def warn_of_padding(input_ids: Tensor, attention_mask: Tensor | None, config: Any, ends: bool = False) -> None:
    """Warn where a row of a prompt begins with padding and no mask says so; with `ends`, where it ends with it, too.

    Padding after a text changes nothing before it, so only what goes on after the last token asks for `ends`. A
    pad_token_id that begins or ends texts as well says nothing."""
    pad, eos = config.pad_token_id, config.eos_token_id
    ending = eos if isinstance(eos, list) else [eos]
    if attention_mask is not None or pad is None or pad == config.bos_token_id or pad in ending:
        return
    edges = input_ids[:, [0, -1]] if ends else input_ids[:, :1]
    if (edges == pad).any():
        cure = "give attention_mask, 1 at text and 0 at padding"
        # One text from one line, so that Python shows it once.
        warnings.warn(f"a row is padded with pad_token_id {pad}, which is read as text; {cure}", stacklevel=1)


def expect_fit(kept: Tensor, new: Tensor) -> None:
    """Raise ValueError unless new keys or values (B, G, S, D) can be stored behind those in a cache."""
    if kept.shape[0] != new.shape[0]:
        raise ValueError(f"the cache holds a batch of {kept.shape[0]}, the input is a batch of {new.shape[0]}")
    if kept.dtype != new.dtype or kept.device != new.device or kept.shape[1] != new.shape[1]:
        sizes = [f"{x.shape[1]} heads of {x.dtype} on {x.device}" for x in (kept, new)]
        raise ValueError(f"the cache holds {sizes[0]}, the model makes {sizes[1]}; give each model its own cache")


# ----------------------------------------------------------------------------------------------------- labels


def expect_classes(labels: Tensor, count: int) -> None:
    """Raise ValueError unless labels are whole numbers from 0 to count - 1, or -100, which the losses ignore."""
    if not is_whole(labels):
        raise ValueError(f"labels of {labels.dtype}; allowed: whole numbers, torch.int64 for example")
    if may_read(labels) and not ((labels == -100) | (labels >= 0) & (labels < count)).all():
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"labels from {found}; allowed: 0 to {count - 1}, or -100 to ignore one")


def expect_labels(labels: Tensor | None, text: Tensor | None, logits_to_keep: int | Tensor) -> None:
    """Raise ValueError unless labels belong to the text, (B, S) ids or (B, S, E) embeddings, and all logits are kept
    for them."""
    indices = isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1 and is_whole(logits_to_keep)
    if not indices and not is_number(logits_to_keep, int, 0):
        found = f"logits_to_keep={logits_to_keep!r} is impossible"
        raise ValueError(f"{found}; allowed: 0 (all), a count, or indices in a tensor of one dimension")
    if labels is not None and isinstance(text, Tensor):
        expect("labels", labels, tuple(text.shape[:2]))
        if indices or logits_to_keep:
            raise ValueError("labels need all logits; leave logits_to_keep at 0")
