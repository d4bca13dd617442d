"""Model directories: configuration and safetensors weights, from files to tensors and back. Computes no model.

A published model comes in one or both of two layouts:

    Transformers'   config.json   model.safetensors, or shards of it and an index   rotary pairs: two halves
    Mistral's own   params.json   consolidated.safetensors                          rotary pairs: neighbours

`Checkpoint` reads one of them, never both, and hands out Transformers' names and order of rows either way (`NAMES`,
`half_split`), and FP8 weights as plain numbers (`dequantize`).

    python checkpoint.py info DIR_OR_HUB_ID
    python checkpoint.py convert SOURCE DESTINATION [--format hf|mistral] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of a LoRA adapter, as PEFT writes it
PARAMS, CONSOLIDATED = "params.json", "consolidated.safetensors"
GENERATION = "generation_config.json"
# What stands beside weights and configuration, and is taken along.
OTHER_FILES = ["tekken.json", "tokenizer*.json", "special_tokens_map.json", GENERATION,
               "*processor_config.json", "chat_template*", "SYSTEM_PROMPT.txt"]  # fmt: skip
# What is fetched from the Hub: one set of weights, Transformers' where there is one, and no pickle.
HUB_WEIGHTS = [WEIGHTS, "model-*-of-*.safetensors", INDEX]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}  # in safetensors
FP8 = "F8_E4M3"
FORMATS = ("hf", "mistral")  # the two layouts
NO_WEIGHTS = ("weight_scale_inv", "activation_scale", "inv_freq")  # names of tensors that are no parameters end so


# ------------------------------------------------------------------------------------------- directories and files


def find(path_or_hub_id: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The directory of a model: the one named, or the local copy of a Hub repository ("owner/name"), downloaded now
    if it is not there yet (huggingface_hub's cache, login, variables and offline mode apply).

    Args:
        revision: branch, tag or commit of the repository; None is its main branch.
        weights: False fetches the configuration only.

    Raises:
        FileNotFoundError: neither a directory nor a repository that can be reached; the line says how to log in where
            that is what it needs.
        ValueError: a revision of a directory.
    """
    if not isinstance(path_or_hub_id, (str, Path)) or not str(path_or_hub_id):
        raise ValueError(f"a model is named by a directory or a Hub id 'owner/name'; found {path_or_hub_id!r}"[:200])
    path = Path(path_or_hub_id)
    with suppress(RuntimeError):  # "~" of a user who is not there
        path = path.expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is impossible for the directory {path}; allowed: with a Hub id")
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; a model is a directory with {CONFIG} and {WEIGHTS}")
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"no model directory {path}; give a directory with {CONFIG}, or a Hub id 'owner/name'")
    from huggingface_hub import snapshot_download  # imported late: a local model needs none of it
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    def fetch(*files: str) -> Path:
        get = partial(snapshot_download, name, revision=revision, allow_patterns=[CONFIG, PARAMS, ADAPTER, *files])
        try:
            return Path(get())
        except OfflineModeIsEnabled:  # some versions ask for a list of files before they look into the cache
            return Path(get(local_files_only=True))

    try:
        directory = fetch(*(OTHER_FILES + HUB_WEIGHTS if weights else []))
        if weights and not any((directory / file).is_file() for file in (WEIGHTS, INDEX)):
            directory = fetch(*OTHER_FILES, "consolidated*.safetensors", "consolidated*.json")
        return directory
    except Exception as error:  # many kinds: no network, no such repository, a full disk
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, GatedRepoError):
            cure = f"accept its terms at https://huggingface.co/{name}, then log in: `hf auth login`, or set HF_TOKEN"
        elif isinstance(error, RepositoryNotFoundError):
            cure = "check the name; if the repository is private, log in: `hf auth login`, or set HF_TOKEN"
        else:
            cure = "give a directory, or check name, revision and network"
        raise FileNotFoundError(
            f"{name} is no directory here and could not be fetched from the Hub ({reason}); {cure}"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not UTF-8 JSON; the message says where.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a directory; give a file" if path.is_dir() else f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def layout(directory: Path) -> str:
    """Which of the two layouts is read: "mistral" if only that one is complete, otherwise "hf"."""

    def there(config: str, *weights: str) -> bool:
        return (directory / config).is_file() and any((directory / name).is_file() for name in weights)

    mistral, hf = there(PARAMS, CONSOLIDATED, f"{CONSOLIDATED}.index.json"), there(CONFIG, WEIGHTS, INDEX)
    only_mistral = (directory / PARAMS).is_file() and not (directory / CONFIG).is_file()
    return "mistral" if only_mistral or (mistral and not hf) else "hf"


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json, a JSON object; in Mistral's own layout what params.json says in its terms (raises as
    `read_json` and `from_params`)."""
    mistral = layout(directory) == "mistral"
    file = directory / (PARAMS if mistral else CONFIG)
    if not file.is_file():
        refuse_adapter(directory)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; a model is a directory with {CONFIG} and {WEIGHTS}")
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; found {type(content).__name__}")
    return from_params(content) if mistral else content


def refuse_adapter(directory: Path) -> None:
    """Raise ValueError if a directory that lacks a model's files is a LoRA adapter."""
    if (directory / ADAPTER).is_file():
        content = read_json(directory / ADAPTER)
        base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        whole = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(directory)!r})"
        cure = f"merge it into its base with peft: {whole}.merge_and_unload().save_pretrained('merged')"
        raise ValueError(f"{directory} is a LoRA adapter ({ADAPTER}) of {base}, not a whole model; {cure}")


# ---------------------------------------------------------------------------------------- generation_config.json


