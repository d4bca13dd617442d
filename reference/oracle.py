"""Ministral and Ministral 3 (text) once more, in NumPy and float64, from the papers' formulas alone.

A third opinion beside `ministral.py` and Transformers, with which it shares no line, and an example of a port: what a
port has to compute is all here, one formula after the other, without caches, batches of masks or speed. Attention is
written out position by position. `forward` returns every intermediate under the name it has in a trace.

Sources: RMSNorm https://arxiv.org/abs/1910.07467, rotary positions https://arxiv.org/abs/2104.09864, YaRN
https://arxiv.org/abs/2309.00071, grouped queries https://arxiv.org/abs/2305.13245, sliding windows
https://arxiv.org/abs/2310.06825, SwiGLU https://arxiv.org/abs/2002.05202, Ministral 3 https://arxiv.org/abs/2601.08584
(whose query scale is that of Llama 4). Shapes: B texts, S tokens, E hidden size, H heads, G key heads, D numbers in
each, F intermediate size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


# ------------------------------------------------------------------------------------------------------ positions


def angles_per_position(config: Mapping[str, Any]) -> Array:
    """By which angle (radians) each pair of a head turns from one position to the next, (D/2,).

    Plain: theta^(-2i/D). YaRN: pairs that turn more than beta_fast times within the original context keep that, those
    that turn less than beta_slow times turn `factor` times more slowly, and those between are blended linearly.
    """
    rope, D = config["rope_parameters"], config["head_dim"]
    theta, result = rope["rope_theta"], np.empty(D // 2)
    for i in range(D // 2):
        result[i] = theta ** (-2 * i / D)
    if rope["rope_type"] == "default":
        return result
    # Pair i turns L / (2 pi theta^(2i/D)) times within a context of L; here that is solved for i.
    L = rope["original_max_position_embeddings"]
    first, last = (
        D / 2 * math.log(L / (2 * math.pi * turns)) / math.log(theta)
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, D - 1)
    for i in range(D // 2):
        slope = (i - first) / (last - first if last != first else 0.001)
        slowed = min(max(slope, 0.0), 1.0)
        result[i] = result[i] * (1 - slowed) + result[i] / rope["factor"] * slowed
    return result


def magnitude(config: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosine and sine by. 1 for Ministral 3, whose mscale and mscale_all_dim are equal."""
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
    """One head's vector (D,) at a position: number i and number i + D/2 are a point in the plane, which is turned."""
    half = len(head) // 2
    a, b = head[:half], head[half:]
    cos, sin = np.cos(position * angles) * size, np.sin(position * angles) * size
    return np.concatenate([a * cos - b * sin, b * cos + a * sin])


def query_scale(config: Mapping[str, Any], position: float) -> float:
    """1 + beta ln(1 + floor(p / L)): from the original context length on, queries grow with their position."""
    rope = config["rope_parameters"]
    beta = rope.get("llama_4_scaling_beta") or 0.0
    return 1 + beta * math.log(1 + math.floor(position / rope["original_max_position_embeddings"])) if beta else 1.0


# ------------------------------------------------------------------------------------------------------ attention


def visible(query: int, key: int, window: int | None, real: Array) -> bool:
    """Whether a token sees another: itself and those before it, the last `window` of them, and no padding."""
    return key <= query and (window is None or query - key < window) and bool(real[key])


