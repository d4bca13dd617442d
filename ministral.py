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
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
LAYER_TYPES = ("full_attention", "sliding_attention")
RopeTables = tuple[Tensor, ...]

# ---------------------------------------------------------------------------------------------- configuration


@dataclass
class MinistralConfig:
    """The numbers that define a Ministral. Fields and defaults are those of Transformers' `MinistralConfig`.

    `layer_types=None` means what Transformers makes of it: every layer slides when `sliding_window` is set, and
    none when it is not. The published 8B model mixes them; `MinistralConfig.published_layer_types(36)` is its
    pattern, one full layer before every three sliding ones. (Its config.json on the Hub leaves the pattern out,
    which gives the same results up to 32768 tokens.) `head_dim=None` means `hidden_size // num_attention_heads`.

    `rope_theta=x` is short for `rope_parameters={"rope_type": "default", "rope_theta": x}`; after construction both
    are filled in. `attn_implementation` is "sdpa" (PyTorch's fused attention) or "eager" (the formula written out).

    Raises:
        ValueError: a value is impossible; the message names the field, the value and what is allowed.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int | None = 4096  # a query sees this many keys, its own included
    attention_dropout: float = 0.0
    layer_types: list[str] | None = None
    attn_implementation: str = "sdpa"

    model_type: ClassVar[str] = "ministral"
    rope_types: ClassVar[tuple[str, ...]] = ("default",)
    # Other architectures that compute the same function, with the defaults in which they differ.
    same_function: ClassVar[dict[str, dict[str, Any]]] = {
        "mistral": {},
        "llama": {
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "sliding_window": None,
        },
    }

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "max_position_embeddings"),
        ):
            self._require_int(name, 1)
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse("num_key_value_heads", f"a divisor of num_attention_heads={self.num_attention_heads}")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._require_int("head_dim", 2)
        if self.head_dim % 2:
            self._refuse("head_dim", "an even number (RoPE rotates pairs)")
        if self.hidden_act not in ACTIVATIONS:
            self._refuse("hidden_act", f"one of {', '.join(ACTIVATIONS)}")
        if not self.rms_norm_eps > 0:
            self._refuse("rms_norm_eps", "a number above 0")
        if not self.initializer_range >= 0:
            self._refuse("initializer_range", "a number not below 0")
        if not 0 <= self.attention_dropout < 1:
            self._refuse("attention_dropout", "a number from 0 to below 1")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            self._refuse("pad_token_id", f"None, or an id below vocab_size={self.vocab_size}")
        if self.attn_implementation not in ATTENTION:
            self._refuse("attn_implementation", f"one of {', '.join(ATTENTION)}")
        if self.sliding_window is not None:
            self._require_int("sliding_window", 1)
        self._set_layer_types()
        self._set_rope_parameters()

    def _set_layer_types(self) -> None:
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if len(self.layer_types) != self.num_hidden_layers:
            self._refuse("layer_types", f"a list of num_hidden_layers={self.num_hidden_layers} names")
        if any(kind not in LAYER_TYPES for kind in self.layer_types):
            self._refuse("layer_types", f"a list of the names {', '.join(LAYER_TYPES)}")
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            self._refuse("sliding_window", "a number, because layer_types has sliding_attention")

    def _set_rope_parameters(self) -> None:
        rope = dict(self.rope_parameters or {})
        kind = rope.pop("type", None)
        rope.setdefault("rope_type", kind or "default")
        if kind is not None and rope["rope_type"] != kind:
            self._refuse("rope_parameters", "one rope type, not two ('type' and 'rope_type' differ)")
        theta = rope.setdefault("rope_theta", 10000.0 if self.rope_theta is None else self.rope_theta)
        if self.rope_theta is not None and self.rope_theta != theta:
            self._refuse("rope_theta", f"left out, or equal to rope_parameters['rope_theta']={theta}")
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 0:
            raise ValueError(f"rope_theta={theta!r} is impossible; allowed: a number above 0")
        self.rope_theta, self.rope_parameters = theta, rope
        if rope["rope_type"] not in self.rope_types:
            self._refuse("rope_parameters", f"rope_type {' or '.join(self.rope_types)} for {type(self).__name__}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            self._refuse("rope_parameters", "no partial_rotary_factor (every pair of a head is rotated)")

    def _require_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self._refuse(name, f"a whole number not below {least}")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r} is impossible; allowed: {allowed}")

    @staticmethod
    def published_layer_types(num_hidden_layers: int) -> list[str]:
        """The layers of Ministral-8B-Instruct-2410: one full, three sliding, repeated (in its params.json the
        window is the list [null, 32768, 32768, 32768])."""
        return ["sliding_attention" if layer % 4 else "full_attention" for layer in range(num_hidden_layers)]

    @classmethod
    def from_dict(cls: type[Config], d: dict[str, Any]) -> Config:
        """Build a configuration from a published config.json of either Transformers generation.

        `rope_theta` + `rope_scaling` (4.x) and `rope_parameters` (5.x) are both read. A foreign `model_type` is
        taken when it computes the same function, and refused with the reason when it does not.

        Raises:
            ValueError: another architecture, biases, a quantised checkpoint, or an impossible value.
        """
        if not isinstance(d, dict):
            raise ValueError(f"config.json must hold one JSON object; found {type(d).__name__}")
        model_type = d.get("model_type", cls.model_type)
        if model_type != cls.model_type and model_type not in cls.same_function:
            allowed = ", ".join([cls.model_type, *cls.same_function])
            raise ValueError(f"model_type {model_type!r} is not what {cls.__name__} computes; allowed: {allowed}")
        for key in ("attention_bias", "mlp_bias"):
            if d.get(key):
                raise ValueError(f"{key}={d[key]!r}: {cls.__name__} has no biases, so this is another function")
        if d.get("quantization_config"):
            method = d["quantization_config"].get("quant_method", "unknown")
            raise ValueError(f"quantized weights ({method}) are not supported; use the BF16 variant of the model")

        known = {field.name for field in fields(cls)} - {"attn_implementation"}
        values = {**cls.same_function.get(model_type, {}), **{k: v for k, v in d.items() if k in known}}
        if model_type == "llama":
            values["sliding_window"] = None  # LlamaConfig carries the key through, its attention never reads it
        rope = {**(d.get("rope_scaling") or {}), **(d.get("rope_parameters") or {})}
        if rope:
            values["rope_parameters"] = rope
        ignored = sorted(set(d) - known - HARMLESS_KEYS)
        if ignored:
            warnings.warn(f"config.json: ignored unknown keys {', '.join(ignored)}", stacklevel=2)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that Transformers 5 loads."""
        values = {key: value for key, value in asdict(self).items() if key not in ("attn_implementation", "rope_theta")}
        return {"model_type": self.model_type, **values}


