"""The same models, faster: what `generate` runs in the place of `model(...)`. Read `ministral.py` first.

    reason = why_not(model)                                # None, or why only the readable path will do
    forward = FlatModel(model)
    logits = forward(input_ids, position_ids, cache)       # (B, V), after the last token

It computes the same function with the same weights, cache and rotary tables (tests/test_fast.py). Sums run in another
order, so bits differ as they do between two kernels. The weights are only read: nothing of the model is moved, copied
or kept. Its parts, each with its gain, are attention without masks (`blockwise.py`), products in float32 (`wide_mm`),
and one function in the place of modules (`FlatModel`). On a GPU, its steps are recorded (`recorded_step.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockwise import CausalWindow, blockwise_attention
from ministral import KVCache, RopeTables, make_attention_mask, rotate_half, sdpa_attention
from pretrained import ACTIVATIONS

# ------------------------------------------------------------------------------ float32 products of 16-bit weights


def wide_rows(dtype: torch.dtype, device: torch.device) -> float:
    """The number of rows from which a CPU multiplies 16-bit weights faster in float32.

    It is 8 on processors without such arithmetic. It is 128 for bfloat16 where a virtual machine hides the
    processor's matrix unit (AMX): 512 rows are multiplied with 300 instead of 180 GFLOPS."""
    cpu = torch.ops.mkldnn
    native = {torch.bfloat16: cpu._is_mkldnn_bf16_supported(), torch.float16: cpu._is_mkldnn_fp16_supported()}
    if device.type != "cpu" or dtype not in native:
        return math.inf
    if not native[dtype]:
        return 8
    has_unit = torch.cpu._is_avx512_bf16_supported() and native[torch.float16]
    if dtype == torch.bfloat16 and has_unit and not torch.cpu._is_amx_tile_supported():
        return 128
    return math.inf


# Numbers of a weight that are converted at a time: 16 MB. With 1 MB, products take a third longer.
TILE = 1 << 22


