"""What training after the cut won back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimum_moe.reporting.page.drawing import Axis, line_path, point_path, x_ticks, y_ticks
from optimum_moe.reporting.page.elements import Chart, Element, Line, Section, Table, Text
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.words import nats


def training(run: RunRecord) -> Section | None:
    """Curves of the training after the cut; None if nothing was trained."""
    record = run.training
    if record is None:
        return None
    said = (
        f"KL to {record.teacher} on held-out text, in nats a token: {nats(record.kl_before)} before, "
        f"{nats(record.kl_after)} after, from step {record.best_step} of {record.steps}. Training ended "
        f"{record.stopped}."
    )
    series = {"KL to the original on held-out text": record.curve, "loss on the training text": record.losses}
    elements: list[Element] = [Text(said)]
    if len(record.curve) > 1:
        elements.append(_curves(series))
    return Section("training", "What training won back", elements)


def _curves(series: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    points = {label: [(float(step), float(value)) for step, value in own] for label, own in series.items()}
    every = [point for own in points.values() for point in own]
    x, y = Axis.of(step for step, _ in every), Axis.of((value for _, value in every), from_zero=True)
    lines = tuple(
        Line(str(style), label, line_path(own, x, y), point_path(own, x, y))
        for style, (label, own) in enumerate(points.items())
        if own
    )
    rows = tuple((label, f"{step:g}", f"{value:.5f}") for label, own in points.items() for step, value in own)
    return Chart(
        identifier="training-curves",
        title="Held-out KL and training loss by step",
        description="Lower is better; what was written is from the step with the least KL on held-out text.",
        lines=lines,
        x_label="step",
        x_ticks=x_ticks(x),
        y_label="nats a token",
        y_ticks=y_ticks(y),
        table=Table("Measurements", ("what", "step", "value"), rows, folded=True),
    )
