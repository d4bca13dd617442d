"""Ministral 3 (Ministral-3-3B/8B/14B-2512, text): exactly what changed since `ministral.py`, and nothing else.

* No window: every layer uses full attention (if `sliding_window` is set, every layer is a sliding one).
* YaRN stretches the periods of rotary pairs: slow pairs by `factor` (16), fast pairs not at all. So a model trained on
  16384 positions reaches 262144. It acts at every position, also in short texts.
* YaRN also multiplies cosine and sine by `attention_factor()`. It is 1.0 here, because `mscale` equals
  `mscale_all_dim`. Without these two keys it would be 0.1 ln(16) + 1 = 1.277, and every score 1.277^2 times larger.
* Queries are scaled by position, as in Llama 4: 1 + 0.1 ln(1 + floor(p / 16384)). Below position 16384 that is 1.
* Sizes: in the 3B model head_dim * heads is not hidden_size (4096 and 3072), and head and embeddings are tied.

Sources: YaRN https://arxiv.org/abs/2309.00071, Ministral 3 https://arxiv.org/abs/2601.08584. Read `ministral.py` first:
attention, MLP, norms, masks, cache and the loop over layers are imported from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from checks import require_rope_key
from ministral import (
    MinistralAttention,
    MinistralConfig,
    MinistralDecoderLayer,
    MinistralForCausalLM,
    MinistralModel,
    RopeTables,
    RotaryEmbedding,
)
from outputs import at_least_float32


@dataclass
class Ministral3Config(MinistralConfig):
    """The sizes and settings of a Ministral 3. Fields and defaults are those of Transformers' `Ministral3Config`, the
    text part of Ministral-3-8B. `rope_parameters` holds rope_type ("yarn" or "default"), rope_theta, and:

    * factor, original_max_position_embeddings: the stretch, and the context length before it (both required by yarn).
    * beta_fast, beta_slow (32, 1): pairs that turn more than beta_fast times within the original context stay as they
      are. Pairs that turn less than beta_slow times are stretched in full. Those between are stretched in part.
    * truncate (True): round the ends of the ramp between these two zones outwards to whole pairs.
    * mscale, mscale_all_dim, attention_factor: the magnitude, see `YarnRotaryEmbedding.attention_factor`.
    * llama_4_scaling_beta: strength of the query scaling. With 0, with None or without the key it is off.
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
    # yarn may leave these keys out.
    rope_defaults: ClassVar[dict[str, float]] = {"beta_fast": 32, "beta_slow": 1}
    unwritten: ClassVar[tuple[str, ...]] = (*MinistralConfig.unwritten, "layer_types")

    def __post_init__(self) -> None:
        if self.rope_parameters is None:
            self.rope_parameters = {
                "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "max_position_embeddings": self.max_position_embeddings, "beta_fast": 32.0, "beta_slow": 1.0,
                "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
            }  # fmt: skip
        super().__post_init__()
        self.expect_uniform_layers(" (see sliding_window)")
        rope = self.rope_parameters
        # Transformers reads llama_4_scaling_beta and original_max_position_embeddings in any case.
        if rope.get("llama_4_scaling_beta") is None:
            rope["llama_4_scaling_beta"] = 0.0
        if rope["rope_type"] == "default" and rope["llama_4_scaling_beta"] == 0.0:
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        require_rope_key(self, "original_max_position_embeddings")
        if rope["rope_type"] == "yarn":
            require_rope_key(self, "factor")


class YarnRotaryEmbedding(RotaryEmbedding):
    """Rotary positions with YaRN frequencies, and the scale of each query."""

    @property
    def rope(self) -> dict[str, Any]:
        """`rope_parameters` of the configuration. A change of them takes effect in the next call."""
        return self.config.rope_parameters

    def inverse_frequencies(self, dtype: torch.dtype) -> Tensor:
        """YaRN, "NTK-by-parts": a blend of the plain frequencies and the same divided by `factor`, (D/2,).

        Pair i turns original * theta^(-2i/D) / 2 pi times within the original context. `ramp_end` solves this for i:
        pairs turn beta_fast times at `low`, and beta_slow times at `high`. For the 3B model these are 20 and 37 of 64.
        """
        plain = super().inverse_frequencies(dtype)
        if self.rope["rope_type"] == "default":
            return plain
        low, high = self.ramp_end("beta_fast"), self.ramp_end("beta_slow")
        if self.rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        D, theta = self.config.head_dim, self.config.rope_theta
        low, high = max(low, 0), min(high, D - 1)  # D - 1 as in Transformers, though there are D/2 pairs
        if low == high:
            high += 0.001  # a step instead of a ramp
        pairs = torch.arange(D // 2, dtype=dtype, device="cpu")
        plain_share = 1 - ((pairs - low) / (high - low)).clamp(0, 1)  # 1: as trained, 0: stretched in full
        periods = theta ** (torch.arange(0, D, 2, dtype=dtype, device="cpu") / D)
        stretched = 1.0 / (self.rope["factor"] * periods)  # plain / factor would round in another way
        return stretched * (1 - plain_share) + plain * plain_share

    def ramp_end(self, key: str) -> float:
        """The pair (a fraction, too) that turns `rope_parameters[key]` times within the original context."""
        turns = self.rope.get(key)
        if turns is None:
            turns = Ministral3Config.rope_defaults[key]
        original = self.rope["original_max_position_embeddings"]
        log_theta = math.log(self.config.rope_theta)
        return self.config.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * log_theta)

    def attention_factor(self) -> float:
        """YaRN's magnitude. The paper's is 0.1 ln(factor) + 1, a temperature of the softmax.

        `attention_factor` in the configuration replaces it. Given mscale and mscale_all_dim, it is the quotient of two
        magnitudes, 0.1 * mscale * ln(factor) + 1 each. These are equal in Ministral 3, which gives 1.0."""
        if self.rope["rope_type"] == "default":
            return 1.0
        if self.rope.get("attention_factor") is not None:
            return float(self.rope["attention_factor"])
        log_factor = math.log(self.rope["factor"])
        mscale, mscale_all_dim = self.rope.get("mscale"), self.rope.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            return (0.1 * mscale * log_factor + 1.0) / (0.1 * mscale_all_dim * log_factor + 1.0)
        return 0.1 * log_factor + 1.0

    def forward(self, x: Tensor, position_ids: Tensor) -> RopeTables:
        """position_ids (B or 1, S) -> cosines, sines (B or 1, 1, S, D), and scales (B or 1, 1, S, 1)."""
        positions = position_ids.to(at_least_float32(x.dtype))
        steps = torch.floor(positions / self.rope["original_max_position_embeddings"])
        scale = 1 + self.rope["llama_4_scaling_beta"] * torch.log(1 + steps)
        return *super().forward(x, position_ids), scale[:, None, :, None].to(x.dtype)


class Ministral3Attention(MinistralAttention):
    """Attention whose queries are scaled by position, so that the softmax stays sharp over long contexts."""

    def rotate(self, q: Tensor, k: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        cos, sin, scale = tables
        q, k = super().rotate(q, k, (cos, sin))
        return q * scale, k


class Ministral3DecoderLayer(MinistralDecoderLayer):
    """The same layer with the new attention."""

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
