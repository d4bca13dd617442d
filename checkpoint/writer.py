"""Writing files so that each appears whole or not at all, and model directories so that none is a mixture of two."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checks import is_number

from .files import CONFIG, CONSOLIDATED, CONSOLIDATED_INDEX, FORMATS, GENERATION, INDEX, PARAMS, WEIGHTS
from .generation_config import GenerationConfig

# A function that writes one file, under the name that it is given.
Writer = Callable[[Path], object]
# The names of the files of weights that belong to each file of a configuration, as regular expressions.
WEIGHTS_OF = {
    CONFIG: r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    PARAMS: r"consolidated\.safetensors(\.index\.json)?",
}
# The name for which `write_tensors` makes a temporary directory.
SAFETENSORS = "safetensors"
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
    config.json last. So a directory in which that is interrupted is refused, never read as a mixture; the message says
    how to finish (`interrupted_save`). One process at a time writes into a directory.

    Args:
        config: the content of config.json.
        sizes: bytes of every tensor, in the order of the file.
        read: returns each tensor by its name. One shard at a time is in memory.
        generation: the content of generation_config.json; none is written if no setting is given.
        format: "hf", or "mistral" for params.json and one consolidated.safetensors; the caller has already renamed
            and reordered the tensors.

    Raises:
        NotADirectoryError: `directory` is a file.
        BlockingIOError: another process or thread is writing into the directory.
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
    with _only_writer(directory):
        for leftover in leftovers(directory):
            _remove(leftover)
        replace_files(writers, before=partial(_remove_old, directory, config_path, config, writers.keys()))


@contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Lock a directory against other writers, processes and threads. The lock is a file in the system's directory for
    temporary files, so that none is left in the model's."""
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"ministral-{name}.lock", timeout=0, mode=0o666)
    try:
        with lock:
            yield
    except Timeout as error:
        raise BlockingIOError(f"{directory} is being written by another process; save when it is done") from error


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
    if not is_number(nbytes, int, 1, 2**63):
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
    names_with_bar = tqdm(names, "reading", unit=" tensors", leave=False, delay=2)
    write_tensors(path, {name: read(name).contiguous() for name in names_with_bar}, {"format": "pt"})


def _remove_old(directory: Path, config_path: Path, config: Any, new: Iterable[Path]) -> None:
    """Remove the weights and the configuration of an earlier save. Its generation_config.json is removed, too: the new
    model would end where the old one did.

    Nothing is removed if the earlier save has the same configuration and the same files, the weights in one. Then the
    old version can be read until the new weights replace the old ones."""
    weights = re.compile(WEIGHTS_OF[config_path.name])
    old = [path for path in directory.iterdir() if weights.fullmatch(path.name)]
    old += [path for path in (config_path, directory / GENERATION) if path.is_file()]
    if set(old) == set(new) and len(old) <= 3 and config_path.read_bytes() == _json_bytes(config):
        return
    for path in sorted(old, key=_removal_order):
        path.unlink()


def _removal_order(path: Path) -> int:
    """Weights are removed before the configuration, and the index before its shards: so what an interruption leaves is
    refused, and finishing the save by hand does not leave weights of both."""
    if path.name in (INDEX, CONSOLIDATED_INDEX):
        return 0
    if path.suffix == ".safetensors":
        return 1
    return 2


def leftovers(directory: Path) -> list[Path]:
    """The temporary files and directories of saves of a model that were interrupted."""
    names = [re.escape(name) for name in (CONFIG, PARAMS, GENERATION, SAFETENSORS)]
    of_a_model = re.compile("|".join((*names, *WEIGHTS_OF.values())))
    return sorted(path for path, name, _, _ in _temporary_files(directory) if of_a_model.fullmatch(name))


def interrupted_save(directory: Path) -> str:
    """How to finish a save that was interrupted after its last file was complete, as the end of an error message; ""
    if there was none. The configuration is written last, so the other files are complete if it is there."""
    found = leftovers(directory)
    if not any(path.name.startswith((f".{CONFIG}.", f".{PARAMS}.")) for path in found):
        return ""
    names = ", ".join(path.name for path in found[:4])
    cure = "save again, or rename each .NAME.NUMBER.tmp to NAME, the configuration last"
    return f"; a save was interrupted here ({names}): {cure}"


# --------------------------------------------------------------------------------------------------------- files


def _json_bytes(content: Any) -> bytes:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", errors="replace")


def _write_json(content: Any, path: Path) -> None:
    path.write_bytes(_json_bytes(content))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    The library writes to `.tmpXXXXXX` beside its path first. A killed process leaves that file, and its name does not
    say whose it is. So the library gets a directory of its own, which the next save removes."""
    directory = temporary_path(path.with_name(SAFETENSORS))
    directory.mkdir()
    try:
        save_file(tensors, directory / path.name, metadata)
        os.replace(directory / path.name, path)
    finally:
        _remove(directory)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    replace_files({path: partial(_write_json, content)})


def replace_file(path: Path, write_to: Writer) -> None:
    """Let `write_to` write a temporary file beside `path`, then put that in its place: whole or not at all (raises as
    `replace_files`)."""
    replace_files({path: write_to})


def replace_files(writers: Mapping[Path, Writer], before: Callable[[], object] = lambda: None) -> None:
    """The same for several files: when all temporary files are written, `before` is called and they are put in their
    places, in the given order.

    Raises:
        FileNotFoundError, PermissionError: see `expect_writable`.
        OSError: a file cannot be written; the message says which and why, for example a full disk.
    """
    for path in writers:
        expect_writable(path)
    temporary = {path: temporary_path(path) for path in writers}
    try:
        for path, write_to in writers.items():
            _write_temporary(path, temporary[path], write_to)
        before()
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def expect_writable(path: Path) -> None:
    """Check, before the work whose result it holds, that a file can be written.

    Raises:
        FileNotFoundError: its directory does not exist, or a directory is in its place.
        PermissionError: its directory is read-only.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: it is a directory")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: {path.parent} is no directory")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {path.parent} is read-only; give another directory")


def temporary_path(path: Path) -> Path:
    """A path beside `path` to write to, which no other thread has. What a process that was killed has left under such
    a name is removed."""
    for found, name, process, thread in _temporary_files(path.parent):
        if name != path.name or _is_running(process, thread):
            continue
        _remove(found)
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def _remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _temporary_files(directory: Path) -> Iterator[tuple[Path, str, int, int]]:
    """The files and directories whose names `temporary_path` has made: (path, the name that it was made for, the
    numbers of the process and of the thread)."""
    for path in directory.glob(".*.tmp"):
        parts = re.fullmatch(r"\.(.+)\.(\d+)-(\d+)\.tmp", path.name)
        if parts is not None:
            yield path, parts[1], int(parts[2]), int(parts[3])


def _is_running(process: int, thread: int) -> bool:
    """Whether a process of this machine runs; True where that is not known. Of this process, whether the thread does: a
    container gives its process the same number each time."""
    if process == os.getpid():
        return thread in [running.ident for running in threading.enumerate()]
    if os.name == "nt":  # where os.kill ends a process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to another user, or no process has such a number
        return True
    return True


def _write_temporary(path: Path, temporary: Path, write_to: Writer) -> None:
    """Write the temporary file of `path`."""
    try:
        temporary.touch()
        usual_mode = temporary.stat().st_mode  # safetensors gives no permissions to the group
        write_to(temporary)
        temporary.chmod(usual_mode)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise  # another file is the reason, and the message names it
        raise type(error)(error.errno, f"{path} cannot be written: {error.strerror}") from error