Config = TypeVar("Config", bound=MinistralConfig)
# Keys of a config.json that do not change what the text model computes.
HARMLESS_KEYS = set(
    "architectures model_type torch_dtype dtype transformers_version _name_or_path auto_map rope_scaling attention_bias"
    " mlp_bias pretraining_tp quantization_config output_attentions output_hidden_states return_dict id2label label2id"
    " problem_type chunk_size_feed_forward is_encoder_decoder _attn_implementation_autoset num_labels".split()
)


# ---------------------------------------------------------------------------------------------------- results


@dataclass
class BaseModelOutputWithPast:
    """What `MinistralModel` returns. `hidden_states` has num_hidden_layers + 1 entries of shape (B, S, E): the
    embeddings, then the output of each layer, the last one normed (so it equals `last_hidden_state`).
    `attentions` has one (B, H, S, K) tensor of probabilities per layer, keys in order of position."""

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


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
    """`nn.Linear` without bias and without its own initialisation, which `init_weights` or a checkpoint replaces
    anyway. On the meta device that initialisation costs 1.7 s of lazy imports."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """`nn.Embedding` without its own initialisation (see `Linear`)."""

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

    def inverse_frequencies(self, dtype: torch.dtype) -> Tensor:
        """The angle per position of each of the D/2 pairs, in radians, on the CPU."""
        assert self.config.head_dim is not None and self.config.rope_theta is not None
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=dtype, device="cpu") / self.config.head_dim
        return 1.0 / (self.config.rope_theta**exponents)

    def attention_factor(self) -> float:
        """A factor on cosine and sine, and so, squared, on every attention score."""
        return 1.0

    def forward(self, x: Tensor, position_ids: Tensor) -> RopeTables:
        """position_ids (B or 1, S) -> cosines and sines, each (B or 1, 1, S, D) in the dtype of x."""
        dtype = at_least_float32(x.dtype)
        if (dtype, x.device) not in self._frequencies:
            self._frequencies[dtype, x.device] = self.inverse_frequencies(dtype).to(x.device)
        angles = position_ids[:, None, :, None].to(dtype) * self._frequencies[dtype, x.device]  # (B, 1, S, D/2)
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

    def __init__(self, sliding_window: int | None) -> None:
        self.window = sliding_window
        self.length = 0  # tokens seen, which in a sliding layer may be more than are kept
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def _reserve(self, like: Tensor, slots: int) -> None:
        """Make room for `slots` positions, at least doubling, so that appending stays cheap."""
        held = 0 if self.keys is None else self.keys.shape[2]
        if slots <= held:
            return
        capacity = max(slots, 2 * held, 64)
        if self.window is not None:
            capacity = min(capacity, self.window)
        shape = (like.shape[0], like.shape[1], capacity, like.shape[3])
        keys, values = like.new_empty(shape), like.new_empty(shape)
        if self.keys is not None and self.values is not None:
            keys[:, :, :held], values[:, :, :held] = self.keys, self.values
        self.keys, self.values = keys, values

    def key_positions(self, new: int, device: torch.device | None = None) -> Tensor:
        """(K,) absolute positions of the keys that the next `update` with `new` tokens will return."""
        end = self.length + new
        if self.window is None or end <= self.window:
            return torch.arange(end, device=device)
        if new > 1:
            return torch.arange(max(self.length - self.window + 1, 0), end, device=device)
        slots = torch.arange(self.window, device=device)
        return end - 1 - (end - 1 - slots) % self.window

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, G, S, D); return all those the new queries need, (B, G, K, D)."""
        if self.keys is not None and self.keys.shape[0] != k.shape[0]:
            raise ValueError(f"the cache holds a batch of {self.keys.shape[0]}, the input is a batch of {k.shape[0]}")
        start, new = self.length, k.shape[2]
        end, self.length = start + new, start + new
        if self.window is None or end <= self.window:  # nothing has left the window: slots are positions
            self._reserve(k, end)
            assert self.keys is not None and self.values is not None
            self.keys[:, :, start:end], self.values[:, :, start:end] = k, v
            return (k, v) if start == 0 else (self.keys[:, :, :end], self.values[:, :, :end])

        self._reserve(k, self.window)
        assert self.keys is not None and self.values is not None
        if new == 1:  # overwrite the one key that leaves the window; the order of keys does not matter
            slot = start % self.window
            self.keys[:, :, slot : slot + 1], self.values[:, :, slot : slot + 1] = k, v
            return self.keys, self.values
        past = torch.arange(max(start - self.window + 1, 0), start, device=k.device) % self.window
        all_k = torch.cat((self.keys[:, :, past], k), dim=2)  # W - 1 + S positions at most
        all_v = torch.cat((self.values[:, :, past], v), dim=2)
        kept = min(new, self.window)
        slots = torch.arange(end - kept, end, device=k.device) % self.window
        self.keys[:, :, slots], self.values[:, :, slots] = k[:, :, -kept:], v[:, :, -kept:]
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
    """

    def __init__(self, config: MinistralConfig) -> None:
        assert config.layer_types is not None
        self.layers = [
            LayerCache(config.sliding_window if kind == "sliding_attention" else None) for kind in config.layer_types
        ]

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return self.layers[0].length

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
        # The lowest number, not -inf: a row with nothing to see becomes uniform instead of NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = F.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(q.dtype)
    probs = F.dropout(probs, p=dropout)
    return torch.matmul(probs, v), probs


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """The same by PyTorch's fused kernel, which keeps no (S, K) matrix. mask None: causal, or all keys if S = 1."""
    (B, H, S, D), G = q.shape, k.shape[1]
    if S == 1:  # the heads of a group become rows of queries over their one key head: nothing is repeated
        q = q.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling).reshape(B, H, S, D), None
    gqa = mask is None and H > G and D <= 256  # fused grouping exists only without a mask
    if H > G and not gqa:
        k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
    causal = mask is None
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=gqa), None


