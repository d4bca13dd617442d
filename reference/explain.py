"""Name the known mistake that reproduces a port's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrained import PreTrainedModel
from reference.compare import counts, least
from reference.mutants import MUTANTS, ROUNDING, Mutant
from reference.trace import record

ENOUGH = 16  # numbers in which a mistake must show, so that equal bits are no accident of rounding
# The largest norm of the difference to a mistake's numbers, over the noise; and how far the part of the port's error
# in the direction of the mistake may be from the mistake's effect. Measured with 370 ports that make one mistake and
# round their sums in another way: where the effect is 3 times the noise or more, none was above 2.1 in the first, or
# outside 0.87 to 1.07 in the second.
RESIDUAL, SHARE = 2.5, 1 / 8


@dataclass
class Suspect:
    """A mistake that gives the port's numbers but for noise.

    Attributes:
        name: of the mutant.
        bits: whether they are equal bit for bit.
        residual: norm of the difference.
        cosine: between them.
        exact: the mistake's numbers in float64.
    """

    name: str
    bits: bool
    residual: float
    cosine: float
    exact: Tensor


def differences(a: Tensor, b: Tensor) -> int:
    """The number of entries in which two tensors differ, rows that occur several times counted once."""
    width = a.shape[-1]
    pairs = torch.cat((a.flatten(0, -2), b.flatten(0, -2)), dim=-1)
    rows = torch.unique(pairs.double(), dim=0)
    return int((rows[:, :width] != rows[:, width:]).sum())


def unchanged(before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str | None) -> bool:
    """True if a tensor is in both traces, and the same."""
    if name is None or name not in before or name not in after:
        return False
    return before[name].equal(after[name])


class Case:
    """A port's tensor and the right ones, as vectors of the entries that count.

    Args:
        port: the port's tensor, in the reference's shape; logits may lack first tokens.
        right, exact: this implementation's, in the port's type and in float64.
        counted: which entries count, in the reference's shape.
    """

    def __init__(self, port: Tensor, right: Tensor, exact: Tensor, counted: Tensor) -> None:
        self.port, self.right, self.counted = port, right, counted
        if port.ndim == exact.ndim == 3:
            lacking = max(exact.shape[1] - port.shape[1], 0)
            right = right[:, lacking:]
            exact = exact[:, lacking:]
        self.fits = port.shape == exact.shape
        if self.fits:
            self.exact = self.vector(exact)
            self.noise = self.vector(right) - self.exact
            self.error = self.vector(port) - self.exact

    def vector(self, tensor: Tensor) -> Tensor:
        """The entries that count, in float64."""
        counted = self.counted[:, -tensor.shape[1] :]
        return tensor.double()[counted.expand_as(tensor)]

    def changed(self, mistaken: Tensor) -> float:
        """The number of entries that a mistake changes in the port's type; infinite if it changes the shape."""
        if mistaken.shape != self.right.shape:
            return math.inf
        return differences(torch.where(self.counted, mistaken, 0), torch.where(self.counted, self.right, 0))

    def suspect(self, mutant: Mutant, mistaken: Tensor, mistaken_exact: Tensor) -> Suspect | None:
        """The mistake, if it explains the port's numbers.

        It does when it gives the very bits, the right model does not, and it matters in exact arithmetic (or is one of
        rounding). It also does when the port's difference to float64 is, but for noise, the one that the mistake makes:
        as long, in the same direction, and with nothing else left.

        Args:
            mutant: the mistake.
            mistaken: the tensor that the mistake makes in the port's type.
            mistaken_exact: the same in float64.
        """
        if mistaken.shape != self.port.shape:
            return None
        # Equal bits.
        port, numbers, exact = (self.vector(tensor) for tensor in (self.port, mistaken, mistaken_exact))
        effect = exact - self.exact
        size = float(effect.norm())
        matters = size > 1e-9 * float(self.exact.norm())
        rounds = mutant.name in ROUNDING and mistaken.dtype in (torch.bfloat16, torch.float16)
        bits = (matters or rounds) and self.changed(mistaken) >= ENOUGH and numbers.equal(port)

        # Equal but for noise.
        residual = float((self.error - effect).norm())
        noises = (
            self.noise.norm(),
            (numbers - exact).norm(),
            least(mistaken.dtype) * self.exact.norm(),
        )
        share = 0.0
        if matters:
            share = float(self.error @ effect) / size**2
        as_long = abs(share - 1) < SHARE
        straight = share * size > 0.9 * float(self.error.norm())
        nothing_left = residual <= RESIDUAL * float(max(noises))
        if not bits and not (as_long and straight and nothing_left):
            return None
        cosine = float(torch.cosine_similarity(exact, port, 0))
        return Suspect(mutant.name, bits, residual, cosine, exact)


