"""A score with its confidence interval, and the scores of single windows, questions or prompts it is computed from.

Every score is a ratio of sums over units (for example the negative log-likelihood of all windows over their tokens), so
one seeded bootstrap over units applies to all of them, and two models on the same units can be compared in pairs.

Shape letters: N units, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
CONFIDENCE = 0.95

# Maximum number of indices drawn at once, which bounds the memory of the bootstrap.
_INDICES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Score:
    """One score with its interval.

    Args:
        value: the point estimate.
        low: lower end of its 95% bootstrap interval over units.
        high: upper end. An interval over few units, or over units that all agree, is too narrow.
        count: number of units (windows, questions, prompts).
    """

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class UnitScores:
    """The units of a score: value = sum(total) / sum(weight), exponentiated for a perplexity.

    Args:
        total: N sums, one per unit.
        weight: N divisors, one per unit (tokens of a window; 1 for a question).
        exponential: whether the score is the exponential of the ratio.
    """

    total: tuple[float, ...]
    weight: tuple[float, ...]
    exponential: bool = False

    @classmethod
    def of(cls, total: Tensor, weight: Tensor | None = None, exponential: bool = False) -> UnitScores:
        """Create from tensors of shape (N,); the default weight is 1."""
        weight = torch.ones_like(total) if weight is None else weight
        return cls(tuple(total.double().tolist()), tuple(weight.double().tolist()), exponential)

    def value(self) -> float:
        """The point estimate over all units."""
        return float(self._over(torch.arange(len(self.total))[None])[0])

    def resampled(self, seed: int, resamples: int = RESAMPLES) -> Tensor:
        """Scores of R bootstrap resamples of the units, (R,) float64; the same seed and N give the same resamples."""
        return torch.cat([self._over(index) for index in _resample(len(self.total), seed, resamples)])

    def summary(self, seed: int, resamples: int = RESAMPLES) -> Score:
        """The score with its interval."""
        low, high = interval(self.resampled(seed, resamples))
        return Score(self.value(), low, high, len(self.total))

    def _over(self, index_RN: Tensor) -> Tensor:
        total = torch.tensor(self.total, dtype=torch.float64)[index_RN].sum(-1)
        ratio = total / torch.tensor(self.weight, dtype=torch.float64)[index_RN].sum(-1)
        return ratio.exp() if self.exponential else ratio


def interval(samples_R: Tensor) -> tuple[float, float]:
    """The central 95% of bootstrap samples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(samples_R, torch.tensor([tail, 1 - tail], dtype=samples_R.dtype)).tolist()
    return low, high


def paired_interval(a: UnitScores, b: UnitScores, seed: int, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Difference a - b of two scores of the same units and its 95% interval, with the same resamples for both."""
    low, high = interval(a.resampled(seed, resamples) - b.resampled(seed, resamples))
    return a.value() - b.value(), low, high


def _resample(units: int, seed: int, resamples: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _INDICES_AT_ONCE // units)
    for start in range(0, resamples, step):
        yield torch.randint(units, (min(step, resamples - start), units), generator=generator)
