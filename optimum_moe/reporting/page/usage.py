"""How the router used the experts of the original on the calibration data."""

from __future__ import annotations

from bisect import bisect_right

import torch

from optimum_moe.algorithms.expert_usage import busiest_share, effective_experts
from optimum_moe.reporting.page.drawing import (
    MOST_COLUMNS,
    MOST_ROWS,
    Cell,
    block_ticks,
    index_ticks,
    row_paths,
    thinned,
)
from optimum_moe.reporting.page.elements import Element, Map, Missing, Row, Section, Swatch, Table, Text
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.words import share

_BOUNDS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Tokens of an expert over those of even use, at which the next darker color begins."""
_LEVELS = (
    "less than 1/4 of even use",
    "1/4 to 1/2",
    "1/2 to 0.8",
    "about even: 0.8 to 1.25",
    "1.25 to 2",
    "2 to 4",
    "more than 4 times",
)


def usage(run: RunRecord) -> Section:
    """The map of frequencies, and each block's use in numbers."""
    routed = {name: facts.routed for name, facts in run.blocks.items() if facts.routed is not None}
    if not routed:
        return Section("usage", "How the experts were used", [_nothing(run)])
    elements: list[Element] = [
        Text(
            "Tokens that the original's router sent to each expert, compared with even use of all experts of the block."
        ),
        _map(routed),
    ]
    most = max(len(counts) for counts in routed.values())
    if most > MOST_COLUMNS or len(routed) > MOST_ROWS:
        wide = -(-most // MOST_COLUMNS)
        elements.append(Text(f"The map is thinned out: each cell stands for the mean of {wide} neighboring experts."))
    return Section("usage", "How the experts were used", elements)


def _nothing(run: RunRecord) -> Missing:
    if run.plan.calibration is None:
        what = "This recipe needed no data, so nobody observed which experts are used."
    else:
        what = "How often each expert was used was not recorded."
    return Missing(
        what,
        "Statistics of the original, which `compress --save-statistics` saves, show it:",
        run.command("--statistics STATISTICS"),
    )


def _level(count: float, even: float) -> str:
    return "none" if count == 0 else str(bisect_right(_BOUNDS, count / even))


def _map(routed: dict[str, tuple[int, ...]]) -> Map:
    names = list(routed)
    most = max(len(counts) for counts in routed.values())
    rows, used = [], set()
    for top, members in enumerate(thinned(len(names), MOST_ROWS)):
        name = names[members[0]]
        counts = routed[name]
        even = sum(counts) / len(counts) or 1.0
        cells = []
        for experts in thinned(len(counts), MOST_COLUMNS):
            cells.append(Cell(_level(sum(counts[expert] for expert in experts) / len(experts), even)))
        used |= {cell.style for cell in cells}
        rows.append(Row(f"{name}: {sum(counts):,} routed tokens", row_paths(cells, top)))
    legend = [Swatch(str(level), said) for level, said in enumerate(_LEVELS) if str(level) in used]
    return Map(
        identifier="usage-map",
        title="Routed tokens of every expert",
        description="One row for each MoE block, one cell for each expert; the table below has numbers.",
        columns=len(thinned(most, MOST_COLUMNS)),
        rows=tuple(rows),
        x_label="expert",
        x_ticks=index_ticks(most),
        y_label="layer",
        y_ticks=block_ticks(names),
        legend=(*legend, *([Swatch("none", "no token")] if "none" in used else [])),
        textured=False,
        table=_table(routed),
    )


def _table(routed: dict[str, tuple[int, ...]]) -> Table:
    rows = []
    for name, counts in routed.items():
        count_E = torch.tensor(counts, dtype=torch.float64)
        total = max(sum(counts), 1)
        rows.append(
            (
                name,
                f"{sum(counts):,}",
                str(sum(count == 0 for count in counts)),
                f"{effective_experts(count_E):.1f} of {len(counts)}" if any(counts) else "–",
                share(busiest_share(count_E)) if any(counts) else "–",
                share(min(counts) / total),
                share(max(counts) / total),
                str(counts.index(max(counts))),
            )
        )
    header = (
        *("MoE block", "routed tokens", "without tokens", "effective experts", "busiest quarter has"),
        *("least used has", "most used has", "most used"),
    )
    return Table("Use of each block", header, tuple(rows), folded=True)
