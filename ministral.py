"""Ministral (Ministral-8B-Instruct-2410) in plain PyTorch: the whole text model in one file.

A decoder-only transformer with grouped-query attention, rotary positions, RMSNorm and a gated MLP. In a
"full_attention" layer a token sees all tokens up to itself, in a "sliding_attention" layer only the last
W = `sliding_window` of them. The parts come first; `MinistralModel.forward`, near the end, calls them in order.
`pretrained.py` loads and saves models, `checks.py` refuses wrong arguments.

Sources: RoPE https://arxiv.org/abs/2104.09864, GQA https://arxiv.org/abs/2305.13245, RMSNorm
https://arxiv.org/abs/1910.07467, SwiGLU https://arxiv.org/abs/2002.05202, sliding windows and the rolling cache
https://arxiv.org/abs/2310.06825. Names are those of Hugging Face's Transformers. Letters in the shape comments:

    B  sequences in the batch            H  query heads
    S  new tokens in this call           G  key/value heads (H is a multiple of G)
    K  keys given to attention           D  size of one head
    E  hidden_size                       V  vocab_size

The order of operations and the places where a number is rounded to the weights' dtype are part of the specification:
they make a forward pass equal to Transformers' to the last bit (tests/test_parity.py). Norms, rotary tables and softmax
are computed in float32, or in float64 if the weights are float64.

Other files rely on names here (tests/test_layout.py): `fast.py` reads the cache and the submodules of a layer, and
`reference/mutants` replaces `F`, `ATTENTION`, `repeat_kv`, `apply_rotary_pos_emb`, `SlidingLayerCache.update`, `_mask`
and `_choose_cache` of `MinistralModel`, and `forward` of `RMSNorm`, `RotaryEmbedding`, `MinistralAttention`,
`MinistralMLP`, `MinistralForCausalLM`; it calls `MinistralAttention.rotate`, `RotaryEmbedding.inverse_frequencies`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
from blockwise import CausalWindow, blockwise_attention
from outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, at_least_float32, logits_and_loss
from pretrained import ACTIVATIONS, Embedding, FrequencyCache, Linear, PreTrainedConfig, PreTrainedModel

Mask = Any  # bool, True where a query may look at a key; None, or a `CausalWindow`: see `MinistralModel._mask`
RopeTables = tuple[Tensor, ...]  # cosines and sines of rotary positions; Ministral 3 adds a scale for queries
Attended = tuple[Tensor, Tensor | None]  # the result of attention, and its probabilities if it keeps them


# ---------------------------------------------------------------------------------------------- configuration
@dataclass
class MinistralConfig(PreTrainedConfig):
    """The sizes and settings of a Ministral. Fields and defaults are those of Transformers' `MinistralConfig`.

    `layer_types=None` makes every layer a sliding one if `sliding_window` is set, and a full one if not. The published
    8B model mixes the two: `published_layer_types(36)`. (Its config.json on the Hub lacks the pattern, so all layers
    slide when it is loaded. Up to 32768 tokens, its window, the result is the same.) `head_dim=None` is
    `hidden_size // num_attention_heads`. `rope_theta=x` is short for `rope_parameters={"rope_type": "default",
    "rope_theta": x}`; after construction both are set. `attn_implementation` is "sdpa" (PyTorch's fused attention),
    "eager" (step by step) or "blockwise" (`blockwise.py`). Fields from `num_labels` on are those of `heads.py`.

    Raises: ValueError for an impossible value; the message has the field, the value and what is allowed.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # None in a field marked so is replaced on construction
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
    classifier_dropout: float | None = None  # None means 0.1
    attn_implementation: str = "sdpa"

    model_type: ClassVar[str] = "ministral"
    reads_text_config: ClassVar[bool] = True  # also loads the text part of a vision model's files

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        checks.check_text_sizes(self)
        checks.check_common_fields(self, ACTIVATIONS, ATTENTION)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.complete_layer_types()
        self.complete_fields()
        checks.check_text_config(self)

    @staticmethod
    def published_layer_types(num_hidden_layers: int) -> list[str]:
        """The layers of Ministral-8B-Instruct-2410, from its params.json: one full, three sliding, repeated."""
        pattern = ("full_attention", "sliding_attention", "sliding_attention", "sliding_attention")
        return [pattern[layer % 4] for layer in range(num_hidden_layers)]


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned weight: x / sqrt(mean(x^2) + eps) * weight. The result
    is rounded to the input's dtype *before* the weight multiplies it; `F.rms_norm` rounds after that."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(at_least_float32(x.dtype))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


# -------------------------------------------------------------------------------------------- rotary positions
class RotaryEmbedding(FrequencyCache):
    """Compute the cosines and sines that rotate queries and keys, so that a score depends on their distance.

    The D numbers of a head are D/2 pairs (`rotate_half`). Pair i turns by position * theta^(-2i/D) radians. Frequencies
    stay float32 (float64) in a bfloat16 model: rounding them would move the angles of far positions by whole turns.
    """

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__()
        self.config = config

    def inverse_frequencies(self, dtype: torch.dtype) -> Tensor:
        """The angle per position (`inv_freq` in Transformers) of each of the D/2 pairs, in radians, on the CPU."""
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=dtype, device="cpu") / self.config.head_dim
        return 1.0 / (self.config.rope_theta**exponents)

    def attention_factor(self) -> float:
        """A factor on cosine and sine, so its square is on every score. It is 1 here; `ministral3.py` overrides it."""
        return 1.0

    def forward(self, x: Tensor, position_ids: Tensor) -> RopeTables:
        """position_ids (B or 1, S) -> cosines and sines, each (B or 1, 1, S, D) in the dtype of x."""
        dtype = at_least_float32(x.dtype)
        frequencies = self.frequencies(dtype, x.device)
        angles = position_ids[:, None, :, None].to(dtype) * frequencies  # (B or 1, 1, S, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (B or 1, 1, S, D): both halves hold the same angles
        factor = self.attention_factor()
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the two halves of a head. This is the *half-split* layout of Transformers: pair i is
    (x[i], x[i + D/2]). Mistral's own files pair neighbours, (x[2i], x[2i+1]): loading permutes their q and k rows."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate every pair of q (B, H, S, D) and k (B, G, S, D) by its angle, given as cos and sin (B or 1, 1, S, D)."""
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


