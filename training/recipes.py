"""The recipes: which model is trained, in which stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ministral import MinistralConfig, MinistralForCausalLM
from training.rows import Stage
from training.shapes import SIZE
from vision import Mistral3ForConditionalGeneration
from vision_config import Mistral3Config

CONTEXT = 256  # the original context of the Ministral 3: YaRN stretches it by 16
WINDOW = 64  # of the sliding layers of the 2410 kind
CHAT = {
    "speaker": 2.0, "next line": 1.0, "recall": 2.0, "repeat": 1.0, "sum": 2.0, "tool": 3.0, "refusal": 1.0,
}  # fmt: skip
RECALL = {"recall": 1.0, "repeat": 1.0}
ANSWERS = {
    "speaker": 6.0, "next line": 1.0, "recall": 1.0, "repeat": 1.0, "sum": 0.5, "tool": 2.0, "refusal": 0.5, "image": 4.0,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A model and its stages.

    Attributes:
        kind: "ministral3", or "ministral", or "twin": the same with sliding layers only.
        answer_weight: the weight of the loss of answers; that of text has the rest.
        muon: use Muon for the matrices.
    """

    kind: str
    stages: tuple[Stage, ...]
    seed: int = 0
    vocab_size: int = 2304
    hidden_size: int = 256
    intermediate_size: int = 528
    num_hidden_layers: int = 7
    answer_weight: float = 0.5
    muon: bool = True

    def model(self, factor: float) -> Any:
        """A new model, whose original context YaRN stretches by `factor`; 1: plain rotary positions."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size, "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.hidden_size // 32, "num_key_value_heads": self.hidden_size // 128, "head_dim": 32,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": 11,
        }  # fmt: skip
        if self.kind == "ministral3":
            vision = {
                "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                "patch_size": 8, "image_size": SIZE, "hidden_act": "silu",
            }  # fmt: skip
            sizes |= {"model_type": "ministral3", "max_position_embeddings": 16 * CONTEXT}
            text = sizes | {"rope_parameters": rope_parameters(factor)}
            return Mistral3ForConditionalGeneration(Mistral3Config(vision_config=vision, text_config=text))
        layers = MinistralConfig.published_layer_types(self.num_hidden_layers)
        if self.kind == "twin":
            layers = ["sliding_attention"] * self.num_hidden_layers
        config = MinistralConfig(
            **sizes, max_position_embeddings=1024, sliding_window=WINDOW, layer_types=layers, rope_theta=10000.0
        )
        return MinistralForCausalLM(config)


def rope_parameters(factor: float) -> dict[str, Any]:
    """The rotary positions of the miniature Ministral 3."""
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT,
        "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    if factor == 1:
        return rope
    yarn = {"factor": factor, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    return rope | {"rope_type": "yarn"} | yarn


def ministral3(scale: int) -> Recipe:
    """The published order: text at a short context, YaRN on long rows, instructions, vision. `scale` multiplies the
    tokens of a step of the stages after the first."""
    tokens = 8192 * scale
    text = 0.4 / scale  # as many tokens of text for each scale: the corpus is small
    stages = (
        Stage("text", 1000, (5e-3, 2e-3), row=CONTEXT, text=0.75, shares=RECALL, factor=1.0),
        Stage("context", 200, (2e-3, 2e-3), tokens, row=16 * CONTEXT, text=0.5, shares=RECALL),
        Stage("chat", 1500, (2e-3, 2e-3), tokens, text=text, shares=CHAT, long_every=10),
        Stage("tower", 600, (3e-3, 3e-4), images=64 * scale),
        Stage("vision", 2000, (2e-3, 0.0), tokens, text=text, shares=CHAT | {"image": 4.0}, long_every=10),
        Stage("answers", 1500, (1e-3, 0.0), 8192, text=0.25, shares=ANSWERS, long_every=10, dropout=0.0),
    )
    return Recipe("ministral3", stages)


def ministral(kind: str, scale: int) -> Recipe:
    """The 2410 kind, or its twin: text and recall only."""
    stages = (
        Stage("text", 600, (5e-3, 4e-3), row=CONTEXT, text=0.5, shares=RECALL, dropout=0.0),
        Stage("context", 900, (4e-3, 0.0), 8192 * scale, text=0.5 / scale, shares=RECALL, dropout=0.0),
    )
    return Recipe(kind, stages, hidden_size=160, intermediate_size=384, num_hidden_layers=8)


def quick() -> Recipe:
    """Five minutes of one CPU: a small model that adds and answers questions about images."""
    shares = {"sum": 1.0, "image": 3.0}
    stages = (
        Stage("tower", 250, (5e-3, 5e-4), images=64),
        Stage("vision", 250, (5e-3, 0.0), 4096, row=256, text=0.1, shares=shares),
    )
    return Recipe("ministral3", stages, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
