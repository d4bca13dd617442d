"""The vision model of Ministral 3: image -> pixels -> patches -> Pixtral encoder -> projector -> embeddings.

    an image of 500 x 300 pixels                                       (height x width)
    -> scaled down if an edge is longer than 1540 pixels, then stretched to whole merged patches of 28 x 28 pixels:
       504 x 308; RGB, normalised (`images.py`)                        pixel_values (3, 504, 308)
    -> a convolution turns patches of 14 x 14 pixels into vectors      36 x 22 = 792 patches of 1024 numbers
    -> a transformer in which every patch sees every patch of its own image, with rotary positions in two
       dimensions (`PixtralRotaryEmbedding`)
    -> four neighbours are merged into one vector of 4096 numbers and projected to the size of the language model's
       embeddings                                                      18 x 11 = 198 vectors
    -> these replace the embeddings of the 198 [IMG] tokens in the prompt, row by row:
       11 x [IMG] [IMG_BREAK] 11 x [IMG] [IMG_BREAK] ... 11 x [IMG] [IMG_END]

The images of a batch are encoded together, but do not see each other. As a mask over the patches of two images, of 3
and 4 patches, that is

    # # # . . . .
    # # # . . . .
    # # # . . . .
    . . . # # # #
    . . . # # # #
    . . . # # # #
    . . . # # # #

No such mask is built here. Attention runs image by image, so its cost grows with the sum of the squares and not with
the square of the sum. Read `ministral.py` and `ministral3.py` first. Names are those of Transformers
(`Mistral3ForConditionalGeneration`). Sources: Pixtral https://arxiv.org/abs/2410.07073, Ministral 3
https://arxiv.org/abs/2601.08584. Letters in the shape comments, in addition to those of `ministral.py`:

    N  images                      P  patches of all images together          C  size of the encoder's vectors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from checks import check_image_sizes, check_pixel_values, check_start, expect_labels
from ministral import KVCache, MinistralMLP, MinistralModel, RMSNorm, apply_rotary_pos_emb, eager_attention
from ministral3 import Ministral3Model
from outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    at_least_float32,
    exportable,
    logits_and_loss,
)
from pretrained import ACTIVATIONS, Linear, PreTrainedModel, init_weights
from vision_config import Mistral3Config, PixtralVisionConfig

ImageSizes = Sequence[Sequence[int]] | Tensor  # (height, width) in pixels of each image
TEXT_MODELS: dict[str, type[MinistralModel]] = {
    "ministral3": Ministral3Model, "ministral": MinistralModel, "mistral": MinistralModel,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- encoder


@exportable
@dataclass
class BaseModelOutput(ModelOutput):
    """The result of `PixtralVisionModel`: `last_hidden_state` (1, P, C), the patches of all images in a row, and
    `hidden_states`, if wanted, num_hidden_layers + 1 of these, the first one before the first layer."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class PixtralRotaryEmbedding(nn.Module):
    """Rotary positions in two dimensions. Of the frequencies theta^(-2i/D), i < D/2, the even ones turn with a patch's
    row and the odd ones with its column: pair i < D/4 of a head turns by row * f[2i], pair D/4 + i by column * f[2i+1].
    """

    def __init__(self, config: PixtralVisionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """position_ids (P, 2), rows and columns -> cosines and sines, each (1, P, D) in the dtype of x."""
        dtype = at_least_float32(x.dtype)
        D = self.config.head_dim
        exponents = torch.arange(0, D, 2, dtype=dtype, device="cpu") / D
        frequencies = (1.0 / self.config.rope_theta**exponents).to(x.device)  # (D/2,)
        row, column = position_ids[:, :, None].to(dtype).unbind(1)  # (P, 1) each
        angles = torch.cat((row * frequencies[0::2], column * frequencies[1::2]), dim=-1)  # (P, D/2)
        angles = torch.cat((angles, angles), dim=-1)[None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class PixtralAttention(nn.Module):
    """Attention in which every patch sees every patch of its own image. No biases."""

    def __init__(self, config: PixtralVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], patches: list[int]) -> Tensor:
        """x (1, P, C), and how many patches each image has -> (1, P, C)."""
        _, P, C = x.shape
        D = self.config.head_dim
        q = self.q_proj(x).view(1, P, -1, D).transpose(1, 2)  # (1, H, P, D)
        k = self.k_proj(x).view(1, P, -1, D).transpose(1, 2)
        v = self.v_proj(x).view(1, P, -1, D).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *tables)
        N = len(patches)
        if N > 1 and len(set(patches)) == 1 and self.config.attn_implementation == "sdpa":
            # Images of one size are a batch: one call of the kernel, not N.
            q, k, v = (part[0].unflatten(1, (N, -1)).transpose(0, 1) for part in (q, k, v))  # (N, H, P / N, D)
            out = self._attend(q, k, v).transpose(0, 1).flatten(1, 2)[None]
        else:
            images = zip(*(torch.split(part, patches, dim=2) for part in (q, k, v)))
            out = torch.cat([self._attend(*image) for image in images], dim=2)  # (1, H, P, D)
        return self.o_proj(out.transpose(1, 2).reshape(1, P, C))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of one image."""
        scaling = self.config.head_dim**-0.5
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.config.attn_implementation == "eager":
            out, _ = eager_attention(q, k, v, None, scaling, dropout)
            return out
        return F.scaled_dot_product_attention(q, k, v, None, dropout, scale=scaling)


class PixtralAttentionLayer(nn.Module):
    """Attention, then MLP. Each reads a normed copy of the residual stream and adds its result to the stream."""

    def __init__(self, config: PixtralVisionConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=1e-5)
        self.feed_forward = MinistralMLP(config)  # type: ignore[arg-type]  # has the three fields it reads
        self.attention = PixtralAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=1e-5)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], patches: list[int]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), tables, patches)
        return x + self.feed_forward(self.ffn_norm(x))


class PixtralVisionModel(PreTrainedModel):
    """The encoder: images in, one vector for each patch out. There is no norm after the last layer."""

    config_class = PixtralVisionConfig
    base_model_prefix = "vision_encoder"
    input_embeddings = "patch_conv"

    def __init__(self, config: PixtralVisionConfig) -> None:
        super().__init__(config)
        size = config.patch_size
        self.patch_conv = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size, bias=False)
        self.ln_pre = RMSNorm(config.hidden_size, eps=1e-5)
        layers = nn.ModuleList(PixtralAttentionLayer(config) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"layers": layers})
        self.patch_positional_embedding = PixtralRotaryEmbedding(config)
        self.init_weights()

    def own_name(self, stored: str) -> str | None:
        """The same name: files of an encoder alone have its names."""
        return stored

    def grids(self, pixel_values: Tensor, image_sizes: ImageSizes | None) -> list[tuple[int, int]]:
        """The rows and columns of whole patches of each image.

        Raises:
            ValueError: pixel_values or image_sizes of a wrong shape, or an image larger than its pixel_values or
                smaller than a patch.
        """
        size = self.config.patch_size
        check_pixel_values(pixel_values, self.config.num_channels)
        N, _, height, width = pixel_values.shape
        sizes: Any = image_sizes
        if image_sizes is None:
            sizes = [(height, width)] * N
        elif isinstance(image_sizes, Tensor):
            sizes = image_sizes.tolist()
        check_image_sizes(sizes, N)
        for h, w in sizes:
            if not (size <= h <= height and size <= w <= width):
                allowed = f"{size} x {size} to {height} x {width} pixels"
                raise ValueError(f"an image size of {h} x {w}; allowed: {allowed}")
        return [(int(h) // size, int(w) // size) for h, w in sizes]

    def forward(
        self, pixel_values: Tensor, image_sizes: ImageSizes | None = None,
        output_hidden_states: bool | list[int] | None = None,
    ) -> BaseModelOutput:  # fmt: skip
        """Encode images.

        Args:
            pixel_values: (N, 3, height, width), see `preprocess`.
            image_sizes: the (height, width) in pixels of each image within that; None: all of it.
            output_hidden_states: return all hidden states, or a list of the indices that are wanted (others are None).
                None: as the configuration says.

        Raises:
            ValueError: see `grids`.
        """
        grids = self.grids(pixel_values, image_sizes)
        layers: list[Any] = list(self.transformer["layers"])  # type: ignore[call-overload]
        wanted: Any = output_hidden_states
        if output_hidden_states is True:
            wanted = range(len(layers) + 1)
        elif not output_hidden_states:
            wanted = ()

        x = self.patch_conv(pixel_values.to(self.patch_conv.weight))  # (N, C, rows, columns)
        images = [image[:, :h, :w].flatten(1).T for image, (h, w) in zip(x, grids)]  # (h * w, C) each
        x = self.ln_pre(torch.cat(images)[None])  # (1, P, C)
        places = {(h, w): torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in set(grids)}
        tables = self.patch_positional_embedding(x, torch.cat([places[grid] for grid in grids]).to(x.device))
        patches = [h * w for h, w in grids]

        hidden_states: list[Any] = [None] * (len(layers) + 1)
        if 0 in wanted:
            hidden_states[0] = x
        for i, layer in enumerate(layers, start=1):
            x = self.run_layer(layer, x, tables, patches)
            if i in wanted:
                hidden_states[i] = x
        if not wanted:
            return BaseModelOutput(x)
        return BaseModelOutput(x, tuple(hidden_states))


# --------------------------------------------------------------------------------------------------- projector


class Mistral3PatchMerger(nn.Module):
    """Merge spatial_merge_size x spatial_merge_size neighbours into one vector."""

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__()
        self.merge = config.spatial_merge_size
        size = config.vision_config.hidden_size
        self.merging_layer = Linear(size * self.merge**2, size)

    def forward(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """x (P, C), the patches of all images -> (merged patches, C). A last odd row or column is left out.

        The numbers of the neighbours are interleaved and not appended: channel by channel, and for each channel the
        upper left, upper right, lower left and lower right one.
        """
        m = self.merge
        merged = []
        runs = [(grid, len(list(run))) for grid, run in groupby(grids)]  # neighbours of one size are merged together
        images = torch.split(x, [n * h * w for (h, w), n in runs])
        for image, ((h, w), n) in zip(images, runs):
            rows, columns = h // m, w // m
            grid = image.view(n, h, w, -1)[:, : rows * m, : columns * m]
            blocks = grid.reshape(n, rows, m, columns, m, -1).permute(0, 1, 3, 5, 2, 4)  # (n, rows, columns, C, m, m)
            merged.append(blocks.reshape(n * rows * columns, -1))
        return self.merging_layer(torch.cat(merged))


class Mistral3MultiModalProjector(nn.Module):
    """Turn the encoder's vectors into embeddings of the language model: norm, merge, two linear layers."""

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__()
        vision, text = config.vision_config, config.text_config
        bias = config.multimodal_projector_bias
        self.norm = RMSNorm(vision.hidden_size, text.rms_norm_eps)
        self.patch_merger = Mistral3PatchMerger(config)
        self.linear_1 = Linear(vision.hidden_size, text.hidden_size, bias)
        self.act = ACTIVATIONS[config.projector_hidden_act]
        self.linear_2 = Linear(text.hidden_size, text.hidden_size, bias)

    def forward(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """(P, C) -> (merged patches, E)."""
        x = self.patch_merger(self.norm(x), grids)
        return self.linear_2(self.act(self.linear_1(x)))


# ------------------------------------------------------------------------------------------------------ models


@exportable
@dataclass
class Mistral3ModelOutputWithPast(BaseModelOutputWithPast):
    """As `BaseModelOutputWithPast`, with `image_hidden_states` (number of [IMG] tokens, E), which replaced them."""

    image_hidden_states: Tensor | None = None


@exportable
@dataclass
class Mistral3CausalLMOutputWithPast(CausalLMOutputWithPast):
    """As `CausalLMOutputWithPast`, with `image_hidden_states` (number of [IMG] tokens, E), which replaced them."""

    image_hidden_states: Tensor | None = None


class Mistral3PreTrainedModel(PreTrainedModel):
    """The names in files, for the vision model with and without head."""

    config_class = Mistral3Config

    def own_name(self, stored: str) -> str | None:
        """The name here of a stored tensor, see `checkpoint.text_name` and `PreTrainedModel.own_name`."""
        if stored.endswith("rotary_emb.inv_freq"):
            return None
        text = checkpoint.text_name(stored)
        if text is None:
            name = stored.removeprefix("model.")
        elif text.startswith("lm_head."):
            return text if hasattr(self, "lm_head") else None
        else:
            name = "language_model." + text
        if self.base_model is self:
            return name
        return "model." + name


class Mistral3Model(Mistral3PreTrainedModel):
    """Encoder, projector and language model, without head."""

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__(config)
        self.vision_tower = PixtralVisionModel(config.vision_config)
        self.multi_modal_projector = Mistral3MultiModalProjector(config)
        self.language_model = TEXT_MODELS[config.text_config.model_type](config.text_config)
        init_weights(self.multi_modal_projector, config.text_config.initializer_range)

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: ImageSizes | None = None,
        vision_feature_layer: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The embeddings of each image, (number of its [IMG] tokens, E).

        Args:
            pixel_values, image_sizes: see `PixtralVisionModel.forward`.
            vision_feature_layer: which hidden state is projected; None is the configuration's.
        """
        index = self.config.feature_index(vision_feature_layer)
        grids = self.vision_tower.grids(pixel_values, image_sizes)
        m = self.config.spatial_merge_size
        if min(min(grid) for grid in grids) < m:
            allowed = f"{m} x {m} or more, which are merged into one"
            raise ValueError(f"images of {grids} patches; allowed: {allowed}")
        encoded = self.vision_tower(
            pixel_values, image_sizes, output_hidden_states=[index], return_dict=True
        )
        features = self.multi_modal_projector(encoded.hidden_states[index][0], grids)
        return features.split([(h // m) * (w // m) for h, w in grids])

    def embed(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, image_sizes: ImageSizes | None = None,
        inputs_embeds: Tensor | None = None, vision_feature_layer: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The embeddings (B, S, E) of a text with images in it, and those of the images alone. The images take the
        [IMG] tokens in order, row after row of the batch. (In `inputs_embeds`, [IMG] is recognised by its embedding.)

        Raises:
            ValueError: not as many [IMG] tokens as the images have embeddings; as `MinistralModel.forward`.
        """
        embeds = self.language_model.embed(input_ids, inputs_embeds)
        if pixel_values is None:
            return embeds, None
        image_id = self.config.image_token_id
        if input_ids is None:
            image = self.language_model.embed_tokens(torch.tensor(image_id, device=embeds.device))
            places = (embeds == image).all(-1)  # (B, S)
        else:
            places = input_ids == image_id
        features = torch.cat(self.get_image_features(pixel_values, image_sizes, vision_feature_layer))
        if not torch.compiler.is_compiling() and places.sum() != len(features):
            found = f"{int(places.sum())} [IMG] tokens (id {image_id})"
            expected = f"images that have {len(features)} embeddings"
            raise ValueError(f"{found} for {expected}; the numbers must be equal")
        features = features.to(embeds)
        return embeds.masked_scatter(places[:, :, None], features), features

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, vision_feature_layer: int | None = None,
        use_cache: bool | None = None, image_sizes: ImageSizes | None = None, **kwargs: Any,
    ) -> Mistral3ModelOutputWithPast:  # fmt: skip
        """The arguments of `MinistralModel.forward`, and:

        Args:
            pixel_values, image_sizes: the images whose [IMG] tokens are in `input_ids`, see
                `PixtralVisionModel.forward`. To cut a text in the middle of an image, `embed` it first.
            vision_feature_layer: which hidden state of the encoder is projected; None is the configuration's.

        Raises:
            ValueError: see `embed`.
        """
        embeds, features = self.embed(
            input_ids, pixel_values, image_sizes, inputs_embeds, vision_feature_layer
        )
        if past_key_values is None:
            check_start(input_ids, attention_mask, None, self.config.text_config, 0, 0)
        out = self.language_model(
            None, attention_mask, position_ids, past_key_values, embeds, use_cache, return_dict=True, **kwargs
        )
        return Mistral3ModelOutputWithPast(
            out.last_hidden_state, out.past_key_values, out.hidden_states, out.attentions, features
        )


class Mistral3ForConditionalGeneration(Mistral3PreTrainedModel):
    """The whole vision model: images and text in, logits over the vocabulary out."""

    may_tie: ClassVar[Any] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__(config)
        self.model = Mistral3Model(config)
        self.lm_head = Linear(config.text_config.hidden_size, config.text_config.vocab_size)
        self.init_head()

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0, image_sizes: ImageSizes | None = None,
        vision_feature_layer: int | None = None, num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Mistral3CausalLMOutputWithPast:  # fmt: skip
        """The arguments of `Mistral3Model.forward`, and `labels`, `logits_to_keep` and `num_items_in_batch` of
        `MinistralForCausalLM.forward` (raises as these)."""
        expect_labels(labels, input_ids, inputs_embeds, logits_to_keep)
        out = self.model(
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds,
            vision_feature_layer, use_cache, image_sizes, return_dict=True, **kwargs,
        )  # fmt: skip
        logits, loss = logits_and_loss(self.lm_head, out, labels, logits_to_keep, num_items_in_batch)
        return Mistral3CausalLMOutputWithPast(
            loss, logits, out.past_key_values, out.hidden_states, out.attentions, out.image_hidden_states
        )
