"""The catalogue: what a mistake is, and how a switch enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import nn

Switch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: in the words that are common for it.
        mistake: what a port with it does, and what is right.
        applied: the switch: a context manager, during which all models make this mistake.
        replaced: the (owner, name) of everything that the switch replaces; owners are modules and classes.
    """

    name: str
    mistake: str
    applied: Switch
    replaced: frozenset[tuple[Any, str]] = frozenset()

    def concerns(self, model: nn.Module) -> bool:
        """False if nothing that the switch replaces is a part of the model."""
        parts = {cls for part in model.modules() for cls in type(part).__mro__}
        for owner, _ in self.replaced:
            is_layer = isinstance(owner, type) and issubclass(owner, nn.Module)
            if not is_layer or owner in parts:
                return True
        return False


class Recording(ExitStack):
    """A stack that keeps the names of what is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced: set[tuple[Any, str]] = set()


MUTANTS: dict[str, Mutant] = {}
# Right in exact arithmetic: only rounding differs.
ROUNDING = {"softmax_not_in_float32", "norm_weight_before_rounding", "query_scale_before_rope"}


def mutant(switch: Callable[[ExitStack], None]) -> Callable[[ExitStack], None]:
    """Enter a function into the catalogue.

    The function puts its replacements on a stack. Its docstring describes the mistake.
    """

    @contextmanager
    def applied() -> Iterator[None]:
        with ExitStack() as stack:
            switch(stack)
            yield

    with Recording() as recording:
        switch(recording)
    name = switch.__name__
    assert switch.__doc__ is not None
    mistake = " ".join(switch.__doc__.split()).rstrip(".")
    MUTANTS[name] = Mutant(name, mistake, applied, frozenset(recording.replaced))
    return switch


def replace(stack: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace an attribute by what `make` makes of it."""
    if isinstance(stack, Recording):
        stack.replaced.add((owner, name))
    stack.enter_context(patch.object(owner, name, make(getattr(owner, name))))


class Namespace:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **changes: Any) -> None:
        self._module = module
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        if name in self._changes:
            return self._changes[name]
        return getattr(self._module, name)
