"""Which class reads which model: from the `model_type` in a config.json to a class, and `load_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import checkpoint
from checks import brief
from ministral import MinistralForCausalLM
from ministral3 import Ministral3ForCausalLM
from pretrained import PreTrainedConfig
from vision import Mistral3ForConditionalGeneration

MODEL_DIRECTORY = Path(__file__).resolve().parent / "models"
BUNDLED = MODEL_DIRECTORY / "ministral3"  # a vision model
BUNDLED_2410 = MODEL_DIRECTORY / "ministral"  # a text model with sliding windows
# What the bundled models learned to do in a chat (training/tasks.py): `--chat` begins with this line.
ABILITIES = {
    BUNDLED: (
        "the bundled model adds two numbers of up to three digits, answers questions about drawn shapes"
        " (/image FILE), calls tools (--tools examples/tools.json), and finds a key or the speaker of a line in a"
        " text (--prompt-file FILE); it knows nothing else, and says so"
    ),
    BUNDLED_2410: (
        "this bundled model finds a key in a text (--prompt-file FILE) and has no other answers; without --model, a"
        " model that converses is loaded"
    ),
}
GenerativeModel = MinistralForCausalLM | Mistral3ForConditionalGeneration
MODELS: dict[str, type[GenerativeModel]] = {
    "ministral": MinistralForCausalLM,
    "mistral": MinistralForCausalLM,
    "llama": MinistralForCausalLM,
    "ministral3": Ministral3ForCausalLM,
    "mistral3": Mistral3ForConditionalGeneration,
}


def model_class(config: dict[str, object]) -> type[GenerativeModel]:
    """The class for a config.json.

    Raises:
        ValueError: there is none for its model_type.
    """
    model_type = config.get("model_type")
    if str(model_type) not in MODELS:
        raise ValueError(f"config.json has model_type {brief(model_type)}; allowed: {', '.join(MODELS)}")
    return MODELS[str(model_type)]


def load_model(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **others: Any,
) -> GenerativeModel:
    """`from_pretrained` of the class that config.json asks for; arguments and errors are those of
    `PreTrainedModel.from_pretrained`."""
    directory = checkpoint.find(path_or_hub_id, revision, "model", token, cache_dir, local_files_only)
    cls = model_class(checkpoint.read_config(directory))
    model = cls.from_pretrained(directory, dtype, device, attn_implementation, **others)
    model.name_or_path = str(path_or_hub_id)
    return model


def expect_model(model: Any) -> None:
    """Raise ValueError unless that is a language model of this project (or a wrapper that has its attributes)."""
    if isinstance(model, (str, Path)):
        raise ValueError(f"model must be a loaded model; found a name: give load_model({str(model)!r})")
    if not isinstance(getattr(model, "config", None), PreTrainedConfig) or not hasattr(model, "lm_head"):
        supported = "; ".join(sorted({cls.__name__ for cls in MODELS.values()}))
        name = type(model).__name__
        raise ValueError(f"model must be one that load_model returns ({supported}); found {name}")
    if "prepare_inputs_for_generation" in vars(model):
        found = "prepare_inputs_for_generation was replaced, by a prompt of peft for example"
        raise ValueError(f"{found}, and is not called; supported: adapters that change layers, such as LoRA")
    if model.device.type == "meta":
        raise ValueError("the weights are on the meta device, without values; load them first")
