"""Writing files so that each appears whole or not at all, and model directories so that none is a mixture of two."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checks import is_size

from .files import CONFIG, CONSOLIDATED, FORMATS, GENERATION, INDEX, PARAMS, WEIGHTS
from .generation_config import GenerationConfig

# A function that writes one file, under the name that it is given.
Writer = Callable[[Path], object]
# Bytes of the units of sizes.
UNITS = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- model directories


def write(
    directory: str | Path,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    max_shard_size: int | str = "5GB",
    generation: GenerationConfig | None = None,
    format: str = "hf",
) -> None:
    """Write a model directory that Transformers reads too: one weights file, or, above `max_shard_size`, shards
    with an index. Nothing is touched before all files are complete; then the old ones go and the new ones come,
    config.json last. So a directory in which that is interrupted is refused, never read as a mixture.

    Args:
        config: the content of config.json.
        sizes: bytes of every tensor, in the order of the file.
        read: returns each tensor by its name. One shard at a time is in memory.
        generation: the content of generation_config.json; none is written if no setting is given.
        format: "hf", or "mistral" for params.json and one consolidated.safetensors; the caller has already renamed
            and reordered the tensors.

    Raises:
        NotADirectoryError: `directory` is a file.
        ValueError: an unknown format, or no room in a shard.
    """
    if not isinstance(directory, (str, Path)) or not str(directory):
        raise ValueError(f"a model is written into a directory, named by text or a Path; found {directory!r}")
    directory = Path(directory)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not supported; supported: {', '.join(FORMATS)}")
    shard_bytes = parse_size(max_shard_size)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; a model is written into a directory")
    directory.mkdir(parents=True, exist_ok=True)

    if format == "hf":
        config_path = directory / CONFIG
        shards = _shards(sizes, shard_bytes)
    else:
        config_path = directory / PARAMS
        shards = {CONSOLIDATED: list(sizes)}
    writers: dict[Path, Writer] = {}
    for file, names in shards.items():
        writers[directory / file] = partial(_write_shard, names, read)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        writers[directory / INDEX] = partial(_write_json, index)
    if generation is not None and generation.to_dict():
        writers[directory / GENERATION] = partial(_write_json, generation.to_dict())
    writers[config_path] = partial(_write_json, config)
    replace_files(writers, before=partial(_remove_old, directory, config_path))


def parse_size(max_shard_size: int | str) -> int:
    """The bytes of a size: a whole number, or a number and a unit (see `UNITS`) in text, such as "5GB".

    Raises:
        ValueError: another text or number.
    """
    nbytes: Any = max_shard_size
    if isinstance(max_shard_size, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]I?B)", max_shard_size.strip().upper())
        nbytes = None
        if found is not None:
            number, unit = found.groups()
            nbytes = int(float(number) * UNITS[unit])
    if not is_size(nbytes):
        allowed = "a whole number of bytes not below 1, or text such as '5GB', '500MB' or '1GiB'"
        raise ValueError(f"max_shard_size={max_shard_size!r} is impossible; allowed: {allowed}")
    return int(nbytes)


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """The names of the weights files, each with those of its tensors. A tensor above the limit has its own file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    count = len(shards)
    if count == 1:
        return {WEIGHTS: shards[0]}
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return dict(zip(files, shards))


def _write_shard(names: list[str], read: Callable[[str], Tensor], path: Path) -> None:
    try:
        save_file({name: read(name).contiguous() for name in names}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for example
        raise OSError(f"{path} could not be written: {error}") from error


def _remove_old(directory: Path, config_path: Path) -> None:
    """Remove the configuration and weights of an earlier save, the configuration first: without it nothing is read.
    Its generation_config.json is removed, too: the new model would end where the old one did."""
    config_path.unlink(missing_ok=True)
    (directory / GENERATION).unlink(missing_ok=True)
    weights = "consolidated"
    if config_path.name == CONFIG:
        weights = r"model(-\d+-of-\d+)?"
    for path in directory.iterdir():
        if re.fullmatch(rf"{weights}\.safetensors(\.index\.json)?", path.name):
            path.unlink()


# --------------------------------------------------------------------------------------------------------- files


def _write_json(content: Any, path: Path) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    replace_files({path: partial(_write_json, content)})


def replace_file(path: Path, write_to: Writer) -> None:
    """Let `write_to` write a temporary file beside `path`, then put that in its place: whole or not at all."""
    replace_files({path: write_to})


def replace_files(writers: Mapping[Path, Writer], before: Callable[[], object] = lambda: None) -> None:
    """The same for several files: when all temporary files are written, `before` is called and they are put in their
    places, in the given order."""
    for path in writers:
        if path.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: it is a directory")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: {path.parent} is no directory")
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write_to in writers.items():
            temporary[path].touch()
            usual_mode = temporary[path].stat().st_mode  # safetensors gives no permissions to the group
            write_to(temporary[path])
            temporary[path].chmod(usual_mode)
        before()
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)
