"""Files as the published models have them: FP8, and the names of tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from reference import golden
from reference.published import ministral3


def quantize(directory: Path, scale_dtype: torch.dtype = torch.float32, grid: tuple[int, int] | None = None) -> None:
    """`golden.quantize`, with the quantization_config of the published files."""
    golden.quantize(directory, scale_dtype, grid)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = ministral3("3B", fp8=True)["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))


def hub_names(directory: Path) -> None:
    """Rename the tensors of a vision model as the published files do: language_model.model.layers, lm_head below."""
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        name = re.sub(r"^language_model\.", "language_model.model.", name.removeprefix("model."))
        tensors[re.sub(r"^lm_head\.", "language_model.lm_head.", name)] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