# ------------------------------------------------------------------------------------------------------- masks
def make_attention_mask(
    query_positions: Tensor, key_positions: Tensor, sliding_window: int | None = None, visible: Mask = None
) -> Tensor:
    """Which query may look at which key: bool (B or 1, 1, S, K), True where it may.

    Everything is decided by absolute positions in the sequence (padding is counted), and never by indices into a
    tensor. So one rule serves a whole prompt, a chunk in the middle of it, and the ring of `SlidingLayerCache`: a key
    is visible if `key <= query` and, in a sliding layer, `query - key < sliding_window`. These are at most W keys, the
    query's own included. (FlashAttention's `window_size=(W, 0)` is W + 1 keys.) Seven positions, W = 3:

        full_attention               sliding_attention            sliding, a chunk of two queries
        query 0  # . . . . . .       query 0  # . . . . . .       after five cached tokens, of which
              1  # # . . . . .             1  # # . . . . .       attention gets the last W - 1:
              2  # # # . . . .             2  # # # . . . .
              3  # # # # . . .             3  . # # # . . .            key 3 4 5 6
              4  # # # # # . .             4  . . # # # . .       query 5  # # # .
              5  # # # # # # .             5  . . . # # # .             6  . # # #
              6  # # # # # # #             6  . . . . # # #

    query_positions (S,) are those of the new tokens, key_positions (K,) those of the keys. sliding_window is W, or None
    for full attention. visible, bool, broadcastable to (B, S, K), is False where a key is hidden for another reason:
    padding, or another text (see `same_text`).
    """
    distance = query_positions[:, None] - key_positions[None, :]  # (S, K)
    mask = distance >= 0
    if sliding_window is not None:
        mask = mask & (distance < sliding_window)
    if visible is None:
        return mask[None, None]
    return (mask & visible)[:, None]


