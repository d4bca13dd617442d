"""Test vectors in JSON, for the parts of a port that need no weights.

    tables.json               rotary frequencies, cosines, sines and query scales of the published models
    vectors/tokenizer.json    texts and their ids, in two vocabularies
    vectors/chat.json         conversations and their ids, in each layout
    vectors/sampler.json      logits and settings, the probabilities of the tokens that are kept, and the drawn tokens

The expected values are those of the project's own functions. `python -m reference golden` writes the files. All numbers
are float64, written so that reading gives the same bits; all text is ASCII, with escapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import checkpoint
from ministral import MinistralConfig, RotaryEmbedding
from ministral3 import Ministral3Config, YarnRotaryEmbedding
from reference.published import MINISTRAL_8B, ministral3

POSITIONS = (0, 1, 16383, 16384, 131071, 262143)
ABOUT_TABLES = {
    "head_dim": "D, the numbers of a head, which are D/2 pairs",
    "rope_parameters": "the rotary settings of the published config.json",
    "attention_factor": "the factor that the cosines and sines below contain",
    "positions": "P positions: those of the list that the context has, and its last",
    "inverse_frequencies": "[D/2] radians that pair i turns by from one position to the next",
    "cosines": "[P, D/2] cos(position * inverse frequency) * attention_factor; float32 tables differ from them by up to "
    "position * inverse frequency * 2**-23, which is the rounding of the angle",
    "sines": "[P, D/2] sines of the same angles",
    "query_scales": "[P] the factor of the rotated queries",
}


def write(path: Path, content: dict[str, Any], depth: int) -> None:
    """Write a JSON file: the first `depth` levels have a line for each entry, and deeper ones share a line."""
    text = as_lines(content, depth) + "\n"
    path.parent.mkdir(exist_ok=True)
    checkpoint.replace_file(path, lambda temporary: temporary.write_text(text, encoding="ascii"))


def as_lines(content: Any, depth: int) -> str:
    """The JSON of `write`."""
    if depth == 0 or not isinstance(content, (dict, list)):
        return json.dumps(content, allow_nan=False)
    if isinstance(content, list):
        entries = [as_lines(value, depth - 1) for value in content]
        return "[\n" + ",\n".join(entries) + "\n]"
    entries = [f"{json.dumps(key)}: {as_lines(value, depth - 1)}" for key, value in content.items()]
    return "{\n" + ",\n".join(entries) + "\n}"


# ------------------------------------------------------------------------------------------------------- tables


def tables() -> dict[str, Any]:
    """The content of tables.json."""
    models: dict[str, Any] = {}
    for size in ("3B", "8B", "14B"):
        config = Ministral3Config.from_dict(ministral3(size)["text_config"])
        models[f"Ministral-3-{size}-2512"] = rotary_table(YarnRotaryEmbedding(config))
    models["Ministral-8B-Instruct-2410"] = rotary_table(RotaryEmbedding(MinistralConfig.from_dict(MINISTRAL_8B)))
    return {"about": ABOUT_TABLES, "models": models}


def rotary_table(rotary: RotaryEmbedding) -> dict[str, Any]:
    """The table of one model, in float64."""
    config = rotary.config
    context = config.max_position_embeddings
    positions = sorted({p for p in POSITIONS if p < context} | {context - 1})
    tables = rotary(torch.empty(0, dtype=torch.float64), torch.tensor([positions]))
    cosines, sines = (table[0, 0, :, : config.head_dim // 2] for table in tables[:2])
    scales = torch.ones(len(positions), dtype=torch.float64)
    if isinstance(rotary, YarnRotaryEmbedding):
        scales = tables[2].flatten()
    return {
        "head_dim": config.head_dim,
        "rope_parameters": config.rope_parameters,
        "attention_factor": rotary.attention_factor(),
        "positions": positions,
        "inverse_frequencies": rotary.inverse_frequencies(torch.float64).tolist(),
        "cosines": cosines.tolist(),
        "sines": sines.tolist(),
        "query_scales": scales.tolist(),
    }


def write_vectors(directory: Path) -> None:
    """Write all test vectors to the directory of the golden files."""
    write(directory / "tables.json", tables(), depth=3)