def _is_number(value: Any, least: float, most: float = math.inf) -> bool:
    """Whether a value is a finite number from `least` to `most`."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and least <= value <= most and value < math.inf


def _is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Whether a value is a whole number from `least` to `most`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= value <= most


def _is_list(value: Any, valid: Callable[[Any], bool]) -> bool:
    """Whether a value is valid, or a list of such values."""
    return all(map(valid, value)) if isinstance(value, (list, tuple)) else valid(value)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and value != ""


# The settings of `generate`: what each may be, in words and as a test.
SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "do_sample": ("true or false", lambda value: isinstance(value, bool)),
    "temperature": ("a number not below 0 (0 always takes the most likely token)", lambda value: _is_number(value, 0)),
    "top_k": ("a whole number not below 0 (0 is off)", lambda value: _is_whole(value, 0)),
    "top_p": ("a number above 0, at most 1 (1 is off)", lambda value: _is_number(value, 0, 1) and value > 0),
    "min_p": ("a number from 0 to 1 (0 is off)", lambda value: _is_number(value, 0, 1)),
    "repetition_penalty": ("a number from 0.01 to 100 (1 is off)", lambda value: _is_number(value, 0.01, 100)),
    "max_new_tokens": ("a whole number not below 1", lambda value: _is_whole(value, 1)),
    "max_length": ("a whole number not below 1", lambda value: _is_whole(value, 1)),
    "num_return_sequences": ("a whole number not below 1", lambda value: _is_whole(value, 1)),
    "seed": ("a whole number from 0 to 2**63 - 1", lambda value: _is_whole(value, 0, 2**63 - 1)),
    "stop_strings": ("a text that is not empty, or a list of such", lambda value: _is_list(value, _is_stop)),
    "bos_token_id": ("a token id", lambda value: _is_whole(value, 0)),
    "pad_token_id": ("a token id", lambda value: _is_whole(value, 0)),
    "eos_token_id": ("a token id, or a list of such", lambda value: _is_list(value, lambda i: _is_whole(i, 0))),
}


def check_setting(name: str, value: Any, where: str = "") -> None:
    """Raise ValueError, which begins with `where`, unless a setting of `generate` may have this value. None always may:
    it says nothing."""
    allowed, valid = SETTINGS[name]
    if value is not None and not valid(value):
        raise ValueError(f"{where}{name}={value!r} is impossible; allowed: {allowed}")


# Settings in a generation_config.json that change no text, or none without another that does.
HARMLESS_SETTINGS = {
    *("_from_model_config", "_commit_hash", "transformers_version", "use_cache", "cache_implementation"),
    *("cache_config", "max_cache_len", "low_memory", "compile_config", "disable_compile", "prefill_chunk_size"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("renormalize_logits", "remove_invalid_values", "early_stopping", "length_penalty", "num_beam_groups"),
    *("diversity_penalty", "decoder_start_token_id", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "target_lookbehind"),
    *("assistant_early_exit", "assistant_lookbehind", "max_matching_ngram_size", "prompt_lookup_num_tokens", "use_mtp"),
    *("assistant_ensemble_weight", "speculation_type", "continuous_batching_config"),
}
# All others are off at 0, null, false or empty.
OFF_AT_ONE = ("num_beams", "typical_p", "guidance_scale", "encoder_repetition_penalty")


@dataclass
class GenerationConfig:
    """The settings of `generate` that come with a model in generation_config.json, by Transformers' names. None: the
    file says nothing. `others` are those that `generate` does not know; they are kept for `save_pretrained`."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    num_return_sequences: int | None = None
    stop_strings: str | list[str] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GenerationConfig:
        """Read the generation_config.json of a model directory; where there is none, every setting is None. A warning
        names the settings in it that `generate` does not support and that would change the text.

        Raises:
            ValueError: the file is not a JSON object, or a value in it is impossible.
        """
        path = Path(directory) / GENERATION
        if not path.exists():
            return cls()
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a JSON object; found {type(content).__name__}")
        known = {name: value for name, value in content.items() if name in SETTINGS and name != "seed"}
        for name, value in known.items():
            check_setting(name, value, f"{path}: ")
        others = {name: value for name, value in content.items() if name not in known}
        if ignored := [f"{name}={value!r}" for name, value in others.items() if _changes_text(name, value)]:
            warnings.warn(f"{path}: not supported here, and left out: {', '.join(ignored)}", stacklevel=1)
        return cls(**known, others=others)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file: the settings that are not None, and `others`."""
        settings = asdict(self)
        others: dict[str, Any] = settings.pop("others")
        return {name: value for name, value in settings.items() if value is not None} | others


def _changes_text(name: str, value: Any) -> bool:
    """Whether a setting that `generate` does not know would change what it writes."""
    off = not value or (name in OFF_AT_ONE and value == 1)
    return name not in HARMLESS_SETTINGS and not off


# --------------------------------------------------------------------------------------------------- config.json


# Keys of a config.json that do not change what a text model computes.
HARMLESS_KEYS = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"),
    *("return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "num_labels", "pretraining_tp", "_attn_implementation_autoset"),
}


def config_fields(d: Any, known: set[str], model_types: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields of a text model's config.json, whichever Transformers generation wrote it.

    4.x has `rope_theta` and `rope_scaling` (or null), 5.x has `rope_parameters`; what they hold is merged. Keys of no
    known meaning are left out with a warning.

    Args:
        d: the content of the file.
        known: names of the fields that are wanted.
        model_types: the model types that are taken, each with its defaults for fields that the file leaves out.

    Raises:
        ValueError: another model type or biases, which compute something else, or quantised weights other than FP8.
    """
    model_type = expect_model_type(d, model_types)
    read = {"rope_scaling", "attention_bias", "mlp_bias", "quantization_config"}
    if unknown := sorted(d.keys() - known - read - HARMLESS_KEYS):
        warnings.warn(f"{CONFIG}: ignored unknown keys {', '.join(unknown)}", stacklevel=3)
    values = model_types[model_type] | {key: value for key, value in d.items() if key in known}
    if model_type == "llama":
        values["sliding_window"] = None  # its attention has none, whatever the file says
    if rope := merged_rope(d):
        values["rope_parameters"] = rope
    return values


def merged_rope(d: dict[str, Any]) -> dict[str, Any]:
    """What a config.json of either generation says of rotary positions, in one object."""
    return {**(d.get("rope_scaling") or {}), **(d.get("rope_parameters") or {})}


def expect_model_type(d: Any, model_types: Iterable[str]) -> str:
    """The model type of a config.json; the first of those that are allowed if it says none.

    Raises:
        ValueError: another model type, biases, quantised weights other than FP8, or values of an impossible kind.
    """
    if not isinstance(d, dict):
        raise ValueError(f"{CONFIG} must hold a JSON object; found {type(d).__name__}")
    for key in ("rope_scaling", "rope_parameters", "quantization_config", "vision_config", "text_config"):
        if not isinstance(d.get(key), (dict, type(None))):
            raise ValueError(f"{key}={d[key]!r} is impossible; allowed: an object")
    if not isinstance(d.get("model_type"), (str, type(None))):
        raise ValueError(f"model_type={d['model_type']!r} is impossible; allowed: a name")
    model_type = d.get("model_type") or next(iter(model_types))
    if model_type not in model_types:
        raise ValueError(f"model_type {model_type!r} computes another function; allowed: {', '.join(model_types)}")
    for key in ("attention_bias", "mlp_bias"):
        if d.get(key):
            raise ValueError(f"{key}={d[key]!r}: biases make it another function; allowed: false, or none")
    expect_fp8(d.get("quantization_config"))
    return str(model_type)


def label_maps(
    num_labels: int | None = None, id2label: dict[Any, str] | None = None, label2id: dict[str, Any] | None = None
) -> tuple[int, dict[int, str], dict[str, int]]:
    """What a config.json says of a classifier's labels, complete: their number, the name of each, the number of each
    name. One of the three is enough; none means two labels.

    As in Transformers, labels without names are called LABEL_0, LABEL_1, ...; such names give way to a `num_labels`
    that asks for more or fewer, and to other names in `label2id`. For the rest, `id2label` is right and `label2id`
    follows from it: Transformers writes files in which they differ.

    Raises:
        ValueError: no or an impossible number of labels, or a number without a name.
    """

    def unnamed(names: dict[Any, str]) -> bool:
        return names == {i: f"LABEL_{i}" for i in range(len(names))}

    def number(key: Any) -> Any:
        return int(key) if str(key).isdecimal() else key  # keys in JSON are text

    for name, value in (("id2label", id2label), ("label2id", label2id)):
        if not isinstance(value, (dict, type(None))):
            raise ValueError(f"{name}={value!r} is impossible; allowed: an object, or none")
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise ValueError(f"num_labels={num_labels!r} is impossible; allowed: a whole number not below 1")
    names = {number(key): str(name) for key, name in (id2label or {}).items()}
    others = {number(key): str(name) for name, key in (label2id or {}).items()}
    if unnamed(names) and not unnamed(others):
        names = others
    if unnamed(names):
        names = {i: f"LABEL_{i}" for i in range(num_labels or len(names) or 2)}
    if names.keys() != set(range(len(names))):
        raise ValueError(f"labels numbered {', '.join(map(str, names))}; allowed: 0, 1, 2, ... with a name for each")
    if num_labels not in (None, len(names)):
        raise ValueError(f"num_labels={num_labels} is impossible; allowed: {len(names)}, the number of given names")
    return len(names), names, {name: i for i, name in names.items()}