def same_text(position_ids: Tensor) -> Tensor | None:
    """Which tokens belong to one text, if several are packed into a row: a position (B or 1, S) that is not the one
    before plus 1 starts a new text. Returns bool (B or 1, S, S), True within a text, or None if there is only one."""
    jumps = position_ids.diff(dim=1) != 1
    if not torch.compiler.is_compiling() and not jumps.any():
        return None
    text = F.pad(jumps.cumsum(dim=1), (1, 0))  # (B or 1, S) number of the text that each token belongs to
    return text[:, :, None] == text[:, None, :]


# ------------------------------------------------------------------------------------------------------- cache
class LayerCache:
    """Keys and values of one layer, each (B, G, capacity, D): one slot for each position. Position p is in slot p."""

    window: int | None = None  # how many positions are kept; None: all

    def __init__(self, expected: int = 64) -> None:
        self.length = 0  # tokens seen so far
        self.expected = expected  # capacity to begin with
        self.capacity = 0
        self.keys: Any = None
        self.values: Any = None

    def reserve(self, k: Tensor, v: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Make room for `slots` positions and return both tensors. Each growth at least doubles the capacity (up to the
        window), so appending stays cheap."""
        checks.check_fit(self.keys, k)
        checks.check_fit(self.values, v)  # on its own: under autocast its dtype is not that of the keys
        if slots > self.capacity:
            self.capacity = max(slots, 2 * self.capacity, self.expected)
            if self.window is not None:
                self.capacity = min(self.capacity, self.window)
            self.keys = enlarge(self.keys, k, self.capacity)
            self.values = enlarge(self.values, v, self.capacity)
        return self.keys, self.values

    def key_positions(self, new: int, device: torch.device | None = None) -> Tensor:
        """(K,) absolute positions of the keys that the next `update` with `new` tokens will return."""
        return torch.arange(self.length + new, device=device)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, G, S, D); return all that the new queries need, (B, G, K, D)."""
        start, end = self.length, self.length + k.shape[2]
        keys, values = self.reserve(k, v, end)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.length = end
        if start == 0:
            # The same numbers in the layout of Transformers' cache: it decides which kernel runs, and so the last bit.
            return k.contiguous(), v.contiguous()
        return keys[:, :, :end], values[:, :, :end]


def enlarge(old: Tensor | None, new: Tensor, size: int) -> Tensor:
    """A tensor like `new` with `size` slots, the first of which hold `old`."""
    B, G, _, D = new.shape
    larger = new.new_empty(B, G, size, D)
    if old is not None:
        larger[:, :, : old.shape[2]] = old
    return larger


class SlidingLayerCache(LayerCache):
    """The cache of a sliding layer: a ring of W slots. Position p is in slot p % W.

    An update returns at most W + S - 1 positions, so memory does not grow with the text. A text may be cut into chunks
    in any way; chunks longer than the window are allowed. A ring with W = 4 gets a prompt of 6 tokens, then single
    tokens, then 3 at once:

        new tokens   returned to attention          slots afterwards (position p in slot p % 4)
        0 1 2 3 4 5  0 1 2 3 4 5  (the chunk)       4 5 2 3
        6            4 5 6 3      (slot order)      4 5 6 3      6 has overwritten 2
        7            4 5 6 7                        4 5 6 7      7 has overwritten 3
        8            8 5 6 7                        8 5 6 7      8 has overwritten 4
        9 10 11      6 7 8 9 10 11  (W-1 old, S)    8 9 10 11    the first query, 9, still sees 6 7 8 9
    """

    def __init__(self, window: int, expected: int = 64) -> None:
        super().__init__(expected)
        self.window: int = window

    def key_positions(self, new: int, device: torch.device | None = None) -> Tensor:
        end = self.length + new
        if new == 1 and end > self.window:  # in slot order: slot s has the newest p < end with p % W == s
            slots = torch.arange(self.window, device=device)
            return end - 1 - (end - 1 - slots) % self.window
        oldest = max(self.length - self.window + 1, 0)
        return torch.arange(oldest, end, device=device)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new = k.shape[2]
        if self.length + new <= self.window:  # no position has left the window: slots are positions
            return super().update(k, v)
        keys, values = self.reserve(k, v, self.window)
        start, end = self.length, self.length + new
        if new == 1:
            # Overwrite the key that leaves. Keys are rotated already, so their order changes only rounding.
            slot = start % self.window
            keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1] = k, v
            self.length = end
            return keys, values
        past_slots = self.key_positions(new, k.device)[:-new] % self.window  # of at most W - 1 keys before
        all_k = torch.cat((keys[:, :, past_slots], k), dim=2)  # a copy, made before the ring is overwritten
        all_v = torch.cat((values[:, :, past_slots], v), dim=2)
        # Of the new tokens, the last W are stored.
        slots = torch.arange(max(start, end - self.window), end, device=k.device) % self.window
        keys[:, :, slots], values[:, :, slots] = k[:, :, -self.window :], v[:, :, -self.window :]
        self.length = end
        return all_k, all_v


