"""The report of a compressed folder, written again with what was measured since: statistics, scores, a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_moe.algorithms.grouping import dendrogram
from optimum_moe.algorithms.similarity import gram_similarity
from optimum_moe.checkpoint.identity import first_difference
from optimum_moe.evaluation.result import EvaluationResult
from optimum_moe.evaluation.side_by_side import side_by_side
from optimum_moe.plan import CompressionPlan
from optimum_moe.reporting.card_quality import update_card
from optimum_moe.reporting.loads_in import write_report_file
from optimum_moe.reporting.page import PAGE_FILE, RunRecord, write_page
from optimum_moe.reporting.page.merges import TREES
from optimum_moe.reporting.page.run_record import check_is_run, read_report
from optimum_moe.reporting.scores import EVALUATION, REFERENCE, SIDE_BY_SIDE, SWEEP
from optimum_moe.statistics import BlockStatistics, Statistics
from optimum_moe.sweep import Sweep

_MOST_TREES = 8
"""Blocks whose trees are shown, evenly among all."""
_DIGITS = 5


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    statistics: Statistics | str | Path | None = None,
    evaluation: EvaluationResult | str | Path | None = None,
    reference: EvaluationResult | str | Path | None = None,
    sweep: Sweep | str | Path | None = None,
    original: PreTrainedModel | str | Path | None = None,
    text: Any = None,
) -> Path:
    """Write the report of a compressed checkpoint: one HTML file that needs no network.

    `compress` writes one too. What is added here is kept in the folder's `compression_report.json`, so that later
    reports have it as well, unless `output` names another file: then the folder stays as it is.

    Args:
        folder: A folder that `MoECompressor.save_pretrained` or `optimum-cli moe compress` wrote.
        output: File to write; default `report.html` in the folder.
        statistics: Statistics of the original, or their folder: how often each expert was used, and trees of the
            experts' similarity where they were merged.
        evaluation: Scores of the checkpoint, or the file of `EvaluationResult.save`.
        reference: Scores of the original in the same evaluation, shown beside them.
        sweep: What a sweep found on this model, or its folder.
        original: The original, its folder or Hub id: it is run beside the checkpoint on `text`, for the error of every
            block and layer, and for continuations of both with their differences.
        text: Text for that, which the checkpoint was not calibrated on; the report quotes three pieces of it.

    Returns:
        The file.

    Raises:
        ValueError: If the folder is not one that `compress` wrote, or something given belongs to another model.
    """
    folder = Path(folder).expanduser()
    check_is_run(folder)
    report = read_report(folder)
    if statistics is not None:
        report = _with_statistics(report, CompressionPlan.from_pretrained(folder), _statistics(statistics))
    if reference is not None and evaluation is None and EVALUATION not in report:
        raise ValueError("reference= is shown beside the scores of the checkpoint. Pass these too, as evaluation=.")
    for key, scores in ((EVALUATION, evaluation), (REFERENCE, reference)):
        if scores is not None:
            report[key] = _scores(scores)
    if sweep is not None:
        found = sweep if isinstance(sweep, Sweep) else Sweep.load(sweep)
        report[SWEEP] = [outcome.to_dict() for outcome in found.outcomes]
    if (original is None) != (text is None):
        raise ValueError("original= and text= belong together: both models are run on the text. Give both, or none.")
    if original is not None:
        plan = CompressionPlan.from_pretrained(folder)
        compared = side_by_side(folder, original, text, blocks=list(plan.blocks), dropped=plan.dropped)
        report[SIDE_BY_SIDE] = compared.to_dict()
    run = RunRecord.read(folder, folder.resolve().name, report)
    file = folder / PAGE_FILE if output is None else Path(output).expanduser()
    _check_file(file)
    if output is None and report != read_report(folder):
        write_report_file(folder, report)
        update_card(folder / "README.md", run.name, report)
    write_page(run, file)
    return file


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise ValueError(f"{file} is a folder. Give a file, such as {file / PAGE_FILE}.")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {file.absolute().parent}. Create it, or choose another file.")


def _statistics(given: Statistics | str | Path) -> Statistics:
    return given if isinstance(given, Statistics) else Statistics.from_pretrained(Path(given).expanduser())


def _with_statistics(report: Mapping[str, Any], plan: CompressionPlan, statistics: Statistics) -> dict[str, Any]:
    odd = first_difference(statistics.source, plan.source) if statistics.source and plan.source else None
    if odd is not None:
        raise ValueError(
            f"The statistics are of another model than the original of this checkpoint: they differ in {odd}. Give "
            "those that compress saved with --save-statistics, or observe the original again."
        )
    observed = _of_remaining(plan, statistics)
    blocks = {
        name: facts
        | {
            "tokens": observed[name].num_tokens,
            "routed": " ".join(str(int(count)) for count in observed[name].token_count_E.tolist()),
        }
        for name, facts in report["blocks"].items()
    }
    merged = [name for name, block in plan.blocks.items() if block.merges]
    seen = [name for name in merged if observed[name].router_gram_EE is not None]
    step = max(1, -(-len(seen) // _MOST_TREES))
    trees = {name: _tree(observed[name]) for name in seen[::step]}
    return {**report, "blocks": blocks, **({TREES: trees} if trees else {})}


def _of_remaining(plan: CompressionPlan, statistics: Statistics) -> dict[str, BlockStatistics]:
    """Statistics of each block of a plan, whose layers have other numbers than before if some were dropped."""
    kept = [
        block
        for name, block in statistics.blocks.items()
        if not any(name == layer or name.startswith(f"{layer}.") for layer in plan.dropped)
    ]
    same = [block.num_experts for block in plan.blocks.values()] == [block.num_experts for block in kept]
    if not same:
        raise ValueError(
            f"The statistics have {len(kept)} MoE blocks, and the plan has {len(plan.blocks)}, or their experts differ "
            "in number. Give statistics of the original of this checkpoint."
        )
    return dict(zip(plan.blocks, kept, strict=True))


def _tree(block: BlockStatistics) -> list[list[float]]:
    assert block.router_gram_EE is not None
    merges = dendrogram(gram_similarity(block.router_gram_EE), "average")
    return [[int(left), int(right), float(f"{at:.{_DIGITS}g}")] for left, right, at, _ in merges.tolist()]


def _scores(given: EvaluationResult | str | Path) -> dict[str, Any]:
    if not isinstance(given, EvaluationResult):
        file = Path(given).expanduser()
        if not file.is_file():
            raise ValueError(f"There is no file {file}. Give one that `optimum-cli moe evaluate --output` wrote.")
        given = EvaluationResult.load(file)
    return given.summary()
