"""Names of the files in a model directory, which of the two layouts it has, and reading JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Transformers' layout ("hf").
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Mistral's own layout ("mistral").
PARAMS = "params.json"
CONSOLIDATED = "consolidated.safetensors"
CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
# Both.
GENERATION = "generation_config.json"
# An adapter, as PEFT writes it.
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FORMATS = ("hf", "mistral")
# Files beside weights and configuration, which are downloaded and converted along with them.
OTHER_FILES = ["tekken.json", "tokenizer*.json", "special_tokens_map.json", GENERATION,
               "*processor_config.json", "chat_template*", "SYSTEM_PROMPT.txt"]  # fmt: skip


def has_any(directory: Path, *names: str) -> bool:
    """Whether a directory holds one or more of these files."""
    return any((directory / name).is_file() for name in names)


def layout(directory: Path) -> str:
    """The layout that is read: "mistral" if only that one is complete, otherwise "hf"."""
    has_config = has_any(directory, CONFIG)
    has_params = has_any(directory, PARAMS)
    hf_complete = has_config and has_any(directory, WEIGHTS, INDEX)
    mistral_complete = has_params and has_any(directory, CONSOLIDATED, CONSOLIDATED_INDEX)
    if has_params and not has_config:
        return "mistral"
    if mistral_complete and not hf_complete:
        return "mistral"
    return "hf"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not UTF-8 JSON; the message says where.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a directory; give a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON: it is nested too deeply") from error
    except ValueError as error:
        problem = str(error)
        if "integer string" in problem:
            problem = "a number has thousands of digits"
        raise ValueError(f"{path} is not JSON: {problem}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object (raises as `read_json`)."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; found {type(content).__name__}")
    return content
