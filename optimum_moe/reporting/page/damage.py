"""Damage against bytes, as a byte budget expected it, and where it was cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimum_moe.reporting.page.drawing import Axis, block_ticks, line_path, point_path, x_ticks, y_ticks
from optimum_moe.reporting.page.elements import Chart, Line, Section, Table, Tick
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.words import byte_unit, quantity

_LOSS, _SHARE = "expected rise of the loss (nats a token)", "share of the error of emptying all experts"


def damage(run: RunRecord) -> Section | None:
    """The curve with its cut, and the damage of each block; None where no stage measured it."""
    found = run.plan.evidence.get("damage")
    if not found:
        return None
    unit = _LOSS if found["in_loss"] else _SHARE
    return Section("damage", "What the bytes cost", [_curve(found, unit), _by_block(found["blocks"], unit)])


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
    names = list(blocks)
    # The ends are those of the ticks, whose places are the middles of cells.
    x, y = Axis(-0.5, len(names) - 0.5), Axis.of([0.0, *blocks.values()])
    points = [(float(at), value) for at, value in enumerate(blocks.values())]
    rows = tuple((name, f"{value:.4g}") for name, value in blocks.items())
    return Chart(
        identifier="damage-blocks",
        title="Expected damage by layer",
        description="What the chosen forms are expected to lose in each MoE block.",
        lines=(Line("0", "", line_path(points, x, y), point_path(points, x, y)),),
        x_label="layer",
        x_ticks=block_ticks(names),
        y_label=unit,
        y_ticks=y_ticks(y),
        table=Table("Damage of each block", ("MoE block", "damage"), rows, folded=True),
    )
