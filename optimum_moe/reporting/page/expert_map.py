"""What each expert became: a map of all blocks, by form and bytes."""

from __future__ import annotations

from collections import Counter

from optimum_moe.reporting.page.drawing import (
    MOST_COLUMNS,
    MOST_ROWS,
    Cell,
    block_ticks,
    index_ticks,
    row_paths,
    thinned,
)
from optimum_moe.reporting.page.elements import Element, Map, Row, Section, Swatch, Table, Text
from optimum_moe.reporting.page.fates import REMOVED, UNCHANGED, Fate, by_form, fates, stored_experts
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.words import quantity, share

_OTHER = "other forms"
_STYLES = 7
"""Forms that have a color and a texture of their own, `UNCHANGED` among them."""


def expert_map(run: RunRecord) -> Section:
    """The map, its legend, and the forms of each block in numbers."""
    found = {name: fates(plan, run.blocks[name]) for name, plan in run.plan.blocks.items()}
    styles = _styles(by_form(found))
    elements: list[Element] = [
        Text(
            "Each cell is an expert of the original. Its color and texture say what it became, and the height of its "
            "bar how much of its bytes is left: an empty cell is an expert that is gone."
        ),
        _map(run, found, styles),
    ]
    most = max(len(experts) for experts in found.values())
    if most > MOST_COLUMNS or len(found) > MOST_ROWS:
        elements.append(Text(_thinned_remark(most, len(found), "the mean of their bytes and the most common form")))
    return Section("experts", "What each expert became", elements)


def _thinned_remark(columns: int, rows: int, what: str) -> str:
    wide, high = -(-columns // MOST_COLUMNS), -(-rows // MOST_ROWS)
    blocks = f" of every {high} blocks" if high > 1 else ""
    return f"The map is thinned out: each cell stands for {wide} neighboring experts{blocks}, with {what}."


def _styles(forms: Counter[str]) -> dict[str, str]:
    """The number of the style of each form; those of the rare ones are the same."""
    common = [form for form, _ in forms.most_common() if form not in (UNCHANGED, REMOVED)]
    styles = {UNCHANGED: "0"} | {form: str(number) for number, form in enumerate(common[: _STYLES - 1], 1)}
    rare = common[_STYLES - 1 :]
    return styles | dict.fromkeys(rare, str(_STYLES)) | {REMOVED: ""}


def _map(run: RunRecord, found: dict[str, list[Fate]], styles: dict[str, str]) -> Map:
    names = list(found)
    columns = len(thinned(max(len(experts) for experts in found.values()), MOST_COLUMNS))
    rows = []
    for top, members in enumerate(thinned(len(names), MOST_ROWS)):
        name = names[members[0]]
        whole = run.blocks[name].expert_bytes
        cells = []
        for experts in thinned(len(found[name]), MOST_COLUMNS):
            own = [found[name][expert] for expert in experts]
            form = Counter(fate.form for fate in own).most_common(1)[0][0]
            height = sum(fate.bytes for fate in own) / len(own) / whole if whole else 1.0
            cells.append(Cell(styles[form], round(max(height, 0.06) if styles[form] else 0.0, 3)))
        rows.append(Row(f"{name}: {_counted(found[name])}", row_paths(cells, top)))
    counts = by_form(found)
    legend = []
    for style in sorted(set(styles.values()) - {""}):
        forms = [form for form, own in styles.items() if own == style and counts[form]]
        if forms:
            said = forms[0] if len(forms) == 1 else _OTHER
            legend.append(Swatch(style, f"{said} ({sum(counts[form] for form in forms):,})"))
    if counts[REMOVED]:
        legend.append(Swatch("none", f"{REMOVED} ({counts[REMOVED]:,})"))
    return Map(
        identifier="expert-map",
        title="Form and bytes of every expert",
        description="One row for each MoE block, one cell for each expert; the table below has numbers.",
        columns=columns,
        rows=tuple(rows),
        x_label="expert",
        x_ticks=index_ticks(max(len(experts) for experts in found.values())),
        y_label="layer",
        y_ticks=block_ticks(names),
        legend=tuple(legend),
        textured=True,
        table=_table(run, found, counts),
    )


def _counted(experts: list[Fate]) -> str:
    return ", ".join(f"{count} {form}" for form, count in Counter(fate.form for fate in experts).most_common())


def _table(run: RunRecord, found: dict[str, list[Fate]], counts: Counter[str]) -> Table:
    forms = [form for form, _ in counts.most_common()]
    rows = []
    for name, experts in found.items():
        own = Counter(fate.form for fate in experts)
        before, after = len(experts) * run.blocks[name].expert_bytes, sum(fate.bytes for fate in experts)
        cells = (
            str(len(experts)),
            str(stored_experts(run.plan.blocks[name], experts)),
            *(str(own[form]) for form in forms),
        )
        rows.append((name, *cells, quantity(after, "B"), share(after / before) if before else "–"))
    header = ("MoE block", "experts", "stored", *forms, "bytes", "of the original")
    return Table("Forms of each block", header, tuple(rows), folded=True)
