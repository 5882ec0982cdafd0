"""The byte budget: a way to store every expert of a model so that all of them lose the least at a given size.

Each expert's candidates are measured in one unit, the loss; the lower convex hull of (stored bytes, damage) is its
curve; and the steepest steps over all experts of all blocks are taken until the bytes are spent. Where the candidates
come from is a matter of the formats that experts are stored in (`optimum_moe.formats`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Candidate:
    """A way to store an expert, before it is carried out; small, hashable and picklable.

    Args:
        format: Name of the registered format that builds it.
        neurons: Neurons that are kept.
        size: Of what the format stores, in the format's own terms, such as a rank.
    """

    format: str
    neurons: int
    size: int = 0


@dataclass(frozen=True)
class Point:
    """What a candidate costs and loses.

    Args:
        bytes: What it stores.
        damage: What it is expected to add to the loss on tokens that it was not fitted to, summed over as many as were
            sampled.
        candidate: What it is.
    """

    bytes: float
    damage: float
    candidate: Candidate


def hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points, by ascending bytes; of equal bytes the least damage counts.

    Raises:
        ValueError: If a damage is NaN, infinite or negative.
    """
    corners: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, point.damage)):
        if not 0 <= point.damage < float("inf"):
            raise ValueError(f"{point} has no usable damage: it must be 0 or more. Check the tokens' gradients.")
        if corners and corners[-1].bytes == point.bytes:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-2], point):
            corners.pop()
        corners.append(point)
    return corners


def _slope(left: Point, right: Point) -> float:
    """Damage that a byte saves."""
    return (left.damage - right.damage) / (right.bytes - left.bytes)


def frontier(curves: Sequence[Sequence[Point]]) -> list[tuple[float, float]]:
    """Bytes and damage of all curves together at every budget, from the least bytes on, the steepest steps first.

    Args:
        curves: A convex curve for each expert, as `hull` gives them; damages in one unit.
    """
    steps = sorted(
        (-_slope(left, right), index, at)
        for index, points in enumerate(curves)
        for at, (left, right) in enumerate(pairwise(points))
    )
    size, damage = sum(points[0].bytes for points in curves), sum(points[0].damage for points in curves)
    found = [(size, damage)]
    for _, index, at in steps:
        left, right = curves[index][at], curves[index][at + 1]
        size, damage = size + right.bytes - left.bytes, damage + right.damage - left.damage
        found.append((size, damage))
    return found


def allocate(curves: Sequence[Sequence[Point]], budget: float) -> list[Point]:
    """Choose a point of every curve, so that together they store at most `budget` bytes and do the least damage.

    Steps are taken by the damage that they save for a byte, ties by the order of the curves. Convex curves make this
    optimal up to the last step: a step that does not fit is left out, and smaller ones that fit come after it.

    Args:
        curves: A convex curve for each expert, as `hull` gives them; damages in one unit.
        budget: Bytes.

    Raises:
        ValueError: If the first points alone store more.
    """
    taken = [0] * len(curves)
    left = budget - sum(points[0].bytes for points in curves)
    if left < 0:
        raise ValueError(
            f"The budget of {budget:,.0f} bytes is below the least that the experts can store, {budget - left:,.0f}. "
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
        cost = points[at + 1].bytes - points[at].bytes
        if cost <= left:
            left -= cost
            taken[index] += 1
            offer(index)
    return [points[at] for points, at in zip(curves, taken, strict=True)]


def sufficient(
    points: Sequence[Sequence[Point]],
    optional: Collection[Candidate],
    shares: Sequence[float],
    tolerance: float,
    cost: Callable[[Candidate, Collection[Candidate]], float],
) -> list[Candidate]:
    """A few of the optional candidates, with which experts lose hardly more than with all of them.

    At the price of a byte that a budget has with all candidates, every expert takes the one that loses the least, its
    bytes paid for. What that adds up to is compared, and candidates are added by what they save for their cost.

    Args:
        points: For each expert its candidates; damages in one unit.
        optional: Those that may be left out; every expert has others.
        shares: Budgets that are looked at, as shares of what lies between the least and the most bytes.
        tolerance: Share of the damage that may be lost more at each of them.
        cost: Of a candidate, where others have been added, more than 0.
    """
    found = frontier([hull(own) for own in points])
    offered = list(dict.fromkeys(p.candidate for own in points for p in own if p.candidate in optional))
    if len(found) == 1 or not offered:
        return []
    budgets = [found[0][0] + share * (found[-1][0] - found[0][0]) for share in shares]
    steps = [max(1, bisect_left(found, (budget,))) for budget in budgets]
    price_B = torch.tensor(
        [-(found[at][1] - found[at - 1][1]) / (found[at][0] - found[at - 1][0]) for at in steps], dtype=torch.float64
    )
    place = {candidate: number for number, candidate in enumerate(offered)}
    # The last row is the least of all that cannot be left out.
    value_CEB = torch.full((len(offered) + 1, len(points), len(shares)), torch.inf, dtype=torch.float64)
    for number, own in enumerate(points):
        for point in own:
            row_B = value_CEB[place.get(point.candidate, -1), number]
            torch.minimum(row_B, point.damage + price_B * point.bytes, out=row_B)
    best_EB, value_EB = value_CEB.amin(0), value_CEB[-1]
    allowed_B = tolerance * torch.tensor([found[at][1] for at in steps], dtype=torch.float64)

    def excess(value_EB: torch.Tensor) -> torch.Tensor:
        return ((value_EB - best_EB).sum(-2) - allowed_B).clamp(min=0).sum(-1)

    chosen: list[Candidate] = []
    while float(excess(value_EB)) > 0:
        saved_C = excess(value_EB) - excess(torch.minimum(value_EB, value_CEB[:-1]))
        saved_C /= torch.tensor([cost(candidate, chosen) for candidate in offered], dtype=torch.float64)
        index = int(saved_C.argmax())
        if float(saved_C[index]) <= 0:
            break
        chosen.append(offered[index])
        value_EB = torch.minimum(value_EB, value_CEB[index])
    return chosen
