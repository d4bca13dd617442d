"""From a directory or a Hub id ("owner/name") to a local directory."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from .files import ADAPTER, ADAPTER_WEIGHTS, CONFIG, INDEX, OTHER_FILES, PARAMS, WEIGHTS, has_any, read_json

# The parts of a repository that can be downloaded: the configuration only; everything but the weights; everything; an
# adapter.
PARTS = ("config", "tokenizer", "model", "adapter")
# One set of weights is downloaded, Transformers' if there is one, and no pickle.
HF_WEIGHTS = [WEIGHTS, "model-*-of-*.safetensors", INDEX]
MISTRAL_WEIGHTS = ["consolidated*.safetensors", "consolidated*.json"]


def find(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    parts: str = "model",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory of a model: the one named, or the local copy of a Hub repository ("owner/name"). The repository is
    downloaded if it is not there yet; huggingface_hub's cache, login, variables and offline mode apply.

    Args:
        revision: branch, tag or commit of the repository; None is its main branch.
        parts: one of `PARTS`, what is downloaded.
        token: an access token, True for that of the login, False for none; None uses the login if there is one.
        cache_dir: the folder of downloaded repositories; None is huggingface_hub's.
        local_files_only: use what was downloaded before, and do not ask the Hub.

    Raises:
        FileNotFoundError: neither a directory nor a repository that can be reached. The message says how to log in
            where that is needed.
        ValueError: a revision of a directory.
    """
    if not isinstance(path_or_hub_id, (str, Path)) or not str(path_or_hub_id):
        problem = f"a model is named by a directory or a Hub id 'owner/name'; found {path_or_hub_id!r}"
        raise ValueError(problem[:200])
    path = Path(path_or_hub_id)
    with suppress(RuntimeError):  # "~name" of a user who does not exist
        path = path.expanduser()
    if path.is_dir():
        if revision is not None:
            problem = f"revision={revision!r} is impossible for the directory {path}"
            raise ValueError(f"{problem}; allowed: with a Hub id")
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; a model is a directory with {CONFIG} and {WEIGHTS}")
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        cure = f"give a directory with {CONFIG}, or a Hub id 'owner/name'"
        raise FileNotFoundError(f"no model directory {path}; {cure}")
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return _download(name, parts, options)


def _download(name: str, parts: str, options: dict[str, Any]) -> Path:
    """The local copy of a Hub repository (raises as `find`). The options are those of `snapshot_download`."""
    from huggingface_hub import snapshot_download  # imported late: a local model needs none of it
    from huggingface_hub.errors import OfflineModeIsEnabled

    def download(*patterns: str) -> Path:
        allowed = [CONFIG, PARAMS, ADAPTER, *patterns]
        get = partial(snapshot_download, name, allow_patterns=allowed)
        try:
            return Path(get(**options))
        except OfflineModeIsEnabled:  # some versions ask for a list of files before they look into the cache
            return Path(get(**options | {"local_files_only": True}))

    try:
        if parts == "config":
            return download()
        if parts == "tokenizer":
            return download(*OTHER_FILES)
        if parts == "adapter":
            return download(ADAPTER_WEIGHTS)
        directory = download(*OTHER_FILES, *HF_WEIGHTS)
        if not has_any(directory, WEIGHTS, INDEX):
            directory = download(*OTHER_FILES, *MISTRAL_WEIGHTS)
        return directory
    except Exception as error:  # many kinds: no network, no such repository, a full disk
        reason = str(error).strip().partition("\n")[0]
        problem = f"{name} is no directory here and could not be fetched from the Hub ({reason})"
        raise FileNotFoundError(f"{problem}; {_cure(name, error)}") from error


def _cure(name: str, error: Exception) -> str:
    """Advice for an error of the Hub."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    log_in = "log in: `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"accept its terms at https://huggingface.co/{name}, then {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        return f"check the name; if the repository is private, {log_in}"
    return "give a directory, or check name, revision and network"


def refuse_adapter(directory: Path) -> None:
    """Raise ValueError if a directory that lacks a model's files holds an adapter."""
    if not has_any(directory, ADAPTER):
        return
    content = read_json(directory / ADAPTER)
    base = "BASE"
    if isinstance(content, dict) and content.get("base_model_name_or_path"):
        base = str(content["base_model_name_or_path"])
    problem = f"{directory} is a LoRA adapter ({ADAPTER}) of {base}, not a whole model"
    paths = shlex.join([str(directory), base, "OUT"])
    raise ValueError(f"{problem}; merge it into its base: python -m checkpoint merge {paths}")