def wide_mm(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x (N, in), float32, with the transposed 16-bit weight (in, out) of a linear layer: (N, out).

    It is computed in float32, which is closer to float64. A prompt of 512 tokens is read 5 times as fast on a CPU
    without 16-bit arithmetic (135-million shape). Less than 8 rows, which are bound by reading the weight, are
    multiplied in 16 bits."""
    if len(x) < 8:
        return torch.mm(x.to(weight.dtype), weight)
    out = torch.empty(len(x), weight.shape[1], dtype=x.dtype)
    columns = max(TILE // len(weight), 1)
    for start in range(0, weight.shape[1], columns):
        tile = weight[:, start : start + columns].to(x.dtype)
        torch.mm(x, tile, out=out[:, start : start + columns])
    return out


# -------------------------------------------------------------------------------------------------------- attention


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one new token to the slots of a cache: q (B, H, 1, D), k and v (B, G, slots, D), mask bool
    (B or 1, 1, 1, slots), False at hidden slots, or None -> (B, H, 1, D).

    On CUDA, the kernel is told to find the key/value head of each query head. That kernel splits the keys among
    processors: 46 instead of 640 microseconds for one layer of the 8B shape and 32,768 slots (H200, torch 2.11,
    bfloat16). On a CPU, `sdpa_attention` is as fast."""
    scaling = q.shape[-1] ** -0.5
    q = q.to(k.dtype)  # reading the keys takes the time, so they are not converted
    if groups_heads(q.device):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return sdpa_attention(q, k, v, mask, scaling, 0.0)[0]


def groups_heads(device: torch.device) -> bool:
    """Whether the kernel for one query is the faster one if it groups the heads itself."""
    return device.type == "cuda"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    """Attention of new tokens q (B, H, S, D) to the keys that a cache returns. Without a mask, nothing is padding."""
    if q.shape[2] == 1:
        return one_query_attention(q, k, v, mask)
    k, v = k.to(q.dtype), v.to(q.dtype)
    rule = CausalWindow(window) if mask is None else mask
    return blockwise_attention(q, k, v, rule, q.shape[-1] ** -0.5, 0.0)[0]


# --------------------------------------------------------------------------------------------------- the flat model


class LayerWeights(NamedTuple):
    """The parameters of a layer, as views. Those of linear layers are transposed, (in, out)."""

    input_norm: Tensor  # (E,)
    q: Tensor  # (E, H D)
    k: Tensor  # (E, G D)
    v: Tensor  # (E, G D)
    o: Tensor  # (H D, E)
    post_norm: Tensor  # (E,)
    gate: Tensor  # (E, F)
    up: Tensor  # (E, F)
    down: Tensor  # (F, E)


def transposed(weight: Tensor) -> Tensor:
    """A view (in, out) of the weight of a linear layer. A step of a small model takes 5 % less than with `F.linear`,
    which makes this view each time. A vector stays as it is."""
    weight = weight.detach()
    if weight.ndim == 1:
        return weight
    return weight.t()


class FlatModel:
    """A causal language model (of a vision model, too: then it takes embeddings) as one function over its parameters.

    Without modules, a step of a small model takes two thirds of the time (bundled model, float32).

    Args:
        model: a model without a reason in `why_not`. Its parameters as they are now are used. Making this object takes
            microseconds, so it is made anew for every text.
    """

    def __init__(self, model: Any) -> None:
        text = text_model(model)
        self.config = text.config
        self.rotary_emb = text.rotary_emb
        self.act = ACTIVATIONS[text.config.hidden_act]
        self.embeddings = text.embed_tokens.weight.detach()
        self.norm = text.norm.weight.detach()
        self.eps = text.norm.eps
        self.head = transposed(model.lm_head.weight)
        self.wide_rows = wide_rows(self.head.dtype, self.head.device)
        self.layers = [self.weights_of(layer) for layer in text.layers]

    @staticmethod
    def weights_of(layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        modules = (
            layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        return LayerWeights(*(transposed(module.weight) for module in modules))

    def __call__(self, x: Tensor, position_ids: Tensor, cache: KVCache, padding_mask: Tensor | None = None) -> Tensor:
        """Logits (B, V) after the last of S new tokens, which are added to the cache.

        Args:
            x: ids (B, S), or embeddings (B, S, E).
            position_ids: (B or 1, S).
            padding_mask: bool (B, past + S), False at padding; None: there is none.
        """
        masks = dict[int | None, Tensor]()  # of the layers with each window
        if padding_mask is not None:
            places = torch.arange(padding_mask.shape[1], device=x.device)[-x.shape[1] :]
            for layer in cache.layers:
                if layer.window not in masks:
                    keys = layer.key_positions(x.shape[1], x.device)
                    masks[layer.window] = make_attention_mask(places, keys, layer.window, padding_mask[:, None, keys])

        def attend(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer = cache.layers[n]
            k, v = layer.update(k, v)
            return attention(q, k, v, masks.get(layer.window), layer.window)

        return self.run(x, position_ids, attend)

    def run(self, x: Tensor, position_ids: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """All layers with any form of attention: attend(number of the layer, q (B, H, S, D), k and v (B, G, S, D) of
        the new tokens, in the dtype of the weights) -> (B, H, S, D)."""
        dtype = self.head.dtype
        if x.ndim == 2:
            x = F.embedding(x, self.embeddings)
        B, S, E = x.shape
        H, D = self.config.num_attention_heads, self.config.head_dim
        x = x.reshape(B * S, E)
        tables: RopeTables = self.rotary_emb(self.embeddings, position_ids)
        mm: Callable[[Tensor, Tensor], Tensor] = torch.mm
        if len(x) >= self.wide_rows:
            mm = wide_mm
            x = x.float()
            tables = tuple(table.float() for table in tables)
        cos, sin, *scale = tables
        for n, layer in enumerate(self.layers):
            h = self.normed(x, layer.input_norm)
            qk = torch.cat((mm(h, layer.q), mm(h, layer.k)), dim=1).view(B, S, -1, D).transpose(1, 2)
            v = mm(h, layer.v).view(B, S, -1, D).transpose(1, 2)
            qk = qk * cos + rotate_half(qk) * sin  # (B, H + G, S, D): both at once take 3 % less of a step
            q, k = qk[:, :H], qk[:, H:]
            if scale:
                q = q * scale[0]
            out = attend(n, q, k.to(dtype), v.to(dtype)).to(x.dtype)
            x = x + mm(out.transpose(1, 2).reshape(B * S, -1), layer.o)
            h = self.normed(x, layer.post_norm)
            x = x + mm(self.act(mm(h, layer.gate)) * mm(h, layer.up), layer.down)
        last = x.view(B, S, E)[:, -1]
        return mm(self.normed(last, self.norm), self.head).to(dtype)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """`RMSNorm`, rounded before the weight multiplies, as there."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * weight.to(x.dtype)


# The modules whose classes `FlatModel` computes (tests/test_layout.py).
OWN_MODULES = {"ministral", "ministral3", "pretrained", nn.ModuleList.__module__}


def text_model(model: Any) -> Any:
    """The backbone of a causal language model, or that of the text in a vision model."""
    return getattr(model.base_model, "language_model", model.base_model)


def why_not(model: Any) -> str | None:
    """The reason why `FlatModel` would compute something else than `model(...)`; None: it computes the same."""
    text = text_model(model)
    if model.training:
        return "the model is in training mode"
    if text.config.attn_implementation == "eager":
        return "attn_implementation is 'eager'"
    for part in model.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{type(part).__name__} has hooks"
    computed = [*text.modules(), model.lm_head]
    for part in [model, model.base_model, *computed]:
        origin = type(part).forward.__module__
        own = origin in OWN_MODULES or origin.startswith(("vision", "torch."))
        if "forward" in part.__dict__ or not own:
            return f"the forward of {type(part).__name__} is not that of this project"
    for part in computed:
        kind = type(part)
        if kind.__module__ not in OWN_MODULES:
            return f"{kind.__module__}.{kind.__name__} is not a class of this project"
        if hasattr(part, "weight") and type(part.weight.data) is not Tensor:
            return f"a weight of {kind.__name__} is a {type(part.weight.data).__name__}"
        if getattr(part, "bias", None) is not None:
            return f"{kind.__name__} has a bias"
    return None
