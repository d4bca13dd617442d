"""From the tensors of a model directory to the parameters of a module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from tqdm import tqdm

from .files import CONFIG
from .reader import KINDS, Checkpoint, describe_origin


def load_weights(
    module: nn.Module,
    files: Checkpoint,
    own_name: Callable[[str], str | None],
    may_tie: Mapping[str, str],
    tied_by_config: bool | None,
    new: set[str],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> bool:
    """Replace the parameters of a module, which may be on the meta device, one by one by those in the files.

    Args:
        own_name: from a stored name to the parameter's, or None for a tensor that is to be left out.
        may_tie: parameters that share another's tensor if they are not stored: {name: the other's name}.
        tied_by_config: whether config.json says they do, None if it does not say. The files decide; this counts only
            for tensors stored twice with equal values. A warning says so where the two contradict each other.
        new: parameters that are left as they are.
        dtype, device: what each tensor is cast and moved to; dtype None keeps the stored one.

    Returns:
        Whether the parameters in `may_tie` are to be tied; otherwise they were filled like all others.

    Raises:
        ValueError: tensors are missing, unexpected, misshapen, given twice, no floating-point numbers, or of several
            types when `dtype` is None; the message names them.
    """
    parameters = module.named_parameters(remove_duplicate=False)
    expected = {name: tuple(parameter.shape) for name, parameter in parameters if name not in new}
    stored = _stored_names(files, own_name)
    missing_ties = {name: other for name, other in may_tie.items() if name not in stored}
    equal_ties = _remove_equal(files, stored, may_tie, tied_by_config)
    tied = missing_ties | equal_ties

    _expect_tensors(files, expected, stored, tied)
    names = [name for name in expected if name in stored]
    expect_types(files, [stored[name] for name in names], names, dtype)
    if tied_by_config is False:
        for name, other in missing_ties.items():
            problem = f"{files.directory} has no {name}, so it is tied to {other}"
            warnings.warn(f"{problem}, though {CONFIG} says no", stacklevel=4)
    if files.scaled:
        target = str(files.dtype if dtype is None else dtype).removeprefix("torch.")
        warnings.warn(
            f"{files.directory}: {files.scaled} FP8 weights become {target}; activation scales are left out:"
            " this is weight-only, not the arithmetic of an FP8 GPU kernel, which rounds activations, too",
            stacklevel=4,
        )
    for name in tqdm(names, "loading", unit=" tensors", leave=False, delay=2):
        owner, _, attribute = name.rpartition(".")
        tensor = files.read(stored[name], dtype).to(device)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor))
    return bool(tied)


def _stored_names(files: Checkpoint, own_name: Callable[[str], str | None]) -> dict[str, str]:
    """Names of parameters -> names in the files."""
    stored: dict[str, str] = {}
    for name in files.names():
        own = own_name(name)
        if own is None:
            continue
        if own in stored:
            raise ValueError(f"{files.directory}: {stored[own]} and {name} are the same parameter")
        stored[own] = name
    return stored


def _remove_equal(
    files: Checkpoint, stored: dict[str, str], may_tie: Mapping[str, str], tied_by_config: bool | None
) -> dict[str, str]:
    """Of the pairs in `may_tie` that are both stored, those with equal values. They are removed from `stored`, so that
    the tensor is in memory once."""
    equal: dict[str, str] = {}
    if tied_by_config is False:
        return equal
    for name, other in may_tie.items():
        if name not in stored or other not in stored:
            continue
        first = stored[name]
        second = stored[other]
        if files.kind(first) == files.kind(second) and torch.equal(files.read(first), files.read(second)):
            del stored[name]
            equal[name] = other
        elif tied_by_config:
            problem = f"{name} is stored with values of its own, so it is not tied to {other}"
            warnings.warn(problem, stacklevel=5)
    return equal


def _expect_tensors(
    files: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    tied: Mapping[str, str],
) -> None:
    """Raise ValueError unless the files hold every parameter, in its shape, and no other."""
    missing = sorted(expected.keys() - stored.keys() - tied.keys())
    unexpected = sorted(stored[name] for name in stored.keys() - expected.keys())
    misshapen = []
    for name in sorted(expected.keys() & stored.keys()):
        shape = files.shape(stored[name])
        if shape != expected[name]:
            misshapen.append(f"{name} is {list(shape)}, {CONFIG} asks for {list(expected[name])}")

    origin = describe_origin(unexpected)
    if missing:
        problem = f"{len(missing)} tensors missing: {list_names(missing, 6)}"
        if unexpected:
            problem += f"; found {list_names(unexpected, 3)}"
        raise ValueError(f"{files.directory}: {problem}{origin}")
    if unexpected:
        problem = f"{len(unexpected)} tensors unexpected: {list_names(unexpected, 6)}"
        raise ValueError(f"{files.directory}: {problem}{origin}")
    if misshapen:
        raise ValueError(f"{files.directory}: {len(misshapen)} tensors misshapen: {list_names(misshapen, 3)}")


def expect_types(
    files: Checkpoint, stored: Sequence[str], names: Sequence[str], dtype: torch.dtype | None
) -> None:
    """Raise ValueError unless these tensors are of one floating-point type, or, with a `dtype`, of any."""
    name_of_kind = {files.kind(stored_name): name for stored_name, name in zip(stored, names)}
    supported = name_of_kind.keys() <= KINDS.keys()
    if supported and (dtype is not None or len(name_of_kind) < 2):
        return
    types = ", ".join(f"{name} is {kind}" for kind, name in sorted(name_of_kind.items()))
    allowed = "one floating-point type, or several if you give dtype"
    raise ValueError(f"{files.directory}: {types}; allowed: {allowed}")


def list_names(names: Sequence[str], most: int) -> str:
    """Names for an error message, `most` of them."""
    listed = ", ".join(names[:most])
    if len(names) > most:
        return f"{listed} and {len(names) - most} more"
    return listed
