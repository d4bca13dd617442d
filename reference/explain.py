"""Name the known mistake that reproduces a port's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pretrained import PreTrainedModel
from reference.compare import counts, least
from reference.mutants import MUTANTS, ROUNDING, Mutant
from reference.trace import record

ENOUGH = 16  # numbers in which a mistake must show, so that equal bits are not due to rounding
# The largest norm of the difference to a mistake's numbers, over the noise; and how far the part of the port's error
# in the direction of the mistake may be from the mistake's effect. Measured with 370 ports that make one mistake and
# round their sums in another way: where the effect is 3 times the noise or more, none was above 2.1 in the first, or
# outside 0.87 to 1.07 in the second.
RESIDUAL, SHARE = 2.5, 1 / 8
# Mistakes that only inputs with padding, or with images, allow to make.
NEEDS_PADDING = {"positions_through_padding", "padding_visible"}
NEEDS_IMAGES = {"merger_patch_by_patch", "vision_axes_swapped"}
SMALLEST = torch.finfo(torch.float64).tiny  # the least noise, which divides


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


@dataclass
class Findings:
    """What the known mistakes make of one tensor.

    Attributes:
        name: of the tensor.
        sentence: about a tensor that is not looked at; empty otherwise.
        suspects: the mistakes that explain it, the likeliest first.
        before: the distance of the port from the right numbers, in norms of the noise.
        after: the same from the numbers of each mistake that was tried.
        contradicted: the mistakes that explain it, but not another tensor that is given -> that tensor.
    """

    name: str
    sentence: str = ""
    suspects: list[Suspect] = field(default_factory=list)
    before: float = 0.0
    after: dict[str, float] = field(default_factory=dict)
    contradicted: dict[str, str] = field(default_factory=dict)


class Case:
    """A port's tensor and the right ones, as vectors of the entries that count.

    Tensors of fewer tokens hold the last ones: logits may be given for these only, and a mistake may leave tokens out.

    Args:
        port: the port's tensor, in the reference's shape; it may lack first tokens.
        right, exact: this implementation's, in the port's type and in float64.
        counted: which entries count, in the reference's shape.
    """

    def __init__(self, port: Tensor, right: Tensor, exact: Tensor, counted: Tensor) -> None:
        self.port, self.right = port, right
        self.counted = counted.expand_as(exact)
        if port.ndim == exact.ndim == 3 and port.shape[1] < exact.shape[1]:
            lacking = exact.shape[1] - port.shape[1]
            self.right = right[:, lacking:]
            self.counted = self.counted[:, lacking:]
            if lacking == 1:  # the first token of each text; a padded text has it in a later column
                self.counted = self.counted & counted.expand_as(exact)[:, :-1]
            exact = exact[:, lacking:]
        self.fits = port.shape == exact.shape
        if self.fits:
            self.exact = self.vector(exact)
            self.right_pair = self.right, exact
            self.noise = self.vector(self.right) - self.exact
            self.error = self.vector(port) - self.exact

    def vector(self, tensor: Tensor) -> Tensor:
        """The entries that count, in float64."""
        return tensor.double()[self.counted]

    def aligned(self, tensor: Tensor) -> Tensor | None:
        """A mistake's tensor with as many tokens as the port's; None if that is impossible."""
        if tensor.shape == self.port.shape:
            return tensor
        if tensor.ndim != 3 or self.port.ndim != 3:
            return None
        lacking = self.port.shape[1] - tensor.shape[1]
        if lacking > 0 and not bool(self.counted[:, :lacking].any()):
            tensor = F.pad(tensor, (0, 0, lacking, 0))
        elif lacking < 0:
            tensor = tensor[:, -lacking:]
        if tensor.shape != self.port.shape:
            return None
        return tensor

    def changed(self, mistaken: Tensor) -> float:
        """The number of entries that a mistake changes in the port's type."""
        return differences(torch.where(self.counted, mistaken, 0), torch.where(self.counted, self.right, 0))

    def distances(self, mistaken: Tensor, mistaken_exact: Tensor) -> tuple[float, float]:
        """The norms of the port's difference to a mistake's numbers in float64, and of the noise."""
        numbers, exact = self.vector(mistaken), self.vector(mistaken_exact)
        noises = (
            self.noise.norm(),
            (numbers - exact).norm(),
            least(mistaken.dtype) * self.exact.norm(),
        )
        return float((self.vector(self.port) - exact).norm()), float(max(*noises, SMALLEST))

    def suspect(self, mutant: Mutant, mistaken: Tensor, mistaken_exact: Tensor) -> Suspect | None:
        """The mistake, if it explains the port's numbers.

        It does when it gives the very bits, the right model does not, and it matters in exact arithmetic (or is one of
        rounding). It also does when the port's difference to float64 is, but for noise, the one that the mistake makes:
        as long, in the same direction, and with nothing else left.

        Args:
            mutant: the mistake.
            mistaken: the tensor that the mistake makes in the port's type, in the port's shape.
            mistaken_exact: the same in float64.
        """
        # Equal bits.
        port, numbers, exact = (self.vector(tensor) for tensor in (self.port, mistaken, mistaken_exact))
        effect = exact - self.exact
        size = float(effect.norm())
        matters = size > 1e-9 * float(self.exact.norm())
        rounds = mutant.name in ROUNDING and mistaken.dtype in (torch.bfloat16, torch.float16)
        bits = (matters or rounds) and self.changed(mistaken) >= ENOUGH and numbers.equal(port)

        # Equal but for noise.
        residual, noise = self.distances(mistaken, mistaken_exact)
        share = 0.0
        if matters:
            share = float(self.error @ effect) / size**2
        as_long = abs(share - 1) < SHARE
        straight = share * size > 0.9 * float(self.error.norm())
        nothing_left = residual <= RESIDUAL * noise
        if not bits and not (as_long and straight and nothing_left):
            return None
        cosine = float(torch.cosine_similarity(exact, port, 0))
        return Suspect(mutant.name, bits, residual, cosine, exact)