def expect_fp8(quantization: Any) -> None:
    """Raise ValueError unless a config.json's `quantization_config` is none, or the FP8 that `dequantize` reads."""
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config={quantization!r} is impossible; allowed: an object")
    method, numbers = quantization.get("quant_method", "of unknown kind"), quantization.get("fmt", "e4m3")
    if quantization and (method, numbers) != ("fp8", "e4m3"):
        found = str(method) if numbers == "e4m3" else f"{method} {numbers}"
        raise ValueError(f"quantized weights ({found}) are not supported; allowed: fp8 e4m3, or a BF16 version")
    block = quantization.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(map(is_size, block))):
        raise ValueError(f"weight_block_size={block!r} is impossible; allowed: none, or two whole numbers above 0")


def is_size(value: object) -> bool:
    """Whether a value is a whole number above 0."""
    return type(value) is int and value > 0


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json: all of it, or `text_config` of a model with eyes. There
    `tie_word_embeddings` counts at the top, and the published files have it below, or nowhere."""
    if not isinstance(text := config.get("text_config"), dict):
        return config
    outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {"model_type": "ministral3"} | text | outer


def complete(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The text and the vision part of a config.json, for what is computed here from the file alone: with every number
    that the shapes depend on, and rotary positions in one place ("rope"). What the file leaves to the classes'
    defaults is refused, but for a head_dim that follows from the others.

    Raises:
        ValueError: another model type, or something that is missing or impossible.
    """
    kind = expect_model_type(config, (*ARCHITECTURES, "llama"))
    text = dict(text_config(config))
    if kind == "mistral3" and not isinstance(config.get("vision_config"), dict):
        raise ValueError("a mistral3 model needs vision_config, an object; found none")
    text["model_type"] = expect_model_type(text, [*list(ARCHITECTURES)[:-1], "llama"])
    sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size"]  # fmt: skip
    if text["model_type"] != "ministral3" and text.get("head_dim") is None:
        heads = text.get("num_attention_heads")
        text["head_dim"] = is_size(heads) and is_size(text.get("hidden_size")) and text["hidden_size"] // (heads or 1)
    vision = config.get("vision_config")
    for where, part, keys in (("", text, [*sizes, "head_dim"]), ("vision_config.", vision or {}, VISION_KEYS)):
        for key in keys if part else ():
            if not is_size(part.get(key)):
                raise ValueError(f"{CONFIG} has {where}{key}={part.get(key)!r}; allowed: a whole number above 0")
    if not isinstance(norm := text.get("rms_norm_eps"), (int, float)) or isinstance(norm, bool):
        raise ValueError(f"{CONFIG} has rms_norm_eps={norm!r}; allowed: a number")
    rope = {"rope_theta": text.get("rope_theta"), **merged_rope(text)}
    rope = {key: value for key, value in rope.items() if value is not None}
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    for key in ("rope_theta", *(("factor", "original_max_position_embeddings") if rope["rope_type"] == "yarn" else ())):
        if not isinstance(rope.get(key), (int, float)) or isinstance(rope[key], bool):
            raise ValueError(f"{CONFIG} has {key}={rope.get(key)!r} for rotary positions; allowed: a number")
    window, layers = text.get("sliding_window"), text["num_hidden_layers"]
    if text["model_type"] == "llama":
        window = None
    elif "sliding_window" not in text and text["model_type"] != "ministral3":
        raise ValueError(f"{CONFIG} does not say sliding_window; allowed: null, or a whole number above 0")
    kinds = text.get("layer_types") or [f"{'sliding' if window else 'full'}_attention"] * layers
    whole = isinstance(kinds, list) and len(kinds) == layers and set(map(str, kinds)) <= set(LAYER_TYPES)
    if not whole or not (window is None or is_size(window)) or (LAYER_TYPES[1] in kinds and not window):
        raise ValueError(f"{CONFIG} has sliding_window={window!r}, layer_types={kinds!r}; allowed: {layers} names of "
                         f"{', '.join(LAYER_TYPES)}, and a window for sliding ones")  # fmt: skip
    return text | {"rope": rope, "sliding_window": window, "layer_types": kinds}, vision


# --------------------------------------------------------------------------------------------------- params.json

# Mistral's key -> Transformers'.
TEXT_KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}  # fmt: skip
OPTIONAL = ("max_position_embeddings", "tied_embeddings")
VISION_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
               "image_size", "patch_size")  # fmt: skip
# Without meaning for what is computed here: the tokenizer says the ids, `image_size` the longest edge.
IDLE_PARAMS = {"image_break_token_id", "image_end_token_id", "max_image_size", "model_type", "max_seq_len"}
ARCHITECTURES = {"ministral": "MinistralForCausalLM", "mistral": "MistralForCausalLM",
                 "ministral3": "Ministral3ForCausalLM", "mistral3": "Mistral3ForConditionalGeneration"}  # fmt: skip
LAYER_TYPES = ("full_attention", "sliding_attention")


# Other models of Mistral's: mixtures of experts, latent attention, adapters, biases.
FOREIGN_PARAMS = {"moe", "lora", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
                  "use_biases"}  # fmt: skip


class Reader(dict[str, Any]):
    """A JSON object of params.json from which keys are taken, so that none is overlooked."""

    def take(self, key: str, kind: type = int, required: bool = True) -> Any:
        """A value of a kind (float takes whole numbers, too, int those above 0), or None if it need not be there."""
        value = self.pop(key, None)
        right = {int: is_size(value), float: isinstance(value, (int, float)) and not isinstance(value, bool)}
        if not (right.get(kind, isinstance(value, kind)) or (value is None and not required)):
            names = {int: "a whole number above 0", float: "a number", bool: "true or false", dict: "an object"}
            raise ValueError(f"{PARAMS} has {key}={value!r}; allowed: {names[kind]}{'' if required else ', or none'}")
        return value

    def close(self) -> None:
        """Refuse what is left if it makes another model, and mention what is not known at all."""
        for key in sorted(FOREIGN_PARAMS & self.keys()):
            if self[key] not in (None, False):
                raise ValueError(f"{PARAMS} has {key}={self[key]!r}, which is another function; allowed: none")
        if unknown := sorted(key for key, value in self.items() if value and key not in IDLE_PARAMS | FOREIGN_PARAMS):
            warnings.warn(f"{PARAMS}: ignored unknown keys {', '.join(unknown)}", stacklevel=4)


