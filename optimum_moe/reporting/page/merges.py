"""Which experts were merged, and what that did to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimum_moe.plan import BlockPlan
from optimum_moe.reporting.page.drawing import (
    MOST_ROWS,
    Axis,
    Cell,
    block_ticks,
    index_ticks,
    line_path,
    point_path,
    row_paths,
    thinned,
    tree_path,
    x_ticks,
    y_ticks,
)
from optimum_moe.reporting.page.elements import (
    Chart,
    Element,
    Line,
    Map,
    Missing,
    Row,
    Section,
    Swatch,
    Table,
    Text,
    Tick,
    Tree,
)
from optimum_moe.reporting.page.run_record import RunRecord

TREES = "trees"
"""Key of the trees in the report's file."""
_FIRST, _NEXT, _ALONE = "5", "3", "1"
"""Colors of a group, of the group beside it, and of an expert that stays alone."""


def merges(run: RunRecord) -> Section | None:
    """Sizes of all groups, trees of similarity, and stable ranks; None if no experts were merged."""
    merged = {name: plan for name, plan in run.plan.blocks.items() if plan.merges}
    if not merged:
        return None
    elements: list[Element] = [_groups(merged)]
    trees: Mapping[str, Sequence[Sequence[float]]] = run.report.get(TREES) or {}
    shown = [name for name in merged if name in trees]
    if shown:
        if len(shown) < len(merged):
            elements.append(Text(f"Trees of {len(shown)} of {len(merged)} blocks, evenly among them."))
        elements += [_tree(number, merged[name], trees[name]) for number, name in enumerate(shown)]
    else:
        elements.append(
            Missing(
                "How alike the experts are is not recorded with the checkpoint.",
                "Statistics of the original, which `compress --save-statistics` saves, show it as trees:",
                run.command("--statistics STATISTICS"),
            )
        )
    ranks = {name: plan.stable_rank for name, plan in merged.items() if plan.stable_rank is not None}
    if ranks:
        elements.append(_stable_ranks(ranks))
    return Section("merges", "Which experts were merged", elements)


def _members(plan: BlockPlan) -> list[list[int]]:
    """Members of each group, the largest group first."""
    found: dict[int, list[int]] = {}
    for expert, label in enumerate(plan.labels_E):
        if label >= 0:
            found.setdefault(label, []).append(expert)
    return sorted(found.values(), key=lambda members: (-len(members), members))


def _groups(merged: Mapping[str, BlockPlan]) -> Map:
    names = list(merged)
    rows, table = [], []
    for top, blocks in enumerate(thinned(len(names), MOST_ROWS)):
        groups = _members(merged[names[blocks[0]]])
        cells: list[Cell] = []
        for number, members in enumerate(groups):
            style = _ALONE if len(members) == 1 else (_FIRST, _NEXT)[number % 2]
            cells += [Cell(style)] * len(members)
        rows.append(
            Row(f"{names[blocks[0]]}: groups of {', '.join(str(len(own)) for own in groups)}", row_paths(cells, top))
        )
    for name, plan in merged.items():
        groups = _members(plan)
        alone = sum(len(own) == 1 for own in groups)
        largest = ", ".join(map(str, groups[0]))
        table.append((name, str(plan.num_experts), str(len(groups)), str(alone), str(len(groups[0])), f"{{{largest}}}"))
    most = max(sum(label >= 0 for label in plan.labels_E) for plan in merged.values())
    header = ("MoE block", "experts", "groups", "alone", "largest group", "its experts")
    return Map(
        identifier="group-map",
        title="Groups of every block, by their size",
        description="One row for each MoE block; a bar as long as the number of experts that became one.",
        columns=most,
        rows=tuple(rows),
        x_label="experts, ordered by the size of their group",
        x_ticks=index_ticks(most),
        y_label="layer",
        y_ticks=block_ticks(names),
        legend=(
            Swatch(_FIRST, "a group"),
            Swatch(_NEXT, "the group beside it"),
            Swatch(_ALONE, "experts that stay alone"),
        ),
        textured=False,
        table=Table("Groups of each block", header, tuple(table), folded=True),
    )


def _tree(number: int, plan: BlockPlan, merges: Sequence[Sequence[float]]) -> Tree:
    path, order = tree_path(merges, plan.num_experts)
    cells, last, odd = [], None, 1
    for expert in order:
        label = plan.labels_E[expert]
        odd = odd if label == last else 1 - odd
        cells.append(Cell("" if label < 0 else str(odd)))
        last = label
    step = max(1, -(-plan.num_experts // 32))
    ticks = tuple(
        Tick(round(100 * (at + 0.5) / len(order), 3), str(expert))
        for at, expert in enumerate(order)
        if step == 1 or at % step == 0
    )
    groups = _members(plan)
    rows = tuple((str(at), str(len(members)), ", ".join(map(str, members))) for at, members in enumerate(groups, 1))
    return Tree(
        identifier=f"tree-{number}",
        title=f"{plan.name}: how alike its experts are",
        description="Average linkage of the similarity of router logits; the higher two branches join, the less alike "
        "they are. In the strip, neighbors of one color became one expert.",
        path=path,
        leaves=plan.num_experts,
        strip=row_paths(cells, 0),
        ticks=ticks,
        table=Table(f"Groups of {plan.name}", ("group", "size", "experts"), rows, folded=True),
    )


def _stable_ranks(ranks: Mapping[str, tuple[float, float]]) -> Chart:
    names = list(ranks)
    x, y = Axis.of(range(len(names))), Axis.of([rank for pair in ranks.values() for rank in pair])
    lines = []
    for style, (label, which) in enumerate((("before merging", 0), ("after merging", 1))):
        points = [(float(at), float(ranks[name][which])) for at, name in enumerate(names)]
        lines.append(Line(str(style), label, line_path(points, x, y), point_path(points, x, y)))
    rows = tuple((name, f"{before:.3f}", f"{after:.3f}") for name, (before, after) in ranks.items())
    return Chart(
        identifier="stable-rank",
        title="Mean stable rank of the experts' matrices",
        description="By MoE block, before and after merging.",
        lines=tuple(lines),
        x_label="MoE block",
        x_ticks=tuple(tick for tick in x_ticks(x) if float(tick.text).is_integer()),
        y_label="stable rank",
        y_ticks=y_ticks(y),
        table=Table("Stable ranks", ("MoE block", "before", "after"), rows, folded=True),
    )
