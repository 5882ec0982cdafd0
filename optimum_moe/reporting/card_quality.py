"""Scores in a model card: a section for readers, and `model-index` for the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from optimum_moe.reporting.scores import EVALUATION, REFERENCE, domain_rows, measured_on, score_rows, worst_domain

_TITLE = "## Quality"
_NOT_MEASURED = f"""{_TITLE}

This card states sizes; it makes no claim about quality. Measure it on your task with `optimum-cli moe evaluate`, and
add the scores with `optimum-cli moe report --evaluation`."""


def quality_section(report: Mapping[str, Any]) -> str:
    """Section of the scores that the report's file has, or of how to get them."""
    evaluation = report.get(EVALUATION)
    if evaluation is None:
        return _NOT_MEASURED
    header, rows = score_rows(evaluation, report.get(REFERENCE))
    said = [_TITLE, _table(header, rows), measured_on(evaluation.get("data", {}))]
    header, rows = domain_rows(evaluation)
    if rows:
        said += [_table(header, rows), worst_domain(evaluation)]
    return "\n\n".join(said).rstrip()


def _table(header: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    # The first column names the row, the others are numbers.
    rule = ("---", *("---:",) * (len(header) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def eval_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """The scores that the report's file has, as the Hub's metadata name them."""
    evaluation = report.get(EVALUATION)
    if evaluation is None:
        return []
    data = evaluation.get("data", {})
    sources = [str(source.get("name")) for source in data.get("sources", ())] or ["held-out text"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            # Scores of tasks are called task/metric.
            dataset_name=name.rpartition("/")[0] or ", ".join(sources),
            metric_type=name.rpartition("/")[2],
            metric_value=round(score["value"], 6),
            metric_args={"interval_95": [round(score["low"], 6), round(score["high"], 6)], "units": score["count"]},
        )
        for name, score in evaluation["scores"].items()
    ]


def update_card(file: Path, name: str, report: Mapping[str, Any]) -> None:
    """Write the scores of the report's file into the card of a finished checkpoint; what else it says stays.

    Args:
        file: `README.md`; nothing is done if there is none.
        name: What the checkpoint is called.
        report: Content of the report's file.
    """
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    pattern = re.compile(rf"^{_TITLE}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    section = f"{quality_section(report)}\n\n"
    text = pattern.sub(lambda _: section, text, count=1) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    card = ModelCard(text, ignore_metadata_errors=True)
    assert isinstance(card.data, ModelCardData)
    card.data.eval_results, card.data.model_name = eval_results(report), name
    file.write_text(str(card), encoding="utf-8", errors="surrogateescape")
