"""A port held against the model that made its reference: the noise that is allowed, the mistakes that explain it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import DTYPES
from model_types import GenerativeModel
from reference import golden
from reference.compare import Report, coarser, compare, head_dim, measure_noise
from reference.explain import Findings, Suspect, examine, verdict
from reference.layouts import in_other_layouts
from reference.mutants import MUTANTS
from reference.trace import dimensions, record

SMALL = 10**7  # parameters up to which known mistakes are tried even where nothing diverges, and in pairs
TRIED = 4  # how many explanations of a tensor are held against everything else that is given
# What a mistake leaves of a port's distance to the right numbers, at most, if it is a part of the explanation. Of ports
# with one mistake that the catalogue does not have, few come nearer by another mistake: tests/test_diff_reasons.py.
NEARER = 0.5
Models = Callable[[torch.dtype], GenerativeModel]
Trace = Mapping[str, Tensor]
Types = Mapping[str, torch.dtype]


@dataclass
class Judge:
    """A port, the reference, and the model that made it.

    Attributes:
        port, reference: their tensors.
        inputs: of both.
        padding_mask: bool (B, S), False at padding; None: there is none.
        model: the model in any type.
        noise: what was measured before, for the types of the stages.
    """

    port: Trace
    reference: Trace
    inputs: Trace
    padding_mask: Tensor | None
    model: Models
    noise: dict[Any, Trace] = field(default_factory=dict)

    def measure(self, types: Types, reference: Trace) -> dict[str, Tensor]:
        """The noise of the model in a type for each stage."""
        noise: dict[str, Tensor] = {}
        for dtype in set(types.values()):
            stages = {name: reference[name] for name in types if types[name] == dtype and name in reference}
            noise |= measure_noise(self.model(dtype), stages, golden.arguments(self.inputs, dtype))
        return noise

    def compare(self, types: Types, port: Trace | None = None, padding_mask: Tensor | None = None) -> Report:
        """The report, with the noise of the model.

        Args:
            types: of each stage.
            port: other tensors than the port's.
            padding_mask: another one than that of the inputs.
        """
        if port is None:
            port = self.port
        if padding_mask is None:
            padding_mask = self.padding_mask
        key = tuple(types.items())
        if key not in self.noise:
            self.noise[key] = self.measure(types, self.reference)
        return compare(port, self.reference, self.noise[key], padding_mask)

    # ----------------------------------------------------------------------------------------------- one mistake

    def name_mistake(self, report: Report, types: Types) -> list[Findings]:
        """Look for the known mistake behind a divergence, or, in small models, behind numbers within the noise."""
        exact = self.model(torch.float64)
        if report.agrees and not is_small(exact):
            return []
        given = golden.arguments(self.inputs, torch.float64)
        tried = []
        for name in names_to_explain(report, types):
            model = self.model(types.get(name, torch.float64))
            for layout, tensor, counted in self.readings(report, name):
                findings = examine(tensor, model, exact, given, name, counted, report.first)
                tried.append(findings)
                self.name_from(findings, report, types, layout)
                if report.mutant is not None:
                    return tried
        return tried

    def name_from(self, findings: Findings, report: Report, types: Types, layout: str) -> None:
        """Enter the mistake that explains a tensor, and contradicts no other, into the report."""
        agreeing = []
        for suspect in findings.suspects[:TRIED]:
            contradiction = self.contradiction((suspect.name,), types, findings.name)
            if contradiction is None:
                agreeing.append(suspect)
            else:
                findings.contradicted[suspect.name] = contradiction
        report.mutant, sentence = verdict(findings.name, agreeing)
        if findings.sentence:
            sentence = findings.sentence
        if report.mutant is not None and layout:
            sentence += f"; after {layout}"
        if report.mutant is not None and report.agrees:
            sentence = f"within the noise of its type, but {sentence}"
        tells = report.first is not None or sentence.endswith("bit for bit")
        if report.mutant is not None or (tells and not layout):
            report.verdict = sentence

    def readings(self, report: Report, name: str) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """A tensor of the port as it was compared, and, where it diverges, in other layouts: the layout in words, the
        tensor, and which entries count."""
        if name not in report.fitted:
            yield "", self.port[name], None
            return
        tensor, counted = report.fitted[name]
        yield "", tensor, counted
        if report.first == name:
            for layout, other in in_other_layouts(name, tensor, head_dim(self.reference)):
                yield layout, other, counted

    def contradiction(self, mistakes: tuple[str, ...], types: Types, explained: str) -> str | None:
        """The first tensor of the port, but for the explained one, that is not what these mistakes make of it."""
        given = golden.arguments(self.inputs, torch.float64)
        with ExitStack() as stack:
            for mistake in mistakes:
                stack.enter_context(MUTANTS[mistake].applied())
            exact = record(self.model(torch.float64), keep=self.reference.__contains__, **given)
            noise = self.measure(types, exact)
        report = compare(self.port, exact, noise, self.padding_mask_of(exact))
        for stage in report.stages:
            if stage.diverges and not stage.equal_after and stage.name != explained:
                return stage.name
        return None

    def padding_mask_of(self, trace: Trace) -> Tensor | None:
        """The padding mask of a trace that may lack the first token of each text."""
        if self.padding_mask is None:
            return None
        tokens = self.padding_mask.shape[1]
        for name, tensor in trace.items():
            if dimensions(name).startswith("B S") and tensor.shape[1] < tokens:
                return self.padding_mask[:, 1:] & self.padding_mask[:, :-1]
        return self.padding_mask

    def look_in_16_bits(self, report: Report, types: Types) -> bool:
        """Look again for the known mistake, with the noise of 16 bits. The logits of a port with a 16-bit cache are
        float32, and do not show it. Returns whether there was something to say."""
        for kind in ("float16", "bfloat16"):
            coarse = {name: coarser(dtype, DTYPES[kind]) for name, dtype in types.items()}
            if coarse == types:
                continue
            other = self.compare(coarse)
            if other.agrees:
                report.verdict += f"; the error is no larger than the noise of {kind}, which proves nothing: "
                report.verdict += f"compare with --dtype {kind} only if your port computes or stores anything in it"
                return True
            self.name_mistake(other, coarse)
            if other.mutant is not None:
                report.mutant = other.mutant
                report.verdict = f"{other.verdict}; found with the noise of {kind}, as of a port with a {kind} cache"
                return True
        return False

    # --------------------------------------------------------------------------------------------- several mistakes

    def name_pair(self, report: Report, types: Types, tried: list[Findings]) -> bool:
        """Look for two mistakes that together explain all that is given. Returns whether there are two."""
        for part in parts(tried, 1.0):
            name = tried[0].name
            other = self.second_mistake(part, name, report, types)
            if other is not None:
                report.parts = [part, other.name]
                report.verdict = (
                    f"a combination: mutants {part!r} and {other.name!r} together give your {name}, "
                    f"cosine {other.cosine:.6f}: {MUTANTS[part].mistake}; {MUTANTS[other.name].mistake}"
                )
                return True
        return False

    def name_part(self, report: Report, tried: list[Findings]) -> None:
        """Say which mistake explains a part of the port's numbers."""
        for part, findings in parts(tried, NEARER).items():
            report.parts = [part]
            report.verdict = part_in_words(part, findings, tried[0])
            return

    def second_mistake(self, part: str, name: str, report: Report, types: Types) -> Suspect | None:
        """The mistake that explains a tensor together with another one; in small models only."""
        model, exact = self.model(types.get(name, torch.float64)), self.model(torch.float64)
        if not is_small(exact) or name not in report.fitted:
            return None
        tensor, counted = report.fitted[name]
        given = golden.arguments(self.inputs, torch.float64)
        with MUTANTS[part].applied():
            findings = examine(tensor, model, exact, given, name, counted)
        for suspect in findings.suspects[:TRIED]:
            if suspect.name != part and self.contradiction((part, suspect.name), types, name) is None:
                return suspect
        return None

    def hidden_mistakes(self, types: Types) -> list[str]:
        """The known mistakes that change the numbers of the given stages, and that the noise of these types hides."""
        exact = self.model(torch.float64)
        if not is_small(exact):
            return []
        given = golden.arguments(self.inputs, torch.float64)
        hidden = []
        for mutant in tqdm(MUTANTS.values(), "known mistakes", leave=False, delay=2):
            with mutant.applied():
                try:
                    mistaken = record(exact, keep=types.__contains__, **given)
                except ValueError:  # it makes this input impossible
                    continue
            acts = any(changes(mistaken[name], self.reference[name]) for name in types if name in mistaken)
            if acts and self.compare(types, mistaken).agrees:
                hidden.append(mutant.name)
        return hidden


