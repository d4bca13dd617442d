"""consolidated.safetensors: Mistral's names of tensors and order of rows, to those of Transformers' files and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .files import CONFIG
from .hf import VISION_PREFIXES, text_config, text_name

# Every module of Mistral's consolidated.safetensors and its name in Transformers' files; N is the number of a layer.
# In a vision model, those of the language model (all above "vision_encoder") begin with "language_model.".
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.wq": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.wk": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.wv": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.wo": "model.layers.N.self_attn.o_proj",
    "layers.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.feed_forward.w1": "model.layers.N.mlp.gate_proj",
    "layers.N.feed_forward.w2": "model.layers.N.mlp.down_proj",
    "layers.N.feed_forward.w3": "model.layers.N.mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
    "vision_encoder.patch_conv": "vision_tower.patch_conv",
    "vision_encoder.ln_pre": "vision_tower.ln_pre",
    "vision_encoder.transformer.layers.N.attention_norm": "vision_tower.transformer.layers.N.attention_norm",
    "vision_encoder.transformer.layers.N.attention.wq": "vision_tower.transformer.layers.N.attention.q_proj",
    "vision_encoder.transformer.layers.N.attention.wk": "vision_tower.transformer.layers.N.attention.k_proj",
    "vision_encoder.transformer.layers.N.attention.wv": "vision_tower.transformer.layers.N.attention.v_proj",
    "vision_encoder.transformer.layers.N.attention.wo": "vision_tower.transformer.layers.N.attention.o_proj",
    "vision_encoder.transformer.layers.N.ffn_norm": "vision_tower.transformer.layers.N.ffn_norm",
    "vision_encoder.transformer.layers.N.feed_forward.w1":
        "vision_tower.transformer.layers.N.feed_forward.gate_proj",
    "vision_encoder.transformer.layers.N.feed_forward.w2":
        "vision_tower.transformer.layers.N.feed_forward.down_proj",
    "vision_encoder.transformer.layers.N.feed_forward.w3":
        "vision_tower.transformer.layers.N.feed_forward.up_proj",
    "pre_mm_projector_norm": "multi_modal_projector.norm",
    "patch_merger.merging_layer": "multi_modal_projector.patch_merger.merging_layer",
    "vision_language_adapter.w_in": "multi_modal_projector.linear_1",
    "vision_language_adapter.w_out": "multi_modal_projector.linear_2",
}  # fmt: skip
SUFFIXES = {
    "weight": "weight",
    "bias": "bias",
    "qscale_weight": "weight_scale_inv",
    "qscale_act": "activation_scale",
}
NAMES_IN_MISTRAL = {theirs: name for name, theirs in NAMES.items()}
SUFFIXES_IN_MISTRAL = {theirs: suffix for suffix, theirs in SUFFIXES.items()}


# --------------------------------------------------------------------------------------------------------- names


def from_mistral(name: str, vision: bool) -> str | None:
    """Mistral's name of a tensor -> that of Transformers' files, in a vision model or a text model; None if it is no
    such name."""
    renamed = _rename(name, NAMES, SUFFIXES)
    if renamed is not None and vision and not renamed.startswith(VISION_PREFIXES):
        return "language_model." + renamed
    return renamed


def to_mistral(name: str) -> str | None:
    """A name in Transformers' files, of any version, -> Mistral's; None if it is no such name."""
    text = text_name(name)
    name = name.removeprefix("model.")
    if text is not None:
        name = text
    if not name.startswith((*VISION_PREFIXES, "lm_head.")):
        name = "model." + name
    return _rename(name, NAMES_IN_MISTRAL, SUFFIXES_IN_MISTRAL)


def _rename(name: str, modules: Mapping[str, str], suffixes: Mapping[str, str]) -> str | None:
    """A tensor's name by a table of modules and one of suffixes; None if it is in neither."""
    module, _, suffix = name.rpartition(".")
    number = re.search(r"(?<=layers\.)\d+", module)
    renamed = modules.get(re.sub(r"(?<=layers\.)\d+", "N", module))
    if renamed is None or suffix not in suffixes:
        return None
    if number is not None:
        renamed = renamed.replace(".N.", f".{number[0]}.")
    return f"{renamed}.{suffixes[suffix]}"


# ---------------------------------------------------------------------------------------------------------- rows


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection (heads * D, E) from Mistral's order, in which the two rows that
    rotate together are neighbours (0, 1), (2, 3), ..., to Transformers', in which they are D/2 apart (0, D/2),
    (1, D/2 + 1), ... Scores do not change, as queries and keys are reordered alike."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def interleave(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def reorder_rows(
    name: str, weight: Tensor, config: dict[str, Any], reorder: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """A tensor (Transformers' name), its rows reordered by `half_split` or `interleave` if it makes queries or keys.

    Args:
        config: complete, as `from_params` or `to_dict` of a configuration class gives it.

    Raises:
        ValueError: not as many rows as the configuration's heads have.
    """
    projection = re.search(r"\.(q|k)_proj\.weight$", name)
    if projection is None:
        return weight
    if name.removeprefix("model.").startswith(VISION_PREFIXES):
        vision = config["vision_config"]
        heads = vision["num_attention_heads"]
        head_dim = vision["hidden_size"] // heads
    else:
        text = text_config(config)
        key = {"q": "num_attention_heads", "k": "num_key_value_heads"}[projection[1]]
        heads = text[key]
        head_dim = text["head_dim"]
    if len(weight) != heads * head_dim or head_dim % 2:
        wanted = f"{heads} heads of {head_dim}, an even number"
        raise ValueError(f"{name} has {len(weight)} rows; {CONFIG} asks for {wanted}")
    return reorder(weight, heads)
