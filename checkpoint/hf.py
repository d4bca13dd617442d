"""config.json: Transformers' configuration, whichever of its versions wrote it, under one set of keys."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from checks import LARGEST_INTEGER, LAYER_TYPES, MOST_LABELS, MOST_LAYERS, brief, is_number

from .files import CONFIG
from .fp8 import expect_fp8

# Each model type that is read, and the class that Transformers has for it.
ARCHITECTURES = {
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
}
TEXT_TYPES = ("ministral", "mistral", "ministral3", "llama")
MODEL_TYPES = (*ARCHITECTURES, "llama")
# Keys of the numbers that the shapes of tensors depend on.
TEXT_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size",
)  # fmt: skip
VISION_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size",
)  # fmt: skip
# How the names of tensors begin in the vision part of a vision model.
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.")
# Keys that do not change what a text model computes.
HARMLESS_KEYS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "auto_map", "is_encoder_decoder", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "num_labels", "pretraining_tp", "_attn_implementation_autoset",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- reading


def config_fields(d: Any, known: set[str], model_types: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields of a text model's config.json, whichever version of Transformers wrote it.

    4.x has `rope_theta` and `rope_scaling` (or null), 5.x has `rope_parameters`; their contents are merged. Keys of no
    known meaning are left out with a warning.

    Args:
        d: the content of the file.
        known: names of the fields that are wanted.
        model_types: the model types that are allowed, each with its defaults for fields that the file leaves out.

    Raises:
        ValueError: another model type or biases, which compute something else, or quantised weights other than FP8.
    """
    model_type = expect_model_type(d, model_types)
    read_elsewhere = {"rope_scaling", "attention_bias", "mlp_bias", "quantization_config"}
    unknown = sorted(d.keys() - known - read_elsewhere - HARMLESS_KEYS)
    if unknown:
        warnings.warn(f"{CONFIG}: ignored unknown keys {', '.join(unknown)}", stacklevel=3)
    values = model_types[model_type] | {key: value for key, value in d.items() if key in known}
    if model_type == "llama":
        values["sliding_window"] = None  # its attention has none, even if the file gives one
    rope = merged_rope(d)
    if rope:
        values["rope_parameters"] = rope
    return values


