"""Geometry of pictures: cells, lines, trees and the labels of axes, as paths of SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from optimum_moe.reporting.page.elements import Tick
from optimum_moe.reporting.page.words import brief, short_name

_GAP = 0.12
"""Share of a row's height that separates it from the next."""
MOST_COLUMNS, MOST_ROWS = 512, 256
"""Maps with more cells than this are thinned out."""


@dataclass(frozen=True)
class Cell:
    """A cell of a map.

    Args:
        style: Its color or texture; empty for nothing.
        height: Share of its row that is filled, from the bottom.
    """

    style: str
    height: float = 1.0


def row_paths(cells: Sequence[Cell], top: int) -> tuple[tuple[str, str], ...]:
    """Style and path of the cells of a row that begins at `top`; equal neighbors are one rectangle."""
    paths: dict[str, list[str]] = {}
    at = 0
    for cell, run in groupby(cells):
        length = len(list(run))
        height = (1 - _GAP) * cell.height
        if cell.style and height > 0:
            paths.setdefault(cell.style, []).append(
                f"M{at} {_short(top + 1 - _GAP - height)}h{length}v{_short(height)}h-{length}z"
            )
        at += length
    return tuple((style, "".join(path)) for style, path in sorted(paths.items()))


def thinned(number: int, most: int) -> list[range]:
    """The members of each cell where at most so many cells can be drawn: equal runs of neighbors."""
    step = -(-number // most)
    return [range(start, min(start + step, number)) for start in range(0, number, step)]


def index_ticks(number: int, most: int = 8) -> tuple[Tick, ...]:
    """Labels of some of the indices 0, 1, ... at the middle of their cells."""
    step = _round_step(number / most)
    return tuple(Tick(round(100 * (index + 0.5) / number, 3), str(index)) for index in range(0, number, step))


def block_ticks(names: Sequence[str]) -> tuple[Tick, ...]:
    """Ticks of MoE blocks, by the short form of their names."""
    return tuple(Tick(tick.at, short_name(names[int(tick.text)])) for tick in index_ticks(len(names), 16))


def _round_step(least: float) -> int:
    power = 10 ** max(0, math.floor(math.log10(max(least, 1))))
    return int(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least))


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, by logarithms where `is_log`."""

    low: float
    high: float
    is_log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], is_log: bool = False, from_zero: bool = False) -> Axis:
        """Around finite values, with some room on both sides."""
        found = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        if is_log:
            room = max((high / low) ** 0.05, 1.15)
            return cls(low / room, high * room, True) if found else cls(0.1, 1.0, True)
        room = 0.05 * (high - low) or abs(high) * 0.05 or 0.5
        return cls(0.0 if from_zero and low >= 0 else low - room, high + room)

    def at(self, value: float) -> float:
        """Its place in percent, from the low end."""
        if self.is_log:
            value = max(value, self.low)
            return 100 * (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers on it."""
        if self.is_log:
            found = [
                factor * 10.0**power
                for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                for factor in (1, 2, 5)
            ]
            found = [value for value in found if self.low <= value <= self.high]
            decades = [value for value in found if f"{value:.0e}"[0] == "1"]
            return found if len(found) <= most or len(decades) < 2 else decades
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def line_path(points: Sequence[tuple[float, float]], x: Axis, y: Axis, steps: bool = False) -> str:
    """A line through points in a box of 100 x 100; with `steps` it is horizontal up to each next point."""
    path: list[str] = []
    for number, (at, value) in enumerate(points):
        place = f"{_short(x.at(at))} {_short(100 - y.at(value))}"
        if steps and number:
            path.append(f"H{_short(x.at(at))}")
        path.append(f"{'L' if number else 'M'}{place}")
    return "".join(path)


def point_path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Points as lines without length, which a round end of the stroke makes visible."""
    return "".join(f"M{_short(x.at(at))} {_short(100 - y.at(value))}h.01" for at, value in points)


def whisker_path(intervals: Sequence[tuple[float, float, float]], x: Axis, y: Axis) -> str:
    """Vertical lines at x from a low to a high value."""
    return "".join(
        f"M{_short(x.at(at))} {_short(100 - y.at(low))}V{_short(100 - y.at(high))}" for at, low, high in intervals
    )


def x_ticks(axis: Axis, most: int = 6) -> tuple[Tick, ...]:
    """Labels under a horizontal axis."""
    return tuple(Tick(round(axis.at(value), 3), brief(value)) for value in axis.ticks(most))


def y_ticks(axis: Axis, most: int = 6) -> tuple[Tick, ...]:
    """Labels beside a vertical axis, from the top."""
    return tuple(Tick(round(100 - axis.at(value), 3), brief(value)) for value in axis.ticks(most))


def tree_path(merges: Sequence[Sequence[float]], leaves: int) -> tuple[str, list[int]]:
    """Branches of a tree in a box of 100 x 100, and its leaves from the left.

    Args:
        merges: The two clusters of each merge and its height, as scipy's linkage numbers them.
        leaves: Number of leaves.
    """
    order = _leaf_order(merges, leaves)
    place = {leaf: 100 * (at + 0.5) / leaves for at, leaf in enumerate(order)}
    height = dict.fromkeys(range(leaves), 0.0)
    top = max((merge[2] for merge in merges), default=1.0) or 1.0
    path = []
    for number, (left, right, at, *_) in enumerate(merges):
        left, right = int(left), int(right)
        level = 100 - 98 * at / top
        path.append(
            f"M{_short(place[left])} {_short(100 - 98 * height[left] / top)}V{_short(level)}H{_short(place[right])}"
            f"V{_short(100 - 98 * height[right] / top)}"
        )
        place[leaves + number] = (place[left] + place[right]) / 2
        height[leaves + number] = at
    return "".join(path), order


def _leaf_order(merges: Sequence[Sequence[float]], leaves: int) -> list[int]:
    order: list[int] = []
    pending = [leaves + len(merges) - 1] if merges else list(range(leaves))
    while pending:
        cluster = pending.pop()
        if cluster < leaves:
            order.append(cluster)
        else:
            left, right = merges[cluster - leaves][:2]
            pending += [int(right), int(left)]
    return order


def _short(value: float) -> str:
    """A number of a path, with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
