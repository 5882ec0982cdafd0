"""What a model lost by domain: scores of each kind of text, and which kind lost the most.

A mean hides that a model calibrated on prose forgot how to write code, so text whose domains are named is measured
domain by domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimum_moe.evaluation.scores import Score, UnitScores

LOSS = "kl"
"""The score that domains are compared by."""


@dataclass(frozen=True)
class WorstDomain:
    """The domain that lost the most.

    Args:
        name: The domain.
        kl: Its KL to the original in nats a token.
        mean: Mean of the KL of all domains, each counted once.
    """

    name: str
    kl: float
    mean: float

    @classmethod
    def of(cls, domains: Mapping[str, Mapping[str, Score]]) -> WorstDomain | None:
        """The worst of some domains; None without domains, or where no original was compared with."""
        losses = {name: scores[LOSS].value for name, scores in domains.items() if LOSS in scores}
        return cls.among(losses) if losses else None

    @classmethod
    def among(cls, losses: Mapping[str, float]) -> WorstDomain:
        """The worst of at least one domain."""
        name = max(losses, key=lambda domain: losses[domain])
        return cls(name, losses[name], sum(losses.values()) / len(losses))

    @property
    def over_mean(self) -> float:
        """Its loss over the mean: 1 if all domains lost as much, at most their number."""
        return self.kl / self.mean if self.mean > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"name": self.name, "kl": self.kl, "mean": self.mean, "over_mean": self.over_mean}


def joined_units(parts: Sequence[Mapping[str, UnitScores]]) -> dict[str, UnitScores]:
    """The units of several domains as those of one text."""
    return {
        name: UnitScores(
            tuple(value for part in parts for value in part[name].total),
            tuple(value for part in parts for value in part[name].weight),
            units.exponential,
        )
        for name, units in parts[0].items()
    }


def joined_description(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of several domains' text as that of one text."""
    if len(descriptions) == 1:
        return dict(descriptions[0])
    hashes = "".join(str(own["hash"]) for own in descriptions)
    return {
        **descriptions[0],
        "sources": [source for own in descriptions for source in own["sources"]],
        "num_tokens": sum(own["num_tokens"] for own in descriptions),
        "num_batches": sum(own["num_batches"] for own in descriptions),
        "hash": hashlib.sha256(hashes.encode()).hexdigest(),
    }
