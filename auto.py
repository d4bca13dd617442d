"""The names of Transformers in one place: `from auto import AutoModelForCausalLM, AutoTokenizer`.

A script for Transformers changes this import. Every name is a class of this project, except the Auto classes, which
choose a class by the `model_type` in config.json. docs/transformers.md lists what is supported.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import checkpoint
from checkpoint import GenerationConfig
from heads import (
    Ministral3ForQuestionAnswering,
    Ministral3ForSequenceClassification,
    Ministral3ForTokenClassification,
    MinistralForQuestionAnswering,
    MinistralForSequenceClassification,
    MinistralForTokenClassification,
)
from ministral import MinistralConfig, MinistralForCausalLM, MinistralModel
from ministral3 import Ministral3Config, Ministral3ForCausalLM, Ministral3Model
from model_types import MODELS
from pretrained import PreTrainedConfig, PreTrainedModel
from processor import MistralCommonBackend, Processor
from tokenizer import BatchEncoding, TextIteratorStreamer, TextStreamer
from vision import Mistral3ForConditionalGeneration, Mistral3Model, PixtralVisionModel
from vision_config import TEXT_CONFIGS, Mistral3Config, PixtralVisionConfig

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoProcessor",
    "AutoTokenizer",
    "BatchEncoding",
    "GenerationConfig",
    "LogitsProcessor",
    "LogitsProcessorList",
    "Ministral3Config",
    "Ministral3ForCausalLM",
    "Ministral3ForQuestionAnswering",
    "Ministral3ForSequenceClassification",
    "Ministral3ForTokenClassification",
    "Ministral3Model",
    "MinistralConfig",
    "MinistralForCausalLM",
    "MinistralForQuestionAnswering",
    "MinistralForSequenceClassification",
    "MinistralForTokenClassification",
    "MinistralModel",
    "Mistral3Config",
    "Mistral3ForConditionalGeneration",
    "Mistral3Model",
    "MistralCommonBackend",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralModel",
    "PixtralProcessor",
    "PixtralVisionConfig",
    "PixtralVisionModel",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PretrainedConfig",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextStreamer",
    "set_seed",
]


@dataclass
class MistralConfig(MinistralConfig):
    """The sizes and settings of a Mistral: those of a `MinistralConfig` whose layers are all alike, sliding if
    `sliding_window` is set. Fields and defaults are those of Transformers' `MistralConfig`."""

    model_type: ClassVar[str] = "mistral"
    unwritten: ClassVar[tuple[str, ...]] = (*MinistralConfig.unwritten, "layer_types")

    def architecture(self, class_name: str) -> str:
        return class_name.replace("Ministral", "Mistral")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_uniform_layers("; MinistralConfig mixes them")


# The models of a `MistralConfig`. They compute the same function as Ministral's.
MistralModel = MinistralModel
MistralForCausalLM = MinistralForCausalLM
PixtralProcessor = Processor
AutoProcessor = Processor
AutoTokenizer = MistralCommonBackend


# Lists of functions, and base classes of such functions; `generate` takes any functions.
LogitsProcessorList = list
StoppingCriteriaList = list
LogitsProcessor = object
StoppingCriteria = object
PretrainedConfig = PreTrainedConfig  # an older spelling


def __getattr__(name: str) -> Any:
    """Explain a name that this file does not have.

    Raises:
        ImportError: always, except for names that Python itself looks for.
    """
    if name.startswith("_"):
        raise AttributeError(f"module 'auto' has no attribute {name!r}")
    cure = "import it from transformers: its Trainer, data collators and pipelines take these models"
    if name == "BitsAndBytesConfig":
        cure = "quantised weights are not supported"
    raise ImportError(f"auto has no {name}; {cure} (docs/transformers.md)")