class KVCache:
    """Keys and values of the tokens seen so far: an argument of `forward`, never state of the model.

    Full layers keep every position, sliding layers the last W (`SlidingLayerCache`). All rows of a batch advance
    together. Padding takes slots like any token and is hidden by `attention_mask`. The first update makes room for at
    least `expected` positions, or for the window. Tensors are written in place: no gradients through several calls.
    """

    def __init__(self, config: Any, expected: int = 64) -> None:
        checks.expect_kind("config", config, PreTrainedConfig, "a configuration, such as model.config")
        config = config.get_text_config()
        self.layers: list[LayerCache] = []
        for kind in config.layer_types:
            layer = LayerCache(expected)
            if kind == "sliding_attention":
                layer = SlidingLayerCache(config.sliding_window, expected)
            self.layers.append(layer)

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return self.layers[0].length

    def crop(self, max_length: int) -> None:
        """Forget all tokens but the first `max_length`. Raises ValueError if the cache has fewer, or if any would be
        forgotten after a sliding layer has overwritten a key."""
        checks.check_crop(max_length, self.layers)
        for layer in self.layers:
            layer.length = max_length

    def key_positions(self, config: MinistralConfig, new: int, device: torch.device) -> dict[str, Tensor]:
        """For each kind of layer, the (K,) positions of the keys that its updates with `new` tokens will return. Raises
        ValueError if the cache was made for other layers."""
        checks.check_same_windows(self.layers, KVCache(config).layers)  # an empty cache, for its windows
        one_of_each = dict(zip(config.layer_types, self.layers))  # all layers of a kind are alike
        return {kind: layer.key_positions(new, device) for kind, layer in one_of_each.items()}

    def nbytes(self) -> int:
        """Bytes reserved for keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.capacity)


# --------------------------------------------------------------------------------------------------- attention
def repeat_kv(x: Tensor, group_size: int) -> Tensor:
    """Give every query head its key/value head: (B, G, K, D) -> (B, H, K, D); `group_size` neighbours share one. With
    G = 1 the result is a view. `repeat_interleave` would copy, which runs another matmul kernel: float32 results would
    differ by 5e-5 from Transformers'."""
    if group_size == 1:
        return x
    B, G, K, D = x.shape
    return x[:, :, None].expand(B, G, group_size, K, D).reshape(B, G * group_size, K, D)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scaling: float, dropout: float) -> Attended:
    """softmax(q k^T * scaling) v, step by step. q (B, H, S, D), k and v (B, G, K, D) -> (B, H, S, D) and the
    probabilities (B, H, S, K). mask None hides nothing, also not later keys: `_mask` always makes one for this path."""
    group_size = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, group_size), repeat_kv(v, group_size)
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling  # (B, H, S, K)
    if mask is not None:
        # With the lowest number and not -inf, a row that sees nothing (padding) does not become NaN. Adding it, and not
        # filling it in, keeps the gradient of such a row, as in Transformers. In float16 the sum may be -inf. (The
        # gradient of `clamp` at its bound depends on the version of PyTorch.)
        lowest = torch.finfo(scores.dtype).min
        bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)  # (B or 1, 1, S, K)
        scores = scores + bias
        scores = scores.masked_fill(scores.isneginf(), lowest)
    probs = F.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(q.dtype)
    if dropout:
        probs = F.dropout(probs, dropout)
    return torch.matmul(probs, v), probs


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scaling: float, dropout: float) -> Attended:
    """The same by PyTorch's fused kernel, which keeps no (S, K) matrix. mask None: causal; for S = 1, all keys."""
    B, H, S, D = q.shape
    G = k.shape[1]
    if S == 1 and not q.requires_grad:
        # The heads of a group become rows of queries over one key/value head, so nothing is repeated. (The gradient of
        # this is rounded in another way than Transformers'.)
        q = q.reshape(B, G, H // G, D)  # the sequence dimension is now the head's place in its group
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling)
        return out.reshape(B, H, S, D), None
    gqa = mask is None and H > G and D <= 256  # the kernel groups by itself only without a mask
    if not gqa:
        k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
    causal = mask is None and S > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=gqa), None


