"""The same models, faster: what `generate` runs in the place of `model(...)`. Read `ministral.py` first.

    forward = FlatModel(model)
    logits = forward(input_ids, position_ids, cache)       # (B, V), after the last token

It computes the same function with the same weights, cache and rotary tables (tests/test_fast.py). Sums are added in
another order, so the last bits differ, as they do between two kernels. Weights are only read, never moved or copied.

Each part states its reason and its gain: attention without masks (`blockwise.py`), products on a CPU (`products.py`),
one function instead of modules (`FlatModel`), attention of one token (`one_query_attention`), and on a GPU recorded
steps (`recorded_step.py`). `generate(..., fast=False)` uses none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blockwise import CausalWindow, blockwise_attention, has_kernels
from ministral import KVCache, RopeTables, make_attention_mask, sdpa_attention
from pretrained import ACTIVATIONS
from products import avoids_onednn, split_mm, splits_rows, wide_mm, wide_rows, without_onednn

# -------------------------------------------------------------------------------------------------------- attention


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool) -> Tensor:
    """Attention of one new token to the slots of a cache.

    On CUDA, the kernel groups the heads itself (`enable_gqa`). This kernel splits the keys among the processors of the
    GPU: 46 instead of 640 microseconds for one layer of the 8B shape and 32,768 slots (H200, torch 2.11, bfloat16).

    Args:
        q: (B, H, 1, D).
        k, v: (B, G, slots, D).
        mask: bool (B or 1, 1, 1, slots), False at hidden slots; None: all are visible.
        grouped: what `groups_heads` returns.

    Returns:
        (B, H, 1, D).
    """
    scaling = q.shape[-1] ** -0.5
    if grouped:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return sdpa_attention(q, k, v, mask, scaling, 0.0)[0]


def groups_heads(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `one_query_attention` leaves the grouping of heads to the kernel.

    On a CPU, `sdpa_attention` is as fast. On CUDA it depends on the GPU, its libraries and the dtype whether PyTorch
    has a kernel for a mask and groups of heads. If it has none, its choice is 0, the formula step by step."""
    if device.type != "cuda":
        return False
    D = config.head_dim
    q = torch.empty(1, config.num_attention_heads, 1, D, dtype=dtype, device=device)
    k = torch.empty(1, config.num_key_value_heads, 8, D, dtype=dtype, device=device)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool, device=device)
    return torch._fused_sdp_choice(q, k, k, mask, 0.0, False, enable_gqa=True) != 0


# --------------------------------------------------------------------------------------------------- the flat model

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # see `FlatModel.run`


def text_model(model: Any) -> Any:
    """The text backbone of a causal language model or of a vision model."""
    return getattr(model.base_model, "language_model", model.base_model)


class LayerWeights(NamedTuple):
    """Views of the parameters of a layer. Those of linear layers are transposed: (in, out). E, H, G and D are as in
    `ministral.py`, I is `intermediate_size`."""

    input_norm: Tensor  # (E,)
    q: Tensor  # (E, H D)
    k: Tensor  # (E, G D)
    v: Tensor  # (E, G D)
    o: Tensor  # (H D, E)
    post_norm: Tensor  # (E,)
    gate: Tensor  # (E, I)
    up: Tensor  # (E, I)
    down: Tensor  # (I, E)


class FlatModel:
    """A causal language model as one function of its parameters. Of a vision model it is the text model: its input are
    embeddings that contain the images.

    Calling modules takes time, which matters in a step of decoding. Without them, and with `products.py`, a model of 4
    million parameters decodes 1.4 times as fast as by `model(...)` in float32, and 2.3 times in bfloat16 (two cores of
    an AMD EPYC).

    Args:
        model: a model for which `why_not` returns None. Its present parameters are used: after a change, make a new
            object. `generate` makes one in each call, which takes under 3 ms with 36 layers.
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
        self.grouped = groups_heads(text.config, dtype, device)
        self.layers = [self.weights_of(layer) for layer in text.layers]
        self.rotate = text.layers[0].self_attn.rotate

    @staticmethod
    def weights_of(layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        modules = (
            layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        return LayerWeights(*(module.weight.detach().t() for module in modules))  # `t` leaves vectors alone

    def __call__(
        self, x: Tensor, position_ids: Tensor, cache: KVCache, padding_mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Logits (B, V) after the last of S new tokens, which are added to the cache.

        Args:
            x: ids (B, S), or embeddings (B, S, E).
            position_ids: (B or 1, S).
            cache: holds the earlier tokens, `past` in number.
            padding_mask: bool (B, past + S), False at padding; None: there is none.
        """
        S = x.shape[1]
        masks: dict[int | None, Tensor] = {}  # for each window, the mask (B, 1, S, K) of its layers
        if padding_mask is not None or not has_kernels(x.device):
            # Positions in the cache: they count padding, unlike `position_ids`.
            past = cache.get_seq_length()
            queries = torch.arange(past, past + S, device=x.device)
            for layer in cache.layers:
                if layer.window not in masks:
                    keys = layer.key_positions(S, x.device)
                    visible = None
                    if padding_mask is not None:
                        visible = padding_mask[:, None, keys]
                    masks[layer.window] = make_attention_mask(queries, keys, layer.window, visible)

        def attend(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            window = cache.layers[n].window
            mask = masks.get(window)
            k, v = cache.layers[n].update(k, v)
            if q.shape[2] > 1:
                rule = CausalWindow(window) if mask is None else mask
                return blockwise_attention(q, k, v, rule, q.shape[3] ** -0.5, 0.0)[0]
            # One query: a decode step, or the last token of a prompt in the last layer.
            if mask is not None:
                mask = mask[:, :, -1:]
            elif window is not None:
                k, v = k[:, :, -window:], v[:, :, -window:]
            return one_query_attention(q, k, v, mask, self.grouped)

        if self.avoids_onednn and x.shape[:2] == (1, 1):
            with without_onednn():
                return self.run(x, position_ids, attend)
        return self.run(x, position_ids, attend)

    def run(self, x: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Logits (B, V) after the last token.

        Args:
            x, position_ids: as in `__call__`.
            attend: stores keys and values, and attends to all of the text: attend(number of the layer, q (B, H, S, D),
                k and v (B, G, S, D)) -> (B, H, S, D). k and v have the dtype of the weights, and so has a single query.
                In the last layer there is only the query of the last token, (B, H, 1, D).
        """
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
                # From here on only the last token is needed; the others have given their keys and values. This saves
                # 13 % of the time of a prompt of 4,096 tokens with 6 layers.
                q = q[:, :, -1:]
                x = x.view(B, S, E)[:, -1]
            if wide:
                k, v = k.to(dtype), v.to(dtype)
            if wide and q.shape[2] == 1:
                q = q.to(dtype)  # one query is converted, and not all the keys that it reads
            out = attend(n, q, k, v).to(x.dtype)
            x = x + mm(out.transpose(1, 2).reshape(len(x), -1), layer.o)
            h = self.normed(x, layer.post_norm)
            x = x + mm(self.act(mm(h, layer.gate)) * mm(h, layer.up), layer.down)
        return mm(self.normed(x, self.norm), self.head).to(dtype)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same as `ministral.RMSNorm`: the result is rounded before the weight multiplies it."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * weight.to(x.dtype)
