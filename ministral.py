"""Ministral (Ministral-8B-Instruct-2410) in plain PyTorch: the whole text model in one file, top to bottom.

A decoder-only transformer with grouped-query attention, rotary positions, RMSNorm, a gated MLP, and two kinds of
attention layer: "full_attention" sees every earlier token, "sliding_attention" only the last `sliding_window`
ones. Sources: RoPE https://arxiv.org/abs/2104.09864, GQA https://arxiv.org/abs/2305.13245, RMSNorm
https://arxiv.org/abs/1910.07467, SwiGLU https://arxiv.org/abs/2002.05202, sliding windows and the rolling cache
https://arxiv.org/abs/2310.06825. Names follow Transformers (`MinistralForCausalLM`), so weights move both ways.

Letters in the shape comments:

    B  sequences in the batch            H  query heads
    S  new tokens in this call           G  key/value heads (H is a multiple of G)
    K  keys a query may look at          D  size of one head
    E  hidden_size                       V  vocab_size

The order of operations and the places where a number is rounded to the weights' dtype are part of the
specification: they are what makes a forward pass equal to Transformers' to the last bit (tests/test_parity.py).
Normalisation, rotary tables and softmax are computed in float32, or in float64 when the weights are float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

import checkpoint
from checks import (
    as_device,
    as_padding_mask,
    expect_classes,
    expect_device,
    expect_embeds,
    expect_fit,
    expect_ids,
    expect_kind,
    expect_labels,
    expect_positions,
    expect_tensor,
    is_number,
    may_read,
    warn_of_padding,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu,
}
LAYER_TYPES = checkpoint.LAYER_TYPES  # full_attention, sliding_attention
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
RopeTables = tuple[Tensor, ...]
Config = TypeVar("Config", bound="PreTrainedConfig")
Output = TypeVar("Output")
Model = TypeVar("Model", bound="PreTrainedModel")


# ---------------------------------------------------------------------------------------------- configuration


@dataclass
class PreTrainedConfig:
    """What all configurations do: refuse impossible values, and be read from a file."""

    model_type: ClassVar[str]
    # Other model types that compute the same function, with the defaults in which they differ.
    same_function: ClassVar[dict[str, dict[str, Any]]] = {}
    source: ClassVar[str] = "config.json"

    def _check_common(self: Any, *sizes: str) -> None:
        """Check the fields named, which are sizes, and those that text and vision have in common."""
        for name in sizes:
            self._check(name, is_number(getattr(self, name), int, 1), "a whole number not below 1")
        dropout = self.attention_dropout
        for name, valid, allowed in (
            ("hidden_act", self.hidden_act in ACTIVATIONS, ", ".join(ACTIVATIONS)),
            ("initializer_range", is_number(self.initializer_range, float, 0), "a number not below 0"),
            ("attention_dropout", is_number(dropout, float, 0) and dropout < 1, "a number from 0 to below 1"),
            ("attn_implementation", self.attn_implementation in ATTENTION, ", ".join(ATTENTION)),
        ):
            self._check(name, valid, allowed)

    @classmethod
    def from_dict(cls: type[Config], d: dict[str, Any]) -> Config:
        """Build a configuration from a published config.json, or this part of one, of either Transformers generation
        (`rope_theta` and `rope_scaling`, or `rope_parameters`). A foreign `model_type` is taken when it computes the
        same function.

        Raises:
            ValueError: another architecture, biases, quantised weights, or an impossible value.
        """
        known = {field.name for field in fields(cls)} - {"attn_implementation"}
        values = checkpoint.config_fields(d, known, {cls.model_type: {}} | cls.same_function)
        try:
            return cls(**values)
        except TypeError as error:  # a list where a number belongs, and the like
            raise ValueError(f"{cls.source} holds a value of the wrong kind: {error}") from error

    def _check(self, name: str, valid: object, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(self, name)!r} is impossible; allowed: {allowed}")


@dataclass
class MinistralConfig(PreTrainedConfig):
    """The numbers that define a Ministral. Fields and defaults are those of Transformers' `MinistralConfig`.

    `layer_types=None` means what Transformers makes of it: every layer slides when `sliding_window` is set, and
    none when it is not. The published 8B model mixes them; `MinistralConfig.published_layer_types(36)` is its
    pattern, one full layer before every three sliding ones. (Its config.json on the Hub leaves the pattern out,
    which gives the same results up to 32768 tokens.) `head_dim=None` means `hidden_size // num_attention_heads`.

    `rope_theta=x` is short for `rope_parameters={"rope_type": "default", "rope_theta": x}`; after construction both
    are filled in. `attn_implementation` is "sdpa" (PyTorch's fused attention) or "eager" (the formula written out).

    `heads.py` reads the five fields before that one. Of num_labels, id2label and label2id, one is enough; none means
    two labels. `problem_type` is one of PROBLEM_TYPES, or None until the first labels tell.

    Raises:
        ValueError: a value is impossible; the message names the field, the value and what is allowed.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # None here and below is replaced on construction
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float = None  # type: ignore[assignment]
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    sliding_window: int | None = 4096  # a query sees this many keys, its own included
    attention_dropout: float = 0.0
    layer_types: list[str] = None  # type: ignore[assignment]
    num_labels: int = None  # type: ignore[assignment]
    id2label: dict[int, str] = None  # type: ignore[assignment]
    label2id: dict[str, int] = None  # type: ignore[assignment]
    problem_type: str | None = None
    classifier_dropout: float | None = None  # None is 0.1
    attn_implementation: str = "sdpa"

    model_type: ClassVar[str] = "ministral"
    rope_types: ClassVar[tuple[str, ...]] = ("default",)
    # What rope_parameters may hold, each with the lowest number allowed (None: not a number).
    rope_keys: ClassVar[dict[str, float | None]] = {"rope_type": None, "rope_theta": 1.0, "partial_rotary_factor": 1.0}
    unwritten: ClassVar[tuple[str, ...]] = ("attn_implementation", "rope_theta", "num_labels")  # not in a config.json
    same_function: ClassVar[dict[str, dict[str, Any]]] = {
        "mistral": {},
        "llama": {"intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048},
    }

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_common("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                           "num_attention_heads", "num_key_value_heads", "max_position_embeddings")  # fmt: skip
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self._set_rope_parameters()
        self.num_labels, self.id2label, self.label2id = checkpoint.label_maps(
            self.num_labels, self.id2label, self.label2id
        )
        heads, layers, kinds = self.num_attention_heads, self.num_hidden_layers, ", ".join(LAYER_TYPES)
        window, pad, ends = self.sliding_window, self.pad_token_id, self.eos_token_id
        dropout, kind = self.classifier_dropout, self.problem_type
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        for name, valid, allowed in (
            ("num_key_value_heads", heads % self.num_key_value_heads == 0, f"a divisor of {heads} attention heads"),
            ("head_dim", is_number(self.head_dim, int, 2) and self.head_dim % 2 == 0, "an even number above 0"),
            ("rms_norm_eps", is_number(self.rms_norm_eps, float, 1e-30), "a number above 0"),
            ("use_cache", isinstance(self.use_cache, bool), "true or false"),
            ("tie_word_embeddings", isinstance(self.tie_word_embeddings, bool), "true or false"),
            ("pad_token_id", pad is None or (is_number(pad, int, 0) and pad < self.vocab_size),
             f"None or an id below {self.vocab_size}"),
            ("eos_token_id", all(is_number(i, int, 0) and i < self.vocab_size for i in ends),
             f"None, an id below {self.vocab_size}, or a list of such ids"),
            ("sliding_window", window is None or is_number(window, int, 1), "None or a whole number not below 1"),
            ("layer_types", len(self.layer_types) == layers, f"num_hidden_layers={layers} names"),
            ("layer_types", set(self.layer_types) <= set(LAYER_TYPES), f"a list of the names {kinds}"),
            ("sliding_window", window or LAYER_TYPES[1] not in self.layer_types, "a number for sliding layers"),
            ("classifier_dropout", dropout is None or (is_number(dropout, float, 0) and dropout < 1),
             "None or a number from 0 to below 1"),
            ("problem_type", kind in (None, *PROBLEM_TYPES), f"None, {', '.join(PROBLEM_TYPES)}"),
            ("problem_type", kind != PROBLEM_TYPES[1] or self.num_labels > 1, "the two others, for num_labels=1"),
        ):
            self._check(name, valid, allowed)

    def _set_rope_parameters(self) -> None:
        self._check("rope_parameters", isinstance(self.rope_parameters, (dict, type(None))), "an object, or none")
        rope = dict(self.rope_parameters or {})
        older_name = rope.pop("type", None)
        kind = rope.setdefault("rope_type", older_name or "default")
        theta = rope.setdefault("rope_theta", 10000.0 if self.rope_theta is None else self.rope_theta)
        self._check("rope_theta", self.rope_theta in (None, theta), f"None, or rope_parameters' own, {theta}")
        self.rope_theta, self.rope_parameters = theta, rope
        self._check("rope_theta", is_number(theta, float, 1.0) and theta > 1, "a number above 1")
        self._check("rope_parameters", older_name in (None, kind), "'type' and 'rope_type' that agree")
        self._check("rope_parameters", kind in self.rope_types, f"rope_type {' or '.join(self.rope_types)}")
        whole = rope.get("partial_rotary_factor", 1.0) == 1.0
        self._check("rope_parameters", whole, "no partial_rotary_factor: every pair of a head is rotated")
        self._check("rope_parameters", rope.keys() <= self.rope_keys.keys(), f"keys {', '.join(self.rope_keys)}")
        for key, value in rope.items():
            least = self.rope_keys[key]
            if least is not None and value is not None and not is_number(value, float, least):
                raise ValueError(f"rope_parameters[{key!r}]={value!r}: allowed: a number not below {least}")

    def get_text_config(self) -> MinistralConfig:
        """This configuration: it has no other part."""
        return self

    @staticmethod
    def published_layer_types(num_hidden_layers: int) -> list[str]:
        """The layers of Ministral-8B-Instruct-2410: one full, three sliding, repeated (in its params.json the
        window is the list [null, 32768, 32768, 32768])."""
        return [LAYER_TYPES[layer % 4 > 0] for layer in range(num_hidden_layers)]

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that Transformers 5 loads. What concerns heads is in it only when it was set."""
        unnamed = checkpoint.label_maps()
        unset = {"id2label": unnamed[1], "label2id": unnamed[2], "problem_type": None, "classifier_dropout": None}
        values = {k: v for k, v in asdict(self).items() if k not in self.unwritten}
        return {"model_type": self.model_type} | {k: v for k, v in values.items() if k not in unset or v != unset[k]}


# ---------------------------------------------------------------------------------------------------- results


def exportable(cls: type[Output]) -> type[Output]:
    """Make a dataclass known to `torch.export`, so that an exported model can return it."""
    torch.export.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__name__}")
    return cls


@exportable
@dataclass
class BaseModelOutputWithPast:
    """What `MinistralModel` returns. `hidden_states` has num_hidden_layers + 1 entries of shape (B, S, E): the
    embeddings, then the output of each layer, the last one normed (so it equals `last_hidden_state`).
    `attentions` has one (B, H, S, K) tensor of probabilities per layer, keys in order of position."""

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exportable
@dataclass
class CausalLMOutputWithPast:
    """What `MinistralForCausalLM` returns: `logits` (B, S or fewer, V), `loss` a scalar when labels were given."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# ---------------------------------------------------------------------------------------------- building blocks


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, rotary tables and softmax: float32 for 16-bit types, float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """`nn.Linear`, by default without bias, and without its own initialisation, which `init_weights` or a checkpoint
    replaces."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """`nn.Embedding` without its own initialisation, which costs 1 s of lazy imports on the meta device."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned weight: x / sqrt(mean(x^2) + eps) * weight.

    The result is rounded to the input's dtype *before* the weight multiplies it; `F.rms_norm` rounds after, which
    differs in bfloat16. (..., E) -> (..., E)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(at_least_float32(x.dtype))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Turns positions into the cosines and sines by which queries and keys are rotated.

    Pair i of a head turns by the angle position * theta^(-2i/D). The frequencies are no buffer of the module: they
    are computed in float32 (float64) and stay so when the model is cast to bfloat16, because rounding them moves
    the angles of far positions by whole turns."""

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__()
        self.config = config
        self._frequencies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frequencies": {}}  # copies and pickles compute them anew

    def inverse_frequencies(self, dtype: torch.dtype) -> Tensor:
        """The angle per position of each of the D/2 pairs, in radians, on the CPU."""
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=dtype, device="cpu") / self.config.head_dim
        return 1.0 / (self.config.rope_theta**exponents)

    def attention_factor(self) -> float:
        """A factor on cosine and sine, and so, squared, on every attention score."""
        return 1.0

    def forward(self, x: Tensor, position_ids: Tensor) -> RopeTables:
        """position_ids (B or 1, S) -> cosines and sines, each (B or 1, 1, S, D) in the dtype of x."""
        dtype = at_least_float32(x.dtype)
        frequencies = self._frequencies.get((dtype, x.device))
        if frequencies is None:
            frequencies = self.inverse_frequencies(dtype).to(x.device)
            if not torch.compiler.is_compiling():  # a traced tensor has no numbers to keep
                self._frequencies[dtype, x.device] = frequencies
        angles = position_ids[:, None, :, None].to(dtype) * frequencies  # (B, 1, S, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, 1, S, D): the first and second half hold the same angles
        factor = self.attention_factor()
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the two halves of a head. This is the *half-split* layout of Transformers: pair i is
    (x[i], x[i + D/2]). Mistral's own files pair neighbours (x[2i], x[2i+1]) and need their rows permuted."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate every pair of q (B, H, S, D) and k (B, G, S, D) by its position's angle."""
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


# ------------------------------------------------------------------------------------------------------- masks


def make_attention_mask(
    query_positions: Tensor, key_positions: Tensor, sliding_window: int | None = None, allowed: Tensor | None = None
) -> Tensor:
    """Which query may look at which key: bool (B or 1, 1, S, K), True where it may.

    Everything is decided by absolute positions in the sequence (padding counted), never by indices into a tensor,
    so the same line serves a whole prompt, a chunk in the middle of it, and a ring buffer in any order:
    a key is visible when `key <= query` and, in a sliding layer, `query - key < sliding_window`: W keys, the
    query's own included (FlashAttention's `window_size=(W, 0)` is W + 1 keys). Seven positions, W = 3:

        full_attention               sliding_attention            sliding, a chunk of two queries
        query 0  # . . . . . .       query 0  # . . . . . .       that follows five cached tokens,
              1  # # . . . . .             1  # # . . . . .       of which the ring still has two:
              2  # # # . . . .             2  # # # . . . .
              3  # # # # . . .             3  . # # # . . .            key 3 4 5 6
              4  # # # # # . .             4  . . # # # . .       query 5  # # # .
              5  # # # # # # .             5  . . . # # # .             6  . # # #
              6  # # # # # # #             6  . . . . # # #

    Args:
        query_positions: (S,) positions of the new tokens.
        key_positions: (K,) positions of the keys.
        sliding_window: W, or None for full attention.
        allowed: bool, broadcastable to (B, S, K): False hides a key (padding, another packed text).
    """
    distance = query_positions[:, None] - key_positions[None, :]  # (S, K)
    mask = distance >= 0
    if sliding_window is not None:
        mask = mask & (distance < sliding_window)
    mask = mask[None] if allowed is None else mask & allowed
    return mask[:, None]


# ------------------------------------------------------------------------------------------------------- cache


class LayerCache:
    """Keys and values of one layer, each (B, G, capacity, D). Position p lives in slot p, or p % window."""

    def __init__(self, sliding_window: int | None, expected: int = 64) -> None:
        self.window = sliding_window
        self.expected = expected  # positions to make room for at first
        self.length = 0  # tokens seen, which in a sliding layer may be more than are kept
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def reserve(self, k: Tensor, v: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Make room for `slots` positions, at least doubling, so that appending stays cheap. (Under autocast, keys and
        values differ in dtype.)"""
        if self.keys is not None and self.values is not None and slots <= self.keys.shape[2]:
            return self.keys, self.values
        held = 0 if self.keys is None else self.keys.shape[2]
        capacity = max(slots, 2 * held, self.expected)
        if self.window is not None:
            capacity = min(capacity, self.window)
        shape = (k.shape[0], k.shape[1], capacity, k.shape[3])
        keys, values = k.new_empty(shape), v.new_empty(shape)
        if self.keys is not None and self.values is not None:
            keys[:, :, :held], values[:, :, :held] = self.keys, self.values
        self.keys, self.values = keys, values
        return keys, values

    def key_positions(self, new: int, device: torch.device | None = None) -> Tensor:
        """(K,) absolute positions of the keys that the next `update` with `new` tokens will return."""
        end = self.length + new
        if self.window is None or end <= self.window:
            return torch.arange(end, device=device)
        if new > 1:
            return torch.arange(max(self.length - self.window + 1, 0), end, device=device)
        slots = torch.arange(self.window, device=device)
        return end - 1 - (end - 1 - slots) % self.window

    def crop(self, max_length: int) -> None:
        """See `KVCache.crop`."""
        if not is_number(max_length, int, 0) or max_length > self.length:
            raise ValueError(f"max_length={max_length!r} is impossible; allowed: 0 to {self.length}, the tokens held")
        if max_length < self.length and self.window is not None and self.length > self.window:
            raise ValueError(f"keys before the last {self.window} are gone; a window that is full cannot be cropped")
        self.length = max_length

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, G, S, D); return all those the new queries need, (B, G, K, D)."""
        if self.keys is not None and self.values is not None:
            expect_fit(self.keys, k)
            expect_fit(self.values, v)
        start, new = self.length, k.shape[2]
        end, self.length = start + new, start + new
        if self.window is None or end <= self.window:  # nothing has left the window: slots are positions
            keys, values = self.reserve(k, v, end)
            keys[:, :, start:end], values[:, :, start:end] = k, v
            if start == 0:  # in the layout of Transformers' cache: strides choose the kernel, and that the last bit
                return k.contiguous(), v.contiguous()
            return keys[:, :, :end], values[:, :, :end]

        keys, values = self.reserve(k, v, self.window)
        if new == 1:  # overwrite the one key that leaves the window; the order of keys does not matter
            slot = start % self.window
            keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1] = k, v
            return keys, values
        past = torch.arange(max(start - self.window + 1, 0), start, device=k.device) % self.window
        all_k = torch.cat((keys[:, :, past], k), dim=2)  # W - 1 + S positions at most
        all_v = torch.cat((values[:, :, past], v), dim=2)
        kept = min(new, self.window)
        slots = torch.arange(end - kept, end, device=k.device) % self.window
        keys[:, :, slots], values[:, :, slots] = k[:, :, -kept:], v[:, :, -kept:]
        return all_k, all_v


class KVCache:
    """Keys and values of the tokens seen so far: an argument of `forward`, never state of the model.

    Full layers keep every position. Sliding layers keep a ring of W slots, and hand out W + S - 1 positions at
    most, so their memory does not grow with the text. Any way of cutting a text into chunks is allowed, chunks
    longer than the window included. All rows of a batch advance together; padding occupies slots like any token and
    is hidden by `attention_mask`. A ring with W = 4, fed a prompt of 6 tokens, then single tokens, then 3 at once:

        fed          returned to attention          slots afterwards (position p in slot p % 4)
        0 1 2 3 4 5  0 1 2 3 4 5  (the chunk)       4 5 2 3
        6            4 5 6 3      (slot order)      4 5 6 3      6 has overwritten 2
        7            4 5 6 7                        4 5 6 7      7 has overwritten 3
        8            8 5 6 7                        8 5 6 7      8 has overwritten 4
        9 10 11      6 7 8 9 10 11  (W-1 old, S)    8 9 10 11    oldest query 9 still sees 6 7 8 9

    Room is made when it is needed, doubling each time; `expected` positions (of those a layer keeps) from the start.
    Tensors are written in place, so gradients do not flow back through several calls.
    """

    def __init__(self, config: Any, expected: int = 64) -> None:
        expect_kind("config", config, PreTrainedConfig, "a configuration, such as model.config")
        config = config.get_text_config()
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        self.layers = [LayerCache(windows[kind], expected) for kind in config.layer_types]

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return self.layers[0].length

    def crop(self, max_length: int) -> None:
        """Forget all tokens but the first `max_length`, so that another text can follow those.

        Raises:
            ValueError: fewer are held, or a sliding layer has let go of keys that the next query would need; nothing is
                changed then.
        """
        for layer in sorted(self.layers, key=lambda layer: layer.window is None):  # those that may refuse come first
            layer.crop(max_length)

    def key_positions(self, config: MinistralConfig, new: int, device: torch.device) -> dict[str, Tensor]:
        """For each kind of layer, the (K,) positions of the keys that its updates with `new` tokens will return.

        Raises:
            ValueError: the cache was made for other layers.
        """
        if [layer.window for layer in self.layers] != [layer.window for layer in KVCache(config).layers]:
            raise ValueError("past_key_values was made for a configuration with other layers or another window")
        return {kind: layer.key_positions(new, device) for kind, layer in zip(config.layer_types, self.layers)}

    def nbytes(self) -> int:
        """Bytes reserved for keys and values."""
        held = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


# --------------------------------------------------------------------------------------------------- attention


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """Give every query head its key head: (B, G, K, D) -> (B, H, K, D), neighbours share. Written with `expand`
    because for one key head the result is a view, which takes another matmul kernel than a copy: with
    `repeat_interleave` the float32 result is off by 5e-5 from Transformers'."""
    B, G, K, D = x.shape
    return x[:, :, None].expand(B, G, groups, K, D).reshape(B, G * groups, K, D) if groups > 1 else x


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T * scaling) v, step by step. q (B, H, S, D), k and v (B, G, K, D) -> (B, H, S, D) and the
    probabilities (B, H, S, K)."""
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling  # (B, H, S, K)
    if mask is not None:
        # The lowest number, not -inf, keeps a row with nothing to see (padding) from becoming NaN. It is added, so that
        # gradients pass such a row as in Transformers, and clamped, because in float16 the sum may overflow to -inf.
        lowest = torch.finfo(scores.dtype).min
        bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)  # (B or 1, 1, S, K)
        scores = (scores + bias).clamp(min=lowest)
    probs = F.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(q.dtype)
    if dropout:
        probs = F.dropout(probs, dropout)
    return torch.matmul(probs, v), probs


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """The same by PyTorch's fused kernel, which keeps no (S, K) matrix. mask None: causal, or all keys if S = 1."""
    (B, H, S, D), G = q.shape, k.shape[1]
    if S == 1 and not q.requires_grad:
        # The heads of a group become rows of queries over their one key head: nothing is repeated. (The gradient of
        # this is rounded differently from Transformers'.)
        q = q.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling).reshape(B, H, S, D), None
    gqa = mask is None and H > G and D <= 256  # fused grouping exists only without a mask
    if H > G and not gqa:
        k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
    causal = mask is None and S > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=gqa), None