def explain(
    port: Tensor,
    model: PreTrainedModel,
    exact: PreTrainedModel,
    inputs: Mapping[str, Any],
    name: str = "logits",
    counted: Tensor | None = None,
    first: str | None = None,
) -> tuple[str | None, str]:
    """The known mistake that reproduces a port's tensor, if any, and a sentence about it.

    The sentence also names the mistakes that cannot be told from it. Neither a right port is accused nor one with a
    mistake that the catalogue does not have.

    Args:
        port: the port's tensor of that name.
        model: the model in the port's type.
        exact: the same in float64.
        inputs: what `record` takes.
        counted: which entries of the tensor are compared; by default all but padding.
        first: where the port diverges first; mistakes that change nothing there are not tried.
    """
    names = {name, first}

    def run(which: PreTrainedModel) -> dict[str, Tensor]:
        try:
            return record(which, keep=names.__contains__, **inputs)
        except ValueError:  # the mistake makes this input impossible: a text of one token without its first
            return {}

    right, right_exact = run(model), run(exact)
    if name not in right_exact:
        return None, f"the reference has no {name}"
    if counted is None:
        mask = inputs.get("attention_mask")
        if mask is not None:
            mask = mask.bool()
        counted = counts(name, right_exact[name].shape, {}, mask)
    case = Case(port, right[name], right_exact[name], counted)
    if port.shape == right[name].shape and case.vector(port).equal(case.vector(right[name])):
        return None, f"your {name} are this implementation's, bit for bit"
    if not case.fits:
        return verdict(name, [])

    suspects = []
    for mutant in (mutant for mutant in MUTANTS.values() if mutant.concerns(exact)):
        with mutant.applied():
            mistaken_exact = run(exact)
            if unchanged(right_exact, mistaken_exact, name) and mutant.name not in ROUNDING:
                continue
            mistaken = run(model)
        if name not in mistaken or name not in mistaken_exact:
            continue
        too_late = unchanged(right, mistaken, first) and unchanged(right_exact, mistaken_exact, first)
        if too_late:  # it changes nothing where the port diverges first
            continue
        suspect = case.suspect(mutant, mistaken[name], mistaken_exact[name])
        if suspect is not None:
            suspects.append(suspect)
    return verdict(name, suspects)


def verdict(name: str, suspects: list[Suspect]) -> tuple[str | None, str]:
    """The most likely mistake, and a sentence about it and those that do the same."""
    if not suspects:
        return None, f"no known mistake reproduces your {name}"
    best = min(suspects, key=lambda suspect: (not suspect.bits, suspect.residual))
    if best.bits:
        how = "bit for bit"
        alike = [suspect for suspect in suspects if suspect.bits]
    else:
        how = f"cosine {best.cosine:.6f}"
        alike = [suspect for suspect in suspects if torch.allclose(suspect.exact, best.exact)]
    same = ", ".join(suspect.name for suspect in alike if suspect is not best)
    if same:
        how += f" (and {same}, which do the same here)"
    mistake = MUTANTS[best.name].mistake
    return best.name, f"your {name} match mutant {best.name!r}, {how}: {mistake} (see docs/numerics.md)"
