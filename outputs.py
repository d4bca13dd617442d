"""The results of a forward pass: how they are read, and the loss of a language model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import expect_classes, refuse_argument

Output = TypeVar("Output")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, rotary tables and softmax: float32 for 16-bit types; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------- results


def exportable(cls: type[Output]) -> type[Output]:
    """Register a dataclass with `torch.export`, so that an exported model can return it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.6 calls a deprecated function of its own
        torch.export.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__name__}")
    return cls


class ModelOutput:
    """A result that is read by name (`out.logits`, `out["logits"]`), by number or slice, or as a tuple (`to_tuple`).

    As in Transformers, fields that are None do not count: out[0] is the loss, or the logits if there are no labels. A
    loop goes over the names.
    """

    def _present(self: Any) -> dict[str, Any]:
        """The fields that are not None, in order."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}

    def keys(self) -> KeysView[str]:
        return self._present().keys()

    def values(self) -> ValuesView[Any]:
        return self._present().values()

    def items(self) -> ItemsView[str, Any]:
        return self._present().items()

    def get(self, name: str, default: Any = None) -> Any:
        return self._present().get(name, default)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values without names."""
        return tuple(self._present().values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._present()[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def __contains__(self, name: object) -> bool:
        return name in self._present()


def with_output_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `forward`: it takes `return_dict`, too, and output arguments that are None have the value of the
    configuration. `PreTrainedModel` wraps that of every model."""

    parameters = signature(forward).parameters
    names = list(parameters)[1:]
    takes_others = any(each.kind == each.VAR_KEYWORD for each in parameters.values())  # for an inner model

    @wraps(forward)
    def wrapped(self: Any, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        for name in ("output_hidden_states", "output_attentions"):
            # Only True is passed on, so that the configuration of an inner model can still ask for it.
            by_position = name in names[: len(args)]
            if not by_position and kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True
        for name in [name for name in kwargs if name not in names and not takes_others]:
            refuse_argument(name, kwargs.pop(name), f"arguments: {', '.join(names)}")
        if return_dict is None:
            return_dict = self.config.return_dict
        out = forward(self, *args, **kwargs)
        if return_dict or isinstance(out, tuple):
            return out
        return out.to_tuple()

    return wrapped


@exportable
@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """The result of a backbone.

    Attributes:
        last_hidden_state: (B, S, E), normed.
        past_key_values: the `KVCache`, which holds the new tokens too; None without a cache.
        hidden_states: num_hidden_layers + 1 tensors (B, S, E): the embeddings, then the output of each layer. The last
            one is normed, so it equals `last_hidden_state`.
        attentions: one (B, H, S, K) tensor of probabilities for each layer, keys in order of position.
    """

    last_hidden_state: Tensor
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exportable
@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """The result of a language model: `logits` (B, S or fewer, V), and `loss`, a scalar, if labels were given. The
    others are those of `BaseModelOutputWithPast`."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# -------------------------------------------------------------------------------------------------------- loss


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats of each token given the tokens before it.

    logits (B, S, V). labels (B, S) are the input ids, -100 where a token does not count; they are shifted by one here.
    The loss is the mean of those that count. With `num_items_in_batch` it is their sum divided by that number: a
    trainer that adds up the gradients of several batches gives the number of all their tokens.
    """
    expect_classes(labels, logits.shape[-1])
    targets = F.pad(labels.long().to(logits.device), (0, 1), value=-100)[:, 1:]
    logits = logits.to(at_least_float32(logits.dtype))
    logits, targets = logits.flatten(0, 1), targets.flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets, ignore_index=-100)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


def logits_and_loss(
    lm_head: nn.Module, out: BaseModelOutputWithPast, labels: Tensor | None, logits_to_keep: int | Tensor,
    num_items_in_batch: Tensor | int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The head on the positions to keep of a backbone's result: logits (B, S or fewer, V), and the loss if there are
    labels."""
    keep: Any = logits_to_keep
    if isinstance(keep, int):
        keep = slice(-keep, None)
    logits = lm_head(out.last_hidden_state[:, keep])
    if labels is None:
        return logits, None
    return logits, causal_lm_loss(logits, labels, num_items_in_batch)
