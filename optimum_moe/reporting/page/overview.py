"""What was asked for, and what came out."""

from __future__ import annotations

from optimum_moe.reporting.card import describe_calibration, describe_cut
from optimum_moe.reporting.page.elements import Element, Section, Table, Text, Tile, Tiles
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
    counts = sorted({(old, new) for old, new in run.report["counts"].values()})
    olds, news = sorted({old for old, _ in counts}), sorted({new for _, new in counts})
    shown = [str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}" for found in (olds, news)]
    tiles.append(Tile("Experts of a block", shown[1], f"of {shown[0]}, in {len(run.plan.blocks)} blocks"))
    scored = (run.report.get(EVALUATION) or {}).get("scores", {})
    if "perplexity" in scored:
        original = (run.report.get(REFERENCE) or {}).get("scores", {}).get("perplexity")
        note = "of the held-out text" if original is None else f"{original['value']:.2f} for the original"
        tiles.append(Tile("Perplexity", f"{scored['perplexity']['value']:.2f}", note))
    elements: list[Element] = [
        Text(f"{run.original}, compressed by optimum_moe: {describe_cut(run.plan)}"),
        Tiles(tuple(tiles)),
        _asked(run),
        Table(
            "Sizes",
            ("", "original", "this model", "ratio"),
            tuple(
                (label, f"{before[key]:,.0f}", f"{after[key]:,.0f}", ratio(after[key], before[key]))
                for label, key, _ in _SIZES
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


def _asked(run: RunRecord) -> Table:
    rows = []
    for number, stage in enumerate(run.plan.stages, 1):
        settings = [f"{name} = {value}" for name, value in stage.items() if name != "stage" and value is not None]
        title = "stage" if len(run.plan.stages) == 1 else f"stage {number}"
        rows.append((title, f"{stage.get('stage')}: {', '.join(settings) or 'as it is by default'}"))
    if not rows:
        rows.append(("plan", "given"))
    rows.append(("calibration", describe_calibration(run.plan.calibration)))
    rows.append(("random choices", f"seed {run.plan.seed}"))
    return Table("What was asked", ("", "with its settings"), tuple(rows))
