"""What the checkpoint scored, and what a sweep found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from shlex import quote
from typing import Any

from optimum_moe.reporting.page.drawing import Axis, line_path, point_path, whisker_path, x_ticks, y_ticks
from optimum_moe.reporting.page.elements import Chart, Element, Line, Missing, Section, Table, Text
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.words import byte_unit, quantity
from optimum_moe.reporting.scores import (
    EVALUATION,
    REFERENCE,
    SWEEP,
    domain_rows,
    measured_on,
    score_rows,
    worst_domain,
)


def quality(run: RunRecord) -> Section:
    """Scores with their intervals, by domain too where the text names some."""
    scores = run.report.get(EVALUATION)
    if scores is None:
        missing = Missing(
            "This checkpoint was not evaluated yet, so nothing here says how good it is.",
            "Measure it on text that it was not calibrated on, and add the scores:",
            f"optimum-cli moe evaluate {quote(run.name)} --reference {quote(run.original)} --text HELD_OUT "
            f"--output scores.json\n{run.command('--evaluation scores.json')}",
        )
        return Section("quality", "How good it is", [missing])
    header, rows = score_rows(scores, run.report.get(REFERENCE))
    elements: list[Element] = [Table("Scores", header, rows)]
    header, rows = domain_rows(scores)
    if rows:
        elements.append(Table("Scores by domain", header, rows))
    elements += [Text(said) for said in (worst_domain(scores), measured_on(scores.get("data", {}))) if said]
    return Section("quality", "How good it is", elements)


def sweep(run: RunRecord) -> Section | None:
    """What a sweep over recipes and sizes found on this model; None if there is none."""
    found = run.report.get(SWEEP)
    if not found:
        return None
    trials = [trial for trial in found if trial.get("kl") is not None]
    element = _pareto(trials, _trials(found)) if trials else replace(_trials(found), folded=False)
    return Section("sweep", "Other recipes and sizes", [element])


def _trials(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            trial["recipe"],
            trial["size"],
            quantity(trial["bytes"], "B") if trial["bytes"] else "–",
            "–" if trial.get("kl") is None else f"{trial['kl']:.4f}",
            "–" if trial.get("perplexity") is None else f"{trial['perplexity']:.2f}",
            f"refused: {trial['refused']}" if trial.get("refused") else "yes" if trial["plain"] else "no",
        )
        for trial in found
    )
    header = ("recipe", "size", "checkpoint", "KL", "perplexity", "loads without this package")
    return Table("All trials", header, rows, folded=True)


def _pareto(trials: Sequence[Mapping[str, Any]], table: Table) -> Chart:
    step, prefix = byte_unit(max(trial["bytes"] for trial in trials))
    x, y = Axis.of(trial["bytes"] / step for trial in trials), Axis.of((t["kl"] for t in trials), is_log=True)
    lines = []
    for style, recipe in enumerate(dict.fromkeys(trial["recipe"] for trial in trials)):
        own = sorted((t["bytes"] / step, t["kl"], t["low"], t["high"]) for t in trials if t["recipe"] == recipe)
        points = [(at, value) for at, value, _, _ in own]
        whiskers = whisker_path([(at, low, high) for at, _, low, high in own], x, y)
        lines.append(Line(str(style % 7), recipe, line_path(points, x, y), point_path(points, x, y), whiskers))
    front: list[tuple[float, float]] = []
    for at, value in sorted((t["bytes"] / step, t["kl"]) for t in trials):
        if not front or value < front[-1][1]:
            front.append((at, value))
    lines.append(Line("front", "best of all", line_path(front, x, y, steps=True)))
    return Chart(
        identifier="pareto",
        title="KL to the original against the size of the checkpoint",
        description="Lower and further left is better; whiskers are 95% intervals.",
        lines=tuple(lines),
        x_label=f"checkpoint ({prefix})",
        x_ticks=x_ticks(x),
        y_label="KL (nats a token, logarithmic)",
        y_ticks=y_ticks(y),
        table=table,
    )
