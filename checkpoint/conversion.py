"""Converting a model directory from one layout to the other, or to another type."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .expected import empty_model, expect_tensors
from .files import OTHER_FILES
from .fp8 import SCALE
from .hf import text_config
from .hub import find
from .mistral import to_params
from .mistral_tensors import interleave, reorder_rows, to_mistral
from .reader import Checkpoint
from .writer import temporary_path, write


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None = None,
    format: str = "hf",
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model in Transformers' layout ("hf") or Mistral's own ("mistral"), with its tokenizer. One shard is in
    memory at a time, of which tensors that stay as they are take none; Mistral's layout is one single file.

    Args:
        source: a directory or Hub id.
        destination: a new or empty directory; it appears complete or not at all.
        dtype: cast all weights, FP8 ones included; None keeps every tensor's type, and FP8 scales.

    Raises:
        FileExistsError: the destination holds something.
        FileNotFoundError, ValueError: see `find`, `Checkpoint` and `empty_model`; or the other layout has no field
            for it.
    """
    destination = expect_new(destination)
    directory = find(source)
    files = Checkpoint(directory, raw=dtype is None)
    model = empty_model(files.config)

    # Tensors: new name -> stored name.
    in_mistral = mistral_names(files)
    expect_tensors(directory, model, in_mistral)
    _expect_shapes(files, model, in_mistral)
    stored_names = in_mistral
    if format != "mistral":
        stored_names = {name: name for name in in_mistral.values()}
    if format != files.layout:
        _expect_no_grid(files, list(in_mistral.values()))

    # Configuration.
    config = converted_config(files, dtype, has_head="output.weight" in in_mistral)
    complete = _complete_config(config, model.config)
    if format == "mistral":
        config = to_params(complete)

    def read(name: str) -> Tensor:
        tensor = files.read(stored_names[name], dtype)
        if format == "mistral":
            return reorder_rows(stored_names[name], tensor, complete, interleave)
        return tensor

    sizes = {name: nbytes(files, stored_name, dtype) for name, stored_name in stored_names.items()}
    with new_directory(destination) as temporary:
        write(temporary, config, sizes, read, max_shard_size, format=format)
        copy_other_files(directory, temporary)
        _expect_readable(temporary)


# ------------------------------------------------------------------------------------------------------- tensors


def mistral_names(files: Checkpoint) -> dict[str, str]:
    """Mistral's name of every tensor that is converted -> its name in Transformers' files."""
    names: dict[str, str] = {}
    for name in files.names():
        if name.endswith("rotary_emb.inv_freq"):  # written by old versions of Transformers, and computed
            continue
        in_mistral = to_mistral(name)
        if in_mistral is None:
            problem = f"{name} has no name in the mistral layout"
            raise ValueError(f"{files.directory}: {problem}; allowed: see NAMES")
        if in_mistral in names:
            raise ValueError(f"{files.directory}: {names[in_mistral]} and {name} are the same tensor")
        names[in_mistral] = name
    return names


def _expect_shapes(files: Checkpoint, model: Any, stored_names: dict[str, str]) -> None:
    """Raise ValueError unless every tensor has the shape that the configuration asks for. `stored_names` has them by
    Mistral's names."""
    for name, parameter in model.named_parameters():
        stored = stored_names.get(str(to_mistral(name)))
        if stored is not None and files.shape(stored) != tuple(parameter.shape):
            asked = f"the configuration asks for {list(parameter.shape)}"
            raise ValueError(f"{files.directory}: {stored} is {list(files.shape(stored))}, {asked}")


def _expect_no_grid(files: Checkpoint, names: list[str]) -> None:
    """Raise ValueError if FP8 scales belong to blocks of rows, and rows are about to be reordered."""
    for name in names:
        if name.endswith(SCALE) and math.prod(files.shape(name)) != 1:
            problem = f"{name} is a grid, which rows cannot leave"
            raise ValueError(f"{files.directory}: {problem}; give a dtype (--dtype)")


def nbytes(files: Checkpoint, name: str, dtype: torch.dtype | None) -> int:
    """The bytes of a tensor, cast to `dtype` if one is given."""
    itemsize = files.itemsize(name) if dtype is None else dtype.itemsize
    return math.prod(files.shape(name)) * itemsize


def _expect_readable(directory: Path) -> None:
    """Raise ValueError unless the written configuration and weights can be read again."""
    try:
        files = Checkpoint(directory, raw=True)
        empty_model(files.config)
    except ValueError as error:
        raise ValueError(f"the converted model could not be read: {error}") from error


# ------------------------------------------------------------------------------------------------- configuration


def converted_config(files: Checkpoint, dtype: torch.dtype | None, has_head: bool) -> dict[str, Any]:
    """The content of config.json after a conversion to `dtype`. Without a head of its own a model is tied, even if the
    file says otherwise."""
    config = dict(files.config)
    new_dtype = files.dtype
    if dtype is not None:
        new_dtype = dtype
        config.pop("quantization_config", None)
    key = min({"dtype", "torch_dtype"} & config.keys(), default="dtype")
    config[key] = str(new_dtype).removeprefix("torch.")
    if not has_head and not text_config(config).get("tie_word_embeddings"):
        config["tie_word_embeddings"] = True
    return config


def _complete_config(content: dict[str, Any], config: Any) -> dict[str, Any]:
    """The content of a config.json with every field, as its configuration class has read it. Only the two that a
    params.json may leave out are None where the file does not give them."""
    complete: dict[str, Any] = config.to_dict()
    complete["quantization_config"] = content.get("quantization_config")
    text = complete.get("text_config", complete)
    given_text = text_config(content)
    text["max_position_embeddings"] = given_text.get("max_position_embeddings")
    complete["tie_word_embeddings"] = given_text.get("tie_word_embeddings")
    rope = text["rope_parameters"]
    if rope["rope_type"] == "yarn":
        given = {key: value for key, value in rope.items() if value is not None}
        text["rope_parameters"] = config.get_text_config().rope_defaults | given
    return complete


# --------------------------------------------------------------------------------------------------------- files


def expect_new(destination: str | Path) -> Path:
    """The absolute path of a new or empty directory; raises FileExistsError for another, ValueError for no name."""
    if not str(destination):
        raise ValueError("an empty name of a directory; give a new or empty directory")
    path = Path(destination).resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} holds something already; give a new or empty directory")
    return path


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A path to write a directory to, which becomes `destination` if no error occurs. Otherwise nothing is left, nor
    of the folders that were made for it."""
    temporary = temporary_path(destination)
    missing = [folder for folder in destination.parents if not folder.exists()]
    try:
        _make_directory(temporary, destination)
        yield temporary
        os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # it is not empty, and stays
                folder.rmdir()


def _make_directory(temporary: Path, destination: Path) -> None:
    """Make the temporary directory of a destination, which an OSError names."""
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(error.errno, f"{destination} cannot be written: {error.strerror}") from error


def copy_other_files(source: Path, destination: Path) -> None:
    """Copy the tokenizer and other files beside the weights."""
    for pattern in (*OTHER_FILES, "README.md", "LICENSE*"):
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, destination / path.name)
