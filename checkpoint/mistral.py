"""params.json: Mistral's own configuration, to the content of a config.json and back."""

from __future__ import annotations

import math
import warnings
from typing import Any

from checks import MOST_LAYERS, brief, is_number, is_size

from .files import PARAMS
from .hf import ARCHITECTURES, VISION_SIZES, expect_complete, text_config

# Mistral's key -> Transformers'.
TEXT_KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "head_dim": "head_dim",
    "hidden_dim": "intermediate_size", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps", "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings", "tied_embeddings": "tie_word_embeddings",
}  # fmt: skip
OPTIONAL_KEYS = ("max_position_embeddings", "tied_embeddings")
KINDS = {"norm_eps": float, "tied_embeddings": bool}  # of values in TEXT_KEYS; the others are int
KIND_NAMES = {int: "a whole number above 0", float: "a number", bool: "true or false", dict: "an object"}
# Without effect here: the tokenizer has the ids of these tokens, and `image_size` is the longest edge.
UNUSED_KEYS = {"image_break_token_id", "image_end_token_id", "max_image_size", "model_type", "max_seq_len"}
# Of other models of Mistral's: mixtures of experts, latent attention, adapters, biases.
FOREIGN_KEYS = {
    "moe", "lora", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "use_biases",
}  # fmt: skip


# --------------------------------------------------------------------------------- from params.json to config.json


class Fields(dict[str, Any]):
    """A JSON object of params.json from which keys are removed as they are read, so that none is overlooked."""

    def required(self, key: str, kind: type = int) -> Any:
        """A value of a kind: an int is above 0, a float may be a whole number."""
        value = self.pop(key, None)
        if not _is_kind(value, kind):
            raise ValueError(f"{PARAMS} has {key}={brief(value)}; allowed: {KIND_NAMES[kind]}")
        return value

    def optional(self, key: str, kind: type = int) -> Any:
        """The same; None if there is none."""
        value = self.pop(key, None)
        if value is not None and not _is_kind(value, kind):
            raise ValueError(f"{PARAMS} has {key}={brief(value)}; allowed: {KIND_NAMES[kind]}, or none")
        return value

    def expect_all_read(self) -> None:
        """Refuse the keys that are left if they make another model, and warn of unknown ones."""
        for key in sorted(FOREIGN_KEYS & self.keys()):
            if self[key] not in (None, False):
                problem = f"{PARAMS} has {key}={brief(self[key])}, which is another function"
                raise ValueError(f"{problem}; allowed: none")
        known = UNUSED_KEYS | FOREIGN_KEYS
        unknown = sorted(key for key, value in self.items() if value and key not in known)
        if unknown:
            warnings.warn(f"{PARAMS}: ignored unknown keys {', '.join(unknown)}", stacklevel=4)


def _is_kind(value: Any, kind: type) -> bool:
    if kind is int:
        return is_size(value)
    if kind is float:
        return is_number(value, float, -math.inf)
    return isinstance(value, kind)