def attention(
    config: Mapping[str, Any],
    window: int | None,
    weights: Mapping[str, Array],
    x: Array,
    real: Array,
    positions: Array,
    note: Callable[[str, Array], Array],
) -> Array:
    """Grouped-query attention of texts x (B, S, E), padding where `real` (B, S) is False -> (B, S, E)."""
    B, S, _ = x.shape
    H, G, D = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    q, k, v = (x @ weights[f"{name}_proj"].T for name in "qkv")
    q = note("q", q.reshape(B, S, H, D).swapaxes(1, 2))
    k = note("k", k.reshape(B, S, G, D).swapaxes(1, 2))
    v = note("v", v.reshape(B, S, G, D).swapaxes(1, 2))
    angles, size = angles_per_position(config), magnitude(config)
    q, k = (np.stack([[[rotate(head[s], positions[b, s], angles, size) for s in range(S)] for head in heads[b]]
                      for b in range(B)]) for heads in (q, k))  # fmt: skip
    note("q_rotated", q)
    note("k_rotated", k)
    scales = np.array([[query_scale(config, p) for p in row] for row in positions])
    q = note("q_scaled", q * scales[:, None, :, None])
    scores = note("scores", np.einsum("bhsd,bhtd->bhst", q, np.repeat(k, H // G, axis=1)) / math.sqrt(D))
    seen = note("mask", np.array([[[visible(s, t, window, row) for t in range(S)] for s in range(S)] for row in real]))
    probabilities, heads = np.zeros_like(scores), np.zeros((B, S, H, D))
    for b, h, s in np.ndindex(B, H, S):
        keys = np.flatnonzero(seen[b, s])
        if len(keys):  # padding may see nothing
            weight = np.exp(scores[b, h, s, keys] - scores[b, h, s, keys].max())
            probabilities[b, h, s, keys] = weight / weight.sum()
            heads[b, s, h] = probabilities[b, h, s, keys] @ v[b, h // (H // G), keys]  # query head h shares a key head
    note("probabilities", probabilities)
    return note("output", note("heads", heads.reshape(B, S, H * D)) @ weights["o_proj"].T)


# ---------------------------------------------------------------------------------------------------- the model


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json (of the text model) with what it may leave out."""
    c = dict(config)
    c["num_key_value_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
    c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    rope = (c.get("rope_scaling") or {}) | (c.get("rope_parameters") or {})
    rope.setdefault("rope_theta", c.get("rope_theta") or 10000.0)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    window = c.get("sliding_window")
    kinds = c.get("layer_types") or [("full" if window is None else "sliding") + "_attention"] * c["num_hidden_layers"]
    return c | {"rope_parameters": rope, "windows": [window if k == "sliding_attention" else None for k in kinds]}


def forward(
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
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
    c = complete(config)
    w = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    ids = np.asarray(input_ids)
    B, S = ids.shape
    real = np.ones((B, S), bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    positions = np.tile(np.arange(S), (B, 1)) if position_ids is None else np.broadcast_to(position_ids, (B, S))
    trace: dict[str, Array] = {}
    act, eps = ACTIVATIONS[c.get("hidden_act", "silu")], c["rms_norm_eps"]

    def note(name: str, array: Array, prefix: str = "") -> Array:
        trace[prefix + name] = array
        return array

    x = note("embedding", w["model.embed_tokens.weight"][ids])
    for n, window in enumerate(c["windows"]):
        of, to = f"model.layers.{n}.", f"layers.{n}."
        matrices = {f"{name}_proj": w[f"{of}self_attn.{name}_proj.weight"] for name in "qkvo"}
        normed = note(f"{to}input_norm", rms_norm(x, w[f"{of}input_layernorm.weight"], eps))
        attended = attention(c, window, matrices, normed, real, positions, partial(note, prefix=f"{to}attention."))
        x = note(f"{to}attention_residual", x + attended)
        normed = note(f"{to}post_attention_norm", rms_norm(x, w[f"{of}post_attention_layernorm.weight"], eps))
        gate = note(f"{to}mlp.gate", normed @ w[f"{of}mlp.gate_proj.weight"].T)
        up = note(f"{to}mlp.up", normed @ w[f"{of}mlp.up_proj.weight"].T)
        product = note(f"{to}mlp.product", note(f"{to}mlp.activation", act(gate)) * up)
        x = note(f"{to}mlp_residual", x + note(f"{to}mlp.down", product @ w[f"{of}mlp.down_proj.weight"].T))
    x = note("final_norm", rms_norm(x, w["model.norm.weight"], eps))
    note("logits", x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T)
    return trace