def from_params(content: dict[str, Any]) -> dict[str, Any]:
    """What a params.json (Mistral's configuration) says, as the content of a config.json.

    * `sliding_window` (or `_sliding_window`): a number for all layers, or a list that is repeated over the depth, null
      for full attention; Ministral-8B has [null, 32768, 32768, 32768].
    * `yarn`: beta, alpha are beta_fast, beta_slow. `apply_scale` false means a magnitude of 1, written mscale =
      mscale_all_dim = 1 in Transformers; true means 0.1 ln(factor) + 1, written mscale_all_dim = 0.
    * `llama_4_scaling`: the query scale.

    Raises:
        ValueError: a key is missing, or asks for another function. (Unknown ones are named in a warning.)
    """
    params = Reader(content)
    kinds = {"norm_eps": float, "tied_embeddings": bool}
    text = {theirs: params.take(ours, kinds.get(ours, int), ours not in OPTIONAL) for ours, theirs in TEXT_KEYS.items()}
    text = {key: value for key, value in text.items() if value is not None}
    text |= {"hidden_act": "silu"} | _layer_types(params, text["num_hidden_layers"])
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.take("rope_theta", float)}
    yarn, scaling = params.take("yarn", dict, required=False), params.take("llama_4_scaling", dict, required=False)
    if yarn is not None:
        yarn = Reader(yarn)
        rope |= {"rope_type": "yarn", "factor": float(yarn.take("factor", float)),
                 "beta_fast": float(yarn.take("beta", float)), "beta_slow": float(yarn.take("alpha", float)),
                 "mscale": 1.0, "mscale_all_dim": 0.0 if yarn.take("apply_scale", bool) else 1.0,
                 "original_max_position_embeddings": yarn.take("original_max_position_embeddings")}  # fmt: skip
        yarn.close()
    if scaling is not None:
        scaling = Reader(scaling)
        original = scaling.take("original_max_position_embeddings")
        if rope.setdefault("original_max_position_embeddings", original) != original:
            raise ValueError(f"{PARAMS}: yarn and llama_4_scaling differ in original_max_position_embeddings")
        rope["llama_4_scaling_beta"] = scaling.take("beta", float)
        scaling.close()
    new = yarn is not None or scaling is not None
    if new and len(set(text["layer_types"])) > 1:
        raise ValueError(f"{PARAMS} has yarn or llama_4_scaling, and windows for some layers only: Transformers has no"
                         " such model; allowed: a window for all layers, or for none")  # fmt: skip
    text |= {"model_type": "ministral3" if new else "ministral" if text["sliding_window"] else "mistral"}
    if new:
        rope.setdefault("llama_4_scaling_beta", 0.0)  # Transformers reads it without asking whether it is there
    text["rope_parameters"] = rope
    if new or not text["sliding_window"]:
        text.pop("layer_types")  # Transformers has no such field there
    config = text
    if (vision := params.take("vision_encoder", dict, required=False)) is not None:
        vision = Reader(vision)
        if vision.pop("add_pre_mm_projector_layer_norm", None) is not True:
            raise ValueError(f"{PARAMS}: vision_encoder needs add_pre_mm_projector_layer_norm=true")
        if vision.pop("mm_projector_id", None) != "patch_merge":
            raise ValueError(f"{PARAMS}: vision_encoder needs mm_projector_id='patch_merge'")
        config = {
            "model_type": "mistral3",
            "image_token_index": vision.take("image_token_id"),
            "multimodal_projector_bias": bool(vision.take("adapter_bias", bool, required=False)),
            "projector_hidden_act": "gelu",
            "spatial_merge_size": vision.take("spatial_merge_size"),
            "vision_feature_layer": -1,
            "text_config": text | ({} if new else {"model_type": "mistral"}),
            "vision_config": {"model_type": "pixtral", "hidden_act": "silu"}
            | {key: vision.take(key) for key in VISION_KEYS}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": vision.take("rope_theta", float)}},
        }
        if "tie_word_embeddings" in text:
            config["tie_word_embeddings"] = text["tie_word_embeddings"]
        vision.close()
    if quantization := params.take("quantization", dict, required=False):
        quantization = Reader(quantization)
        if (found := quantization.pop("qformat_weight", "of unknown kind")) != "fp8_e4m3":
            raise ValueError(f"quantized weights ({found}) are not supported; allowed: fp8_e4m3, or a BF16 version")
        scheme = "dynamic" if quantization.pop("qscheme_act", None) == "NO_SCALES" else "static"
        quantization.close()
        unquantized = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": scheme,
                                         "weight_block_size": None, "modules_to_not_convert": unquantized}  # fmt: skip
    params.close()
    return {"architectures": [ARCHITECTURES[config["model_type"]]], **config}