class Runs:
    """The numbers of a model, right and with mistakes.

    Args:
        model: the model in the port's type.
        exact: the same in float64.
        inputs: what `record` takes.
        name: the tensor that is explained.
        first: where the port diverges first; None: nowhere, or not known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        exact: PreTrainedModel,
        inputs: Mapping[str, Any],
        name: str,
        first: str | None,
    ) -> None:
        self.model, self.exact, self.inputs = model, exact, inputs
        self.name, self.first = name, first
        self.right, self.right_exact = self.run(model), self.run(exact)

    def run(self, which: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors at both places; none if the mistake makes this input impossible."""
        try:
            return record(which, keep={self.name, self.first}.__contains__, **self.inputs)
        except ValueError:  # for example, a text of one token without its first
            return {}

    def with_mistake(self, mutant: Mutant) -> tuple[Tensor, Tensor] | None:
        """The tensor in the port's type and in float64. None if the mistake does not change it, or changes nothing
        where the port diverges first."""
        if not mutant.concerns(self.exact):
            return None
        with mutant.applied():
            exact = self.run(self.exact)
            if unchanged(self.right_exact, exact, self.name) and mutant.name not in ROUNDING:
                return None
            mistaken = self.run(self.model)
        if self.name not in mistaken or self.name not in exact:
            return None
        if unchanged(self.right, mistaken, self.first) and unchanged(self.right_exact, exact, self.first):
            return None
        return mistaken[self.name], exact[self.name]


def examine(
    port: Tensor,
    model: PreTrainedModel,
    exact: PreTrainedModel,
    inputs: Mapping[str, Any],
    name: str = "logits",
    counted: Tensor | None = None,
    first: str | None = None,
) -> Findings:
    """Try all known mistakes on a port's tensor.

    Args:
        port: the port's tensor of that name.
        model: the model in the port's type.
        exact: the same in float64.
        inputs: what `record` takes.
        counted: which entries of the tensor are compared; by default all but padding.
        first: where the port diverges first; mistakes that change nothing there are not tried.
    """
    runs = Runs(model, exact, inputs, name, first)
    if name not in runs.right_exact:
        return Findings(name, f"the reference has no {name}")
    right, right_exact = runs.right[name], runs.right_exact[name]
    if counted is None:
        counted = counts(name, right_exact.shape, {}, mask_of(inputs))
    case = Case(port, right, right_exact, counted)
    if port.shape == right.shape and case.vector(port).equal(case.vector(right)):
        return Findings(name, f"your {name} are this implementation's, bit for bit")
    findings = Findings(name)
    if not case.fits:
        return findings

    distance, noise = case.distances(*case.right_pair)
    findings.before = distance / noise
    for mutant in tqdm(MUTANTS.values(), "known mistakes", leave=False, delay=2):
        pair = runs.with_mistake(mutant)
        if pair is None:
            continue
        numbers, numbers_exact = (case.aligned(tensor) for tensor in pair)
        if numbers is None or numbers_exact is None:
            continue
        distance, _ = case.distances(numbers, numbers_exact)
        findings.after[mutant.name] = distance / noise
        suspect = case.suspect(mutant, numbers, numbers_exact)
        if suspect is not None:
            findings.suspects.append(suspect)
    findings.suspects.sort(key=lambda best: (impossible(best.name, inputs), not best.bits, best.residual))
    return findings


def mask_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """bool (B, S), False at padding; None without one."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    return torch.as_tensor(mask).bool()


def impossible(name: str, inputs: Mapping[str, Any]) -> bool:
    """Whether nobody can make a mistake with these inputs: one of padding where there is none, or one of images."""
    mask = mask_of(inputs)
    if name in NEEDS_PADDING:
        return mask is None or bool(mask.all())
    return name in NEEDS_IMAGES and inputs.get("pixel_values") is None


def verdict(name: str, suspects: list[Suspect]) -> tuple[str | None, str]:
    """The most likely mistake, which is the first one, and a sentence about it and those that do the same."""
    if not suspects:
        return None, f"no known mistake reproduces your {name}"
    best = suspects[0]
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
    return best.name, f"your {name} match mutant {best.name!r}, {how}: {mistake} (see python -m reference mutants)"