ATTENTION = {"sdpa": sdpa_attention, "eager": eager_attention}


class MinistralAttention(nn.Module):
    """Grouped-query attention with rotary positions; no biases."""

    def __init__(self, config: MinistralConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)

    def rotate(self, q: Tensor, k: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        """Apply positions to queries and keys."""
        cos, sin = tables
        return apply_rotary_pos_emb(q, k, cos, sin)

    def forward(
        self, x: Tensor, tables: RopeTables, mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, S, E) -> (B, S, E), and the probabilities (B, H, S, K) on the eager path."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (B, H, S, D)
        k = self.k_proj(x).view(heads).transpose(1, 2)  # (B, G, S, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, G, S, D)
        q, k = self.rotate(q, k, tables)
        if cache is not None:
            k, v = cache.layers[self.layer_idx].update(k, v)  # (B, G, K, D)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, probs = ATTENTION[self.config.attn_implementation](q, k, v, mask, self.head_dim**-0.5, dropout)
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:-1], -1)), probs


class MinistralMLP(nn.Module):
    """The gated feed-forward layer: down(act(gate(x)) * up(x)), (B, S, E) -> (B, S, E)."""

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MinistralDecoderLayer(nn.Module):
    """Attention, then MLP, each reading a normed copy of the residual stream and adding its result to it."""

    attention_class: ClassVar[type[MinistralAttention]] = MinistralAttention

    def __init__(self, config: MinistralConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = MinistralMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, tables: RopeTables, mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        attended, probs = self.self_attn(self.input_layernorm(x), tables, mask, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), probs


# ------------------------------------------------------------------------------------------------------ models


@torch.no_grad()
def init_weights(module: nn.Module, std: float) -> None:
    """Normal(0, std) for every matrix in `module`, zeros for biases and the padding embedding, as Transformers does.
    Norms start at one. On the meta device there is nothing to fill."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding, nn.Conv2d)) and not part.weight.is_meta:
            part.weight.normal_(0.0, std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.zero_()
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                part.weight[part.padding_idx].zero_()


class PreTrainedModel(nn.Module):
    """What every model here can do besides computing: be read from a directory and written to one."""

    config_class: ClassVar[type[Any]] = MinistralConfig
    base_model_prefix: ClassVar[str] = "model"  # under which attribute the backbone sits
    new_layer: ClassVar[str | None] = None  # a layer that files may lack, which is initialised then
    may_tie: ClassVar[Mapping[str, str]] = MappingProxyType({})  # {parameter: the one whose tensor it may share}

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.generation_config = checkpoint.GenerationConfig()  # for `generate`
        self._recompute = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps only the input of each layer and computes the rest again in the backward pass: less
        memory, one more forward pass, the bits of `use_cache=False` (https://arxiv.org/abs/1604.06174). Off until set.
        """
        return self._recompute

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module._recompute = on

    def _recomputes(self) -> bool:
        """Whether this forward pass does so: without gradients there is no backward pass."""
        return self._recompute and self.training and torch.is_grad_enabled()

    @property
    def base_model(self) -> PreTrainedModel:
        """The backbone: the part without a head, or this model itself if it has none."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    def tie_weights(self) -> None:
        """Make each tied parameter one tensor with the other, again, after tensors were replaced."""
        for name, other in self.may_tie.items() if self.may_tie and self.config.tie_word_embeddings else ():
            module, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(module), attribute, self.get_parameter(other))

    @classmethod
    def from_pretrained(
        cls: type[Model], path_or_hub_id: str | Path, dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None, attn_implementation: str | None = None,
        revision: str | None = None, **changes: Any,
    ) -> Model:  # fmt: skip
        """Load a directory that holds config.json and safetensors weights, or params.json and consolidated ones, or a
        Hub id ("owner/name"). A text model loads from the files of one with eyes, too, and leaves the eyes out.

        Args:
            dtype: cast the weights, to torch.bfloat16 or "bfloat16" for example; None or "auto" keeps the type they are
                stored in. (`torch_dtype` is another name of it.)
            device: where to put them; None is the CPU, where weights that need no cast stay mapped to the file.
                (`device_map` is another name of it.)
            attn_implementation: "sdpa" or "eager"; None takes the configuration's.
            revision: branch, tag or commit of a Hub id.
            changes: fields of the configuration to set, such as `num_labels=3`.

        Returns:
            The model in eval mode. The head is the one that is stored, and tied to the embeddings if none is; a warning
            says so where config.json says otherwise. FP8 weights become `dtype` (None: what config.json names, or
            bfloat16), with a warning. The classification layer of a model in `heads.py` is initialised, with a warning
            that names it, if the files have none. `generation_config` is the content of generation_config.json.

        Raises:
            FileNotFoundError: no such directory or repository, or a file is missing in it.
            ValueError: not a configuration of this class; tensors missing, unexpected, misshapen or unreadable.
        """
        dtype = checkpoint.as_dtype(dtype, changes.pop("torch_dtype", None))
        to = as_device(device, changes.pop("device_map", None))
        directory = checkpoint.find(path_or_hub_id, revision)
        fields_in_file = checkpoint.read_config(directory)
        without_eyes = "text_config" in fields_in_file and issubclass(cls.config_class, MinistralConfig)
        text = checkpoint.text_config(fields_in_file)
        fields_in_file = text if without_eyes else fields_in_file
        if unknown := sorted(changes.keys() - {field.name for field in fields(cls.config_class)}):
            raise ValueError(f"{', '.join(unknown)}: no argument here and no field of {cls.config_class.__name__}")
        labels = {"num_labels", "id2label", "label2id"}
        if labels & changes.keys() and changes.get("num_labels") != len(fields_in_file.get("id2label") or ()):
            fields_in_file = {k: v for k, v in fields_in_file.items() if k not in labels}  # new ones instead
        config = cls.config_class.from_dict(fields_in_file | changes)
        if attn_implementation is not None:
            config = replace(config, attn_implementation=attn_implementation)
        with torch.device("meta"):
            model = cls(config)
        files = checkpoint.Checkpoint(directory)
        new = {name for name, _ in model.named_parameters() if name.partition(".")[0] == cls.new_layer}

        def own_name(stored: str) -> str | None:
            name = checkpoint.text_name(stored) if without_eyes else stored
            return name and model.own_name(name)

        if new & {own_name(name) for name in files.names()}:
            new = set()
        said_tied = changes.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        tie = checkpoint.load_weights(model, files, own_name, model.may_tie, said_tied, new, dtype, to)
        if model.may_tie:
            config.tie_word_embeddings = tie
            model.generation_config = checkpoint.GenerationConfig.from_pretrained(directory)
        model.tie_weights()
        if cls.new_layer and new:
            warnings.warn(f"{directory} has no {', '.join(sorted(new))}: initialised, to be trained", stacklevel=2)
            layer = model.get_submodule(cls.new_layer).to_empty(device=model.device).to(model.dtype)
            init_weights(layer, config.initializer_range)
        return model.eval()

    def own_name(self, stored: str) -> str | None:
        """The name in this model of a stored tensor, None if this model does without: a backbone needs no head, a
        classifier no language model head. (Other heads are not left out in silence.) The files of a backbone lack the
        prefix under which heads keep it."""
        if stored.endswith("rotary_emb.inv_freq"):
            return None  # written by old versions of Transformers, computed here
        layer, _, rest = stored.partition(".")
        bare = self.base_model is self
        if layer in ("lm_head", "score", "qa_outputs"):
            return None if not hasattr(self, layer) and (bare or layer == "lm_head") else stored
        stored = rest if layer in ("model", "transformer") else stored
        return stored if bare else f"{self.base_model_prefix}.{stored}"

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write config.json, generation_config.json if there is something to say in it, and weights, readable here and
        by Transformers; larger models in shards. A tied tensor is written once. Each file appears whole or not at all.

        Raises:
            NotADirectoryError: `directory` exists and is a file.
        """
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        tensors = {name: tensor.detach() for name, tensor in self.named_parameters()}  # each tensor by its first name
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        checkpoint.write(directory, config, sizes, tensors.__getitem__, max_shard_bytes, self.generation_config)


class MinistralModel(PreTrainedModel):
    """The backbone: token ids or embeddings in, normed hidden states out."""

    layer_class: ClassVar[type[MinistralDecoderLayer]] = MinistralDecoderLayer
    rotary_class: ClassVar[type[RotaryEmbedding]] = RotaryEmbedding

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config)
        init_weights(self, config.initializer_range)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None, cache_position: Tensor | None = None,
        output_hidden_states: bool = False, output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Run S new tokens through all layers.

        Args:
            input_ids: (B, S) token ids; or give `inputs_embeds` (B, S, E) instead.
            attention_mask: (B, past + S), 1 at text and 0 at padding. None: all is text, and a batch that is
                padded is read as text, too (a warning says so where `pad_token_id` shows it).
            position_ids: (B or 1, S) rotary positions. None: past, past + 1, ... (padding counts; `generate` passes
                positions that skip it). Masks do not depend on these, with one exception, which is Transformers':
                without mask and without cache, every jump in a row starts a new text that cannot see the ones before
                it (packed training sequences). With a cache, which is the default (`use_cache=False` and
                `gradient_checkpointing` make none), or with a mask of ones, packed texts DO see each other.
            past_key_values: the cache of the tokens before; it is extended in place.
            use_cache: return a cache for the next call; None: as the configuration says (and none in training
                with `gradient_checkpointing`).
            cache_position: (S,) if given, must be past, past + 1, ...: a cache has no gaps.
            output_hidden_states, output_attentions: also return what each layer put out, and its probabilities.

        Raises:
            ValueError: both or neither of ids and embeddings, a wrong shape, dtype or device, an id outside the
                vocabulary, or `output_attentions` on the sdpa path, which never holds the probabilities.
        """
        x = self._embed(input_ids, inputs_embeds)
        B, S, _ = x.shape
        recompute = self._recomputes()
        expect_kind("past_key_values", past_key_values, KVCache, "a KVCache of ministral.py")
        if recompute and (use_cache or past_key_values is not None):
            raise ValueError("gradient_checkpointing runs each layer twice, which a cache does not allow; leave it out")
        # Whether there is a cache is decided here, once: masks, layers and the result only ask for past_key_values.
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache and not recompute:
            past_key_values = KVCache(self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(past, past + S, device=x.device)  # (S,) places in the sequence, padding counted
        if output_attentions and self.config.attn_implementation != "eager":
            raise ValueError("output_attentions needs attn_implementation='eager'; the fused kernel keeps none")
        if cache_position is not None and not torch.compiler.is_compiling():
            expect_tensor("cache_position", cache_position)
            if cache_position.tolist() != positions.tolist():
                raise ValueError(f"cache_position must be {past}..{past + S - 1} after {past} cached tokens")
        if input_ids is not None and past == 0 and may_read(input_ids):
            warn_of_padding(input_ids, attention_mask, self.config)

        real = packed = None
        if attention_mask is not None:
            real = as_padding_mask(attention_mask, B, past + S).to(x.device)
            real = None if not torch.compiler.is_compiling() and real.all() else real
        if position_ids is not None:
            expect_positions(position_ids, B, S)
            position_ids = position_ids.to(x.device)
            if attention_mask is None and past_key_values is None:
                packed = same_text(position_ids)
        tables = self.rotary_emb(x, positions[None] if position_ids is None else position_ids)
        keys = dict.fromkeys(self.config.layer_types, positions)  # kind of layer -> (K,) places of its keys
        if past_key_values is not None:
            keys = past_key_values.key_positions(self.config, S, x.device)
        masks = {kind: self._mask(kind, positions, keys[kind], real, packed) for kind in keys}

        hidden_states, attentions = [x], []
        for kind, layer in zip(self.config.layer_types, self.layers):
            if recompute:
                x, probs = run_again_in_backward(layer, x, tables, masks[kind], None, use_reentrant=False)
            else:
                x, probs = layer(x, tables, masks[kind], past_key_values)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(probs[..., keys[kind].argsort()])  # a ring hands its keys out rotated
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, S, E) embeddings of either input, checked."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            expect_ids(input_ids, self.config.vocab_size)
            expect_device("input_ids", input_ids, self.embed_tokens.weight)
            return self.embed_tokens(input_ids)
        expect_embeds(inputs_embeds, self.embed_tokens.weight)
        return inputs_embeds

    def _mask(
        self, kind: str, queries: Tensor, keys: Tensor, real: Tensor | None, packed: Tensor | None
    ) -> Tensor | None:
        """The mask for layers of one kind, or None where the fused kernel needs none."""
        window = self.config.sliding_window if kind == "sliding_attention" else None
        S, K = queries.shape[0], keys.shape[0]
        allowed = packed if real is None else real[:, None, keys]  # (B, 1 or S, K)
        # One query sees all keys that a cache hands out; a first chunk that the window spares is causal. (At K = W no
        # key is hidden either, but Transformers builds a mask there, and that takes another kernel.)
        needless = S == 1 or (S == K and (window is None or window > K))
        if needless and allowed is None and self.config.attn_implementation == "sdpa":
            return None
        return make_attention_mask(queries, keys, window, allowed)


def same_text(position_ids: Tensor) -> Tensor | None:
    """Packed training sequences: positions (B or 1, S) that do not advance by one start a new text. Returns bool
    (B or 1, S, S), True where query and key belong to one text, or None when there is only one text."""
    jumps = position_ids.diff(dim=1) != 1
    if not torch.compiler.is_compiling() and not jumps.any():
        return None
    text = F.pad(jumps.cumsum(dim=1), (1, 0))  # (B or 1, S) number of the text each token belongs to
    return text[:, :, None] == text[:, None, :]


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it. logits (B, S, V); labels (B, S) are the input
    ids, -100 where a token does not count; the shift by one happens here."""
    expect_classes(labels, logits.shape[-1])
    targets = F.pad(labels.long().to(logits.device), (0, 1), value=-100)[:, 1:]
    logits = logits.to(at_least_float32(logits.dtype))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def logits_and_loss(
    lm_head: nn.Module, hidden_states: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor
) -> tuple[Tensor, Tensor | None]:
    """The head on the positions to keep of (B, S, E): logits (B, S or fewer, V), and the loss if there are labels."""
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = lm_head(hidden_states[:, keep])
    return logits, None if labels is None else causal_lm_loss(logits, labels)


class MinistralForCausalLM(PreTrainedModel):
    """The backbone and the head that turns hidden states into logits over the vocabulary."""

    model_class: ClassVar[type[MinistralModel]] = MinistralModel
    may_tie = MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.tie_weights()
        else:
            init_weights(self.lm_head, config.initializer_range)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        cache_position: Tensor | None = None, logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False, output_attentions: bool = False,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """The arguments of `MinistralModel.forward`, and:

        Args:
            labels: (B, S) ids to be predicted, -100 where none counts; gives `loss`.
            logits_to_keep: compute logits only for the last n positions (0: all), or for the positions in a 1-D
                tensor of indices.

        Raises:
            ValueError: as `MinistralModel.forward`, or labels that do not match the logits.
        """
        expect_labels(labels, input_ids if input_ids is not None else inputs_embeds, logits_to_keep)
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache_position,
            output_hidden_states, output_attentions,
        )  # fmt: skip
        logits, loss = logits_and_loss(self.lm_head, out.last_hidden_state, labels, logits_to_keep)
        return CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
