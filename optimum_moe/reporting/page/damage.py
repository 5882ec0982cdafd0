"""What was lost: damage against bytes as a byte budget expected it, and the error of every block as it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_moe.reporting.page.drawing import Axis, block_ticks, line_path, point_path, x_ticks, y_ticks
from optimum_moe.reporting.page.elements import Chart, Element, Line, Section, Table, Tick
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.words import byte_unit, quantity
from optimum_moe.reporting.scores import SIDE_BY_SIDE

_LOSS, _SHARE = "expected rise of the loss (nats a token)", "share of the error of emptying all experts"


def damage(run: RunRecord) -> Section | None:
    """The curve with its cut, the damage of each block and its measured error; None where none of it is known."""
    found, errors = run.plan.evidence.get("damage"), run.report.get(SIDE_BY_SIDE)
    elements: list[Element] = []
    if found:
        unit = _LOSS if found["in_loss"] else _SHARE
        elements += [_curve(found, unit), _by_block(found["blocks"], unit)]
    if errors:
        elements.append(_errors(errors))
    return Section("damage", "What was lost where", elements) if elements else None


def _curve(found: Mapping[str, Any], unit: str) -> Chart:
    curve, (size, lost) = found["curve"], found["chosen"]
    step, prefix = byte_unit(curve[-1][0])
    points = [(number / step, value) for number, value in curve]
    chosen = (size / step, lost)
    x, y = Axis.of(at for at, _ in [*points, chosen]), Axis.of([0.0, *(value for _, value in points)])
    rows = [("chosen", quantity(size, "B"), f"{lost:.4g}")]
    rows += [("curve", quantity(number, "B"), f"{value:.4g}") for number, value in curve]
    return Chart(
        identifier="damage-curve",
        title="Expected damage against the bytes of the experts",
        description="The curve is what the best form for each expert would lose at every size; the dot on the dashed "
        "line is what was chosen. It is above the curve where all blocks keep experts of one number and width.",
        lines=(
            Line("0", "the best form for each expert", line_path(points, x, y)),
            Line("1", "chosen", points=point_path([chosen], x, y)),
        ),
        x_label=f"bytes of the experts ({prefix})",
        x_ticks=x_ticks(x),
        y_label=unit,
        y_ticks=y_ticks(y),
        table=Table("Damage and bytes", ("", "bytes", "damage"), tuple(rows), folded=True),
        marks=(Tick(round(x.at(chosen[0]), 3), f"cut at {quantity(size, 'B')}"),),
    )


def _by_block(blocks: Mapping[str, float], unit: str) -> Chart:
    rows = tuple((name, f"{value:.4g}") for name, value in blocks.items())
    return _chart_of_blocks(
        list(blocks),
        {"": blocks},
        identifier="damage-blocks",
        title="Expected damage by layer",
        description="What the chosen forms are expected to lose in each MoE block.",
        y_label=unit,
        table=Table("Damage of each block", ("MoE block", "damage"), rows, folded=True),
    )


def _errors(found: Mapping[str, Any]) -> Chart:
    blocks, layers = found["block_errors"], found["layer_errors"]
    names = list(blocks | layers)
    shown = [(name, *(f"{each[name]:.4g}" if name in each else "–" for each in (blocks, layers))) for name in names]
    return _chart_of_blocks(
        names,
        {"the block alone": blocks, "its layer, after all layers before it": layers},
        identifier="layer-errors",
        title="Measured error by layer",
        description="Norm of the difference to the original's output over the norm of that output, on held-out text: 0 "
        "is no change, 1 what an output of zeros would have. A block alone gets what the original gives to its own.",
        y_label="relative error of the output",
        table=Table("Error of each block and layer", ("MoE block", "alone", "its layer"), tuple(shown), folded=True),
    )


def _chart_of_blocks(names: Sequence[str], series: Mapping[str, Mapping[str, float]], **rest: Any) -> Chart:
    # The ends are those of the ticks, whose places are the middles of cells.
    x = Axis(-0.5, len(names) - 0.5)
    y = Axis.of([0.0, *(value for values in series.values() for value in values.values())])
    lines = []
    for style, (label, values) in enumerate(series.items()):
        points = [(float(at), values[name]) for at, name in enumerate(names) if name in values]
        lines.append(Line(str(style), label, line_path(points, x, y), point_path(points, x, y)))
    return Chart(lines=tuple(lines), x_label="layer", x_ticks=block_ticks(names), y_ticks=y_ticks(y), **rest)
