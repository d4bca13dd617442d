"""Ministral and Ministral 3 (text) once more, in NumPy and float64, from the papers' formulas alone.

An independent computation beside `ministral.py` and Transformers, with which it shares no line, and an example of a
port. It has all that a port has to compute, one formula after the other, without caches, batches of masks or speed.
Attention is written out position by position. `forward` returns every intermediate under the name it has in a trace.

Sources: RMSNorm https://arxiv.org/abs/1910.07467, rotary positions https://arxiv.org/abs/2104.09864, YaRN
https://arxiv.org/abs/2309.00071, grouped queries https://arxiv.org/abs/2305.13245, sliding windows
https://arxiv.org/abs/2310.06825, SwiGLU https://arxiv.org/abs/2002.05202, Ministral 3 https://arxiv.org/abs/2601.08584
(whose query scale is that of Llama 4). Shapes: B texts, S tokens, E hidden size, H heads, G key heads, D numbers in
each, F intermediate size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
Fields = Mapping[str, Any]  # the content of a config.json, or a part of it

ERF = np.vectorize(math.erf, otypes=[np.float64])
TANH_SCALE = math.sqrt(2 / math.pi)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh(TANH_SCALE * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


# ------------------------------------------------------------------------------------------------------ positions


def angles_per_position(config: Fields) -> Array:
    """The angle (radians) by which each pair of a head turns from one position to the next, (D/2,).

    Plain: theta^(-2i/D). YaRN: pairs that turn more than beta_fast times within the original context keep that angle.
    Those that turn less than beta_slow times turn `factor` times more slowly. Those between are blended linearly.
    """
    rope = config["rope_parameters"]
    theta = rope["rope_theta"]
    D = config["head_dim"]
    angles = np.array([theta ** (-2 * i / D) for i in range(D // 2)])
    if rope["rope_type"] == "default":
        return angles
    # Pair i turns L / (2 pi theta^(2i/D)) times within a context of L. Here that is solved for i.
    L = rope["original_max_position_embeddings"]
    first, last = (
        D / 2 * math.log(L / (2 * math.pi * turns)) / math.log(theta)
        for turns in (get(rope, "beta_fast", 32), get(rope, "beta_slow", 1))
    )
    if rope.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, D - 1)
    length = last - first
    if length == 0:
        length = 0.001
    for i in range(D // 2):
        slowed = min(max((i - first) / length, 0.0), 1.0)
        angles[i] = angles[i] * (1 - slowed) + angles[i] / rope["factor"] * slowed
    return angles


def magnitude(config: Fields) -> float:
    """YaRN's factor of cosine and sine. It is 1 for Ministral 3, whose mscale and mscale_all_dim are equal."""
    rope = config["rope_parameters"]
    if rope["rope_type"] == "default":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    grown = math.log(rope["factor"]) / 10
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return (rope["mscale"] * grown + 1) / (rope["mscale_all_dim"] * grown + 1)
    return grown + 1


def rotate(head: Array, position: float, angles: Array, size: float) -> Array:
    """One head's vector (D,) at a position. Numbers i and i + D/2 are a point in the plane, which is turned."""
    half = len(head) // 2
    a = head[:half]
    b = head[half:]
    cos = np.cos(position * angles) * size
    sin = np.sin(position * angles) * size
    return np.concatenate([a * cos - b * sin, b * cos + a * sin])


def rotate_heads(config: Fields, heads: Array, positions: Array) -> Array:
    """Heads (B, H, S, D), rotated to the positions (B, S)."""
    angles = angles_per_position(config)
    size = magnitude(config)
    B, H, S, _ = heads.shape
    rotated = np.empty(heads.shape)
    for b, h, s in np.ndindex(B, H, S):
        rotated[b, h, s] = rotate(heads[b, h, s], positions[b, s], angles, size)
    return rotated


def query_scale(config: Fields, position: float) -> float:
    """1 + beta ln(1 + floor(p / L)): from the original context length on, queries grow with their position."""
    rope = config["rope_parameters"]
    beta = rope.get("llama_4_scaling_beta")
    if not beta:
        return 1.0
    L = rope["original_max_position_embeddings"]
    return 1 + beta * math.log(1 + math.floor(position / L))


# ------------------------------------------------------------------------------------------------------ attention


def visible(query: int, key: int, window: int | None, padding_mask: Array) -> bool:
    """True if a token sees another: itself and those before it, the last `window` of them, and no padding."""
    in_window = window is None or query - key < window
    return key <= query and in_window and bool(padding_mask[key])


