"""Ministral 3 (Ministral-3-3B/8B/14B-2512, text): exactly what changed since `ministral.py`, and nothing else.

* No window: every layer is a full attention layer (unless `sliding_window` is set; then every layer slides).
* YaRN: the rotary frequencies are stretched, the slow ones by `factor` (16), the fast ones not at all, so that a
  model trained on 16384 positions reaches 262144. It acts at every position, short texts included.
* The magnitude that YaRN puts on attention scores is 1.0 here, because mscale = mscale_all_dim; where it is left
  out, `attention_factor()` is 0.1 ln(16) + 1 = 1.277. Ports have erred in both directions.
* Queries are scaled by position, as in Llama 4: 1 + 0.1 ln(1 + floor(p / 16384)). Below position 16384 that is 1.
* head_dim * heads need not be hidden_size (3B: 4096 against 3072), and the 3B model ties head and embeddings.

Sources: YaRN https://arxiv.org/abs/2309.00071, Ministral 3 https://arxiv.org/abs/2601.08584. Attention, MLP, norms,
masks, cache and the loop over layers are imported: read `ministral.py` first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from checks import require
from ministral import (
    MinistralAttention,
    MinistralConfig,
    MinistralDecoderLayer,
    MinistralForCausalLM,
    MinistralModel,
    RopeTables,
    RotaryEmbedding,
)
from pretrained import at_least_float32


@dataclass
class Ministral3Config(MinistralConfig):
    """The numbers that define a Ministral 3. Fields and defaults are those of Transformers' `Ministral3Config`
    (the text part of Ministral-3-8B).

    `rope_parameters` holds, beside rope_type ("yarn" or "default") and rope_theta:

    * factor, original_max_position_embeddings: the stretch, and the context length it stretches (yarn: required).
    * beta_fast, beta_slow (32, 1): pairs that turn more than beta_fast times within the original context stay as
      they are, those that turn less than beta_slow times are stretched in full, those between in part.
    * mscale, mscale_all_dim, attention_factor: the magnitude, see `YarnRotaryEmbedding.attention_factor`.
    * truncate (True): widen the ramp between the two zones to whole pairs.
    * llama_4_scaling_beta: strength of the query scaling; 0, None or left out switches it off.
    """

    vocab_size: int = 131072
    num_hidden_layers: int = 34
    head_dim: int = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 11
    sliding_window: int | None = None

    model_type: ClassVar[str] = "ministral3"
    rope_types: ClassVar[tuple[str, ...]] = ("yarn", "default")
    rope_keys: ClassVar[dict[str, float | None]] = MinistralConfig.rope_keys | {
        "factor": 1, "original_max_position_embeddings": 1, "max_position_embeddings": 1, "beta_fast": 1e-6,
        "beta_slow": 1e-6, "mscale": 0, "mscale_all_dim": 0, "attention_factor": 1e-6, "truncate": None,
        "llama_4_scaling_beta": 0,
    }  # fmt: skip
    # Of keys that yarn may leave out.
    rope_defaults: ClassVar[dict[str, float]] = {"beta_fast": 32, "beta_slow": 1}
    unwritten: ClassVar[tuple[str, ...]] = (*MinistralConfig.unwritten, "layer_types")

    def __post_init__(self) -> None:
        if self.rope_parameters is None:
            require(self, "rope_theta", self.rope_theta is None, "None without rope_parameters, which say it")
            self.rope_parameters = {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "max_position_embeddings": self.max_position_embeddings,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            }
        super().__post_init__()
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        require(self, "layer_types", set(self.layer_types) == {kind}, f"{kind} for every layer (see sliding_window)")
        rope = self.rope_parameters
        # Transformers reads these two keys without asking whether they exist.
        if rope.get("llama_4_scaling_beta") is None:
            rope["llama_4_scaling_beta"] = 0.0
        if rope["rope_type"] == "default" and rope["llama_4_scaling_beta"] == 0.0:
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        for key in ("original_max_position_embeddings", *(("factor",) if rope["rope_type"] == "yarn" else ())):
            if rope.get(key) is None:
                raise ValueError(f"rope_parameters[{key!r}]=None is impossible; allowed: a number not below 1")


class YarnRotaryEmbedding(RotaryEmbedding):
    """Rotary positions with YaRN frequencies, and the scale of each query."""

    def __init__(self, config: MinistralConfig) -> None:
        super().__init__(config)
        self.rope = config.rope_parameters

    def inverse_frequencies(self, dtype: torch.dtype) -> Tensor:
        """YaRN, "NTK-by-parts": a blend of the plain frequencies and the same divided by `factor`, (D/2,).

        Pair i turns orig * theta^(-2i/D) / 2 pi times within the original context. Solved for i, that gives the two
        ends of the ramp: `low`, where pairs turn beta_fast times, and `high`, where they turn beta_slow times. For
        the 3B model these are 20 and 37 of 64 pairs."""
        plain = super().inverse_frequencies(dtype)
        if self.rope["rope_type"] == "default":
            return plain
        D, theta = self.config.head_dim, self.config.rope_theta
        original = self.rope["original_max_position_embeddings"]

        def pair_that_turns(times: float) -> float:
            return D * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

        turns = Ministral3Config.rope_defaults | {key: value for key, value in self.rope.items() if value is not None}
        low: float = pair_that_turns(turns["beta_fast"])
        high = pair_that_turns(turns["beta_slow"])
        if self.rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        if low == high:
            high += 0.001  # a step instead of a ramp
        pairs = torch.arange(D // 2, dtype=dtype, device="cpu")
        kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)  # 1: as trained, 0: stretched in full
        periods = theta ** (torch.arange(0, D, 2, dtype=dtype, device="cpu") / D)
        stretched = 1.0 / (self.rope["factor"] * periods)
        return stretched * (1 - kept) + plain * kept

    def attention_factor(self) -> float:
        """YaRN's magnitude: 0.1 ln(factor) + 1 for the paper's softmax temperature, unless the configuration names
        another (`attention_factor`), or gives mscale and mscale_all_dim, whose magnitudes are divided: equal ones,
        as in Ministral 3, make 1.0."""

        def magnitude(mscale: float) -> float:
            return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

        if self.rope["rope_type"] == "default":
            return 1.0
        factor: float = self.rope["factor"]
        if self.rope.get("attention_factor") is not None:
            return float(self.rope["attention_factor"])
        if self.rope.get("mscale") and self.rope.get("mscale_all_dim"):
            return magnitude(self.rope["mscale"]) / magnitude(self.rope["mscale_all_dim"])
        return magnitude(1.0)

    def forward(self, x: Tensor, position_ids: Tensor) -> RopeTables:
        """position_ids (B or 1, S) -> cosines, sines (B or 1, 1, S, D), and scales (B or 1, 1, S, 1)."""
        p = position_ids.to(at_least_float32(x.dtype))
        steps = torch.floor(p / self.rope["original_max_position_embeddings"])
        scale = 1 + self.rope["llama_4_scaling_beta"] * torch.log(1 + steps)
        return *super().forward(x, position_ids), scale[:, None, :, None].to(x.dtype)


class Ministral3Attention(MinistralAttention):
    """Attention whose queries grow with their position, so that far contexts do not wash out the softmax."""

    def rotate(self, q: Tensor, k: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        cos, sin, scale = tables
        q, k = super().rotate(q, k, (cos, sin))
        return q * scale, k


class Ministral3DecoderLayer(MinistralDecoderLayer):
    """The same layer around the new attention."""

    attention_class = Ministral3Attention


class Ministral3Model(MinistralModel):
    """The backbone of Ministral 3; arguments as `MinistralModel`."""

    config_class = Ministral3Config
    layer_class = Ministral3DecoderLayer
    rotary_class = YarnRotaryEmbedding


class Ministral3ForCausalLM(MinistralForCausalLM):
    """Ministral 3 with its language model head; arguments as `MinistralForCausalLM`."""

    config_class = Ministral3Config
    model_class = Ministral3Model
