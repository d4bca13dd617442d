"""Ministral (Ministral-8B-Instruct-2410) in plain PyTorch: the whole text model in one file.

A decoder-only transformer with grouped-query attention, rotary positions, RMSNorm and a gated MLP. A "full_attention"
layer sees every earlier token, a "sliding_attention" layer only the last `sliding_window` tokens. The file has the
order of the computation. `pretrained.py` loads and saves models, `checks.py` refuses wrong arguments.

Sources: RoPE https://arxiv.org/abs/2104.09864, GQA https://arxiv.org/abs/2305.13245, RMSNorm
https://arxiv.org/abs/1910.07467, SwiGLU https://arxiv.org/abs/2002.05202, sliding windows and the rolling cache
https://arxiv.org/abs/2310.06825. Names are those of Transformers. Letters in the shape comments:

    B  sequences in the batch            H  query heads
    S  new tokens in this call           G  key/value heads (H is a multiple of G)
    K  keys that a query may look at     D  size of one head
    E  hidden_size                       V  vocab_size

The order of operations and the places where a number is rounded to the weights' dtype are part of the specification:
they make a forward pass equal to Transformers' to the last bit (tests/test_parity.py). Norms, rotary tables and softmax
are computed in float32, or in float64 if the weights are float64.

Other files rely on names here (tests/test_layout.py). `reference/mutants.py` replaces `F`, `ATTENTION`, `repeat_kv`,
`apply_rotary_pos_emb`, `RMSNorm.forward`, `RotaryEmbedding.forward`, `MinistralAttention.forward`,
`MinistralModel._mask` and `MinistralForCausalLM.forward`; its mistakes call `MinistralAttention.rotate` and
`RotaryEmbedding.inverse_frequencies`. `reference/trace.py` replaces `apply_rotary_pos_emb` and an entry of `ATTENTION`.
`fast.py` reads the cache and the layers' submodules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
from pretrained import (
    ACTIVATIONS,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    Embedding,
    FrequencyCache,
    Linear,
    PreTrainedConfig,
    PreTrainedModel,
    at_least_float32,
    logits_and_loss,
)

Mask = Tensor | None
RopeTables = tuple[Tensor, ...]
Attended = tuple[Tensor, Tensor | None]  # the result of attention, and its probabilities if it keeps them


# ---------------------------------------------------------------------------------------------- configuration
@dataclass
class MinistralConfig(PreTrainedConfig):
    """The sizes and settings of a Ministral. Fields and defaults are those of Transformers' `MinistralConfig`.

    `layer_types=None` makes every layer a sliding one if `sliding_window` is set, and a full one if not. The published
    8B model mixes the two: `published_layer_types(36)` is its pattern. (Its config.json on the Hub does not have the
    pattern, which makes no difference up to 32768 tokens.) `head_dim=None` is `hidden_size // num_attention_heads`.
    `rope_theta=x` is short for `rope_parameters={"rope_type": "default", "rope_theta": x}`; after construction both
    are set. `attn_implementation` is "sdpa" (PyTorch's fused attention) or "eager" (the formula step by step). The five
    fields before it belong to `heads.py`: of num_labels, id2label and label2id one is enough, none means two labels.

    Raises:
        ValueError: a value is impossible; the message has the field, the value and what is allowed.
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
    reads_text_config: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        checks.check_text_sizes(self)
        checks.check_common_fields(self, ACTIVATIONS, ATTENTION)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self.complete_fields()
        checks.check_text_config(self)

    @staticmethod
    def published_layer_types(num_hidden_layers: int) -> list[str]:
        """The layers of Ministral-8B-Instruct-2410: one full, three sliding, repeated. (Its params.json has the windows
        [null, 32768, 32768, 32768].)"""
        pattern = ("full_attention", "sliding_attention", "sliding_attention", "sliding_attention")
        return [pattern[layer % 4] for layer in range(num_hidden_layers)]


# ------------------------------------------------------------------------------------------------------- norm
class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned weight: x / sqrt(mean(x^2) + eps) * weight.

    The result is rounded to the input's dtype *before* the weight multiplies it. `F.rms_norm` rounds after the
    product, which is different in bfloat16. (..., E) -> (..., E).
    """

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
    """Compute the cosines and sines by which queries and keys are rotated.

    Pair i of a head turns by the angle position * theta^(-2i/D). The frequencies are not a buffer of the module. They
    are computed in float32 (or float64) and keep that dtype when the model is cast to bfloat16: rounding them would
    move the angles of far positions by whole turns.
    """

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__()
        self.config = config

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
        frequencies = self.frequencies(dtype, x.device)
        angles = position_ids[:, None, :, None].to(dtype) * frequencies  # (B, 1, S, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, 1, S, D): both halves hold the same angles
        factor = self.attention_factor()
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the two halves of a head. This is the *half-split* layout of Transformers: pair i is
    (x[i], x[i + D/2]). Mistral's own files pair neighbours, (x[2i], x[2i+1]), so their rows have to be permuted."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate every pair of q (B, H, S, D) and k (B, G, S, D) by the angle of its position."""
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


# ------------------------------------------------------------------------------------------------------- masks
def make_attention_mask(
    query_positions: Tensor, key_positions: Tensor, sliding_window: int | None = None, visible: Mask = None
) -> Tensor:
    """Which query may look at which key: bool (B or 1, 1, S, K), True where it may.

    Everything is decided by absolute positions in the sequence (padding is counted), and never by indices into a
    tensor. So the same line serves a whole prompt, a chunk in the middle of it, and a ring buffer in any order: a key
    is visible if `key <= query` and, in a sliding layer, `query - key < sliding_window`. These are W keys, the
    query's own included. (FlashAttention's `window_size=(W, 0)` is W + 1 keys.) Seven positions, W = 3:

        full_attention               sliding_attention            sliding, a chunk of two queries
        query 0  # . . . . . .       query 0  # . . . . . .       after five cached tokens, of which
              1  # # . . . . .             1  # # . . . . .       the ring still has two:
              2  # # # . . . .             2  # # # . . . .
              3  # # # # . . .             3  . # # # . . .            key 3 4 5 6
              4  # # # # # . .             4  . . # # # . .       query 5  # # # .
              5  # # # # # # .             5  . . . # # # .             6  . # # #
              6  # # # # # # #             6  . . . . # # #

    Args:
        query_positions: (S,) positions of the new tokens.
        key_positions: (K,) positions of the keys.
        sliding_window: W, or None for full attention.
        visible: bool, broadcastable to (B, S, K): False hides a key (padding, or another packed text).
    """
    distance = query_positions[:, None] - key_positions[None, :]  # (S, K)
    mask = distance >= 0
    if sliding_window is not None:
        mask = mask & (distance < sliding_window)
    if visible is None:
        return mask[None, None]
    return (mask & visible)[:, None]


def same_text(position_ids: Tensor) -> Tensor | None:
    """Which tokens belong to one text, in packed training sequences.

    Positions (B or 1, S) that do not advance by one start a new text. Returns bool (B or 1, S, S), True where query and
    key belong to the same text, or None if there is only one text.
    """
    jumps = position_ids.diff(dim=1) != 1
    if not torch.compiler.is_compiling() and not jumps.any():
        return None
    text = F.pad(jumps.cumsum(dim=1), (1, 0))  # (B or 1, S) number of the text that each token belongs to
    return text[:, :, None] == text[:, None, :]


# ------------------------------------------------------------------------------------------------------- cache
class LayerCache:
    """Keys and values of one layer, each (B, G, capacity, D). Position p is in slot p."""

    window: int | None = None  # how many positions are kept; None: all

    def __init__(self, expected: int = 64) -> None:
        self.length = 0  # tokens seen so far
        self.expected = expected  # capacity to begin with
        self.capacity = 0
        self.keys: Any = None
        self.values: Any = None

    def reserve(self, k: Tensor, v: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Make room for `slots` positions. The capacity at least doubles, so appending stays cheap."""
        checks.check_fit(self.keys, k)
        checks.check_fit(self.values, v)  # under autocast, keys and values differ in dtype
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
        start = self.length
        self.length = end = start + k.shape[2]
        keys, values = self.reserve(k, v, end)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        if start == 0:
            # The memory layout of Transformers' cache: it decides which kernel runs, and so the last bit.
            return k.contiguous(), v.contiguous()
        return keys[:, :, :end], values[:, :, :end]


def enlarge(old: Tensor | None, new: Tensor, size: int) -> Tensor:
    """A tensor like `new` with `size` slots, of which the first have the content of `old`."""
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
        9 10 11      6 7 8 9 10 11  (W-1 old, S)    8 9 10 11    the oldest query, 9, still sees 6 7 8 9
    """

    def __init__(self, window: int, expected: int = 64) -> None:
        super().__init__(expected)
        self.window: int = window

    def key_positions(self, new: int, device: torch.device | None = None) -> Tensor:
        end = self.length + new
        if new == 1 and end > self.window:  # the slots in their order, which hold the last W positions
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
        if new == 1:  # overwrite the key that leaves the window: attention does not depend on the order
            slot = start % self.window
            keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1] = k, v
            self.length = end
            return keys, values
        past = self.key_positions(new, k.device)[:-new] % self.window  # slots of W - 1 earlier keys
        all_k = torch.cat((keys[:, :, past], k), dim=2)  # at most W - 1 + S positions
        all_v = torch.cat((values[:, :, past], v), dim=2)
        slots = torch.arange(max(start, end - self.window), end, device=k.device) % self.window
        keys[:, :, slots], values[:, :, slots] = k[:, :, -self.window :], v[:, :, -self.window :]
        self.length = end
        return all_k, all_v


class KVCache:
    """Keys and values of the tokens seen so far: an argument of `forward`, never state of the model.

    Full layers keep every position, sliding layers the last W (`SlidingLayerCache`). All rows of a batch advance
    together. Padding takes slots like any token and is hidden by `attention_mask`. Memory is reserved when it is
    needed and doubles each time; room for `expected` positions is made at first. Tensors are written in place, so
    gradients do not flow through several calls.
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
        """Forget all tokens but the first `max_length`, so that another text can follow them.

        Raises:
            ValueError: the cache holds fewer, or a sliding layer has overwritten keys that the next query would need.
        """
        checks.check_crop(max_length, self.layers)
        for layer in self.layers:
            layer.length = max_length

    def key_positions(self, config: MinistralConfig, new: int, device: torch.device) -> dict[str, Tensor]:
        """For each kind of layer, the (K,) positions of the keys that its updates with `new` tokens will return.

        Raises:
            ValueError: the cache was made for other layers.
        """
        checks.check_same_windows(self.layers, KVCache(config).layers)
        kinds = dict(zip(config.layer_types, self.layers))
        return {kind: layer.key_positions(new, device) for kind, layer in kinds.items()}

    def nbytes(self) -> int:
        """Bytes reserved for keys and values."""
        used = [layer for layer in self.layers if layer.keys is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in used)


# --------------------------------------------------------------------------------------------------- attention
def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """Give every query head its key/value head: (B, G, K, D) -> (B, H, K, D); neighbours share one.

    This is written with `expand`, because for one key/value head the result is a view, which takes another matmul
    kernel than a copy: with `repeat_interleave` the float32 result is off by 5e-5 from Transformers'.
    """
    if groups == 1:
        return x
    B, G, K, D = x.shape
    return x[:, :, None].expand(B, G, groups, K, D).reshape(B, G * groups, K, D)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scaling: float, dropout: float) -> Attended:
    """softmax(q k^T * scaling) v, step by step. q (B, H, S, D), k and v (B, G, K, D) -> (B, H, S, D) and the
    probabilities (B, H, S, K)."""
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling  # (B, H, S, K)
    if mask is not None:
        # With the lowest number and not -inf, a row that sees nothing (padding) does not become NaN. It is added, so
        # gradients pass such a row as in Transformers. It is clamped, because in float16 the sum may overflow to -inf.
        lowest = torch.finfo(scores.dtype).min
        bias = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)  # (B or 1, 1, S, K)
        scores = (scores + bias).clamp(min=lowest)
    probs = F.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(q.dtype)
    if dropout:
        probs = F.dropout(probs, dropout)
    return torch.matmul(probs, v), probs


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scaling: float, dropout: float) -> Attended:
    """The same by PyTorch's fused kernel, which keeps no (S, K) matrix. mask None: causal, or all keys if S = 1."""
    B, H, S, D = q.shape
    G = k.shape[1]
    if S == 1 and not q.requires_grad:
        # The heads of a group become rows of queries over one key/value head, so nothing is repeated. (The gradient of
        # this is rounded in another way than Transformers'.)
        q = q.reshape(B, G, H // G, D)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling)
        return out.reshape(B, H, S, D), None
    gqa = mask is None and H > G and D <= 256  # the kernel groups by itself only without a mask
    if not gqa:
        k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
    causal = mask is None and S > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=gqa), None


ATTENTION = {"sdpa": sdpa_attention, "eager": eager_attention}


class MinistralAttention(nn.Module):
    """Grouped-query attention with rotary positions, without biases."""

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
        """Rotate queries and keys by their positions."""
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
            k, v = cache.layers[self.layer_idx].update(k, v)  # (B, G, K, D)
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = ATTENTION[self.config.attn_implementation]
        out, probs = attend(q, k, v, mask, self.head_dim**-0.5, dropout)  # (B, H, S, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1)), probs


# ------------------------------------------------------------------------------------------------ MLP and layer
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
        cache_position: Tensor | None = None, output_hidden_states: bool = False, output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Run S new tokens through all layers.

        Args:
            input_ids: (B, S) token ids; or give `inputs_embeds` (B, S, E) instead.
            attention_mask: (B, past + S), 1 at text and 0 at padding. None: all is text, and padding is read as text,
                too (a warning says so if `pad_token_id` shows it).
            position_ids: (B or 1, S) rotary positions. None: past, past + 1, ... (padding is counted; `generate` passes
                positions that skip it). Masks do not depend on them, with one exception, which is Transformers':
                without mask and without cache, each jump in a row starts a new text that cannot see the texts before
                (packed training sequences). With a cache, which is the default (`use_cache=False` and
                `gradient_checkpointing` make none), or with a mask of ones, packed texts DO see each other.
            past_key_values: the cache of the tokens before; it is extended in place.
            use_cache: return a cache. None: as the configuration says (none with `gradient_checkpointing`).
            cache_position: (S,) if given, must be past, past + 1, ...: a cache has no gaps.
            output_hidden_states, output_attentions: also return the output and the probabilities of each layer.

        Raises:
            ValueError: both or neither of ids and embeddings, a wrong shape, dtype or device, an id outside the
                vocabulary, or `output_attentions` with sdpa, which keeps no probabilities.
        """
        x = self.embed(input_ids, inputs_embeds)
        B, S, _ = x.shape
        cache = self._choose_cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past, past + S, device=x.device)  # (S,), padding counted
        checks.check_outputs(output_attentions, self.config)
        checks.check_start(input_ids, attention_mask, cache_position, self.config, past, S)

        # Which keys there are, and which query sees them.
        keys = dict.fromkeys(self.config.layer_types, positions)  # kind of layer -> (K,) places of its keys
        if cache is not None:
            keys = cache.key_positions(self.config, S, x.device)
        padding_mask = checks.visible_padding_mask(attention_mask, B, past + S, x.device)
        packed = position_ids is not None and attention_mask is None and cache is None
        position_ids = checks.as_positions(position_ids, positions, B)
        one_text = None
        if packed:
            one_text = same_text(position_ids)
        masks = {kind: self._mask(kind, positions, keys[kind], padding_mask, one_text) for kind in keys}
        tables = self.rotary_emb(x, position_ids)

        hidden_states, attentions = [x], []
        for kind, layer in zip(self.config.layer_types, self.layers):
            x, probs = self.run_layer(layer, x, tables, masks[kind], cache)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(probs[..., keys[kind].argsort()])  # the ring returns keys in slot order
        x = self.norm(x)
        hidden_states[-1] = x
        return BaseModelOutputWithPast(
            x, cache, tuple(hidden_states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )  # fmt: skip

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """The embeddings (B, S, E) of ids (B, S), or those that are given instead."""
        checks.check_inputs(input_ids, inputs_embeds, self.embed_tokens.weight)
        if inputs_embeds is not None:
            return inputs_embeds
        return self.embed_tokens(input_ids)

    def _choose_cache(self, past_key_values: KVCache | None, use_cache: bool | None) -> KVCache | None:
        """The cache of this forward pass. Everything else only asks whether there is one."""
        checks.check_cache(past_key_values, KVCache, use_cache, self.recomputes)
        if use_cache is None:
            use_cache = self.config.use_cache
        if past_key_values is None and use_cache and not self.recomputes:
            return KVCache(self.config)
        return past_key_values

    def _mask(self, kind: str, queries: Tensor, keys: Tensor, padding_mask: Mask, one_text: Mask) -> Mask:
        """The mask for layers of one kind, or None where the fused kernel needs none."""
        window = self.config.sliding_window if kind == "sliding_attention" else None
        S, K = queries.shape[0], keys.shape[0]
        visible = one_text if padding_mask is None else padding_mask[:, None, keys]  # (B or 1, 1 or S, K)
        # One query sees all keys that a cache returns. A first chunk that fits into the window is causal. (At K = W no
        # key is hidden either, but Transformers builds a mask there, and that takes another kernel.)
        causal = S == K and (window is None or window > K)
        if visible is None and (S == 1 or causal) and self.config.attn_implementation == "sdpa":
            return None
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
        output_hidden_states: bool = False, output_attentions: bool = False,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """The arguments of `MinistralModel.forward`, and:

        Args:
            labels: (B, S) ids to be predicted, -100 where none counts. They give `loss`.
            logits_to_keep: compute logits only for the last n positions (0: all), or for the positions in a 1-D
                tensor of indices.

        Raises:
            ValueError: as `MinistralModel.forward`, or labels that do not match the logits.
        """
        checks.expect_labels(labels, input_ids, inputs_embeds, logits_to_keep)
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            cache_position, output_hidden_states, output_attentions,
        )  # fmt: skip
        logits, loss = logits_and_loss(self.lm_head, out.last_hidden_state, labels, logits_to_keep)
        return CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