def attention(
    config: Fields, window: int | None, weights: Arrays, x: Array, padding_mask: Array, positions: Array
) -> dict[str, Array]:
    """Grouped-query attention of texts x (B, S, E). `padding_mask` (B, S) is False at padding."""
    B, S, _ = x.shape
    H = config["num_attention_heads"]
    G = config["num_key_value_heads"]
    D = config["head_dim"]
    trace = {}
    for name, count in (("q", H), ("k", G), ("v", G)):
        product = x @ weights[f"self_attn.{name}_proj.weight"].T
        trace[name] = product.reshape(B, S, count, D).swapaxes(1, 2)
    trace["q_rotated"] = rotate_heads(config, trace["q"], positions)
    k = trace["k_rotated"] = rotate_heads(config, trace["k"], positions)
    scales = np.array([[query_scale(config, p) for p in row] for row in positions])
    q = trace["q_scaled"] = trace["q_rotated"] * scales[:, None, :, None]
    k = np.repeat(k, H // G, axis=1)  # neighbouring query heads share a key head
    scores = np.einsum("bhsd,bhtd->bhst", q, k) / math.sqrt(D)
    mask = np.empty((B, S, S), bool)
    for b, s, t in np.ndindex(B, S, S):
        mask[b, s, t] = visible(s, t, window, padding_mask[b])
    probabilities = np.zeros_like(scores)
    heads = np.zeros((B, S, H, D))
    for b, h, s in np.ndindex(B, H, S):
        keys = np.flatnonzero(mask[b, s])
        if len(keys):  # padding may see nothing
            seen = scores[b, h, s, keys]
            powers = np.exp(seen - seen.max())
            shares = powers / powers.sum()
            probabilities[b, h, s, keys] = shares
            heads[b, s, h] = shares @ trace["v"][b, h // (H // G), keys]
    trace |= {"scores": scores, "mask": mask, "probabilities": probabilities}
    trace["heads"] = heads.reshape(B, S, H * D)
    trace["output"] = trace["heads"] @ weights["self_attn.o_proj.weight"].T
    return trace


# ---------------------------------------------------------------------------------------------------- the model


def decoder_layer(
    config: Fields, window: int | None, weights: Arrays, x: Array, padding_mask: Array, positions: Array
) -> dict[str, Array]:
    """Attention and the gated feed-forward part of one layer. `weights` are those of the layer."""
    eps = config["rms_norm_eps"]
    normed = rms_norm(x, weights["input_layernorm.weight"], eps)
    attended = attention(config, window, weights, normed, padding_mask, positions)
    trace = {"input_norm": normed} | {f"attention.{name}": array for name, array in attended.items()}
    x = trace["attention_residual"] = x + attended["output"]
    normed = trace["post_attention_norm"] = rms_norm(x, weights["post_attention_layernorm.weight"], eps)
    gate = trace["mlp.gate"] = normed @ weights["mlp.gate_proj.weight"].T
    up = trace["mlp.up"] = normed @ weights["mlp.up_proj.weight"].T
    activation = trace["mlp.activation"] = ACTIVATIONS[config.get("hidden_act", "silu")](gate)
    product = trace["mlp.product"] = activation * up
    down = trace["mlp.down"] = product @ weights["mlp.down_proj.weight"].T
    trace["mlp_residual"] = x + down
    return trace


def get(fields: Fields, key: str, default: Any) -> Any:
    """The value of a field, or the default where the field is missing, None, 0 or empty."""
    value = fields.get(key)
    if not value:
        return default
    return value


def with_defaults(config: Fields) -> dict[str, Any]:
    """A config.json (of the text model) with the fields that it may leave out, and the window of each layer."""
    H = config["num_attention_heads"]
    window = config.get("sliding_window")
    rope = get(config, "rope_scaling", {}) | get(config, "rope_parameters", {})
    rope.setdefault("rope_theta", get(config, "rope_theta", 10000.0))
    rope["rope_type"] = get(rope, "rope_type", get(rope, "type", "default"))
    kinds = get(config, "layer_types", ["sliding_attention"] * config["num_hidden_layers"])
    added = {"rope_parameters": rope}
    added["windows"] = [{"sliding_attention": window}.get(kind) for kind in kinds]
    added["num_key_value_heads"] = get(config, "num_key_value_heads", H)
    added["head_dim"] = get(config, "head_dim", config["hidden_size"] // H)
    return {**config, **added}


def forward(
    config: Fields,
    weights: Arrays,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
) -> dict[str, Array]:
    """Every intermediate of a whole run, by name, in the order in which they are computed; the last are "logits".

    Args:
        config: the content of a text model's config.json.
        weights: Transformers' names -> matrices (out, in) and vectors, e.g. "model.layers.0.self_attn.q_proj.weight".
            Without "lm_head.weight" the embeddings are the head.
        input_ids: (B, S).
        attention_mask: (B, S), 0 at padding.
        position_ids: (B, S) rotary positions; by default 0, 1, ... in every row, padding counted.
    """
    config = with_defaults(config)
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    ids = np.asarray(input_ids)
    B, S = ids.shape
    padding_mask = np.ones_like(ids, bool)
    positions = np.broadcast_to(np.arange(S), (B, S))
    if attention_mask is not None:
        padding_mask = np.asarray(attention_mask, bool)
    if position_ids is not None:
        positions = np.broadcast_to(position_ids, (B, S))
    embeddings = weights["model.embed_tokens.weight"]
    x = embeddings[ids]
    trace = {"embedding": x}
    for n, window in enumerate(config["windows"]):
        prefix = f"model.layers.{n}."
        matrices = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
        layer = decoder_layer(config, window, matrices, x, padding_mask, positions)
        trace |= {f"layers.{n}.{name}": array for name, array in layer.items()}
        x = layer["mlp_residual"]
    x = trace["final_norm"] = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    trace["logits"] = x @ weights.get("lm_head.weight", embeddings).T
    return trace
