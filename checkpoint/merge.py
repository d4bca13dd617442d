"""Merging a LoRA adapter into its base: a model directory that needs no adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Change
from .conversion import converted_config, copy_other_files, expect_new, mistral_names, nbytes, new_directory
from .expected import empty_model, expect_tensors
from .files import ADAPTER, ADAPTER_WEIGHTS
from .hf import VISION_PREFIXES, text_name
from .hub import find
from .load import expect_types, list_names
from .mistral_tensors import to_mistral
from .reader import Checkpoint
from .writer import write

TIED = ("tok_embeddings.weight", "output.weight")  # Mistral's names of the two tensors that may be one
EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT also saves these whole if the vocabulary has changed
# The tensors in the adapter of the modules that a key of adapter_config.json names.
CONTENTS = {"target_modules": "factors", "modules_to_save": "the weights"}


def merge(
    adapter: str | Path,
    base: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model with the weights W + scaling * B A (see `Adapter`), in Transformers' layout, with the tokenizer of
    the base. One shard is in memory at a time.

    The sum is computed in float32 and rounded once to the type of W. PEFT's `merge_and_unload` gives the same bits for
    linear layers, if the adapter was loaded with its default `autocast_adapter_dtype=True`. For an embedding, and with
    `safe_merge=True`, it rounds the product to the type of W first.

    Args:
        adapter: a directory or Hub id with adapter_config.json and adapter_model.safetensors, as PEFT writes them.
        base: a directory or Hub id of the model, in either layout. The names of tensors may be those of another version
            of Transformers than the adapter has; an adapter of a text model fits a vision model's text part.
        destination: a new or empty directory; it appears complete or not at all.
        dtype: cast all weights; None keeps every tensor's type, which FP8 weights do not allow.
        max_shard_size: the largest size of a weights file, in bytes or as "5GB"; above it, there are several.

    Raises:
        FileExistsError: the destination holds something.
        FileNotFoundError, ValueError: see `Adapter`, `find` and `Checkpoint`; the adapter does not fit the base; it
            changes one of two tied tensors; the base has weights that are no floating-point numbers; or a merged
            weight is not finite.
    """
    destination = expect_new(destination)
    lora = Adapter(find(adapter, parts="adapter"))
    directory = find(base)
    files = Checkpoint(directory)
    if files.scaled and dtype is None:
        problem = f"{directory} has {files.scaled} FP8 weights, whose type cannot hold merged ones"
        raise ValueError(f"{problem}; give a dtype (--dtype bfloat16)")
    model = empty_model(files.config)
    names_by_mistral_name = mistral_names(files)
    expect_tensors(directory, model, names_by_mistral_name)
    names = list(names_by_mistral_name.values())
    expect_types(files, names, names, files.dtype)  # several types are allowed: each tensor keeps its own
    if "output.weight" not in names_by_mistral_name or model.config.tie_word_embeddings:
        _expect_untied(lora)
    changes = _changes(lora, files, names_by_mistral_name)
    _expect_all_changes(lora, model, {to_mistral(name) for name in changes})
    _warn_of_other_base(lora, base)

    read = partial(_read, lora, files, changes, dtype)
    config = converted_config(files, dtype, has_head="output.weight" in names_by_mistral_name)
    sizes = {name: nbytes(files, name, dtype) for name in names_by_mistral_name.values()}
    with new_directory(destination) as temporary:
        write(temporary, config, sizes, read, max_shard_size)
        copy_other_files(directory, temporary)


def _read(
    lora: Adapter, files: Checkpoint, changes: dict[str, Change], dtype: torch.dtype | None, name: str
) -> Tensor:
    """A tensor of the result, of the base's type if `dtype` is None.

    Raises:
        ValueError: a merged weight that is not finite; as `Adapter.read` and `Checkpoint.read`.
    """
    if name not in changes:
        return files.read(name, dtype)
    read_dtype = None
    if files.scaled:
        read_dtype = torch.float32  # FP8 numbers times their scales, not rounded
    weight = files.read(name, read_dtype)
    target = dtype
    if target is None:
        target = weight.dtype
    merged = lora.apply(changes[name], weight, target)
    if not merged.isfinite().all():
        problem = f"{name}: the merged weight does not fit into {target}"
        raise ValueError(f"{problem}; give a dtype (--dtype bfloat16)")
    return merged


