"""The same models, faster: what `generate` runs in the place of `model(...)`. Read `ministral.py` first.

    forward = flat(model)                                  # None where only the readable path will do
    logits = forward(input_ids, positions, cache)          # (B, V), after the last token

One function over plain tensors instead of modules, on the same weights, cache, masks and rotary tables, tested equal to
the readable path (tests/test_fast.py); sums run in another order, so bits differ as they do between two kernels. The
weights are only read: nothing of the model is moved, copied or kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ministral
import pretrained
from ministral import KVCache, make_attention_mask, repeat_kv, rotate_half, sdpa_attention


def transposed(module: Any) -> Tensor:
    """The weight of a linear layer as a view (in, out), which spares `F.linear` that step in every call (4 to 6 % of a
    step of small models). A view: what is written into the weight is seen, and the weight stays as it is."""
    weight: Tensor = module.weight.detach()
    return weight.t()


def wide_rows(dtype: torch.dtype, device: torch.device) -> float:
    """From how many rows on a CPU multiplies 16-bit weights faster in float32: 8 without such arithmetic; 128 in
    bfloat16 on processors whose matrix unit, AMX, is hidden by a virtual machine (512 rows: 300 against 180 GFLOPS)."""
    cpu = torch.ops.mkldnn
    native = {torch.bfloat16: cpu._is_mkldnn_bf16_supported(), torch.float16: cpu._is_mkldnn_fp16_supported()}
    if device.type != "cpu" or dtype not in native:
        return math.inf
    hidden = torch.cpu._is_avx512_bf16_supported() and native[torch.float16] and not torch.cpu._is_amx_tile_supported()
    return 8 if not native[dtype] else 128 if dtype == torch.bfloat16 and hidden else math.inf


# The modules whose classes this file computes in one function (tests/test_layout.py).
OWN_MODULES = {"ministral", "ministral3", "pretrained", nn.ModuleList.__module__}
# Numbers of a weight (16 MB: a tenth slower than all at once; 1 MB: a third), and keys, that are widened at a time.
TILE, BLOCK = 1 << 22, 8192


def wide_mm(x: Tensor, matrix: Tensor) -> Tensor:
    """x (N, in) times the transpose (in, out) of a 16-bit weight, multiplied in float32: closer to float64. Few rows,
    bound by reading the weight, stay in 16 bits."""
    if len(x) < 8:
        return torch.mm(x.to(matrix.dtype), matrix)
    x, columns, out = x.float(), max(TILE // len(matrix), 1), torch.empty(len(x), matrix.shape[1], dtype=torch.float32)
    for at in range(0, matrix.shape[1], columns):
        torch.mm(x, matrix[:, at : at + columns].float(), out=out[:, at : at + columns])
    return out


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of a chunk of S tokens, without padding, to P earlier keys and its own: q (B, H, S, D), k and v
    (B, G, P + S, D), keys in order, of the dtype of q or narrower -> (B, H, S, D).

    A mask (S, P + S) is long to read and all ones but for its ends. So attention runs in parts without one: keys that
    leave the window while the chunk goes on (causal, read backwards), keys that every query sees, the chunk itself
    (causal). They are joined as in FlashAttention (https://arxiv.org/abs/2205.14135): each weighs its share."""
    (B, H, S, D), G, P = q.shape, k.shape[1], k.shape[2] - q.shape[2]
    edge = 0 if window is None or window >= P + S else P + S - window + 1
    if edge > (P if q.is_cpu else 0):  # the chunk is longer than the window, or the kernel of the parts is not there
        places, k, v = torch.arange(P + S, device=q.device), k.to(q.dtype), v.to(q.dtype)
        return sdpa_attention(q, k, v, make_attention_mask(places[P:], places, window), D**-0.5, 0.0)[0]
    if not q.is_cpu:
        from torch.nn.attention.bias import causal_lower_right  # fmt: skip  # imported late: it takes 1.6 s
        k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
        return F.scaled_dot_product_attention(q, k, v, causal_lower_right(S, P + S))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def some(first: int, last: int, groups: int = 1) -> list[Tensor]:
        return [repeat_kv(x[:, :, first:last].to(q.dtype), groups) for x in (k, v)]

    def others() -> Iterator[tuple[Tensor, Tensor]]:  # one at a time: together they would grow with the context
        for at in range(edge, P, BLOCK):  # a group's heads become rows of queries over one key head: none is repeated
            out, more = attend(q.reshape(B, G, H // G * S, D), *some(at, min(at + BLOCK, P)))
            yield out.reshape(q.shape), more.reshape(B, H, S)
        if edge:
            out, more = attend(*(x.flip(2) for x in (q, *some(0, edge, H // G))), 0.0, True)
            yield out.flip(2), more.flip(2)

    joined, total = attend(q, *some(P, P + S, H // G), 0.0, True)  # and (B, H, S) logarithm of the sum of exponentials
    for out, more in others():
        joined = torch.lerp(joined.to(total.dtype), out.to(total.dtype), torch.sigmoid(more - total)[..., None])
        total = torch.logaddexp(total, more)
    return joined.to(q.dtype)


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool) -> Tensor:
    """Attention of one new token to the slots of a cache: q (B, H, 1, D), k and v (B, G, slots, D), mask bool
    (B or 1, 1, 1, slots), False at hidden slots, or None -> (B, H, 1, D).

    With `grouped`, the kernel finds the key/value head of each query head. On CUDA this takes a kernel that splits the
    keys among processors: 46 instead of 640 microseconds for one layer of the 8B shape and 32,768 slots (H200, torch
    2.11, bfloat16). On a CPU, `sdpa_attention` is as fast.
    """
    scaling = q.shape[-1] ** -0.5
    if grouped:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return sdpa_attention(q, k, v, mask, scaling, 0.0)[0]


class Flat:
    """The text model of `model` as one function; see `flat`."""

    def __init__(self, text: ministral.MinistralModel, head: Any) -> None:
        c = self.config = text.config
        self.rotary, self.act = text.rotary_emb, pretrained.ACTIVATIONS[c.hidden_act]
        self.embeddings: Tensor = text.embed_tokens.weight.detach()
        self.norm, self.head = text.norm.weight.detach(), transposed(head)
        self.wide_rows = wide_rows(self.head.dtype, self.head.device)
        # Each layer: norm (E,), q (E, H D), k and v (E, G D), o (H D, E), norm (E,), gate and up (E, F), down (F, E).
        self.layers: list[tuple[Tensor, ...]] = []
        blocks: list[Any] = list(text.layers)
        for block in blocks:
            at, mlp = block.self_attn, block.mlp
            attention = [transposed(part) for part in (at.q_proj, at.k_proj, at.v_proj, at.o_proj)]
            mix = [transposed(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
            norms = block.input_layernorm.weight.detach(), block.post_attention_layernorm.weight.detach()
            self.layers.append((norms[0], *attention, norms[1], *mix))

    def __call__(self, x: Tensor, position_ids: Tensor, cache: KVCache, real: Tensor | None = None) -> Tensor:
        """Logits (B, V) after the last of S new tokens, which the cache takes in. x: (B, S) ids, or (B, S, E)
        embeddings; position_ids (B or 1, S); real: bool (B, past + S), False at padding, or None if there is none."""
        S, masks = x.shape[1], dict[int | None, Tensor]()
        if real is not None:
            places = torch.arange(real.shape[1], device=x.device)
            for kept in {layer.window: layer for layer in cache.layers}.values():
                keys = kept.key_positions(S, x.device)
                masks[kept.window] = make_attention_mask(places[-S:], keys, kept.window, real[:, None, keys])

        def attend(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept, new, dtype = cache.layers[n], q.shape[2], self.embeddings.dtype
            if q.dtype != dtype:  # (one query is bound by reading the keys)
                q, k, v = q.to(dtype) if new == 1 else q, k.to(dtype), v.to(dtype)
            k, v = kept.update(k, v)
            if new > 1 and real is None:
                return chunk_attention(q, k, v, kept.window)
            k, v = (k, v) if new == 1 else (k.to(q.dtype), v.to(q.dtype))
            mask = None if real is None else masks[kept.window][:, :, -new:]
            if new < S and mask is None and kept.window is not None:
                k, v = k[:, :, -kept.window :], v[:, :, -kept.window :]
            if new == 1:
                return one_query_attention(q, k, v, mask, q.is_cuda)
            return sdpa_attention(q, k, v, mask, q.shape[-1] ** -0.5, 0.0)[0]

        return self.run(x, self.rotary(self.embeddings, position_ids), attend)

    def run(self, x: Tensor, tables: ministral.RopeTables, attend: Callable[..., Tensor]) -> Tensor:
        """All layers, with any form of attention: attend(number of the layer, q, k, v) -> what the heads find."""
        c = self.config
        x = F.embedding(x, self.embeddings) if x.ndim == 2 else x
        (B, S, E), H, G, D = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        cos, sin, *scale = tables
        x = x.reshape(B * S, E)
        mm: Any = torch.mm
        if len(x) >= self.wide_rows:
            mm, (x, cos, sin, *scale) = wide_mm, (t.float() for t in (x, cos, sin, *scale))
        for n, (norm, q_proj, k_proj, v_proj, o_proj, post_norm, gate, up, down) in enumerate(self.layers):
            if mm is wide_mm:  # (numbers of two types are multiplied slowly)
                norm, post_norm = norm.float(), post_norm.float()
            h = self.normed(x, norm)
            qk = torch.cat((mm(h, q_proj), mm(h, k_proj)), dim=1).view(B, S, H + G, D).transpose(1, 2)
            v = mm(h, v_proj).view(B, S, G, D).transpose(1, 2)
            qk = qk * cos + rotate_half(qk) * sin  # (B, H + G, S, D), both at once
            q, k = qk[:, :H], qk[:, H:]
            q = q * scale[0] if scale else q
            if S > 1 and n + 1 == len(self.layers):  # of this layer, the other tokens leave keys and values, no more
                q, x = q[:, :, -1:], x.view(B, S, E)[:, -1]
            found = attend(n, q, k, v)
            x = x + mm(found.transpose(1, 2).reshape(len(x), H * D), o_proj)
            h = self.normed(x, post_norm)
            x = x + mm(self.act(mm(h, gate)) * mm(h, up), down)
        return mm(self.normed(x, self.norm), self.head).to(self.head.dtype)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """`RMSNorm`, rounded before the weight multiplies, as there."""
        return F.rms_norm(x, x.shape[-1:], None, self.config.rms_norm_eps) * weight


class Captured:
    """Decode steps of which every shape and address stays the same, so that a GPU replays one recorded graph instead of
    being told each kernel anew: ids (B, 1) -> logits (B, V), which the next call overwrites.

    `cache` is that of the prompt: room is made for `total` tokens, and each step reads it whole, hidden slots masked.
    first (B or 1, 1) is the position of slot 0, negative where padding comes first; real, bool (B, total), False at
    padding. `compile` fuses the small operations by `torch.compile`, which takes about a minute first."""

    def __init__(self, forward: Flat, cache: KVCache, total: int, first: Tensor, real: Tensor | None, compile: bool):
        self.forward, self.cache, self.first, self.real = forward, cache, first, real
        self.held: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer
        for kept in cache.layers:
            assert kept.keys is not None and kept.values is not None
            self.held.append(kept.reserve(kept.keys, kept.values, min(total, kept.window or total)))
            for tensor in self.held[-1]:
                tensor[:, :, kept.length :].zero_()  # hidden, but 0 times what memory happens to hold may be NaN
        self.slot = torch.full((1,), cache.get_seq_length(), device=first.device)
        self.ids = torch.zeros(len(self.held[0][0]), 1, dtype=torch.int64, device=first.device)
        step = self.replay = torch.compile(self._step, fullgraph=True, dynamic=False) if compile else self._step
        if first.device.type != "cuda":
            return
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile, and let libraries take their memory; all write the same slot
            for _ in range(3):
                step(self.ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(self.ids)
        self.replay = lambda _: (graph.replay(), logits)[1]  # type: ignore[func-returns-value,assignment]

    def _step(self, ids: Tensor) -> Tensor:
        masks: dict[int, Tensor] = {}  # number of slots -> which are seen
        for length in {keys.shape[2] for keys, _ in self.held}:
            slots = torch.arange(length, device=ids.device)
            place = self.slot - (self.slot - slots) % length  # of the token in each slot; below 0: none yet
            seen = (place >= 0)[None] & (True if self.real is None else self.real[:, place.clamp(min=0)])
            masks[length] = seen[:, None, None]

        def attend(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.held[n]
            for held, new in (keys, k), (values, v):
                held.index_copy_(2, self.slot % held.shape[2], new.to(held.dtype))
            return one_query_attention(q.to(keys.dtype), keys, values, masks[keys.shape[2]], ids.is_cuda)

        tables = self.forward.rotary(self.forward.embeddings, (self.first + self.slot).clamp(min=0))
        return self.forward.run(ids, tables, attend)

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        logits = self.replay(self.ids)
        self.slot += 1
        for kept in self.cache.layers:
            kept.length += 1
        return logits


def flat(model: pretrained.PreTrainedModel) -> Flat | None:
    """The fast path of a causal language model (of a vision model, too: then it takes embeddings), for its weights as
    they are now: it is made anew for every text, which takes microseconds, so none is ever out of date. None where it
    would compute something else: eager attention, training mode, hooks, modules or `forward` of other origin."""
    language: Any = getattr(model.base_model, "language_model", model.base_model)
    parts: list[Any] = [*language.modules(), model.lm_head]
    own = {type(part).__module__ for part in parts} <= OWN_MODULES
    forwards = {type(part).forward.__module__ for part in [model, model.base_model, *parts]}
    own = own and all(name in OWN_MODULES or name.startswith(("vision", "torch.")) for name in forwards)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    replaced = any("forward" in part.__dict__ for part in [model, model.base_model, *parts])  # not of the class
    parts = [part for part in parts if hasattr(part, "weight")]
    plain = all(type(part.weight.data) is Tensor and getattr(part, "bias", None) is None for part in parts)
    sdpa = language.config.attn_implementation == "sdpa"
    if model.training or not sdpa or hooked or replaced or not own or not plain:
        return None
    return Flat(language, model.lm_head)
