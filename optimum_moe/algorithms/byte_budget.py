"""The byte budget: for every expert of a model the form in which it loses the least, at a given number of bytes.

Shape letters: H hidden, I intermediate.

Empty, with fewer neurons, of low rank, or as it is: pruning, narrowing, factorizing and keeping are one decision. Each
expert's candidates are measured in one unit, the loss; the lower convex hull of (stored numbers, damage) is its curve;
and the steepest steps over all experts of all blocks are taken until the budget is spent.

    points = [candidates(expert, tokens) for every expert of every block]     # block by block, a few points each
    chosen = choose(points, budget)
    factors = [build(expert, tokens, point.form) for ...]                     # block by block again
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from optimum_moe.algorithms.expert_curves import Cutter, Judge, factors_of
from optimum_moe.algorithms.factors import ExpertFactors, MatrixFactors
from optimum_moe.algorithms.neurons import DAMPING
from optimum_moe.algorithms.one_expert import STEP, Expert, ExpertTokens, Form

KINDS = ("neurons", "rank")
"""What an expert can be between empty and untouched."""

# Widths that are tried, and those among them that are tried with ranks, as shares of all neurons.
_WIDTHS = 16
_RANK_WIDTHS = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
# Ranks that are tried at a width, as shares of the one that stores as much as dense matrices.
_RANKS = (0.3, 0.4, 0.5, 0.6, 0.75)
# Share of the damage that a mixture of kinds has to promise to save over a single kind: the best of more candidates
# always looks a little better than it is.
_LEAST_GAIN = 0.0125


@dataclass(frozen=True)
class Point:
    """One way to keep an expert.

    Args:
        numbers: numbers that it stores, biases excluded.
        damage: what it is expected to add to the loss on tokens that it was not fitted to, summed over as many as were
            sampled.
        form: what it is, for `build`.
    """

    numbers: int
    damage: float
    form: Form


def candidates(
    expert: Expert, tokens: ExpertTokens, damping: float = DAMPING, kinds: Collection[str] = KINDS
) -> list[Point]:
    """The forms of one expert, by ascending numbers.

    Args:
        expert: its matrices.
        tokens: the sampled tokens routed to it, every other of which forms are fitted to (`build` uses all of them);
            with none of them nothing is known to be lost by emptying it.
        damping: ridge of every Gram as a share of its mean diagonal.
        kinds: what is tried between empty and untouched: fewer `"neurons"`, a `"rank"` of gate and up, or both of them
            together where both are named.

    Returns:
        Points, the empty form first and the untouched one, of damage 0, last.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    gated, hidden, inner = expert.gate_IH is not None, int(expert.up_IH.shape[1]), expert.inner
    dense = Form(inner)
    if len(tokens) == 0:
        return [Point(0, 0.0, Form(0)), Point(dense.numbers(hidden, gated), 0.0, dense)]
    points = [Point(dense.numbers(hidden, gated), 0.0, dense)]
    with torch.no_grad():
        fitted, held = tokens.halves()
        cutter = Cutter(expert, fitted, damping)
        judge = Judge(cutter, held, len(tokens))
        points.append(Point(0, judge.empty_damage, Form(0)))
        widths, rank_widths = set(_grid(inner, _WIDTHS)), {min(inner, _rounded(inner * s)) for s in _RANK_WIDTHS}
        if "neurons" not in kinds:
            widths, rank_widths = set(), {inner}
        if "rank" not in kinds:
            widths, rank_widths = widths | rank_widths - {inner}, set()
        for width in sorted(widths | rank_widths):
            narrow = cutter.narrowed(width)
            if width < inner:
                form = Form(width)
                points.append(Point(form.numbers(hidden, gated), judge.narrowed(narrow), form))
            if width in rank_widths:
                ranks = _ranks(len(narrow.expert.stacked), hidden)
                for rank, made in zip(ranks, cutter.at_ranks(narrow, ranks), strict=True):
                    form = Form(width, rank)
                    points.append(Point(form.numbers(hidden, gated), judge.factorized(narrow, made), form))
    return sorted(points, key=lambda point: point.numbers)


def _rounded(value: float) -> int:
    return max(STEP, round(value / STEP) * STEP)


def _ranks(rows: int, columns: int) -> list[int]:
    """Ranks worth trying of a matrix: below the one that stores as much as the matrix itself."""
    most = rows * columns / (rows + columns)
    return sorted({rank for rank in map(_rounded, (most * share for share in _RANKS)) if rank < most})


def _grid(most: int, count: int) -> list[int]:
    """About `count` multiples of 8 below `most`, evenly."""
    step = max(1, round(most / (STEP * count))) * STEP
    return list(range(step, most, step))


def hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points, by ascending numbers; of equal numbers the least damage counts.

    Raises:
        ValueError: If a damage is NaN, infinite or negative.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.numbers, point.damage)):
        if not 0 <= point.damage < float("inf"):
            raise ValueError(f"{point} has no usable damage: it must be 0 or more. Check the tokens' gradients.")
        if kept and kept[-1].numbers == point.numbers:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-2], point):
            kept.pop()
        kept.append(point)
    return kept


def _slope(left: Point, right: Point) -> float:
    """Damage that a number saves."""
    return (left.damage - right.damage) / (right.numbers - left.numbers)


def choose(points: Sequence[Sequence[Point]], numbers: int) -> list[Point]:
    """Choose a candidate of every expert: `spend` on all hulls, or on those of one kind if mixing promises hardly more.

    Args:
        points: for each expert its candidates, by ascending numbers; damages in one unit.
        numbers: the budget, in stored numbers.

    Raises:
        ValueError: If the smallest candidates alone store more, or a damage is no number of 0 or more.
    """
    mixed = spend([hull(own) for own in points], numbers)
    alone = [spend([hull([p for p in own if _is_of(p.form, kind, own)]) for own in points], numbers) for kind in KINDS]
    best = min(alone, key=_total)
    return mixed if _total(mixed) < (1 - _LEAST_GAIN) * _total(best) else best


def _is_of(form: Form, kind: str, own: Sequence[Point]) -> bool:
    """Whether one kind alone allows a form of an expert with these candidates."""
    inner = own[-1].form.neurons
    return form.input_rank is None if kind == "neurons" else form.neurons in (0, inner)


def _total(chosen: Sequence[Point]) -> float:
    return sum(point.damage for point in chosen)


def spend(curves: Sequence[Sequence[Point]], numbers: int) -> list[Point]:
    """Choose a point of every curve, so that together they store at most `numbers` and do the least damage.

    Steps are taken by the damage that they save for a number, ties by the order of the curves. Convex curves make this
    optimal up to the last step: a step that does not fit is left out, and smaller ones that fit come after it.

    Args:
        curves: a convex curve for each expert, as `hull` gives them; damages in one unit.
        numbers: the budget, in stored numbers.

    Raises:
        ValueError: If the first points alone store more.
    """
    taken = [0] * len(curves)
    left = numbers - sum(points[0].numbers for points in curves)
    if left < 0:
        raise ValueError(
            f"The budget of {numbers} numbers is below the least that the experts can store, {numbers - left}. "
            "Raise it."
        )
    steps: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        points, at = curves[index], taken[index]
        if at + 1 < len(points):
            heapq.heappush(steps, (-_slope(points[at], points[at + 1]), index))

    for index in range(len(curves)):
        offer(index)
    while steps:
        _, index = heapq.heappop(steps)
        points, at = curves[index], taken[index]
        cost = points[at + 1].numbers - points[at].numbers
        if cost <= left:
            left -= cost
            taken[index] += 1
            offer(index)
    return [points[at] for points, at in zip(curves, taken, strict=True)]


def build(expert: Expert, tokens: ExpertTokens, form: Form, damping: float = DAMPING) -> ExpertFactors:
    """The expert in a form of its curve.

    Args:
        expert: as for `candidates`.
        tokens: the same tokens as for `candidates`.
        form: of one of them.
        damping: the same as for `candidates`.

    Returns:
        Factors in the dtype of the expert. All neurons without a rank are the given tensors themselves.

    Raises:
        ValueError: If the form asks for more neurons than there are, or for a rank without any tokens.
    """
    if not 0 <= form.neurons <= expert.inner:
        raise ValueError(
            f"{form} does not fit an expert of {expert.inner} neurons. Take one of the expert's candidates."
        )
    dtype = expert.up_IH.dtype
    if form == Form(expert.inner):
        return _kept(expert, None)
    if form.neurons == 0:
        return _kept(expert, torch.zeros(0, dtype=torch.int64, device=expert.up_IH.device))
    if len(tokens) == 0:
        raise ValueError(f"An expert without tokens can be empty or whole, not {form}. Take one of its candidates.")
    with torch.no_grad():
        return factors_of(Cutter(expert, tokens, damping), form, dtype)


def _kept(expert: Expert, neurons: torch.Tensor | None) -> ExpertFactors:
    """The expert as it is (its own tensors), or with these neurons."""
    up_NH, down_HN, gate_NH = expert.up_IH, expert.down_HI, expert.gate_IH
    if neurons is not None:
        up_NH, down_HN = up_NH[neurons], down_HN[:, neurons]
        gate_NH = None if gate_NH is None else gate_NH[neurons]
    return ExpertFactors(
        up=MatrixFactors(dense_OX=up_NH),
        down=MatrixFactors(dense_OX=down_HN),
        gate=None if gate_NH is None else MatrixFactors(dense_OX=gate_NH),
        neurons=neurons,
    )
