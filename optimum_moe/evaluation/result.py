"""Results of an evaluation: scores with intervals, the scores of single units, a table, and paired differences."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from optimum_moe.calibration.documents import did_you_mean
from optimum_moe.evaluation.domains import WorstDomain
from optimum_moe.evaluation.scores import Score, UnitScores, paired_interval

_DIGITS = {"perplexity": 3, "kl": 5}


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model.

    Args:
        scores: by name, in this order if computed: `perplexity`; `kl` (nats per token), `top1_agreement` and
            `perplexity_ratio` against the reference; `choice_accuracy`; `generation_agreement` and
            `prefix_agreement` with the reference's continuation; `loop_rate`.
        units: by the same names, the scores of single windows, questions or prompts.
        data: record of the text, settings, the overlap with calibration data if checked, and the worst domain if there
            are domains, as JSON values.
        domains: scores by domain, by the same names; empty if the text names no domains.
    """

    scores: dict[str, Score]
    units: dict[str, UnitScores] = field(repr=False)
    data: dict[str, Any] = field(repr=False)
    domains: dict[str, dict[str, Score]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        units: Mapping[str, UnitScores],
        data: Mapping[str, Any],
        seed: int,
        domains: Mapping[str, Mapping[str, UnitScores]] | None = None,
    ) -> EvaluationResult:
        """Compute scores from units, with bootstrap intervals of the given seed."""
        scores = {name: _summaries(own, seed) for name, own in (domains or {}).items()}
        worst = WorstDomain.of(scores)
        found = {} if worst is None else {"worst_domain": worst.to_dict()}
        return cls(_summaries(units, seed), dict(units), {**data, **found}, scores)

    @property
    def worst_domain(self) -> WorstDomain | None:
        """The domain with the largest KL to the reference; None without domains or reference."""
        return WorstDomain.of(self.domains)

    def joined(self, other: EvaluationResult) -> EvaluationResult:
        """Both results of one model, with the record of the other under `tasks_data`."""
        data = {**self.data, "tasks_data": other.data}
        units, domains = {**self.units, **other.units}, {**self.domains, **other.domains}
        return EvaluationResult({**self.scores, **other.scores}, units, data, domains)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    def summary(self) -> dict[str, Any]:
        """All fields but the scores of single units, which are only for comparisons, as JSON values."""
        return {name: value for name, value in self.to_dict().items() if name != "units"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationResult:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file has other content.
        """
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or set(raw) != {"scores", "units", "data", "domains"}:
            raise ValueError(f"{path} is not a saved EvaluationResult. Pass a file written by EvaluationResult.save.")
        units = {
            name: UnitScores(tuple(unit["total"]), tuple(unit["weight"]), unit["exponential"])
            for name, unit in raw["units"].items()
        }
        domains = {name: _scores(own) for name, own in raw["domains"].items()}
        return cls(_scores(raw["scores"]), units, raw["data"], domains)


def _scores(raw: Mapping[str, Any]) -> dict[str, Score]:
    return {name: Score(**score) for name, score in raw.items()}


def _summaries(units: Mapping[str, UnitScores], seed: int) -> dict[str, Score]:
    return {name: unit.summary(seed) for name, unit in units.items()}


def paired_difference(
    result_a: EvaluationResult, result_b: EvaluationResult, score: str, seed: int = 0
) -> tuple[float, float, float]:
    """Difference a - b of one score, with a 95% interval from resampling the units that both models were scored on.

    This is much narrower than a comparison of the two intervals, since the same texts are hard for both models.

    Args:
        result_a: result of one model.
        result_b: result of another model, on the same text with the same settings.
        score: name of the score.
        seed: seed of the bootstrap, default 0.

    Returns:
        (difference, low, high).

    Raises:
        ValueError: a result lacks the score, or the results are from different text.
    """
    _check_paired(result_a, result_b, score)
    return paired_interval(result_a.units[score], result_b.units[score], seed)


def mcnemar(result_a: EvaluationResult, result_b: EvaluationResult, score: str) -> tuple[int, int, float]:
    """Exact McNemar test of two models on the same questions: whether they are right equally often.

    Only questions that one of them answers and the other does not say anything about that (McNemar 1947); their number
    is compared with a fair coin.

    Args:
        result_a: result of one model.
        result_b: result of another model, on the same questions.
        score: name of a score whose units are right (1) or wrong (0).

    Returns:
        (questions that only a answers, questions that only b answers, two-sided p).

    Raises:
        ValueError: a result lacks the score, its units are not 0 or 1, or the results are from different text.
    """
    _check_paired(result_a, result_b, score)
    right_a, right_b = (result.units[score] for result in (result_a, result_b))
    other = {value for units in (right_a, right_b) for value in units.total if value not in (0, 1)}
    if other or right_a.exponential or {*right_a.weight, *right_b.weight} != {1.0}:
        raise ValueError(
            f"McNemar's test compares right and wrong answers, and {score!r} has other units. Use paired_difference."
        )
    pairs = list(zip(right_a.total, right_b.total, strict=True))
    only_a, only_b = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _check_paired(result_a: EvaluationResult, result_b: EvaluationResult, score: str) -> None:
    for result in (result_a, result_b):
        if score not in result.units:
            names = list(result.units)
            raise ValueError(f"No score {score!r}{did_you_mean(score, names) or '.'} The result has {names}.")
    for key in ("hash", "seed", "sequence_length", "num_questions", "num_prompts", "new_tokens"):
        if result_a.data.get(key) != result_b.data.get(key):
            raise ValueError(
                f"The results differ in {key} ({result_a.data.get(key)} and {result_b.data.get(key)}), so their units "
                "cannot be paired. Evaluate both on the same text with the same settings."
            )


def compare_results(results: Mapping[str, EvaluationResult], reference: EvaluationResult) -> str:
    """Lines that compare models with the original on the same documents, in pairs.

    For each score of right and wrong answers the difference with its 95% bootstrap interval, and McNemar's test.

    Args:
        results: by name; of their scores those that the original has too.
        reference: the original's.
    """
    lines = []
    for name, result in results.items():
        for score, units in reference.units.items():
            if score not in result.units or {*units.total, *result.units[score].total} - {0.0, 1.0}:
                continue
            own = EvaluationResult(result.scores, result.units, result.data.get("tasks_data", result.data))
            difference, low, high = paired_difference(own, reference, score)
            only_original, only_own, p = mcnemar(reference, own, score)
            lines.append(
                f"{name}, {score}: {difference:+.4f} [{low:+.4f}, {high:+.4f}] against the original; {only_original} "
                f"answers lost, {only_own} won, p = {p:.3g} (McNemar)"
            )
    return "\n".join(lines)


def format_results(results: Mapping[str, EvaluationResult]) -> str:
    """A plain text table: one row per score with its n units, one column per model, each cell with its 95% interval.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("There is no result to print. Pass at least one.")
    names = list(dict.fromkeys(name for result in results.values() for name in result.scores))
    rows = [["score", *results]]
    for name in names:
        rows.append([_label(name, results), *(_cell(name, result.scores.get(name)) for result in results.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _label(name: str, results: Mapping[str, EvaluationResult]) -> str:
    counts = {result.scores[name].count for result in results.values() if name in result.scores}
    return f"{name} (n={counts.pop()})" if len(counts) == 1 else name


def _cell(name: str, score: Score | None) -> str:
    if score is None:
        return "-"
    digits = _DIGITS.get(name, 4)
    value, low, high = (_number(number, digits) for number in (score.value, score.low, score.high))
    return f"{value} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    """A number with as many decimals, or its magnitude where these would be zeros."""
    text = f"{value:.{digits}f}"
    return text if value == 0 or float(text) else f"{value:.0e}"
