"""Candidates of an expert in all formats that a byte budget may choose, the choice among them, and what is built of it.

points = [candidates(expert, tokens) for every expert of every block]     # block by block, a few points each
chosen = choose(points, budget)
stored = [build_expert(expert, tokens, point.candidate) for ...]          # block by block again
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from optimum_moe.algorithms.byte_budget import Candidate, Point, allocate, hull, sufficient
from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.expert_fitter import ExpertFitter, HeldOutEstimate
from optimum_moe.algorithms.neurons import DAMPING
from optimum_moe.formats.base import ExpertFormat, all_formats, get_format
from optimum_moe.formats.budget_format import BudgetFormat, Trial, budget_formats
from optimum_moe.formats.narrow import Narrow
from optimum_moe.formats.specification import layout_bytes
from optimum_moe.formats.stored import StoredExpert

# Share of the damage that a mixture of formats has to promise to save over a single one: the best of more candidates
# always looks a little better than it is.
_LEAST_GAIN = 0.0125
# Sizes at which candidates are compared, as shares of what lies between the smallest and the largest ones.
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
# What one more candidate costs at a width where others of its format are tried.
_ONE_MORE = 0.125


def candidates(
    expert: Expert,
    tokens: ExpertTokens,
    damping: float = DAMPING,
    formats: Collection[str] | None = None,
    fixed_neurons: bool = False,
    itemsize: float | None = None,
    bias_itemsize: float | None = None,
    constant_bytes: float = 0.0,
    among: Collection[Candidate] | None = None,
) -> list[Point]:
    """What one expert could be stored as, by ascending bytes.

    Args:
        expert: Its matrices.
        tokens: The sampled tokens routed to it, every other of which candidates are fitted to (`build_expert` uses all
            of them); with none of them nothing is known to be lost by emptying it.
        damping: Ridge of every Gram as a share of its mean diagonal.
        formats: What is tried between empty and untouched, default all of `budget_formats()`; with `"narrow"` the
            others are tried at fewer neurons too.
        fixed_neurons: Whether the expert's neurons mean something outside of it, so that it keeps all or none.
        itemsize: Bytes of a weight as it is stored, default that of the given tensors.
        bias_itemsize: Bytes of a number of a bias, default the same.
        constant_bytes: What every candidate stores as well: the down bias, which even an empty expert keeps.
        among: Candidates of costly formats that are tried, see `worth_trying`; default all.

    Returns:
        Points, the empty expert first and the untouched one, of damage 0, last.

    Raises:
        ValueError: If a value is NaN or infinite, or a format is unknown.
    """
    everything: list[BudgetFormat] = all_formats(BudgetFormat)
    for name in formats or ():
        get_format(name, BudgetFormat)
    tried_formats = budget_formats() if formats is None else formats
    chosen = [form for form in everything if not form.needs_tokens or form.name in tried_formats]
    size = float(expert.up_IH.element_size() if itemsize is None else itemsize)
    bias_size = size if bias_itemsize is None else bias_itemsize

    def bytes_of(candidate: Candidate) -> float:
        return constant_bytes + candidate_bytes(candidate, expert, size, bias_size)

    if len(tokens) == 0:
        ends = [
            Candidate(form.name, n) for form in chosen if not form.needs_tokens for n in form.widths(expert.inner, True)
        ]
        return sorted((Point(bytes_of(c), 0.0, c) for c in ends), key=lambda point: point.bytes)
    can_narrow = not fixed_neurons and any(form.name == Narrow.name for form in chosen)
    tried = {form.name: set(form.widths(expert.inner, can_narrow)) for form in chosen}
    points = []
    with torch.no_grad():
        fitted, held_out = tokens.halves()
        fitter = ExpertFitter(expert, fitted, damping)
        trial = Trial(expert, fitter, HeldOutEstimate(fitter, held_out, len(tokens)), among)
        for width in sorted(set().union(*tried.values())):
            narrow = fitter.narrowed(width)
            for form in (form for form in chosen if width in tried[form.name]):
                for candidate, damage in form.candidates(trial, narrow):
                    points.append(Point(bytes_of(candidate), damage, candidate))
    return sorted(points, key=lambda point: point.bytes)


def worth_trying(points: Sequence[Sequence[Point]]) -> frozenset[Candidate]:
    """The candidates of costly formats that other experts of a block try, by what some of them are offered.

    They are a few with which these experts lose at no size more than what a mixture has to promise (`choose`).

    Args:
        points: For some experts their candidates, damages in one unit.
    """
    costly = {form.name for form in all_formats(BudgetFormat) if form.is_costly}
    optional = {point.candidate for own in points for point in own if point.candidate.format in costly}
    return frozenset(sufficient(points, optional, _SHARES, _LEAST_GAIN, _relative_cost))


def _relative_cost(candidate: Candidate, others: Collection[Candidate]) -> float:
    """Most of the work, which grows with the width, serves all candidates of a format at this width."""
    shared = any((other.format, other.neurons) == (candidate.format, candidate.neurons) for other in others)
    return candidate.neurons * (_ONE_MORE if shared else 1.0) + 1.0


def candidate_bytes(candidate: Candidate, expert: Expert, itemsize: float, bias_itemsize: float) -> float:
    """Bytes that a candidate stores: matrices, indices, and the biases of its neurons; its down bias excluded.

    Args:
        candidate: What it is.
        expert: What it is made of.
        itemsize: Bytes of a weight.
        bias_itemsize: Bytes of a number of a bias.
    """
    form, hidden = get_format(candidate.format, BudgetFormat), int(expert.up_IH.shape[1])
    total = layout_bytes(form.layout(candidate, expert.gate_IH is not None), candidate.neurons, hidden, itemsize)
    if isinstance(form, ExpertFormat):
        total += sum(spec.bytes(itemsize) for spec in form.tensors(candidate.size, hidden, False).values())
    biases = sum(bias is not None for bias in (expert.gate_bias_I, expert.up_bias_I))
    return total + biases * candidate.neurons * bias_itemsize


def choose(points: Sequence[Sequence[Point]], budget: float) -> list[Point]:
    """Choose a candidate of every expert: on all hulls, or on those of one format if mixing promises hardly more.

    Args:
        points: For each expert its candidates, by ascending bytes; damages in one unit.
        budget: Bytes that all of them may store.

    Raises:
        ValueError: If the smallest candidates alone store more, or a damage is no number of 0 or more.
    """
    mixed = allocate([hull(own) for own in points], budget)
    used = [[_formats_of(point.candidate, own) for point in own] for own in points]
    names = [
        form.name for form in all_formats(BudgetFormat) if any(form.name in found for own in used for found in own)
    ]
    alone = [
        allocate(
            [
                hull([p for p, found in zip(*pair, strict=True) if found <= {name}])
                for pair in zip(points, used, strict=True)
            ],
            budget,
        )
        for name in names
    ]
    best = min(alone, key=_total, default=mixed)
    return mixed if _total(mixed) < (1 - _LEAST_GAIN) * _total(best) else best


def _formats_of(candidate: Candidate, own: Sequence[Point]) -> set[str]:
    """The formats that a candidate needs beside those that every expert has."""
    found = {Narrow.name} if 0 < candidate.neurons < own[-1].candidate.neurons else set()
    return found | ({candidate.format} if get_format(candidate.format, BudgetFormat).needs_tokens else set())


def _total(chosen: Sequence[Point]) -> float:
    return sum(point.damage for point in chosen)


def build_expert(expert: Expert, tokens: ExpertTokens, candidate: Candidate, damping: float = DAMPING) -> StoredExpert:
    """The expert as one of its candidates says.

    Args:
        expert: As for `candidates`.
        tokens: The same tokens as for `candidates`.
        candidate: Of one of its points.
        damping: The same as for `candidates`.

    Returns:
        It in the dtype of the given tensors; the untouched one has the given tensors themselves.

    Raises:
        ValueError: If the candidate asks for more neurons than there are, or for a fit without any tokens.
    """
    form = get_format(candidate.format, BudgetFormat)
    if not 0 <= candidate.neurons <= expert.inner:
        raise ValueError(
            f"{candidate} does not fit an expert of {expert.inner} neurons. Take one of the expert's candidates."
        )
    if form.needs_tokens and len(tokens) == 0:
        raise ValueError(
            f"An expert without tokens can be empty or whole, not {candidate}. Take one of its candidates."
        )
    with torch.no_grad():
        return form.build(expert, ExpertFitter(expert, tokens, damping), candidate)