def from_params(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a params.json (Mistral's configuration) as that of a config.json.

    * `sliding_window` (or `_sliding_window`): a number for all layers, or a list that is repeated over the depth, null
      for full attention; Ministral-8B has [null, 32768, 32768, 32768].
    * `yarn`: beta, alpha are beta_fast, beta_slow. `apply_scale` false means a magnitude of 1, written mscale =
      mscale_all_dim = 1 in Transformers; true means 0.1 ln(factor) + 1, written mscale_all_dim = 0.
    * `llama_4_scaling`: the query scale.

    Raises:
        ValueError: a key is missing, or asks for another function. (Unknown ones are named in a warning.)
    """
    params = Fields(content)
    text = _text_fields(params)
    config = text
    vision = params.optional("vision_encoder", dict)
    if vision is not None:
        config = _vision_fields(Fields(vision), text)
    quantization = params.optional("quantization", dict)
    if quantization:
        config["quantization_config"] = _quantization_fields(Fields(quantization))
    params.expect_all_read()
    return {"architectures": [ARCHITECTURES[config["model_type"]]], **config}


def _text_fields(params: Fields) -> dict[str, Any]:
    """The text part of a config.json, or all of it."""
    text: dict[str, Any] = {}
    for key, theirs in TEXT_KEYS.items():
        read = params.required
        if key in OPTIONAL_KEYS:
            read = params.optional
        value = read(key, KINDS.get(key, int))
        if value is not None:
            text[theirs] = value
    text["hidden_act"] = "silu"
    if not is_number(text["num_hidden_layers"], int, 1, MOST_LAYERS):
        found = brief(text["num_hidden_layers"])
        raise ValueError(f"{PARAMS} has n_layers={found}; allowed: a whole number from 1 to {MOST_LAYERS}")
    window, layer_types = _windows(params, text["num_hidden_layers"])
    text["sliding_window"] = window
    rope = _rope_parameters(params)
    is_ministral3 = rope["rope_type"] == "yarn" or "llama_4_scaling_beta" in rope
    if is_ministral3 and len(set(layer_types)) > 1:
        problem = f"{PARAMS} has yarn or llama_4_scaling, and windows for some layers only"
        allowed = "a window for all layers, or for none"
        raise ValueError(f"{problem}: Transformers has no such model; allowed: {allowed}")
    if is_ministral3:
        text["model_type"] = "ministral3"
        rope.setdefault("llama_4_scaling_beta", 0.0)  # Transformers reads it without checking that it exists
    elif window:
        text["layer_types"] = layer_types  # Transformers has no such field in the two other model types
        text["model_type"] = "ministral"
    else:
        text["model_type"] = "mistral"
    text["rope_parameters"] = rope
    return text


def _windows(params: Fields, layers: int) -> tuple[int | None, list[str]]:
    """sliding_window and layer_types, from either name of the key and either form of its value."""
    plain = params.pop("sliding_window", None)
    underscored = params.pop("_sliding_window", None)
    value = plain
    if underscored is not None:
        value = underscored
    pattern = value
    if not isinstance(value, list):
        pattern = [value]
    contradictory = plain is not None and plain != value
    sizes = [window for window in pattern if window is not None]
    one_size = all(is_size(window) and window == sizes[0] for window in sizes)
    if contradictory or not one_size or not pattern or layers % len(pattern):
        found = brief(value)
        if contradictory:
            found = f"{brief(plain)} and _sliding_window={brief(value)}"
        allowed = f"null, one number, or a list of it and null, repeated over {layers} layers"
        raise ValueError(f"{PARAMS} has sliding_window={found}; allowed: {allowed}")
    kinds = ["full_attention" if window is None else "sliding_attention" for window in pattern]
    layer_types = kinds * (layers // len(pattern))
    if not sizes:
        return None, layer_types
    return sizes[0], layer_types


def _rope_parameters(params: Fields) -> dict[str, Any]:
    """rope_parameters from rope_theta, yarn and llama_4_scaling."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.required("rope_theta", float)}
    yarn = params.optional("yarn", dict)
    scaling = params.optional("llama_4_scaling", dict)
    if yarn is not None:
        yarn = Fields(yarn)
        rope["rope_type"] = "yarn"
        rope["factor"] = float(yarn.required("factor", float))
        rope["beta_fast"] = float(yarn.required("beta", float))
        rope["beta_slow"] = float(yarn.required("alpha", float))
        rope["mscale"] = 1.0
        rope["mscale_all_dim"] = 0.0 if yarn.required("apply_scale", bool) else 1.0
        rope["original_max_position_embeddings"] = yarn.required("original_max_position_embeddings")
        yarn.expect_all_read()
    if scaling is not None:
        scaling = Fields(scaling)
        original = scaling.required("original_max_position_embeddings")
        if rope.setdefault("original_max_position_embeddings", original) != original:
            raise ValueError(f"{PARAMS}: yarn and llama_4_scaling differ in original_max_position_embeddings")
        rope["llama_4_scaling_beta"] = scaling.required("beta", float)
        scaling.expect_all_read()
    return rope


def _vision_fields(params: Fields, text: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a vision model, from vision_encoder and the text part."""
    if params.pop("add_pre_mm_projector_layer_norm", None) is not True:
        raise ValueError(f"{PARAMS}: vision_encoder needs add_pre_mm_projector_layer_norm=true")
    if params.pop("mm_projector_id", None) != "patch_merge":
        raise ValueError(f"{PARAMS}: vision_encoder needs mm_projector_id='patch_merge'")
    if text["model_type"] == "ministral":
        text["model_type"] = "mistral"
    config = {
        "model_type": "mistral3",
        "image_token_index": params.required("image_token_id"),
        "multimodal_projector_bias": bool(params.optional("adapter_bias", bool)),
        "projector_hidden_act": "gelu",
        "spatial_merge_size": params.required("spatial_merge_size"),
        "vision_feature_layer": -1,
        "text_config": text,
    }
    vision: dict[str, Any] = {"model_type": "pixtral", "hidden_act": "silu"}
    for key in VISION_SIZES:
        vision[key] = params.required(key)
    vision["rope_parameters"] = {"rope_type": "default", "rope_theta": params.required("rope_theta", float)}
    config["vision_config"] = vision
    if "tie_word_embeddings" in text:
        config["tie_word_embeddings"] = text["tie_word_embeddings"]
    params.expect_all_read()
    return config


def _quantization_fields(params: Fields) -> dict[str, Any]:
    """quantization_config from quantization."""
    kind = params.pop("qformat_weight", "of unknown kind")
    if kind != "fp8_e4m3":
        problem = f"quantized weights ({kind}) are not supported"
        raise ValueError(f"{problem}; allowed: fp8_e4m3, or a BF16 version")
    scheme = "static"
    if params.pop("qscheme_act", None) == "NO_SCALES":
        scheme = "dynamic"
    params.expect_all_read()
    return {
        "quant_method": "fp8",
        "activation_scheme": scheme,
        "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }


# --------------------------------------------------------------------------------- from config.json to params.json


def to_params(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `from_params`: a config.json as the content of a params.json, which has no fields for the ids of
    special tokens (the tokenizer has them), dropout and initialisation.

    Args:
        config: complete, as `to_dict` of a configuration class gives it; nothing is filled in here.

    Raises:
        ValueError: Mistral's format has no field for it, such as another activation; see also `expect_complete`.
    """
    expect_complete(config)
    text = text_config(config)
    rope = text["rope_parameters"]
    vision = config.get("vision_config")
    _expect_text_fields(text, rope)
    if vision is not None:
        _expect_vision_fields(config, vision)

    params = {key: text[theirs] for key, theirs in TEXT_KEYS.items() if text.get(theirs) is not None}
    params["rope_theta"] = rope["rope_theta"]
    if text.get("sliding_window") is not None:
        params["sliding_window"] = _window_pattern(text)
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "yarn":
        params["yarn"] = {
            "original_max_position_embeddings": original,
            "factor": rope["factor"],
            "apply_scale": not (rope.get("mscale") and rope.get("mscale_all_dim")),
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
        }
    if rope.get("llama_4_scaling_beta"):
        beta = rope["llama_4_scaling_beta"]
        params["llama_4_scaling"] = {"original_max_position_embeddings": original, "beta": beta}
    if vision is not None:
        params["vision_encoder"] = _vision_params(config, vision)
    quantization = config.get("quantization_config")
    if quantization:
        scheme = "TENSOR"
        if quantization.get("activation_scheme") == "dynamic":
            scheme = "NO_SCALES"
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": scheme}
    return params


def _window_pattern(text: dict[str, Any]) -> int | list[int | None] | None:
    """sliding_window of params.json: one number if every layer has this window, else the shortest list of windows
    that repeats over the depth."""
    window: int = text["sliding_window"]
    kinds = text.get("layer_types", ["sliding_attention"])
    pattern = [None if kind == "full_attention" else window for kind in kinds]
    for period in range(1, len(pattern) + 1):
        if pattern[:period] * (len(pattern) // period) == pattern:
            break
    if period == 1:
        return pattern[0]
    return pattern[:period]


def _vision_params(config: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """vision_encoder of params.json."""
    params = {key: vision[key] for key in VISION_SIZES}
    return params | {
        "image_token_id": config["image_token_index"],
        "image_break_token_id": 12,
        "image_end_token_id": 13,
        "mm_projector_id": "patch_merge",
        "spatial_merge_size": config["spatial_merge_size"],
        "rope_theta": vision["rope_parameters"]["rope_theta"],
        "add_pre_mm_projector_layer_norm": True,
        "adapter_bias": config["multimodal_projector_bias"],
        "max_image_size": vision["image_size"],
    }


def _expect_text_fields(text: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raise ValueError for what the text part of params.json has no field for."""
    _expect_value("hidden_act", text.get("hidden_act"), "silu")
    _expect_value("rope_type", rope.get("rope_type"), "default", "yarn")
    _expect_value("attention_factor", rope.get("attention_factor"))
    _expect_value("truncate", rope.get("truncate"), True)
    _expect_value("partial_rotary_factor", rope.get("partial_rotary_factor"), 1.0)
    if rope.get("mscale_all_dim"):
        _expect_value("mscale", rope.get("mscale"), rope["mscale_all_dim"])


def _expect_vision_fields(config: dict[str, Any], vision: dict[str, Any]) -> None:
    """Raise ValueError for what the vision part of params.json has no field for."""
    head_dim = vision["hidden_size"] // vision["num_attention_heads"]
    _expect_value("vision_config.hidden_act", vision.get("hidden_act"), "silu")
    _expect_value("vision_config.head_dim", vision.get("head_dim"), head_dim)
    _expect_value("projector_hidden_act", config.get("projector_hidden_act"), "gelu")
    _expect_value("vision_feature_layer", config.get("vision_feature_layer"), -1)


def _expect_value(key: str, value: Any, *supported: Any) -> None:
    """Raise ValueError unless a value is none, or one of those that params.json implies."""
    if value is not None and value not in supported:
        names = " or ".join(map(str, supported)) if supported else "none"
        raise ValueError(f"{PARAMS} has no field for {key}={brief(value)}; supported: {names}")
