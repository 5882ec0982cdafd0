"""What was asked for, and what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimum_moe.reporting.card import describe_calibration, describe_cut
from optimum_moe.reporting.page.elements import Element, Section, Table, Text, Tile, Tiles
from optimum_moe.reporting.page.fates import Fate, fates, stored_experts
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.words import quantity, ratio
from optimum_moe.reporting.scores import EVALUATION, REFERENCE

_SIZES = (
    ("bytes of the weights", "bytes", "B"),
    ("parameters", "parameters", ""),
    ("FLOPs per token", "flops_upper", ""),
)


def overview(run: RunRecord) -> Section:
    """Sizes before and after, the settings of each stage, and what the run remarked."""
    before, after = run.report["before"], run.report["after"]
    tiles = [
        Tile(
            label[0].upper() + label[1:],
            quantity(after[key], unit),
            f"of {quantity(before[key], unit)}, x {ratio(after[key], before[key])}",
        )
        for label, key, unit in _SIZES
    ]
    found = {name: fates(plan, run.blocks[name]) for name, plan in run.plan.blocks.items()}
    stored = [stored_experts(plan, found[name]) for name, plan in run.plan.blocks.items()]
    shown = [_range(numbers) for numbers in (stored, [len(experts) for experts in found.values()])]
    tiles.append(Tile("Experts of a block", shown[0], f"of {shown[1]}, in {len(stored)} blocks"))
    scored = (run.report.get(EVALUATION) or {}).get("scores", {})
    if "perplexity" in scored:
        original = (run.report.get(REFERENCE) or {}).get("scores", {}).get("perplexity")
        note = "of the held-out text" if original is None else f"{original['value']:.2f} for the original"
        tiles.append(Tile("Perplexity", f"{scored['perplexity']['value']:.2f}", note))
    elements: list[Element] = [
        Text(f"Made from {run.original} by optimum_moe: {describe_cut(run.plan)}"),
        Tiles(tuple(tiles)),
        _asked(run),
        Table(
            "Sizes",
            ("", "original", "this model", "ratio"),
            (
                *((label, *_compared(before[key], after[key])) for label, key, _ in _SIZES),
                ("bytes of the experts", *_compared(*_bytes_of_experts(run, found))),
            ),
        ),
        Text("FLOPs are 2 x multiply-adds of all weight matmuls for one token, without attention scores."),
    ]
    layers = run.report.get("layers")
    if layers:
        dropped = ", ".join(run.plan.dropped)
        elements.append(Text(f"Layers with MoE blocks: {layers[0]} before, {layers[1]} after. Dropped: {dropped}."))
    trained = run.report.get("recovery")
    if trained:
        elements.append(Text(trained["says"]))
    elements += [Text(said) for said in (*run.report.get("only_values", ()), *run.plan.remarks)]
    return Section("overview", "What was asked, and what came out", elements)


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _compared(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:,.0f}", f"{after:,.0f}", ratio(after, before)


def _bytes_of_experts(run: RunRecord, found: Mapping[str, Sequence[Fate]]) -> tuple[float, float]:
    """Before and after, in all blocks."""
    before = sum(len(experts) * run.blocks[name].expert_bytes for name, experts in found.items())
    return before, sum(fate.bytes for experts in found.values() for fate in experts)


def _asked(run: RunRecord) -> Table:
    rows = []
    for number, stage in enumerate(run.plan.stages, 1):
        settings = [f"{name} = {value}" for name, value in stage.items() if name != "stage" and value is not None]
        title = "stage" if len(run.plan.stages) == 1 else f"stage {number}"
        rows.append((title, f"{stage.get('stage')}: {', '.join(settings) or 'as it is by default'}"))
    if not rows:
        rows.append(("plan", "given"))
    rows.append(("calibration", describe_calibration(run.plan.calibration)))
    rows.append(("seed", str(run.plan.seed)))
    return Table("What was asked", ("what", "value"), tuple(rows))
