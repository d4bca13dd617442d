"""The same models, faster: what `generate` runs in the place of `model(...)`. Read `ministral.py` first.

    reason = why_not(model)                                # None, or why only the readable path will do
    forward = FlatModel(model)
    logits = forward(input_ids, position_ids, cache)       # (B, V), after the last token

It computes the same function with the same weights, cache and rotary tables (tests/test_fast.py). Sums run in another
order, so bits differ as they do between two kernels. The weights are only read: nothing of the model is moved, copied
or kept. The parts, each with its gain: attention without masks (`blockwise.py`), products on a CPU (`products.py`), one
function in the place of modules (`FlatModel`), and on a GPU recorded steps (`recorded_step.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockwise import CausalWindow, blockwise_attention
from ministral import KVCache, RopeTables, make_attention_mask, sdpa_attention
from pretrained import ACTIVATIONS
from products import avoids_onednn, split_mm, splits_rows, wide_mm, wide_rows, without_onednn

# -------------------------------------------------------------------------------------------------------- attention


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one new token to the slots of a cache: q (B, H, 1, D), k and v (B, G, slots, D), mask bool
    (B or 1, 1, 1, slots), False at hidden slots, or None -> (B, H, 1, D).

    On CUDA, the kernel is told to find the key/value head of each query head. That kernel splits the keys among
    processors: 46 instead of 640 microseconds for one layer of the 8B shape and 32,768 slots (H200, torch 2.11,
    bfloat16). On a CPU, `sdpa_attention` is as fast."""
    scaling = q.shape[-1] ** -0.5
    if groups_heads(q):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return sdpa_attention(q, k, v, mask, scaling, 0.0)[0]


def groups_heads(q: Tensor) -> bool:
    """Whether the kernel for one query is the faster one if it groups the heads itself."""
    return q.is_cuda


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


class FlatModel:
    """A causal language model (of a vision model, too: then it takes embeddings) as one function over its parameters.

    Without modules, and with `products.py`, the bundled model decodes 1.4 times as fast in float32 and 2.3 times in
    bfloat16 (two cores of an AMD EPYC).

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
        self.head = model.lm_head.weight.detach().t()
        dtype, device = self.head.dtype, self.head.device
        self.wide_rows = wide_rows(dtype, device)
        self.splits_rows = splits_rows(dtype, device)
        self.avoids_onednn = avoids_onednn(dtype, device)
        self.layers = [self.weights_of(layer) for layer in text.layers]
        self.rotate = text.layers[0].self_attn.rotate

    @staticmethod
    def weights_of(layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        modules = (
            layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        return LayerWeights(*(module.weight.detach().t() for module in modules))  # a vector stays as it is

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
            window, mask = layer.window, masks.get(layer.window)
            k, v = layer.update(k, v)
            if q.shape[2] > 1:
                rule = CausalWindow(window) if mask is None else mask
                return blockwise_attention(q, k.to(q.dtype), v.to(q.dtype), rule, q.shape[3] ** -0.5, 0.0)[0]
            if mask is not None:
                mask = mask[:, :, -1:]  # of the last token, if the others are left out
            elif window is not None:
                k, v = k[:, :, -window:], v[:, :, -window:]
            return one_query_attention(q, k, v, mask)

        if self.avoids_onednn and x.shape[:2] == (1, 1):
            with without_onednn():
                return self.run(x, position_ids, attend)
        return self.run(x, position_ids, attend)

    def run(self, x: Tensor, position_ids: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """All layers with any form of attention: attend(number of the layer, q (B, H, S, D), k and v (B, G, S, D)) ->
        (B, H, S, D). In the last layer, q has only the last token, (B, H, 1, D). k and v have the dtype of the weights;
        so has q if it is one token."""
        dtype = self.head.dtype
        if x.ndim == 2:
            x = F.embedding(x, self.embeddings)
        B, S, E = x.shape
        D = self.config.head_dim
        x = x.reshape(B * S, E)
        tables: RopeTables = self.rotary_emb(self.embeddings, position_ids)
        mm: Callable[[Tensor, Tensor], Tensor] = torch.mm
        if len(x) == 1 and self.splits_rows:
            mm = split_mm
        wide = len(x) >= self.wide_rows
        if wide:
            mm = wide_mm
            x = x.float()
            tables = tuple(table.float() for table in tables)
        for n, layer in enumerate(self.layers):
            h = self.normed(x, layer.input_norm)
            q = mm(h, layer.q).view(B, S, -1, D).transpose(1, 2)
            k = mm(h, layer.k).view(B, S, -1, D).transpose(1, 2)
            v = mm(h, layer.v).view(B, S, -1, D).transpose(1, 2)
            q, k = self.rotate(q, k, tables)
            if n == len(self.layers) - 1:
                # Of the last layer, only keys and values of the other tokens are needed. This saves 13 % of a prompt of
                # 4,096 tokens with 6 layers.
                q, x = q[:, :, -1:], x.view(B, S, E)[:, -1]
            if wide:
                k, v = k.to(dtype), v.to(dtype)
            if wide and q.shape[2] == 1:
                q = q.to(dtype)  # reading the keys takes the time, so they are not converted
            out = attend(n, q, k, v).to(x.dtype)
            x = x + mm(out.transpose(1, 2).reshape(len(x), -1), layer.o)
            h = self.normed(x, layer.post_norm)
            x = x + mm(self.act(mm(h, layer.gate)) * mm(h, layer.up), layer.down)
        return mm(self.normed(x, self.norm), self.head).to(dtype)

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
