"""Test vectors in JSON, for the parts of a port that need no weights.

    tables.json               rotary frequencies, cosines, sines and query scales of the published models
    vectors/texts.json        texts and their ids, in two vocabularies
    vectors/chat.json         conversations and their ids, in each layout, in the vocabulary of models/ministral3
    vectors/sampler.json      logits and settings, the probabilities of the tokens that are kept, and the drawn tokens

The expected values are those of the project's own functions. `python -m reference golden` writes the files. All numbers
are float64, written so that reading gives the same bits; all text is ASCII, with escapes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from generate import Sampling, filter_logits, penalize_repetition, sample
from images import image_tokens
from ministral import MinistralConfig, RotaryEmbedding
from ministral3 import Ministral3Config, YarnRotaryEmbedding
from model_types import BUNDLED
from reference.published import MINISTRAL_8B, ministral3
from reference.vector_inputs import CONVERSATIONS, IMAGE_SIZES, SAMPLING, TEXTS, drawn_sampling
from tokenizer import TEKKEN, Tokenizer
from tokenizer.bpe import read_tekken
from vision_config import Mistral3Config

POSITIONS = (0, 1, 16383, 16384, 131071, 262143)
ABOUT_TABLES = {
    "head_dim": "D, the numbers of a head, which are D/2 pairs",
    "rope_parameters": "the rotary settings of the published config.json",
    "attention_factor": "the factor that the cosines and sines below contain",
    "positions": "P positions: those of the list that the context has, and its last",
    "inverse_frequencies": "[D/2] radians that pair i turns by from one position to the next",
    "cosines": "[P, D/2] cos(position * inverse frequency) * attention_factor; in float32, the angle is "
    "rounded, which changes a cosine by up to position * inverse frequency * 2**-22",
    "sines": "[P, D/2] sines of the same angles",
    "query_scales": "[P] the factor of the rotated queries",
}

PUBLISHED = "tekken_240911.json"
PUBLISHED_SHA256 = "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316"
ABOUT_TEXTS = {
    "bundled": "the ids in models/ministral3/tekken.json (36 special tokens), without <s>",
    "published": f"the ids in {PUBLISHED} of the package mistral-common (1000 special tokens), without <s>",
    "sha256": "the hashes of these two files",
    "cases": "special tokens in a text are plain text; decoding the ids gives the text",
}
ABOUT_CHAT = {
    "vocabulary": "models/ministral3/tekken.json, whose special tokens are those of all layouts",
    "sha256": "the hash of this file",
    "version": "the layout: v3 (Ministral-8B-Instruct-2410), v7, v11 or v13 (Ministral 3)",
    "image_sizes": "height and width of the images in pixels; patches have 14 pixels and are merged 2 x 2",
    "ids": "the ids of the conversation, up to where the answer begins",
    "text": "the same ids as text; encoding that text is not the way to get them",
}
ABOUT_SAMPLER = {
    "order": "repetition_penalty, temperature, top_k, top_p, min_p; then softmax of the tokens that are kept",
    "repetition_penalty": "each id of previous_ids, once: logit / penalty if positive, else logit * penalty",
    "temperature": "logits / it; 0 is greedy: the largest logit after the penalty, the lowest id of a tie",
    "top_k": "keeps the logits that are at least the k-th largest, with all ties; null and 0 keep all",
    "top_p": "drops the least likely tokens, which sum to at most 1 - top_p, but never the most likely one",
    "min_p": "drops tokens less likely than min_p times the most likely one",
    "kept": "the ids that are kept, ascending",
    "probabilities": "those of the kept ids",
    "draws": "inverse of the cumulative distribution over ascending ids: the token is the lowest id whose "
    "probability and those of lower ids sum to more than the number; a sampler draws it from [0, 1)",
}
NUMBERS = (0.0, 0.1234, 0.3141, 0.5772, 0.8128, 0.9999)


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
    plain = RotaryEmbedding(MinistralConfig.from_dict(MINISTRAL_8B))
    models["Ministral-8B-Instruct-2410"] = rotary_table(plain)
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


# ----------------------------------------------------------------------------------------------------- tokenizer


def published_vocabulary() -> Path:
    """The vocabulary that Mistral published in September 2024, from the package mistral-common, which is not imported.

    Raises:
        FileNotFoundError: the package is not installed, or does not have the file.
        ValueError: the file has changed.
    """
    package = find_spec("mistral_common")
    cure = "the ids of texts.json need it: pip install -r requirements-test.txt"
    if package is None or package.origin is None:
        raise FileNotFoundError(f"mistral-common is not installed; {cure}")
    path = Path(package.origin).parent / "data" / PUBLISHED
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {cure}")
    found = sha256(path)
    if found != PUBLISHED_SHA256:
        raise ValueError(f"{path} has the SHA-256 {found}; allowed: {PUBLISHED_SHA256}")
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def text_vectors() -> dict[str, Any]:
    """The content of vectors/texts.json."""
    files = {"bundled": BUNDLED / TEKKEN, "published": published_vocabulary()}
    tokenizers = {}
    for name, path in files.items():
        backend, version = read_tekken(path)
        tokenizers[name] = Tokenizer(backend, version)
    cases = []
    for text in TEXTS:
        ids = {name: tokenizer.encode(text, bos=False) for name, tokenizer in tokenizers.items()}
        cases.append({"text": text, **ids})
    hashes = {name: sha256(path) for name, path in files.items()}
    return {"about": ABOUT_TEXTS, "sha256": hashes, "cases": cases}


# ---------------------------------------------------------------------------------------------------------- chat


def chat_vectors() -> dict[str, Any]:
    """The content of vectors/chat.json."""
    backend, _ = read_tekken(BUNDLED / TEKKEN)
    vision = Mistral3Config.from_dict(ministral3("3B"))
    cases = []
    for name, (versions, messages, tools) in CONVERSATIONS.items():
        for version in versions:
            tokenizer = Tokenizer(backend, version)
            special = tokenizer.special_tokens

            def encode_image(source: str, special: dict[str, int] = special) -> list[int]:
                return image_tokens(IMAGE_SIZES[source], vision, special["[IMG_BREAK]"], special["[IMG_END]"])

            ids = tokenizer.encode_chat(messages, tools, encode_image)
            text = tokenizer.decode(ids, skip_special_tokens=False)
            case = {"name": name, "version": version, "messages": messages, "tools": tools}
            cases.append({**case, "ids": ids, "text": text})
    digest = sha256(BUNDLED / TEKKEN)
    return {"about": ABOUT_CHAT, "sha256": digest, "image_sizes": IMAGE_SIZES, "cases": cases}


# ------------------------------------------------------------------------------------------------------- sampler


def sampler_vectors() -> dict[str, Any]:
    """The content of vectors/sampler.json."""
    cases = []
    for name, (logits, previous, settings) in (SAMPLING | drawn_sampling()).items():
        sampling = Sampling(**settings)
        probabilities = token_probabilities(torch.tensor(logits, dtype=torch.float64), previous, sampling)
        kept = [token for token, probability in enumerate(probabilities) if probability > 0]
        case = {"name": name, "logits": logits, "previous_ids": previous, **asdict(sampling)}
        case["kept"] = kept
        case["probabilities"] = [probabilities[token] for token in kept]
        case["draws"] = draws(probabilities)
        cases.append(case)
    return {"about": ABOUT_SAMPLER, "cases": cases}


def token_probabilities(logits: Tensor, previous: list[int], sampling: Sampling) -> list[float]:
    """The probability of each token, given the ids of the text so far."""
    if previous:
        logits = penalize_repetition(logits, torch.tensor(previous), sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = sample(logits, sampling)
        return F.one_hot(token, len(logits)).double().tolist()
    return filter_logits(logits, sampling).softmax(-1).tolist()


def draws(probabilities: list[float]) -> list[dict[str, Any]]:
    """The tokens that random numbers choose: see ABOUT_SAMPLER.

    Numbers near an edge between two tokens are left out, where rounding would choose.
    """
    edges = list(accumulate(probabilities))
    drawn = []
    for number in NUMBERS:
        if number == 0 or min(abs(edge - number) for edge in edges) > 1e-4:
            token = next(token for token, edge in enumerate(edges) if edge > number)
            drawn.append({"number": number, "token": token})
    return drawn


def write_vectors(directory: Path) -> None:
    """Write all test vectors to the directory of the golden files."""
    write(directory / "tables.json", tables(), depth=3)
    vectors = directory / "vectors"
    write(vectors / "texts.json", text_vectors(), depth=2)
    write(vectors / "chat.json", chat_vectors(), depth=2)
    write(vectors / "sampler.json", sampler_vectors(), depth=2)
