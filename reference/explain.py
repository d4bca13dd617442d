"""Which known mistake reproduces a stranger's numbers."""

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
# What the difference to a mistake's numbers is, over the noise, and over the mistake's effect in its direction. Of 370
# ports that make one and whose sums are rounded in another way, those where the effect is 3 times the noise or more,
# none was above 2.1 in the first, or outside 0.87 to 1.07 in the second.
RESIDUAL, SHARE = 2.5, 1 / 8


@dataclass
class Suspect:
    """A mistake that gives the stranger's numbers but for noise.

    Attributes:
        name: of the mutant.
        bits: whether they are equal bit for bit.
        residual: norm of the difference.
        cosine: between them.
        exact: what the mistake makes in float64.
    """

    name: str
    bits: bool
    residual: float
    cosine: float
    exact: Tensor


def differences(a: Tensor, b: Tensor) -> int:
    """In how many numbers two tensors differ, rows that occur several times counted once."""
    rows = torch.unique(torch.cat((a.flatten(0, -2), b.flatten(0, -2)), dim=-1).double(), dim=0)
    return int((rows[:, : a.shape[-1]] != rows[:, a.shape[-1] :]).sum())


def unmoved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> bool:
    """Whether a tensor is there in both, and the same."""
    return name in before and name in after and before[name].equal(after[name])


class Case:
    """A stranger's tensor, and the right ones, as vectors of what counts.

    Args:
        mine: the stranger's tensor, in the reference's shape; logits may lack first tokens.
        right, truth: this implementation's, in the stranger's type and in float64.
        keep: which entries count, in the reference's shape.
    """

    def __init__(self, mine: Tensor, right: Tensor, truth: Tensor, keep: Tensor) -> None:
        self.mine, self.right, self.keep = mine, right, keep
        lacking = truth.shape[1] - mine.shape[1] if mine.ndim == truth.ndim == 3 else 0
        near, base = (tensor[:, max(lacking, 0) :] for tensor in (right, truth))
        self.fits = mine.shape == base.shape
        if self.fits:
            self.base = self.vector(base)
            self.noise, self.away = self.vector(near) - self.base, self.vector(mine) - self.base

    def vector(self, tensor: Tensor) -> Tensor:
        """The entries that count, in float64."""
        return tensor.double()[self.keep[:, -tensor.shape[1] :].expand_as(tensor)]

    def suspect(self, mutant: Mutant, found: Tensor, moved: Tensor) -> Suspect | None:
        """The mistake, if it explains the stranger's numbers, of which it makes `found` in the stranger's type and
        `moved` in float64. It does when it gives the very bits, the right model does not, and it matters in exact
        arithmetic (or is one of rounding); or when the stranger's difference to float64 is, but for noise, the one
        that the mistake makes: as long, in the same direction, and with nothing else left."""
        if found.shape != self.mine.shape:
            return None
        exact, mine = self.vector(moved), self.vector(self.mine)
        shift = exact - self.base
        size, residual = float(shift.norm()), float((self.away - shift).norm())
        matters = size > 1e-9 * float(self.base.norm())
        rounds = mutant.name in ROUNDING and found.dtype in (torch.bfloat16, torch.float16)
        changed = math.inf if found.shape != self.right.shape else differences(
            torch.where(self.keep, found, 0), torch.where(self.keep, self.right, 0))  # fmt: skip
        bits = (matters or rounds) and changed >= ENOUGH and self.vector(found).equal(mine)
        noises = (self.noise.norm(), (self.vector(found) - exact).norm(), least(found.dtype) * self.base.norm())
        share = float(self.away @ shift) / size**2 if matters else 0.0
        straight = share * size > 0.9 * float(self.away.norm())
        if not bits and not (abs(share - 1) < SHARE and straight and residual <= RESIDUAL * float(max(noises))):
            return None
        return Suspect(mutant.name, bits, residual, float(torch.cosine_similarity(exact, mine, 0)), exact)


def explain(
    mine: Tensor, model: PreTrainedModel, exact: PreTrainedModel, inputs: Mapping[str, Any], name: str = "logits",
    keep: Tensor | None = None, first: str | None = None,
) -> tuple[str | None, str]:  # fmt: skip
    """Which known mistake reproduces a stranger's tensor, if any, and a sentence about it, which also names those that
    cannot be told from it. Neither a right port is accused nor one with a mistake that the catalogue does not have.

    Args:
        mine: the stranger's tensor of that name.
        model: the model in the stranger's type.
        exact: the same in float64.
        inputs: what `record` takes.
        keep: which entries of the tensor are compared; by default all but padding.
        first: where the stranger diverges first; mistakes that change nothing there are not tried.
    """

    def run(which: PreTrainedModel) -> dict[str, Tensor]:
        try:
            return record(which, keep={name, first}.__contains__, **inputs)
        except ValueError:  # the mistake makes this input impossible: a text of one token without its first
            return {}

    right, truth = run(model), run(exact)
    if name not in truth:
        return None, f"the reference has no {name}"
    if keep is None:
        real = inputs.get("attention_mask")
        keep = counts(name, truth[name].shape, {}, None if real is None else real.bool())
    case = Case(mine, right[name], truth[name], keep)
    if mine.shape == right[name].shape and case.vector(mine).equal(case.vector(right[name])):
        return None, f"your {name} are this implementation's, bit for bit"
    suspects = []
    for mutant in MUTANTS.values() if case.fits else ():
        with mutant.applied():
            found, moved = run(model), run(exact)
        late = first is not None and unmoved(right, found, first) and unmoved(truth, moved, first)
        if name in found and name in moved and not late:
            suspects.append(case.suspect(mutant, found[name], moved[name]))
    return verdict(name, [suspect for suspect in suspects if suspect is not None])


def verdict(name: str, suspects: list[Suspect]) -> tuple[str | None, str]:
    """The most likely mistake, and a sentence about it and those that do the same."""
    if not suspects:
        return None, f"no known mistake reproduces your {name}"
    best = min(suspects, key=lambda suspect: (not suspect.bits, suspect.residual))
    alike = [s for s in suspects if (s.bits if best.bits else torch.allclose(s.exact, best.exact))]
    same = [suspect.name for suspect in alike if suspect is not best]
    how = "bit for bit" if best.bits else f"cosine {best.cosine:.6f}"
    others = f" (and {', '.join(same)}, which do the same here)" if same else ""
    said = f"your {name} match mutant {best.name!r}, {how}{others}: {MUTANTS[best.name].mistake}"
    return best.name, f"{said} (see docs/numerics.md)"
