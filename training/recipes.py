"""The recipes: which model is trained, in which stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ministral import MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config
from training.rows import Stage
from training.shapes import SIZE
from vision import Mistral3ForConditionalGeneration
from vision_config import Mistral3Config, PixtralVisionConfig

CONTEXT = 256  # the original context of the Ministral 3; YaRN stretches it by 16
RECALL = {"recall": 1.0}
COPYING = RECALL | {"repeat": 1.0}
CHAT = {"speaker": 2.0, "next line": 1.0, "recall": 1.0, "sum": 2.0, "tool": 3.0, "refusal": 1.0}
VISION = CHAT | {"image": 4.0}
JOINT = {"speaker": 6.0, "next line": 2.0, "recall": 1.5, "sum": 0.7, "tool": 2.0, "refusal": 0.5, "image": 5.0}
SCENES = {"speaker": 6.0, "next line": 1.5, "recall": 1.0, "sum": 0.7, "tool": 3.0, "refusal": 0.7, "image": 5.0}
LINES = {"speaker": 6.0, "next line": 4.0, "recall": 1.5, "sum": 0.7, "tool": 3.0, "refusal": 0.7, "image": 4.0}


@dataclass(frozen=True)
class Recipe:
    """A model and its stages.

    Attributes:
        kind: "ministral3", or "ministral", or "twin": the same as "ministral" with sliding layers only.
    """

    kind: str
    stages: tuple[Stage, ...]
    vocab_size: int = 2304
    hidden_size: int = 256
    intermediate_size: int = 528
    num_hidden_layers: int = 7
    seed: int = 0

    def model(self, stage: Stage) -> Any:
        """A new model, with the rotary positions or the window of a stage."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "head_dim": 32,
            "num_attention_heads": self.hidden_size // 32, "num_key_value_heads": self.hidden_size // 128,
            "intermediate_size": self.intermediate_size, "num_hidden_layers": self.num_hidden_layers,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": 11,
        }  # fmt: skip
        if self.kind == "ministral3":
            vision: dict[str, Any] = {
                "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                "patch_size": 8, "image_size": SIZE, "hidden_act": "silu",
            }  # fmt: skip
            sizes |= {"max_position_embeddings": 16 * CONTEXT}
            text = Ministral3Config(**sizes, rope_parameters=rope_parameters(stage.factor))
            return Mistral3ForConditionalGeneration(Mistral3Config(PixtralVisionConfig(**vision), text))
        layer_types = MinistralConfig.published_layer_types(self.num_hidden_layers)
        if self.kind == "twin":
            layer_types = ["sliding_attention"] * self.num_hidden_layers
        sizes |= {"max_position_embeddings": 1024, "sliding_window": stage.window, "rope_theta": 10000.0}
        return MinistralForCausalLM(MinistralConfig(**sizes, layer_types=layer_types))


def rope_parameters(factor: float) -> dict[str, Any]:
    """The rotary positions of the miniature Ministral 3, whose original context YaRN stretches; 1: plain positions."""
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT,
        "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    if factor == 1:
        return rope
    yarn = {"factor": factor, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    return rope | yarn | {"rope_type": "yarn"}


def ministral3(scale: int = 1) -> Recipe:
    """The published order: text at a short context, YaRN on long rows, instructions, vision.

    `scale` multiplies the tokens or images of a step of all stages but "text". The share of text is divided by it from
    "chat" on, because the corpus is small."""
    tokens, text = 8192 * scale, 0.3 / scale
    return Recipe("ministral3", (
        Stage("text", 1000, (5e-3, 2e-3), row=CONTEXT, text=0.75, shares=RECALL, factor=1.0),
        Stage("context", 200, (2e-3, 2e-3), tokens, row=16 * CONTEXT, text=0.4, shares=RECALL),
        Stage("chat", 1500, (2e-3, 2e-3), tokens, text=text, shares=CHAT, long_every=10),
        Stage("tower", 600, (3e-3, 3e-4), images=64 * scale),
        Stage("vision", 2000, (2e-3, 0.0), tokens, text=text, shares=VISION, long_every=10),
        Stage("joint", 1300, (1.5e-3, 0.0), tokens, text=text, shares=JOINT, long_every=10),
        Stage("scenes", 450, (1.2e-3, 0.0), tokens, text=0.45 / scale, shares=SCENES, long_every=20, dropout=0.05),
        Stage("lines", 330, (1e-3, 0.0), tokens, text=0.4 / scale, shares=LINES, long_every=20),
    ))  # fmt: skip


def ministral(kind: str = "ministral", scale: int = 1) -> Recipe:
    """The 2410 kind, or its twin: text, recall and copying only.

    A window of 64 tokens covers many keys, so the sliding layers learn to find these, and the full layers learn nothing
    from them. In the third stage the window is too small for that: only a full layer can find a key. The twin has none,
    so its window stays."""
    tokens, text = 4096 * scale, 0.5 / scale
    window = 8
    if kind == "twin":
        window = 64
    stages = (
        Stage("text", 800, (5e-3, 4e-3), 4096, row=CONTEXT, text=0.4, shares=COPYING, dropout=0.0),
        Stage("context", 500, (4e-3, 1e-3), tokens, text=text, shares=COPYING, dropout=0.0),
        Stage("recall", 1000, (2e-3, 2e-3), 4096, row=CONTEXT, text=0.25, shares=RECALL, window=window, dropout=0.0),
        Stage("far", 350, (2e-3, 0.0), tokens, text=text, shares=RECALL, dropout=0.0),
    )
    return Recipe(kind, stages, hidden_size=160, intermediate_size=384, num_hidden_layers=8)


def quick() -> Recipe:
    """Five minutes of two CPU cores: a small Ministral 3 that adds."""
    stages = (Stage("sums", 500, (5e-3, 0.0), 2048, row=128, text=0.1, shares={"sum": 1.0}, factor=1.0, dropout=0.0),)
    return Recipe("ministral3", stages, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