def _changes(lora: Adapter, files: Checkpoint, names_by_mistral_name: dict[str, str]) -> dict[str, Change]:
    """The changes by the names of tensors in the base. Raises ValueError unless each fits one."""
    changes: dict[str, Change] = {}
    path = lora.directory / ADAPTER_WEIGHTS
    for parameter, change in lora.changes.items():
        name = names_by_mistral_name.get(str(to_mistral(parameter)))
        source = change.tensors()[0]
        if name is None:
            problem = f"{path}: {source} belongs to no tensor of {files.directory}"
            raise ValueError(f"{problem}; give the base that the adapter was trained on")
        if name in changes:
            problem = f"{path}: two names of one tensor, {name}"
            raise ValueError(f"{problem}; save the adapter again")
        shape = files.shape(name)
        for changed in lora.shapes(change):
            if changed == shape:
                continue
            problem = f"{path}: {source} is for {list(changed)}, {name} is {list(shape)}"
            raise ValueError(f"{problem}; give the base that the adapter was trained on")
        changes[name] = change
    return changes


def _expect_untied(lora: Adapter) -> None:
    """Raise ValueError if an adapter changes one of two tied tensors. PEFT then computes with two different ones, and
    its `merge_and_unload` changes both."""
    for parameter in lora.changes:
        if to_mistral(parameter) in TIED:
            reason = "embedding and head of the base are one tensor (tied)"
            cure = "train the adapter on a base that is not tied, or without this module"
            raise ValueError(f"{lora.directory} changes {parameter}; {reason}; {cure}")


def _expect_all_changes(lora: Adapter, model: nn.Module, changed: set[str | None]) -> None:
    """Raise ValueError unless the adapter changes every module of the model that target_modules or modules_to_save
    names, and replaces the weights of no other module."""
    missing: dict[str, list[str]] = {"target_modules": [], "modules_to_save": []}
    for name, trained_name in _trained_names(lora, model):
        if to_mistral(f"{name}.weight") in changed:
            continue
        may_have_factors = isinstance(model.get_submodule(name), (nn.Linear, nn.Embedding))
        if lora.saves(trained_name):
            missing["modules_to_save"].append(trained_name)
        elif may_have_factors and lora.targets(trained_name):
            missing["target_modules"].append(trained_name)
    if not missing["modules_to_save"]:
        missing["modules_to_save"] = lora.missing_saved()
    for key, names in missing.items():
        if names:
            problem = f"{lora.directory / ADAPTER_WEIGHTS} lacks {CONTENTS[key]} of {list_names(names, 4)}"
            cure = "give the whole file, and the base that the adapter was trained on"
            raise ValueError(f"{problem}, which {key} in {ADAPTER} names; {cure}")
    for change in lora.changes.values():
        replaced = change.A is None and not change.module.endswith(EMBEDDINGS)
        if replaced and not lora.saves(change.module):
            problem = f"{lora.directory / ADAPTER_WEIGHTS}: {change.weight} is there"
            reason = f"modules_to_save in {ADAPTER} does not name its module"
            raise ValueError(f"{problem}, but {reason}; both files must be of one adapter")


def _trained_names(lora: Adapter, model: Any) -> Iterator[tuple[str, str]]:
    """The modules of a model that have a weight: their names, and those in the model that the adapter was trained on.

    One of the two may be a vision model, and the other its text part: model.layers.0... of a text adapter is
    model.language_model.layers.0... of a vision model. lm_head has this name in both.
    """
    of_vision = False
    for name in lora.changes:
        in_vision_part = name.removeprefix("model.").startswith(VISION_PREFIXES)
        of_vision |= "language_model." in name or in_vision_part
    is_vision_model = model.config is not model.config.get_text_config()
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is None:
            continue
        text = text_name(name)
        if is_vision_model == of_vision or name == "lm_head":
            yield name, name
        elif of_vision:
            yield name, f"model.language_model.{text}"
        elif text is not None:
            yield name, f"model.{text}"


def _warn_of_other_base(lora: Adapter, base: str | Path) -> None:
    """Warn if adapter_config.json names another base. The directory may have another name, so this is no error."""
    named = lora.config.get("base_model_name_or_path")
    if isinstance(named, str) and named and Path(named).name != Path(base).name:
        warnings.warn(f"{lora.directory} was trained on {named}, and is merged into {base}", stacklevel=3)
