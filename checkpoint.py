"""Model directories: config.json and safetensors weights, from files to tensors and back. Knows no model."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What is fetched from the Hub: Transformers' layout and the tokenizer. Mistral's own consolidated*.safetensors would
# double the download.
HUB_FILES = [CONFIG, "generation_config.json", "model*.safetensors", INDEX, "tokenizer.json", "tekken.json"]


def find(path_or_hub_id: str | Path) -> Path:
    """The directory of a model: the one named, or the local copy of a Hub repository ("owner/name"), downloaded now
    if it is not there yet (huggingface_hub's cache, variables and offline mode apply).

    Raises:
        FileNotFoundError: neither a directory nor a repository that can be reached.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; a model is a directory with {CONFIG} and {WEIGHTS}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) or str(path_or_hub_id).startswith("."):
        raise FileNotFoundError(f"no model directory {path}; give a directory with {CONFIG}, or a Hub id 'owner/name'")
    from huggingface_hub import snapshot_download  # imported late: a local model needs none of it

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=HUB_FILES))
    except Exception as error:  # many kinds: no network, no such repository, a login needed, a full disk
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{path_or_hub_id} is no directory here and could not be fetched from the Hub: {type(error).__name__}: {reason}"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not UTF-8 JSON; the message says where.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json, a JSON object (raises as `read_json`)."""
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{directory / CONFIG} must hold a JSON object; found {type(config).__name__}")
    return config


class Checkpoint:
    """The tensors of a model directory, in one file or in shards with an index. Opening reads the headers only;
    `read` maps one tensor at a time into memory.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is not there.
        ValueError: a file is truncated or not safetensors, or a shard lacks a tensor the index promises.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}  # tensor name -> open file
        if (directory / WEIGHTS).is_file():
            shard = self._open(directory / WEIGHTS)
            self._files = {name: shard for name in shard.keys()}
        elif (directory / INDEX).is_file():
            self._open_shards(read_json(directory / INDEX))
        else:
            found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; found {found}")

    @staticmethod
    def _open(path: Path) -> Any:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, though the index names it; fetch the model again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error

    def _open_shards(self, index: Any) -> None:
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
            raise ValueError(f"{self.directory / INDEX} has no weight_map from tensor names to file names")
        shards = {name: self._open(self.directory / name) for name in sorted(set(weight_map.values()))}
        held = {name: set(shard.keys()) for name, shard in shards.items()}
        for tensor, file in weight_map.items():
            if tensor not in held[file]:
                raise ValueError(f"{self.directory / file} lacks {tensor}, which the index promises; fetch it again")
            self._files[tensor] = shards[file]

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        bits = {name: re.search(r"\d+", self._files[name].get_slice(name).get_dtype()) for name in self._files}
        return sum(math.prod(self.shape(name)) * int(found[0]) // 8 for name, found in bits.items() if found)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, mapped to the file."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def write(
    directory: str | Path, config: dict[str, Any], tensors: dict[str, Tensor], max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a model directory that Transformers reads too: one weights file, or, above `max_shard_bytes`, shards
    with an index. Every file appears complete or not at all; config.json comes last, so that a directory without one
    is known to be unfinished.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; a model is written into a directory")
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += nbytes
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        _replace(directory / name, lambda path, shard=shard: save_file(shard, path, metadata={"format": "pt"}))
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _remove_other_weights(directory, {*names, *([INDEX] if len(shards) > 1 else [])})
    write_json(directory / CONFIG, config)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(path: Path, write_to: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_other_weights(directory: Path, keep: Iterable[str]) -> None:
    """Weights of an earlier save in another number of shards would be read together with the new ones."""
    for path in directory.iterdir():
        if path.name not in keep and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name):
            path.unlink()