def names_to_explain(report: Report, types: Types) -> list[str]:
    """The tensors that tell most about a mistake: the last one, the first one that diverges, the logits."""
    names = [name for name in report.fitted if name in types][-1:]
    if report.first is not None:
        names.append(report.first)
    if "logits" in types:
        names.append("logits")
    return list(dict.fromkeys(names))


def parts(tried: list[Findings], share: float) -> dict[str, Findings]:
    """The mistakes that explain a part of a port's numbers, the likeliest first, and what they explain: a tensor, but
    not another one, or all but a share of the distance of the last tensor."""
    found = {mistake: findings for findings in tried for mistake in findings.contradicted}
    last = tried[0]
    for mistake in sorted(last.after, key=lambda name: last.after[name]):
        if last.after[mistake] < share * last.before and math.isfinite(last.before):
            found.setdefault(mistake, last)
    return dict(list(found.items())[:TRIED])


def part_in_words(part: str, findings: Findings, last: Findings) -> str:
    """The sentence about a mistake that explains a part of a port's numbers.

    Args:
        part: the mistake.
        findings: of the tensor that it explains, or else of the last one.
        last: of the last tensor.
    """
    figure = ""
    if last.after.get(part, math.inf) < NEARER * last.before:
        before, after = f"{last.before:.3g}", f"{last.after[part]:.3g}"
        figure = f"the distance of your {last.name} falls from {before} to {after} times the noise; "
    if part in findings.contradicted:
        suspects = [suspect for suspect in findings.suspects if suspect.name == part]
        _, sentence = verdict(findings.name, suspects)
        contradicted = findings.contradicted[part]
        start = f"{sentence}. It explains this stage, not your {contradicted}"
    else:
        start = f"no known mistake reproduces your {last.name}, but a combination may: "
        start += f"mutant {part!r} explains part of it ({MUTANTS[part].mistake})"
    return f"{start}: {figure}look for a second mistake"


def is_small(model: GenerativeModel) -> bool:
    """Whether known mistakes are tried even where nothing diverges."""
    return sum(parameter.numel() for parameter in model.parameters()) <= SMALL


def changes(mistaken: Tensor, exact: Tensor) -> bool:
    """Whether a tensor has another shape or other numbers, beyond the rounding of float64."""
    if mistaken.shape != exact.shape:
        return True
    return not torch.allclose(mistaken.double(), exact.double(), rtol=1e-9, atol=1e-9, equal_nan=True)