def _layer_types(params: Reader, layers: int) -> dict[str, Any]:
    """sliding_window and layer_types, from either name of the key and either form of its value."""
    given = [params.pop(key, None) for key in ("sliding_window", "_sliding_window")]
    value = given[0] if given[1] is None else given[1]
    pattern = value if isinstance(value, list) else [value]
    sizes = [window for window in pattern if window is not None]
    same = all(is_size(window) and window == sizes[0] for window in sizes) and given[0] in (None, value)
    if not same or not pattern or layers % len(pattern):
        found = value if given[0] in (None, value) else f"{given[0]} and _sliding_window={value}"
        allowed = f"null, one number, or a list of it and null, repeated over {layers} layers"
        raise ValueError(f"{PARAMS} has sliding_window={found}; allowed: {allowed}")
    kinds = [LAYER_TYPES[window is not None] for window in pattern]
    return {"sliding_window": sizes[0] if sizes else None, "layer_types": kinds * (layers // len(pattern))}


def to_params(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `from_params`: a config.json as the content of a params.json, which has no words for the ids of
    special tokens (the tokenizer has them), dropout and initialisation.

    Raises:
        ValueError: something that Mistral's format cannot say, such as another activation; see also `complete`.
    """
    text, vision = complete(config)
    rope = text["rope"]
    _expect_sayable(config, text, vision or {})
    params = {ours: text[theirs] for ours, theirs in TEXT_KEYS.items() if text.get(theirs) is not None}
    params["rope_theta"] = rope["rope_theta"]
    if window := text["sliding_window"]:
        pattern = [None if kind == "full_attention" else window for kind in text["layer_types"]]
        period = next(n for n in range(1, len(pattern) + 1) if pattern[:n] * (len(pattern) // n) == pattern)
        params["sliding_window"] = pattern[:period] if period > 1 else pattern[0]
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "yarn":
        params["yarn"] = {"original_max_position_embeddings": original, "factor": rope.get("factor"),
                          "apply_scale": not (rope.get("mscale") and rope.get("mscale_all_dim")),
                          "beta": rope.get("beta_fast") or 32, "alpha": rope.get("beta_slow") or 1}  # fmt: skip
    if rope.get("llama_4_scaling_beta"):
        params["llama_4_scaling"] = {"original_max_position_embeddings": original, "beta": rope["llama_4_scaling_beta"]}
    if vision is not None:
        theta = (vision.get("rope_parameters") or vision).get("rope_theta", 10000.0)
        params["vision_encoder"] = {key: vision[key] for key in VISION_KEYS} | {
            "image_token_id": config.get("image_token_index", config.get("image_token_id", 10)),
            "image_break_token_id": 12, "image_end_token_id": 13, "mm_projector_id": "patch_merge",
            "spatial_merge_size": config.get("spatial_merge_size", 2), "rope_theta": theta,
            "add_pre_mm_projector_layer_norm": True,
            "adapter_bias": config.get("multimodal_projector_bias", False),
            "max_image_size": vision.get("image_size"),
        }  # fmt: skip
    if quantization := config.get("quantization_config"):
        scheme = "NO_SCALES" if quantization.get("activation_scheme") == "dynamic" else "TENSOR"
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": scheme}
    return params


def _expect_sayable(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Raise ValueError for what params.json has no word for."""
    rope = text["rope"]
    size = vision and vision["hidden_size"] // vision["num_attention_heads"]
    for key, value, allowed in (
        ("hidden_act", text.get("hidden_act"), "silu"),
        ("rope_type", rope["rope_type"], ("default", "yarn")),
        ("attention_factor", rope.get("attention_factor"), "none"),
        ("truncate", rope.get("truncate"), True),
        ("partial_rotary_factor", rope.get("partial_rotary_factor"), 1.0),
        ("mscale", rope.get("mscale") if rope.get("mscale_all_dim") else None, rope.get("mscale_all_dim")),
        ("vision_config.hidden_act", vision.get("hidden_act", "gelu") if vision else None, "silu"),
        ("vision_config.head_dim", vision.get("head_dim"), size),
        ("projector_hidden_act", config.get("projector_hidden_act"), "gelu"),
        ("vision_feature_layer", config.get("vision_feature_layer"), -1),
    ):
        if value is not None and value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
            raise ValueError(f"{key}={value!r} cannot be said in {PARAMS}; allowed: {allowed}")


# --------------------------------------------------------------------------------------------------------- names

# Every module of Mistral's consolidated.safetensors and its name in Transformers' files; N is the number of a layer.
# In a model with eyes, those of the language model (all above "vision_encoder") begin with "language_model.".
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
    "vision_encoder.transformer.layers.N.feed_forward.w1": "vision_tower.transformer.layers.N.feed_forward.gate_proj",
    "vision_encoder.transformer.layers.N.feed_forward.w2": "vision_tower.transformer.layers.N.feed_forward.down_proj",
    "vision_encoder.transformer.layers.N.feed_forward.w3": "vision_tower.transformer.layers.N.feed_forward.up_proj",
    "pre_mm_projector_norm": "multi_modal_projector.norm",
    "patch_merger.merging_layer": "multi_modal_projector.patch_merger.merging_layer",
    "vision_language_adapter.w_in": "multi_modal_projector.linear_1",
    "vision_language_adapter.w_out": "multi_modal_projector.linear_2",
}
SUFFIXES = {"weight": "weight", "bias": "bias", "qscale_weight": "weight_scale_inv", "qscale_act": "activation_scale"}
EYES = ("vision_tower.", "multi_modal_projector.")


def rename(name: str, modules: Mapping[str, str], suffixes: Mapping[str, str]) -> str | None:
    """A tensor's name by a table of modules and one of what stands after them; None if it is in neither."""
    module, _, suffix = name.rpartition(".")
    number = re.search(r"(?<=layers\.)\d+", module)
    renamed = modules.get(re.sub(r"(?<=layers\.)\d+", "N", module))
    if renamed is None or suffix not in suffixes:
        return None
    return f"{renamed.replace('.N.', f'.{number[0]}.') if number else renamed}.{suffixes[suffix]}"


def from_mistral(name: str, eyes: bool) -> str | None:
    """Mistral's name of a tensor -> that of Transformers' files, in a model with or without eyes."""
    renamed = rename(name, NAMES, SUFFIXES)
    return renamed if renamed is None or not eyes or renamed.startswith(EYES) else "language_model." + renamed


def to_mistral(name: str) -> str | None:
    """A name in Transformers' files, of any version, -> Mistral's."""
    name = text_name(name) or name.removeprefix("model.")
    name = name if name.startswith((*EYES, "lm_head.")) else "model." + name
    return rename(name, {b: a for a, b in NAMES.items()}, {b: a for a, b in SUFFIXES.items()})


def text_name(name: str) -> str | None:
    """The name of a tensor in a model with eyes, of any version of Transformers, -> that in the language model's
    backbone ("layers.0....", or "lm_head.weight"); None for the eyes. The published files say
    language_model.model.layers and language_model.lm_head, Transformers 5 model.language_model.layers and lm_head."""
    name = name.removeprefix("model.")
    return None if name.startswith(EYES) else name.removeprefix("language_model.").removeprefix("model.")


# What wrappers put before the names in the files that are written of them, and what has to be written instead.
WRAPPERS = {
    "module.": "torch's DataParallel: save model.module",
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "_fsdp_wrapped_module.": "torch's FSDP: save the full state dict",
    "base_model.model.": "PEFT: save model.merge_and_unload()",
}


def origin(names: Sequence[str]) -> str:
    """Whose names of tensors these seem to be, which no parameter has, for a message; "" if that is not known."""
    prefix = next((prefix for prefix in WRAPPERS if names and all(prefix in name for name in names)), None)
    if any(".lora_" in name for name in names):
        return "; they are of a LoRA adapter that is not merged: save model.merge_and_unload()"
    if prefix is not None:
        return f"; {prefix!r} is written by {WRAPPERS[prefix]}"
    if names and all(from_mistral(name, False) is not None for name in names):
        return f"; they are Mistral's names, which belong into {CONSOLIDATED} with {PARAMS}"
    return ""


def listed(names: Sequence[str], most: int) -> str:
    """Names for an error message, `most` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection (heads * D, E) from Mistral's order, in which the two rows that
    rotate together are neighbours (0, 1), (2, 3), ..., to Transformers', in which they are D/2 apart (0, D/2),
    (1, D/2 + 1), ... Scores do not change, as queries and keys are reordered alike."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def interleave(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def reordered(
    name: str, weight: Tensor, config: dict[str, Any], reorder: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """A tensor (Transformers' name) with its rows reordered by `half_split` or `interleave`, if they rotate.

    Raises:
        ValueError: not as many rows as the configuration's heads have.
    """
    if not (found := re.search(r"\.(q|k)_proj\.weight$", name)):
        return weight
    eyes = name.removeprefix("model.").startswith(EYES)
    part: dict[str, Any] = config["vision_config"] if eyes else text_config(config)
    queries = part["num_attention_heads"]
    heads = queries if eyes or found[1] == "q" else part.get("num_key_value_heads") or queries
    size = part.get("head_dim") or part["hidden_size"] // queries
    if len(weight) != heads * size or size % 2:
        raise ValueError(f"{name} has {len(weight)} rows; {CONFIG} asks for {heads} heads of {size}, an even number")
    return reorder(weight, heads)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 numbers (rows, columns) times their scale, which is one number, or one for each block of a grid of equal
    blocks. The product is computed in float32 and rounded once, as in Transformers on the CPU, bit for bit.

    In the files the scale is called weight_scale_inv, though it is not divided by.

    Raises:
        ValueError: the grid does not divide the matrix.
    """
    grid = tuple(scale.shape) if scale.ndim == 2 else (1, 1)
    if weight.ndim != 2 or scale.numel() != math.prod(grid) or not scale.numel() or any(
            n % blocks for n, blocks in zip(weight.shape, grid)):  # fmt: skip
        found = f"scales {list(scale.shape)} for a tensor {list(weight.shape)}"
        raise ValueError(f"{found}; allowed: one number, or one for each of equal blocks")
    rows, columns = weight.shape
    blocks = weight.float().view(grid[0], rows // grid[0], grid[1], columns // grid[1])
    blocks *= scale.float().view(grid[0], 1, grid[1], 1)
    return blocks.view(rows, columns).to(dtype)


# ------------------------------------------------------------------------------------------------------- tensors


def named_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The type that a config.json names, if any."""
    named = config.get("dtype") or config.get("torch_dtype") or text_config(config).get("dtype")
    return DTYPES.get(str(named))


def as_dtype(dtype: Any, torch_dtype: Any = None) -> torch.dtype | None:
    """The type that an argument names, as a torch.dtype or as text; None for None and for "auto", the stored type.
    `torch_dtype` is another name of the argument.

    Raises:
        ValueError: another type, or both names with different values.
    """
    if dtype is not None and torch_dtype not in (None, dtype):
        raise ValueError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} differ; give one of the two")
    wanted = torch_dtype if dtype is None else dtype
    if wanted is None or wanted == "auto":
        return None
    found = DTYPES.get(str(wanted).removeprefix("torch."))
    if found is None or not isinstance(wanted, (str, torch.dtype)):
        supported = f"{', '.join(DTYPES)}, or auto for the stored type (a device is given as device=)"
        raise ValueError(f"dtype={wanted!r} is not supported; supported: {supported}")
    return found


class Checkpoint:
    """The tensors of a model directory, in one file or in shards with an index, under the names and in the order of
    rows of Transformers' files. Opening reads the headers only; `read` maps one tensor at a time into memory.

    FP8 weights count as `dtype`; the scales of weights and activations are not among the names.

    Args:
        raw: hand out FP8 weights and scales as they are.

    Attributes:
        config: the content of config.json (see `read_config`).
        dtype: of most numbers that are not FP8; for FP8 weights, which become it if nothing else is asked for, what
            config.json names.
        scaled: how many weights are FP8.
        numbers: how many numbers of each kind are stored, scales not counted.

    Raises:
        FileNotFoundError: no configuration, no weights, or a shard that the index names is not there.
        ValueError: a file is truncated or not safetensors, a shard lacks a tensor the index promises, or the weights
            are quantised in another way than FP8.
    """

    def __init__(self, directory: Path, raw: bool = False) -> None:
        self.directory, self.layout, self.config = directory, layout(directory), read_config(directory)
        stored: dict[str, Any] = {}  # name in the file -> open file
        weights = CONSOLIDATED if self.layout == "mistral" else WEIGHTS
        if (directory / weights).is_file():
            shard = self._open(directory / weights)
            stored = dict.fromkeys(shard.keys(), shard)
        elif (directory / f"{weights}.index.json").is_file():
            stored = self._open_shards(directory / f"{weights}.index.json")
        else:
            refuse_adapter(directory)
            found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{directory} holds neither {weights} nor {weights}.index.json; found {found}")
        self._files: dict[str, tuple[Any, str]] = {}  # name -> (open file, name in it)
        eyes = isinstance(self.config.get("vision_config"), dict)
        for name, file in stored.items():
            own = name if self.layout == "hf" else from_mistral(name, eyes)
            if "fake_quantizer" in name:  # ranges of quantisation in training, not used in computing
                continue
            if own is None:
                looks = origin([name for name in stored if from_mistral(name, eyes) is None])
                raise ValueError(f"{directory / weights}: {name} is no tensor of Mistral's layout (see NAMES){looks}")
            self._files[own] = file, name
        expect_fp8(quantization := self.config.get("quantization_config"))
        self._block = (quantization or {}).get("weight_block_size")
        self._scales: dict[str, tuple[Any, str]] = {}  # name of a weight -> its scale
        if not raw:
            for name in [name for name in self._files if name.endswith(".weight_scale_inv")]:
                self._scales[name.removesuffix("_scale_inv")] = self._files.pop(name)
            for name in [name for name in self._files if name.endswith(".activation_scale")]:
                del self._files[name]
        if lost := sorted(name for name in self._scales if name not in self._files or self._kind(name) != FP8):
            raise ValueError(f"{directory}: {lost[0]} has a scale but is not stored as {FP8}; fetch the model again")
        self.scaled = len(self._scales)
        self.numbers = Counter[str]()
        for name in (name for name in self._files if not name.endswith(NO_WEIGHTS)):
            self.numbers[self._kind(name)] += math.prod(self.shape(name))
        common = next((KINDS[kind] for kind, _ in self.numbers.most_common() if kind in KINDS), None)
        named = named_dtype(self.config)
        self.dtype: torch.dtype = (named or common if self.scaled else common or named) or torch.bfloat16

    @staticmethod
    def _open(path: Path) -> Any:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, though the index names it; fetch the model again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error

    def _open_shards(self, path: Path) -> dict[str, Any]:
        index = read_json(path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
            raise ValueError(f"{path} has no weight_map from tensor names to file names")
        shards = {name: self._open(self.directory / name) for name in sorted(set(weight_map.values()))}
        held = {name: set(shard.keys()) for name, shard in shards.items()}
        for tensor, file in weight_map.items():
            if tensor not in held[file]:
                raise ValueError(f"{self.directory / file} lacks {tensor}, which the index promises; fetch it again")
        return {tensor: shards[file] for tensor, file in weight_map.items()}

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        file, stored = self._files[name]
        return tuple(file.get_slice(stored).get_shape())

    def _kind(self, name: str) -> str:
        file, stored = self._files[name]
        return str(file.get_slice(stored).get_dtype())

    def kind(self, name: str) -> str:
        """How one tensor's numbers are handed out if no type is asked for: F32, BF16, I8, ..."""
        return next(kind for kind, t in KINDS.items() if t == self.dtype) if name in self._scales else self._kind(name)

    def itemsize(self, name: str) -> int:
        """Bytes of each number of a tensor as it is handed out if no type is asked for."""
        bits = re.search(r"\d+", self.kind(name))
        return int(bits[0]) // 8 if bits else 1  # BOOL

    def nbytes(self) -> int:
        """Bytes of all tensors as they are handed out if no type is asked for."""
        return sum(math.prod(self.shape(name)) * self.itemsize(name) for name in self._files)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, on the CPU: mapped to the file where nothing has to be computed.

        Args:
            dtype: what it is cast to; None is what `kind` says.

        Raises:
            ValueError: FP8 scales that do not fit.
        """
        file, stored = self._files[name]
        tensor: Tensor = file.get_tensor(stored)
        if name in self._scales:
            file, stored = self._scales[name]
            scale = file.get_tensor(stored)
            blocks = list(scale.shape) if scale.ndim == 2 else None
            given = self._block and [n / size for n, size in zip(tensor.shape, self._block)]
            if not scale.is_floating_point() or scale.element_size() < 2 or (blocks and given and blocks != given):
                allowed = f"one number, or {[math.ceil(n) for n in given] if given else 'a grid'} of them, each for a"
                allowed += f" whole block of {list(tensor.shape)}, of 16 bits or more"
                raise ValueError(f"{name}: scale of shape {list(scale.shape)}, {scale.dtype}; allowed: {allowed}")
            try:
                tensor = dequantize(tensor, scale, dtype or self.dtype)
            except ValueError as error:
                raise ValueError(f"{self.directory}: {name}: {error}") from error
        if self.layout == "mistral":
            tensor = reordered(name, tensor, self.config, half_split)
        return tensor if dtype is None else tensor.to(dtype)


def fill(
    module: nn.Module,
    files: Checkpoint,
    own_name: Callable[[str], str | None],
    may_tie: Mapping[str, str],
    said_tied: bool | None,
    new: set[str],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> bool:
    """Replace the parameters of a module, which may be on the meta device, one by one by those in the files.

    Args:
        own_name: from a stored name to the parameter's, or None for a tensor that is to be left out.
        may_tie: parameters that share another's tensor if they are not stored: {name: the other's name}.
        said_tied: whether config.json says they do, None if it does not say. The files count, and this only for
            tensors stored twice with equal values; where they contradict each other, a warning says so.
        new: parameters that are left as they are.
        dtype, device: what each tensor is cast and moved to; dtype None keeps the stored one.

    Returns:
        Whether the parameters in `may_tie` are to be tied; otherwise they were filled like all others.

    Raises:
        ValueError: tensors are missing, unexpected, misshapen, given twice, no floating-point numbers, or of several
            types when `dtype` is None; the message names them.
    """
    wanted = {k: p for k, p in module.named_parameters(remove_duplicate=False) if k not in new}
    stored: dict[str, str] = {}
    for name in files.names():
        if (own := own_name(name)) is not None:
            if own in stored:
                raise ValueError(f"{files.directory}: {stored[own]} and {name} are the same parameter")
            stored[own] = name
    tied = {name: other for name, other in may_tie.items() if name not in stored}
    for name, other in may_tie.items():
        if name in stored and other in stored and said_tied is not False:
            if files.kind(stored[name]) == files.kind(stored[other]) and torch.equal(
                    files.read(stored[name]), files.read(stored[other])):  # fmt: skip
                del stored[name]  # stored twice, one tensor in memory
                tied[name] = other
            elif said_tied:
                warnings.warn(f"{name} is stored with values of its own, so it is not tied to {other}", stacklevel=3)
    shapes = {name: files.shape(stored[name]) for name in wanted if name in stored}
    foreign = sorted(stored[name] for name in stored.keys() - wanted.keys())
    problems = {
        "missing": sorted(wanted.keys() - stored.keys() - tied.keys()),
        "unexpected": foreign,
        "misshapen": [
            f"{name} is {list(shape)}, {CONFIG} asks for {list(wanted[name].shape)}"
            for name, shape in sorted(shapes.items())
            if shape != wanted[name].shape
        ],
    }
    for what, found in problems.items():
        instead = f"; found {listed(foreign, 3)}" if foreign and what == "missing" else ""
        if found:
            said = f"{len(found)} tensors {what}: {listed(found, 6)}{instead}{origin(foreign)}"
            raise ValueError(f"{files.directory}: {said}")
    kinds = {files.kind(stored[name]): name for name in shapes}
    if not kinds.keys() <= KINDS.keys() or (dtype is None and len(kinds) > 1):
        types = ", ".join(f"{name} is {kind}" for kind, name in sorted(kinds.items()))
        raise ValueError(f"{files.directory}: {types}; allowed: one floating-point type, or several if you give dtype")
    for name in tied.keys() - stored.keys() if said_tied is False else ():
        warnings.warn(
            f"{files.directory} has no {name}, so it is tied to {tied[name]}, though {CONFIG} says no", stacklevel=3
        )
    if files.scaled:
        become = str(dtype or files.dtype).removeprefix("torch.")
        warnings.warn(
            f"{files.directory}: {files.scaled} FP8 weights become {become}; activation scales are left out: this is"
            " weight-only, not the arithmetic of an FP8 GPU kernel, which rounds activations, too",
            stacklevel=3,
        )
    for name in shapes:
        owner, _, attribute = name.rpartition(".")
        tensor = files.read(stored[name], dtype).to(device)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor))
    return bool(tied)


def write(
    directory: str | Path,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = 5 * 10**9,
    generation: GenerationConfig | None = None,
    format: str = "hf",
) -> None:
    """Write a model directory that Transformers reads too: one weights file, or, above `max_shard_bytes`, shards
    with an index. Nothing is touched before all files are complete; then the old ones go and the new ones come,
    config.json last, so that a directory in which that is interrupted is refused, never read as a mixture.

    Args:
        config: the content of config.json.
        sizes: bytes of every tensor, in the order of the file.
        read: gives each tensor by its name. One shard at a time is in memory.
        generation: the content of generation_config.json; none is written if it says nothing.
        format: "hf", or "mistral" for params.json and one consolidated.safetensors; names and rows are the caller's
            affair.

    Raises:
        NotADirectoryError: `directory` is a file.
        ValueError: an unknown format, or no room in a shard.
    """
    if not isinstance(directory, (str, Path)) or not str(directory):
        raise ValueError(f"a model is written into a directory, named by text or a Path; found {directory!r}")
    directory = Path(directory)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is impossible; allowed: {', '.join(FORMATS)}")
    if not is_size(max_shard_bytes):
        raise ValueError(f"max_shard_bytes={max_shard_bytes!r} is impossible; allowed: a whole number not below 1")
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; a model is written into a directory")
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > max_shard_bytes and format == "hf":
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    names = [WEIGHTS if format == "hf" else CONSOLIDATED]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]

    def save(shard: list[str], path: Path) -> None:
        save_file({name: read(name).contiguous() for name in shard}, path, metadata={"format": "pt"})

    writers: dict[Path, Callable[[Path], object]] = {}
    for name, shard in zip(names, shards):
        writers[directory / name] = partial(save, shard)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        writers[directory / INDEX] = partial(_dump, index)
    if generation is not None and generation.to_dict():
        writers[directory / GENERATION] = partial(_dump, generation.to_dict())
    writers[directory / (CONFIG if format == "hf" else PARAMS)] = partial(_dump, config)
    replace_files(writers, before=partial(_remove_old, directory, list(writers)[-1]))


def _dump(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    replace_files({path: partial(_dump, content)})


def replace_file(path: Path, write_to: Callable[[Path], object]) -> None:
    """Let `write_to` write a temporary file beside `path`, then put that in its place: whole or not at all."""
    replace_files({path: write_to})


def replace_files(
    writers: Mapping[Path, Callable[[Path], object]], before: Callable[[], object] = lambda: None
) -> None:
    """The same for several files: only when all temporary files are written, `before` is called and they are put in
    their places, in the given order."""
    for path in writers:
        if path.is_dir() or not path.parent.is_dir():
            why = "it is a directory" if path.is_dir() else f"{path.parent} is no directory"
            raise FileNotFoundError(f"{path} cannot be written: {why}")
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write_to in writers.items():
            temporary[path].touch()
            usual = temporary[path].stat().st_mode  # safetensors gives none to the group
            write_to(temporary[path])
            temporary[path].chmod(usual)
        before()
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def _remove_old(directory: Path, config: Path) -> None:
    """The configuration and weights of an earlier save, the configuration first: without it nothing is read. Its
    generation_config.json goes, too: the new model would end where the old one did."""
    config.unlink(missing_ok=True)
    (directory / GENERATION).unlink(missing_ok=True)
    weights = r"model(-\d+-of-\d+)?" if config.name == CONFIG else "consolidated"
    for path in directory.iterdir():
        if re.fullmatch(rf"{weights}\.safetensors(\.index\.json)?", path.name):
            path.unlink()


# ------------------------------------------------------------------------------------------------------ commands


def expect_all(directory: Path, config: dict[str, Any], found: Iterable[str]) -> None:
    """Raise ValueError unless the tensors, by Mistral's names, are those that the configuration asks for: no more but
    scales, no less but the head."""
    text, vision = complete(config)
    wanted: set[str] = set()
    for module, name in NAMES.items():
        part = vision if name.startswith(EYES) else text
        if part is not None:
            layers = range(part["num_hidden_layers"] if ".N." in module else 1)
            wanted |= {f"{module.replace('.N.', f'.{n}.')}.weight" for n in layers}
            if module.startswith("vision_language_adapter") and config.get("multimodal_projector_bias"):
                wanted.add(f"{module}.bias")
    weights = {name for name in found if not name.rpartition(".")[2].startswith("qscale_")}
    for what, names in (("lacks", wanted - weights - {"output.weight"}), ("should not have", weights - wanted)):
        if names:
            said = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(f"{directory} {what} {said} (Mistral's names), by its configuration; fetch it again")


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None = None,
    format: str = "hf",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model in Transformers' layout ("hf") or Mistral's own ("mistral"), with its tokenizer. One shard is in
    memory at a time, of which tensors that stay as they are take none; Mistral's layout is one single file.

    Args:
        source: a directory or Hub id.
        destination: a new or empty directory; it appears complete or not at all.
        dtype: cast all weights, FP8 ones included; None keeps every tensor's type, and FP8 scales.

    Raises:
        FileExistsError: the destination holds something.
        FileNotFoundError, ValueError: see `find`, `Checkpoint` and `complete`; or the other layout cannot say it.
    """
    destination = Path(destination).resolve()
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise FileExistsError(f"{destination} holds something already; give a new or empty directory")
    directory = find(source)
    files = Checkpoint(directory, raw=dtype is None)
    config = dict(files.config)
    complete(config)
    if dtype is not None:
        config.pop("quantization_config", None)
    named = {"dtype", "torch_dtype"} & config.keys()
    config[min(named, default="dtype")] = str(dtype or files.dtype).removeprefix("torch.")
    found: dict[str, str] = {}  # Mistral's name -> Transformers'
    for name in files.names():
        if not name.endswith("rotary_emb.inv_freq"):  # written by old versions of Transformers, and computed
            if (own := to_mistral(name)) is None:
                raise ValueError(f"{directory}: {name} has no name in the mistral layout; allowed: see NAMES")
            if own in found:
                raise ValueError(f"{directory}: {found[own]} and {name} are the same tensor")
            found[own] = name
    expect_all(directory, config, found)
    if "output.weight" not in found and not text_config(config).get("tie_word_embeddings"):
        config["tie_word_embeddings"] = True  # no head of its own, whatever the file says
    names = found if format == "mistral" else {name: name for name in found.values()}  # new name -> name
    scales = [name for name in names.values() if name.endswith("_scale_inv")]
    if format != files.layout and (blocks := [name for name in scales if math.prod(files.shape(name)) != 1]):
        raise ValueError(f"{directory}: {blocks[0]} is a grid, which rows cannot leave; give a dtype (--dtype)")

    def read(new: str) -> Tensor:
        tensor = files.read(names[new], dtype)
        return reordered(names[new], tensor, config, interleave) if format == "mistral" else tensor

    sizes = {new: math.prod(files.shape(name)) * (dtype.itemsize if dtype else files.itemsize(name))
             for new, name in names.items()}  # fmt: skip
    written = to_params(config) if format == "mistral" else config
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    made = [folder for folder in destination.parents if not folder.exists()]
    try:
        write(temporary, written, sizes, read, max_shard_bytes, format=format)
        for pattern in (*OTHER_FILES, "README.md", "LICENSE*"):
            for path in filter(Path.is_file, directory.glob(pattern)):
                shutil.copyfile(path, temporary / path.name)
        os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:  # (those that are not empty stay)
            with suppress(OSError):
                folder.rmdir()


def count_parameters(config: dict[str, Any]) -> dict[str, int]:
    """The numbers in each part of a model, from the content of its config.json alone: "text", "vision", "projector",
    and, counted under "text" too, "fp8": the matrices that the published FP8 files quantise.

    Raises:
        ValueError: see `complete`.
    """
    text, vision = complete(config)
    E, L, H = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    K, D = text["num_key_value_heads"], text["head_dim"]
    matrices = L * (E * (H + 2 * K) * D + H * D * E + 3 * E * text["intermediate_size"])
    embeddings = text["vocab_size"] * E * (1 if text.get("tie_word_embeddings", vision is not None) else 2)
    counts = {"text": embeddings + matrices + L * 2 * E + E, "vision": 0, "projector": 0, "fp8": matrices}
    if vision is not None:
        C, patch, merge = vision["hidden_size"], vision["patch_size"], config.get("spatial_merge_size", 2)
        if not is_size(merge):
            raise ValueError(f"{CONFIG} has spatial_merge_size={merge!r}; allowed: a whole number above 0")
        layer = 4 * C * C + 3 * C * vision["intermediate_size"] + 2 * C
        counts["vision"] = C * vision["num_channels"] * patch**2 + C + vision["num_hidden_layers"] * layer
        biases = 2 * E if config.get("multimodal_projector_bias") else 0
        counts["projector"] = C + merge**2 * C * C + C * E + E * E + biases
    return counts


def describe(directory: Path) -> list[str]:
    """What a model is and takes, a line each, without loading weights; without weights there, from its configuration
    (raises as `Checkpoint` and `count_parameters`)."""
    from cli import format_bytes

    config, kind = read_config(directory), layout(directory)
    (text, _), expected = complete(config), count_parameters(config)
    dtype: torch.dtype = named_dtype(config) or torch.bfloat16
    fp8 = bool(config.get("quantization_config"))
    by_config = sum(expected.values()) - expected["fp8"]
    if any(map(Path.is_file, (directory / f for f in (WEIGHTS, INDEX, CONSOLIDATED, f"{CONSOLIDATED}.index.json")))):
        files = Checkpoint(directory, raw=True)
        sizes, nbytes, source, dtype = files.numbers, files.nbytes(), "of tensors", files.dtype
    else:
        quantised = expected["fp8"] if fp8 else 0
        sizes = Counter({FP8: quantised, str(dtype).removeprefix("torch."): by_config - quantised})
        nbytes, source = quantised + (by_config - quantised) * dtype.itemsize, "not here; by its configuration"
    total, heads, layers = sum(sizes.values()), text["num_attention_heads"], text["num_hidden_layers"]
    token = 2 * layers * text["num_key_value_heads"] * text["head_dim"] * dtype.itemsize
    sliding = text["layer_types"].count("sliding_attention")
    parts = ", ".join(f"{part} {expected[part]:,}" for part in ("text", "vision", "projector") if expected[part])
    lines = {
        "model": f"{config.get('model_type')}, {layers} layers, hidden size {text['hidden_size']}, {heads} heads",
        "layout": "Transformers" if kind == "hf" else "Mistral",
        "parameters": f"{total:,} ({parts if by_config == total else f'by its configuration {by_config:,}'})",
        "weights": f"{format_bytes(nbytes)} ({nbytes:,} bytes {source}): "
        + ", ".join(f"{n:,} {kind}" for kind, n in sizes.most_common() if n),
        "context": f"{context:,} tokens" if is_size(context := text.get("max_position_embeddings")) else "not said",
        "cache": f"{token:,} bytes per token in {str(dtype).removeprefix('torch.')}"
        + (f", {token * sliding // layers:,} of them up to {text['sliding_window']:,} tokens only" if sliding else ""),
    }
    return [f"{name:11} {value}" for name, value in lines.items()]


def run(options: argparse.Namespace, short: Mapping[str, str]) -> int:
    """The commands `info` and `convert`."""
    if options.command == "info":
        print("\n".join(describe(find(options.model, options.revision, weights=False))))
    else:
        dtype = DTYPES[short.get(options.dtype, options.dtype)] if options.dtype else None
        convert(find(options.source, options.revision), options.destination, dtype, options.format)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    from cli import Parser, exit_code

    parser = Parser(prog="checkpoint.py", description="Look into model directories, and convert them.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    info = commands.add_parser("info", help="sizes, types, context and cache of a model, without loading it")
    info.add_argument("model", metavar="DIR_OR_HUB_ID", help="of a Hub repository only the small files are fetched")
    to = commands.add_parser("convert", help="write a model in another layout or type")
    to.add_argument("source", metavar="DIR_OR_HUB_ID")
    to.add_argument("destination", metavar="DIR", help="a new directory")
    to.add_argument("--format", choices=FORMATS, default="hf", help="Transformers' (default) or Mistral's")
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    to.add_argument("--dtype", choices=[*DTYPES, *short], help="default: as stored, FP8 included")
    for command in (info, to):
        command.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub repository")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options, short))


if __name__ == "__main__":
    sys.exit(main())