ATTENTION = {"sdpa": sdpa_attention, "eager": eager_attention}


class MinistralAttention(nn.Module):
    """Grouped-query attention with rotary positions; no biases."""

    def __init__(self, config: MinistralConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
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
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


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

Model = TypeVar("Model", bound="PreTrainedModel")


@torch.no_grad()
def init_weights(module: nn.Module, std: float) -> None:
    """Normal(0, std) for every matrix in `module`, zeros for the padding embedding, as Transformers does. Norms start
    at one. On the meta device there is nothing to fill."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)) and not part.weight.is_meta:
            part.weight.normal_(0.0, std)
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                part.weight[part.padding_idx].zero_()


class PreTrainedModel(nn.Module):
    """What every model here can do besides computing: be initialised, read from a directory, written to one."""

    config_class: ClassVar[type[MinistralConfig]] = MinistralConfig
    base_model_prefix: ClassVar[str] = ""  # under which attribute the backbone sits; "" for the backbone itself

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def tie_weights(self) -> None:
        """Make tied parameters one tensor again, after they were replaced."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_hub_id: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
    ) -> Model:
        """Load a directory that holds config.json and safetensors weights, or a Hub id ("owner/name").

        Args:
            dtype: cast the weights; None keeps the type they are stored in.
            device: where to put them; None is the CPU, where weights that need no cast stay mapped to the file.
            attn_implementation: "sdpa" or "eager"; None takes the configuration's.

        Returns:
            The model in eval mode. The head is tied to the embeddings when the file holds no separate head.

        Raises:
            FileNotFoundError: no such directory or repository, or a file is missing in it.
            ValueError: not a configuration of this class; tensors missing, unexpected, misshapen or unreadable.
        """
        directory = checkpoint.find(path_or_hub_id)
        config = cls.config_class.from_dict(checkpoint.read_config(directory))
        if attn_implementation is not None:
            config = replace(config, attn_implementation=attn_implementation)
        with torch.device("meta"):
            model = cls(config)
        model._adopt(checkpoint.Checkpoint(directory), dtype, torch.device(device or "cpu"))
        return model.eval()

    def _adopt(self, files: checkpoint.Checkpoint, dtype: torch.dtype | None, device: torch.device) -> None:
        """Replace the parameters, which are on the meta device, one by one by those in the files."""
        head, table = "lm_head.weight", "model.embed_tokens.weight"
        wanted = dict(self.named_parameters(remove_duplicate=False))
        names = {self._own_name(name): name for name in files.names() if self.base_model_prefix or name != head}
        if head in wanted and self.config.tie_word_embeddings and head in names and table in names:
            if torch.equal(files.read(names[head]), files.read(names[table])):
                del names[head]  # stored twice, one tensor in memory
            else:
                warnings.warn(f"{head} differs from the embeddings although config.json ties them: not tied", stacklevel=3)
                self.config.tie_word_embeddings = False
        missing = wanted.keys() - names.keys() - ({head} if self.config.tie_word_embeddings else set())
        unexpected = names.keys() - wanted.keys()
        shapes = {name: files.shape(names[name]) for name in wanted.keys() & names.keys()}
        wrong = sorted(
            f"{name} is {list(shape)}, config.json asks for {list(wanted[name].shape)}"
            for name, shape in shapes.items()
            if shape != wanted[name].shape
        )
        for what, found in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("misshapen", wrong)):
            if found:
                more = f" and {len(found) - 8} more" if len(found) > 8 else ""
                raise ValueError(f"{files.directory}: {len(found)} tensors {what}: {', '.join(found[:8])}{more}")
        for name in shapes:
            tensor = files.read(names[name]).to(device=device, dtype=dtype)
            module = self.get_submodule(name.rpartition(".")[0])
            setattr(module, name.rpartition(".")[2], nn.Parameter(tensor))
        self.tie_weights()

    def _own_name(self, name: str) -> str:
        """The name that a stored tensor has in this class: backbone files lack the prefix, causal ones have it."""
        prefix = self.base_model_prefix and self.base_model_prefix + "."
        if not prefix:
            return name.removeprefix("model.")
        return name if name.startswith((prefix, "lm_head.")) else prefix + name

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, readable here and by Transformers. A tied head is not written
        twice. Each file appears complete or not at all.

        Raises:
            NotADirectoryError: `directory` exists and is a file.
        """
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        tensors = dict(self.named_parameters())  # leaves out the second name of a tied tensor
        checkpoint.write(directory, config, {name: tensor.detach() for name, tensor in tensors.items()})


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
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:
        """Run S new tokens through all layers.

        Args:
            input_ids: (B, S) token ids; or give `inputs_embeds` (B, S, E) instead.
            attention_mask: (B, past + S), nonzero for real tokens and 0 for padding. None: all are real.
            position_ids: (B or 1, S) rotary positions. None: past, past + 1, ... (padding counts; `generate` passes
                positions that skip it). Masks never depend on these, with one exception, Transformers' own:
                without mask and without cache, every jump in a row starts a new text that cannot see the
                ones before it (packed training sequences).
            past_key_values: the cache of the tokens before; it is extended in place.
            use_cache: return a cache for the next call; None takes the configuration's word.
            cache_position: (S,) if given, must be past, past + 1, ...: a cache has no gaps.
            output_hidden_states, output_attentions: also return what each layer put out, and its probabilities.

        Raises:
            ValueError: both or neither of ids and embeddings, a wrong shape or dtype, an id outside the vocabulary,
                or `output_attentions` on the sdpa path, which never holds the probabilities.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[1] == 0 or inputs_embeds.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be (batch, tokens, {self.config.hidden_size}) with at least one token;"
                f" found {tuple(inputs_embeds.shape)}"
            )
        if output_attentions and self.config.attn_implementation != "eager":
            raise ValueError("output_attentions needs attn_implementation='eager'; the fused kernel keeps none")
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = KVCache(self.config)

        B, S, _ = inputs_embeds.shape
        query_positions = torch.arange(past, past + S, device=inputs_embeds.device)
        if cache_position is not None and cache_position.tolist() != list(range(past, past + S)):
            raise ValueError(f"cache_position must be {past}..{past + S - 1} after {past} cached tokens")
        if attention_mask is not None:
            if attention_mask.shape != (B, past + S):
                raise ValueError(
                    f"attention_mask must be {(B, past + S)}, one entry per cached and new token;"
                    f" found {tuple(attention_mask.shape)}"
                )
            attention_mask = attention_mask.to(inputs_embeds.device).bool()
            attention_mask = None if attention_mask.all() else attention_mask
        packed = None
        if position_ids is None:
            position_ids = query_positions[None]
        else:
            if position_ids.shape not in ((B, S), (1, S)):
                raise ValueError(f"position_ids must be {(B, S)} or {(1, S)}; found {tuple(position_ids.shape)}")
            if attention_mask is None and past_key_values is None:
                packed = same_text(position_ids)

        masks = {
            kind: self._mask(kind, query_positions, past_key_values, attention_mask, packed)
            for kind in sorted(set(self.config.layer_types or ()))
        }
        tables = self.rotary_emb(inputs_embeds, position_ids)
        orders = self._key_orders(S, past_key_values) if output_attentions else {}

        x = inputs_embeds
        hidden_states, attentions = (x,), ()
        for kind, layer in zip(self.config.layer_types or (), self.layers):
            x, probs = layer(x, tables, masks[kind], past_key_values)
            if output_hidden_states:
                hidden_states += (x,)
            if output_attentions:
                attentions += (probs if kind not in orders else probs[..., orders[kind]],)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "input_ids must be (batch, tokens) of whole numbers with at least one token;"
                f" found {tuple(input_ids.shape)} of {input_ids.dtype}"
            )
        if input_ids.device.type == "cpu":  # elsewhere the check would wait for the device
            low, high = input_ids.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"input_ids from {low} to {high}; allowed: 0 to vocab_size-1={self.config.vocab_size - 1}")

    def _mask(
        self,
        kind: str,
        query_positions: Tensor,
        cache: KVCache | None,
        attention_mask: Tensor | None,
        packed: Tensor | None,
    ) -> Tensor | None:
        """The mask of all layers of one kind, or None where the fused kernel needs none."""
        window = self.config.sliding_window if kind == "sliding_attention" else None
        S, key_positions = len(query_positions), query_positions
        if cache is not None:
            key_positions = self._cached_layer(kind, cache).key_positions(S, query_positions.device)
        K = len(key_positions)
        allowed = packed if attention_mask is None else attention_mask[:, None, key_positions]  # (B, 1 or S, K)
        if self.config.attn_implementation == "sdpa" and allowed is None:
            # One query sees all the cache hands out; a first chunk that the window spares is causal. (At K = W no
            # key is hidden either, but Transformers builds a mask there, and that takes another kernel.)
            if S == 1 or (K == S and (window is None or K < window)):
                return None
        return make_attention_mask(query_positions, key_positions, window, allowed)

    def _cached_layer(self, kind: str, cache: KVCache) -> LayerCache:
        assert self.config.layer_types is not None
        return cache.layers[self.config.layer_types.index(kind)]

    def _key_orders(self, new: int, cache: KVCache | None) -> dict[str, Tensor]:
        """For each kind of layer, the order that sorts its keys by position (a ring hands them out rotated)."""
        if cache is None:
            return {}
        kinds = set(self.config.layer_types or ())
        return {kind: self._cached_layer(kind, cache).key_positions(new).argsort().to(self.device) for kind in kinds}