ATTENTION = {"sdpa": sdpa_attention, "eager": eager_attention, "blockwise": blockwise_attention}


class MinistralAttention(nn.Module):
    """Grouped-query attention, without biases. H query heads share G key/value heads, which saves cache."""

    def __init__(self, config: MinistralConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)

    def rotate(self, q: Tensor, k: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions. (Ministral 3 also scales the queries here.)"""
        cos, sin = tables
        return apply_rotary_pos_emb(q, k, cos, sin)

    def forward(self, x: Tensor, tables: RopeTables, mask: Mask, cache: KVCache | None) -> Attended:
        """x (B, S, E) -> (B, S, E), and the probabilities (B, H, S, K) on the eager path."""
        B, S, _ = x.shape
        q = self.q_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)  # (B, H, S, D)
        k = self.k_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)  # (B, G, S, D)
        v = self.v_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)  # (B, G, S, D)
        q, k = self.rotate(q, k, tables)
        if cache is not None:
            k, v = cache.layers[self.layer_idx].update(k, v)  # (B, G, K, D); keys are stored rotated
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = ATTENTION[self.config.attn_implementation]
        out, probs = attend(q, k, v, mask, self.head_dim**-0.5, dropout)  # (B, H, S, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1)), probs


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
    """Attention, then MLP. Each reads a normed copy of the residual stream and adds its result to the stream."""

    attention_class: ClassVar[type[MinistralAttention]] = MinistralAttention

    def __init__(self, config: MinistralConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = MinistralMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, tables: RopeTables, mask: Mask, cache: KVCache | None) -> Attended:
        attended, probs = self.self_attn(self.input_layernorm(x), tables, mask, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), probs


# ------------------------------------------------------------------------------------------------------ models
class MinistralModel(PreTrainedModel):
    """The backbone: token ids or embeddings in, normed hidden states out."""

    config_class = MinistralConfig
    layer_class: ClassVar[type[MinistralDecoderLayer]] = MinistralDecoderLayer
    rotary_class: ClassVar[type[RotaryEmbedding]] = RotaryEmbedding

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config)
        self.init_weights()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        cache_position: Tensor | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Run S new tokens through all layers.

        Args:
            input_ids: (B, S) token ids; or give `inputs_embeds` (B, S, E) instead.
            attention_mask: (B, past + S), 1 at text and 0 at padding; past is the number of tokens in the cache. None:
                every token is read as text, also padding.
            position_ids: (B or 1, S) rotary positions. None: past, past + 1, ... (padding is counted; `generate` passes
                positions that skip it). Masks ignore them, with one exception, as in Transformers: packed training
                sequences. If there is neither attention_mask nor cache (pass `use_cache=False`; the default makes one),
                a position that is not the one before plus 1 starts a new text, which cannot see the texts before it.
                In all other cases, and with a mask of ones too, packed texts DO see each other.
            past_key_values: the cache of the tokens before; it is extended in place.
            use_cache: make a cache if none is given. None: the configuration's (not with `gradient_checkpointing`).
            cache_position: (S,) if given, must be past, past + 1, ...: a cache has no gaps.
            output_hidden_states, output_attentions: also return those of each layer. None: as the configuration says.

        Raises: ValueError for a wrong input, and for `output_attentions` with sdpa, which keeps no probabilities.
        """
        x = self.embed(input_ids, inputs_embeds)
        B, S, _ = x.shape
        cache = self._choose_cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past, past + S, device=x.device)  # (S,), padding counted
        checks.check_outputs(output_attentions, self.config)
        checks.check_start(input_ids, attention_mask, cache_position, self.config, past, S)

        # Which keys there are, and which query sees them.
        k_pos = dict.fromkeys(self.config.layer_types, positions)  # kind of layer -> (K,) positions
        if cache is not None:
            k_pos = cache.key_positions(self.config, S, x.device)
        padding_mask = checks.visible_padding_mask(attention_mask, B, past + S, x.device)  # None: no padding
        packed = position_ids is not None and attention_mask is None and cache is None
        position_ids = checks.as_positions(position_ids, positions, B)
        text_mask = same_text(position_ids) if packed else None
        masks = {kind: self._mask(kind, positions, k_pos[kind], padding_mask, text_mask) for kind in k_pos}
        tables = self.rotary_emb(x, position_ids)

        hidden_states, attentions = [x], []
        for kind, layer in zip(self.config.layer_types, self.layers):
            x, probs = self.run_layer(layer, x, tables, masks[kind], cache)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(probs[..., k_pos[kind].argsort()])  # by position: the ring has slot order
        x = self.norm(x)
        hidden_states[-1] = x
        all_hidden_states = tuple(hidden_states) if output_hidden_states else None
        all_attentions = tuple(attentions) if output_attentions else None
        return BaseModelOutputWithPast(x, cache, all_hidden_states, all_attentions)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """The embeddings (B, S, E) of ids (B, S), or those that are given instead."""
        checks.check_inputs(input_ids, inputs_embeds, self.embed_tokens.weight)
        if inputs_embeds is not None:
            return inputs_embeds
        return self.embed_tokens(input_ids)

    def _choose_cache(self, past_key_values: KVCache | None, use_cache: bool | None) -> KVCache | None:
        """The cache of this forward pass: the given one, a new one, or None. A given one is used in any case."""
        checks.check_cache(past_key_values, KVCache, use_cache, self.recomputes)
        if use_cache is None:
            use_cache = self.config.use_cache
        if past_key_values is None and use_cache and not self.recomputes:
            return KVCache(self.config)
        return past_key_values

    def _mask(self, kind: str, queries: Tensor, keys: Tensor, padding_mask: Mask, text_mask: Mask) -> Mask:
        """The mask for layers of one kind, or None if the kernel needs none. `queries` and `keys` are positions. The
        two masks never occur together."""
        window = self.config.sliding_window if kind == "sliding_attention" else None
        S, K = queries.shape[0], keys.shape[0]
        visible = text_mask if padding_mask is None else padding_mask[:, None, keys]  # (B or 1, 1 or S, K)
        # S = 1: the query sees every key it is given. S = K: no earlier keys, so `is_causal` is enough if the window
        # hides none. (K = W hides none either, but there Transformers builds a mask, and that takes another kernel.)
        causal = S == K and (window is None or window > K)
        if visible is None and (S == 1 or causal) and self.config.attn_implementation == "sdpa":
            return None
        if visible is None and self.config.attn_implementation == "blockwise":
            return CausalWindow(window)
        return make_attention_mask(queries, keys, window, visible)


class MinistralForCausalLM(PreTrainedModel):
    """The backbone, and the head that turns hidden states into logits over the vocabulary."""

    config_class = MinistralConfig
    model_class: ClassVar[type[MinistralModel]] = MinistralModel
    may_tie: ClassVar[Any] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.init_head()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        cache_position: Tensor | None = None, logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """The arguments of `MinistralModel.forward`, and:

        labels: the input ids (B, S), shifted here; -100 does not count. `loss`: a mean, or sum / `num_items_in_batch`.
        logits_to_keep: compute logits only for the last n positions (0: all), or for a 1-D tensor of indices.

        Raises: as `MinistralModel.forward`; ValueError for labels that do not match the logits.
        """
        checks.expect_labels(labels, input_ids, inputs_embeds, logits_to_keep)
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            cache_position, return_dict=True, **kwargs,
        )  # fmt: skip
        logits, loss = logits_and_loss(self.lm_head, out, labels, logits_to_keep, num_items_in_batch)
        return CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