def merged_rope(d: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions of a config.json of either version, in one object."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if d.get(key):
            rope |= d[key]
    return rope


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json: all of it, or `text_config` of a vision model. There
    `tie_word_embeddings` counts at the top, and the published files have it below, or nowhere."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    text = {"model_type": "ministral3"} | text
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text


def text_name(name: str) -> str | None:
    """The name of a tensor in a vision model, of any version of Transformers, -> that in the language model's backbone
    ("layers.0....", or "lm_head.weight"); None for the vision part. The published files have
    language_model.model.layers and language_model.lm_head, Transformers 5 model.language_model.layers and lm_head."""
    name = name.removeprefix("model.")
    if name.startswith(VISION_PREFIXES):
        return None
    return name.removeprefix("language_model.").removeprefix("model.")


def label_maps(
    num_labels: int | None = None,
    id2label: dict[Any, str] | None = None,
    label2id: dict[str, Any] | None = None,
) -> tuple[int, dict[int, str], dict[str, int]]:
    """The labels of a classifier, complete: their number, the name of each, the number of each name. One of the three
    is enough; none means two labels.

    As in Transformers, labels without names are called LABEL_0, LABEL_1, ...; such names are replaced where
    `num_labels` asks for more or fewer, or `label2id` has other names. Otherwise `label2id` follows from `id2label`,
    because Transformers writes files in which they differ.

    Raises:
        ValueError: no or an impossible number of labels, or a number without a name.
    """

    def unnamed(names: dict[Any, str]) -> bool:
        return names == {i: f"LABEL_{i}" for i in range(len(names))}

    for key, value in (("id2label", id2label), ("label2id", label2id)):
        if not isinstance(value, (dict, type(None))):
            raise ValueError(f"{key}={brief(value)} is impossible; allowed: an object, or none")
    if num_labels is not None and not is_number(num_labels, int, 1, MOST_LABELS):
        allowed = f"a whole number from 1 to {MOST_LABELS}"
        raise ValueError(f"num_labels={brief(num_labels)} is impossible; allowed: {allowed}")

    names: dict[Any, str] = {}
    names_in_label2id: dict[Any, str] = {}
    if id2label is not None:
        names = {_label_number(key): str(name) for key, name in id2label.items()}
    if label2id is not None:
        names_in_label2id = {_label_number(key): str(name) for name, key in label2id.items()}
    if unnamed(names) and not unnamed(names_in_label2id):
        names = names_in_label2id
    if unnamed(names):
        count = len(names)
        if num_labels is not None:
            count = num_labels
        elif not names:
            count = 2
        names = {i: f"LABEL_{i}" for i in range(count)}

    if names.keys() != set(range(len(names))):
        numbers = ", ".join(map(str, names))
        raise ValueError(f"labels numbered {numbers}; allowed: 0, 1, 2, ... with a name for each")
    if num_labels not in (None, len(names)):
        allowed = f"{len(names)}, the number of given names"
        raise ValueError(f"num_labels={num_labels} is impossible; allowed: {allowed}")
    return len(names), names, {name: i for i, name in names.items()}


def _label_number(key: Any) -> Any:
    """The number of a label from a key: in JSON, keys are text."""
    if str(key).isdecimal():
        return int(key)
    return key


# ------------------------------------------------------------------------------------------------------ refusing


def expect_model_type(d: Any, model_types: Iterable[str]) -> str:
    """The model type of a config.json; the first of those that are allowed if it gives none.

    Raises:
        ValueError: another model type, biases, quantised weights other than FP8, or values of an impossible kind.
    """
    if not isinstance(d, dict):
        raise ValueError(f"{CONFIG} must hold a JSON object; found {type(d).__name__}")
    for key in ("rope_scaling", "rope_parameters", "quantization_config", "vision_config", "text_config"):
        if not isinstance(d.get(key), (dict, type(None))):
            raise ValueError(f"{key}={brief(d[key])} is impossible; allowed: an object")
    if not isinstance(d.get("model_type"), (str, type(None))):
        raise ValueError(f"model_type={brief(d['model_type'])} is impossible; allowed: a name")
    model_type = d.get("model_type")
    if not model_type:
        model_type = next(iter(model_types))
    if model_type not in model_types:
        allowed = ", ".join(model_types)
        raise ValueError(f"model_type {brief(model_type)} computes another function; allowed: {allowed}")
    for key in ("attention_bias", "mlp_bias"):
        if d.get(key):
            raise ValueError(f"{key}={brief(d[key])}: biases make it another function; allowed: false, or none")
    expect_fp8(d.get("quantization_config"))
    return str(model_type)


def expect_complete(config: dict[str, Any]) -> None:
    """Raise ValueError unless a config.json gives every number that shapes and rotary positions depend on, and a model
    type. None of these is left to the defaults of the configuration classes, but for a head_dim that follows from
    other numbers."""
    model_type = expect_model_type(config, MODEL_TYPES)
    text = text_config(config)
    vision = config.get("vision_config")
    if model_type == "mistral3" and vision is None:
        raise ValueError("a mistral3 model needs vision_config, an object; found none")
    text_type = expect_model_type(text, TEXT_TYPES)

    for key in TEXT_SIZES:
        _expect_size(text, key)
    if text_type == "ministral3" or text.get("head_dim") is not None:
        _expect_size(text, "head_dim")
    if vision is not None:
        for key in VISION_SIZES:
            _expect_size(vision, key, "vision_config.")
    if not is_number(text.get("rms_norm_eps"), float, -math.inf):
        raise ValueError(f"{CONFIG} has rms_norm_eps={brief(text.get('rms_norm_eps'))}; allowed: a number")
    _expect_rope(text)
    _expect_layers(text, text_type)


def _expect_size(part: dict[str, Any], key: str, where: str = "") -> None:
    most = LARGEST_INTEGER
    if key == "num_hidden_layers":
        most = MOST_LAYERS
    if not is_number(part.get(key), int, 1, most):
        allowed = f"a whole number from 1 to {most}"
        raise ValueError(f"{CONFIG} has {where}{key}={brief(part.get(key))}; allowed: {allowed}")


def _expect_rope(text: dict[str, Any]) -> None:
    """Raise ValueError unless the numbers of rotary positions are given."""
    rope = {"rope_theta": text.get("rope_theta"), **merged_rope(text)}
    keys = ["rope_theta"]
    if "yarn" in (rope.get("rope_type"), rope.get("type")):
        keys += ["factor", "original_max_position_embeddings"]
    for key in keys:
        if not is_number(rope.get(key), float, -math.inf):
            raise ValueError(f"{CONFIG} has {key}={brief(rope.get(key))} for rotary positions; allowed: a number")


def _expect_layers(text: dict[str, Any], text_type: str) -> None:
    """Raise ValueError unless the window is given where a class has one by default, and layer_types fit it."""
    window = text.get("sliding_window")
    if text_type == "llama":
        window = None
    elif text_type != "ministral3" and "sliding_window" not in text:
        raise ValueError(f"{CONFIG} does not say sliding_window; allowed: null, or a whole number above 0")
    kinds = text.get("layer_types")
    if not kinds:
        return
    layers = text["num_hidden_layers"]
    names = isinstance(kinds, list) and len(kinds) == layers and set(map(str, kinds)) <= set(LAYER_TYPES)
    if not names or ("sliding_attention" in kinds and not window):
        allowed = f"{layers} names of {', '.join(LAYER_TYPES)}, and a window for sliding ones"
        raise ValueError(f"{CONFIG} has sliding_window={brief(window)}, layer_types={brief(kinds)}; allowed: {allowed}")
