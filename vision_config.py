"""The configurations of the vision model: of the encoder, and of the whole. `vision.py` is the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from checks import brief, check_common_fields, check_output_fields, is_number, require, require_sizes
from ministral import ATTENTION, MinistralConfig
from ministral3 import Ministral3Config
from pretrained import ACTIVATIONS, PreTrainedConfig


@dataclass
class PixtralVisionConfig(PreTrainedConfig):
    """The numbers of the encoder. Fields and defaults are Transformers'; Ministral 3 has patch_size 14, image_size 1540
    and hidden_act silu.

    Raises:
        ValueError: a value is impossible; the message names the field, the value and what is allowed.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 1024  # the longest edge, in pixels
    patch_size: int = 16
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    rope_theta: float = None  # type: ignore[assignment]  # None here and below is replaced on construction
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    initializer_range: float = 0.02
    attn_implementation: str = "sdpa"

    model_type: ClassVar[str] = "pixtral"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "axial")
    rope_keys: ClassVar[dict[str, float | None]] = {"rope_type": None, "rope_theta": 1.0}

    def __post_init__(self) -> None:
        self.complete_rope_parameters()
        self.rope_parameters["rope_type"] = "default"  # "axial" is another name of it
        require_sizes(self, "hidden_size", "intermediate_size", "num_attention_heads", "image_size")
        require_sizes(self, "num_channels", "patch_size", "num_hidden_layers", most=1000)
        check_common_fields(self, ACTIVATIONS, ATTENTION)
        attentions = self.output_attentions
        require(self, "output_attentions", not attentions, "False: the encoder returns no probabilities")
        heads = self.num_attention_heads
        size = self.hidden_size // heads
        whole = size * heads == self.hidden_size and size % 4 == 0
        require(self, "hidden_size", whole, f"a multiple of 4 for each of {heads} heads")
        equal = self.head_dim in (None, size)
        require(self, "head_dim", equal, f"hidden_size / num_attention_heads = {size}")
        self.head_dim = size

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> PixtralVisionConfig:
        """See `PreTrainedConfig.from_dict`. Transformers writes a vocab_size here, which has no meaning."""
        return super().from_dict({k: v for k, v in d.items() if k != "vocab_size"})


# model_type of the text part -> its configuration.
TEXT_CONFIGS: dict[str, type[MinistralConfig]] = {
    "ministral3": Ministral3Config,
    "ministral": MinistralConfig,
    "mistral": MinistralConfig,
}


@dataclass
class Mistral3Config(PreTrainedConfig):
    """A vision model: `vision_config` and `text_config` (each a configuration or the dictionary for one), and the
    fields of the projector. None is that of the published 8B model. A text part without `model_type` is a "ministral3".
    `attn_implementation` is that of both parts.

    `tie_word_embeddings=None` is as the text part says, and true if it says nothing. The published files do not have
    the field at the top, where Transformers looks for it.

    Raises:
        ValueError: a value is impossible; the message names the field, the value and what is allowed.
    """

    vision_config: PixtralVisionConfig = None  # type: ignore[assignment]  # None here and below is replaced
    text_config: MinistralConfig = None  # type: ignore[assignment]
    image_token_index: int = 10
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int | list[int] = -1  # which of num_hidden_layers + 1 hidden states is projected
    multimodal_projector_bias: bool = False
    spatial_merge_size: int = 2
    tie_word_embeddings: bool = None  # type: ignore[assignment]
    attn_implementation: str = "sdpa"

    model_type: ClassVar[str] = "mistral3"

    def __post_init__(self) -> None:
        vision, text, tied = self.vision_config, self.text_config, self.tie_word_embeddings
        valid = isinstance(vision, (PixtralVisionConfig, dict, type(None)))
        require(self, "vision_config", valid, "an object, or none")
        valid = isinstance(text, (MinistralConfig, dict, type(None)))
        require(self, "text_config", valid, "an object, or none")
        if vision is None:
            vision = PixtralVisionConfig(patch_size=14, image_size=1540, hidden_act="silu")
        elif isinstance(vision, dict):
            vision = PixtralVisionConfig.from_dict(vision)
        if text is None:
            text = Ministral3Config()
        elif isinstance(text, dict):
            if tied is None:
                tied = text.get("tie_word_embeddings", True)
            kind = "ministral3"
            if text.get("model_type") is not None:
                kind = str(text["model_type"])
            require(self, "text_config", kind in TEXT_CONFIGS, f"model_type {', '.join(TEXT_CONFIGS)}")
            text = TEXT_CONFIGS[kind].from_dict(text)
        if tied is None:
            tied = text.tie_word_embeddings
        self.tie_word_embeddings = tied
        self.vision_config = replace(vision, attn_implementation=self.attn_implementation)
        self.text_config = replace(text, attn_implementation=self.attn_implementation)
        self._check()

    def _check(self) -> None:
        """Check the fields of the projector and of outputs."""
        check_output_fields(self)
        self.feature_index()
        image = self.image_token_index
        known = is_number(image, int, 0) and image < self.text_config.vocab_size
        require(self, "image_token_index", known, "an id of the vocabulary")
        known = str(self.projector_hidden_act) in ACTIVATIONS
        require(self, "projector_hidden_act", known, ", ".join(ACTIVATIONS))
        bias = self.multimodal_projector_bias
        require(self, "multimodal_projector_bias", isinstance(bias, bool), "true or false")
        require_sizes(self, "spatial_merge_size", most=1000)
        require(self, "tie_word_embeddings", isinstance(self.tie_word_embeddings, bool), "true or false")

    def feature_index(self, layer: int | list[int] | None = None) -> int:
        """The index, from 0, of the encoder's hidden state that is projected.

        Args:
            layer: a number, or a list of one, where -1 is the last; None is `vision_feature_layer`.

        Raises:
            ValueError: no such hidden state.
        """
        if layer is None:
            layer = self.vision_feature_layer
        number: Any = layer
        if isinstance(layer, list) and len(layer) == 1:
            number = layer[0]
        last = self.vision_config.num_hidden_layers
        if not is_number(number, int, -last - 1) or number > last:
            allowed = f"one number from {-last - 1} to {last}"
            raise ValueError(f"vision_feature_layer={brief(layer)} is impossible; allowed: {allowed}")
        return int(number) % (last + 1)

    def get_text_config(self) -> MinistralConfig:
        """The configuration of the language model."""
        return self.text_config

    @property
    def image_token_id(self) -> int:
        """The id of [IMG]."""
        return self.image_token_index

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Mistral3Config:
        """See `PreTrainedConfig.from_dict`. `image_token_id` is another name of `image_token_index`."""
        if "image_token_id" in d:
            d = dict(d)
            other = d.pop("image_token_id")
            d.setdefault("image_token_index", other)
        return super().from_dict(d)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that Transformers 5 loads."""
        parts = {"vision_config": self.vision_config.to_dict(), "text_config": self.text_config.to_dict()}
        return super().to_dict() | parts