def same_text(position_ids: Tensor) -> Tensor | None:
    """Packed training sequences: positions (B or 1, S) that do not advance by one start a new text. Returns bool
    (B or 1, S, S), True where query and key belong to one text, or None when there is only one."""
    jumps = position_ids.diff(dim=1) != 1
    if not jumps.any():
        return None
    text = F.pad(jumps.cumsum(dim=1), (1, 0))  # (B or 1, S) number of the text each token belongs to
    return text[:, :, None] == text[:, None, :]


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it. logits (B, S, V); labels (B, S) are the input
    ids, -100 where a token does not count; the shift by one happens here."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(logits.shape[:-1])}, one for each position with logits; found {tuple(labels.shape)}"
        )
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.to(at_least_float32(logits.dtype)).flatten(0, 1), targets.flatten(), ignore_index=-100)


class MinistralForCausalLM(PreTrainedModel):
    """The backbone and the head that turns hidden states into logits over the vocabulary."""

    base_model_prefix = "model"
    model_class: ClassVar[type[MinistralModel]] = MinistralModel

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.tie_weights()
        else:
            init_weights(self.lm_head, config.initializer_range)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> CausalLMOutputWithPast:
        """The arguments of `MinistralModel.forward`, and:

        Args:
            labels: (B, S) ids to be predicted, -100 where none counts; gives `loss`.
            logits_to_keep: compute logits only for the last n positions (0: all), or for the positions in a 1-D
                tensor of indices.

        Raises:
            ValueError: as `MinistralModel.forward`, or labels that do not match the logits.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # (B, S or fewer, V)
        return CausalLMOutputWithPast(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
