"""The papers of what a recipe does, as the docstrings of its stages and of the functions that they name cite them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimum_moe.stages import registered_stages
from optimum_moe.stages.merge_choices import GROUPINGS, ROUTER_ROWS, SIMILARITIES, WEIGHTINGS
from optimum_moe.stages.saliency import SALIENCIES

_CHOICES = {
    "saliency": SALIENCIES,
    "similarity": SIMILARITIES,
    "grouping": GROUPINGS,
    "weighting": WEIGHTINGS,
    "router_rows": ROUTER_ROWS,
}


def papers(stages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Numbers on arXiv, in the order of the stages, each once.

    Args:
        stages: Name and settings of each stage.
    """
    return tuple(dict.fromkeys(number for stage in stages for number in _cited(stage)))


def _cited(stage: Mapping[str, Any]) -> Iterator[str]:
    described: list[Any] = [registered_stages().get(str(stage.get("stage")))]
    for setting, choice in _CHOICES.items():
        if stage.get(setting) in choice.functions:
            described.append(choice.functions[stage[setting]])
    for one in described:
        # Arguments cite what other settings do.
        text = (getattr(one, "__doc__", None) or "").partition("Args:")[0]
        yield from re.findall(r"arXiv[:\s]\s*(\d{4}\.\d{5})", text)