def set_seed(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------------ configurations


CONFIGS: dict[str, type[PreTrainedConfig]] = {
    **TEXT_CONFIGS, "llama": MinistralConfig, "mistral3": Mistral3Config, "pixtral": PixtralVisionConfig,
}  # fmt: skip
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


def read_config(pretrained_model_name_or_path: str | Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, downloaded alone. The arguments may hold those of `checkpoint.find`."""
    options = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    return checkpoint.read_config(checkpoint.find(pretrained_model_name_or_path, parts="config", **options))


class AutoConfig:
    """Chooses the configuration class for a config.json."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **arguments: Any) -> Any:
        """Read a configuration.

        Args:
            arguments: those of `checkpoint.find`, and fields of the configuration to set.

        Raises:
            FileNotFoundError: no such directory or repository, or no config.json.
            ValueError: another model type, an impossible value, or no field of this name.
        """
        content = read_config(pretrained_model_name_or_path, arguments)
        cls = choose_class(CONFIGS, content.get("model_type"), "AutoConfig")
        changes = {name: value for name, value in arguments.items() if name not in HUB_ARGUMENTS}
        changes.pop("trust_remote_code", None)  # no code of a repository is run
        return cls.from_content(content, changes)


# -------------------------------------------------------------------------------------------------------- models


def choose_class(classes: dict[str, Any], model_type: Any, name: str) -> Any:
    """The class for a model type, of the Auto class `name`.

    Raises:
        ValueError: it has none; the message names the Auto class that has one.
    """
    if str(model_type) in classes:
        return classes[str(model_type)]
    others = [cls.__name__ for cls in AUTO_MODELS if str(model_type) in cls.classes]
    cure = ""
    if others:
        cure = f"; use {' or '.join(others)}"
    raise ValueError(f"{name} has no class for model_type {model_type!r}; it has {', '.join(classes)}{cure}")


class AutoModel:
    """Chooses a backbone."""

    classes: ClassVar[dict[str, type[PreTrainedModel]]] = {
        "ministral": MinistralModel, "mistral": MinistralModel, "llama": MinistralModel,
        "ministral3": Ministral3Model, "mistral3": Mistral3Model, "pixtral": PixtralVisionModel,
    }  # fmt: skip

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Any:
        """Load the model that config.json asks for.

        Arguments and errors are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: there is no class for its model_type.
        """
        content = read_config(pretrained_model_name_or_path, arguments)
        model_class = choose_class(cls.classes, content.get("model_type"), cls.__name__)
        return model_class.from_pretrained(pretrained_model_name_or_path, **arguments)

    @classmethod
    def from_config(
        cls, config: Any, dtype: Any = None, torch_dtype: Any = None,
        attn_implementation: str | None = None,
    ) -> Any:  # fmt: skip
        """A new model of a configuration, with random weights.

        Args:
            config: a configuration of this project.
            dtype, torch_dtype, attn_implementation: see `PreTrainedModel.from_pretrained`; None is float32.

        Raises:
            ValueError: there is no class for the configuration, or another dtype or implementation.
        """
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config is a {type(config).__name__}; allowed: a configuration of this project")
        config = copy.deepcopy(config)  # the model may change its own
        if attn_implementation is not None:
            config = replace(config, attn_implementation=attn_implementation)
        model = choose_class(cls.classes, config.model_type, cls.__name__)(config)
        number_type = checkpoint.as_dtype(dtype, torch_dtype)
        if number_type is not None:
            model.to(number_type)
        return model


class AutoModelForCausalLM(AutoModel):
    """Chooses a language model."""

    classes: ClassVar[dict[str, type[PreTrainedModel]]] = {
        name: cls for name, cls in MODELS.items() if name != "mistral3"
    }


class AutoModelForImageTextToText(AutoModel):
    """Chooses a vision model."""

    classes: ClassVar[dict[str, type[PreTrainedModel]]] = {"mistral3": Mistral3ForConditionalGeneration}


def text_classes(
    ministral: type[PreTrainedModel], ministral3: type[PreTrainedModel]
) -> dict[str, type[PreTrainedModel]]:
    """The classes of a task, for Ministral and for Ministral 3."""
    return {"ministral": ministral, "mistral": ministral, "llama": ministral, "ministral3": ministral3}


class AutoModelForSequenceClassification(AutoModel):
    """Chooses a model of `heads.py`."""

    classes = text_classes(MinistralForSequenceClassification, Ministral3ForSequenceClassification)


class AutoModelForTokenClassification(AutoModel):
    """Chooses a model of `heads.py`."""

    classes = text_classes(MinistralForTokenClassification, Ministral3ForTokenClassification)


class AutoModelForQuestionAnswering(AutoModel):
    """Chooses a model of `heads.py`."""

    classes = text_classes(MinistralForQuestionAnswering, Ministral3ForQuestionAnswering)


# Those that an error recommends.
AUTO_MODELS: tuple[type[AutoModel], ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel)
