"""Scores as the report's file records them, for the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EVALUATION, REFERENCE, SWEEP, SIDE_BY_SIDE = "evaluation", "reference_evaluation", "sweep", "side_by_side"
"""Keys in the report's file: scores, the original's scores, a sweep, and what both models did with the same text."""

_SCORES = {
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity over the original's",
    "kl": "KL to the original (nats a token)",
    "top1_agreement": "same most likely token as the original",
    "choice_accuracy": "true continuation chosen among four",
    "generation_agreement": "same tokens as the original, generated greedily",
    "prefix_agreement": "tokens up to the first difference from the original",
    "loop_rate": "continuations that loop",
}
_BY_DOMAIN = ("kl", "perplexity_ratio", "perplexity", "top1_agreement", "choice_accuracy", "loop_rate")
_DIGITS = {"perplexity": 2, "kl": 4}


def score_rows(
    evaluation: Mapping[str, Any], reference: Mapping[str, Any] | None
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of a table of scores with their intervals.

    Args:
        evaluation: Scores as the report's file records them.
        reference: The original's; None if they are not there.
    """
    original = (reference or {}).get("scores", {})
    rows = []
    for name, score in evaluation["scores"].items():
        other = _interval(name, original[name]) if name in original else ["–", "–"]
        rows.append((_SCORES.get(name, name), *_interval(name, score), *other, str(score["count"])))
    return ("score", "this model", "95% interval", "original", "95% interval", "units"), tuple(rows)


def _interval(name: str, score: Mapping[str, Any]) -> list[str]:
    digits = _DIGITS.get(name, 3)
    return [f"{score['value']:.{digits}f}", f"{score['low']:.{digits}f} to {score['high']:.{digits}f}"]


def measured_on(data: Mapping[str, Any]) -> str:
    """The text that scores are from, and what their intervals are, in two sentences."""
    names = ", ".join(str(source.get("name")) for source in data.get("sources", ())) or "text without a name"
    said = f"Measured on {names}"
    if data.get("num_tokens"):
        said += f", {data['num_tokens']:,} tokens"
    if data.get("hash"):
        said += f", sha256 {str(data['hash'])[:12]}"
    return f"{said}. Units are windows of text, questions or prompts; intervals are from a bootstrap over them."


def domain_rows(evaluation: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of a table of domains, the one that lost the most first; no rows if none was named.

    Args:
        evaluation: Scores as the report's file records them.
    """
    domains = evaluation.get("domains", {})
    names = [name for name in _BY_DOMAIN if any(name in scores for scores in domains.values())]
    ordered = sorted(domains, key=lambda domain: -domains[domain].get("kl", {"value": 0.0})["value"])
    rows = (
        (domain, *(" (".join(_interval(name, domains[domain][name])) + ")" for name in names)) for domain in ordered
    )
    return ("domain", *(_SCORES[name] for name in names)), tuple(rows)


def worst_domain(evaluation: Mapping[str, Any]) -> str:
    """A sentence on the domain that lost the most; empty where none was named, or no original was compared with."""
    worst = evaluation.get("data", {}).get("worst_domain")
    if worst is None:
        return ""
    return (
        f"{worst['name']} lost the most: {worst['kl']:.4f} nats a token, {worst['over_mean']:.2f} times the mean of "
        f"all domains ({worst['mean']:.4f})."
    )
