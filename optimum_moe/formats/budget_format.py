"""The protocol of formats that a byte budget may choose: which candidates they offer, and how one of them is built."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert
from optimum_moe.algorithms.expert_fitter import ExpertFitter, HeldOutEstimate, NarrowExpert
from optimum_moe.algorithms.ranks import STEP
from optimum_moe.formats.base import DEFAULT, PROJECTIONS, Format, Layout, all_formats
from optimum_moe.formats.stored import StoredExpert

# Widths at which matrices in other formats are tried, as shares of all neurons.
_WIDTHS = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Trial:
    """What candidates of one expert are made of and measured by.

    Args:
        expert: The expert.
        fitter: Fits to every other of its tokens.
        estimate: Of what fits lose on other tokens.
        among: Candidates of costly formats that are tried, None for all.
    """

    expert: Expert
    fitter: ExpertFitter
    estimate: HeldOutEstimate
    among: Collection[Candidate] | None = None

    def wants(self, candidate: Candidate) -> bool:
        """Whether a candidate of a costly format is tried."""
        return self.among is None or candidate in self.among

    def expected(self, damage: float, certain: float) -> float:
        """The damage, if only this share of what it is smaller by than an empty expert's is certain."""
        empty = self.estimate.empty_damage
        return max(0.0, empty - certain * (empty - damage))


class BudgetFormat(Format):
    """A format that a byte budget may choose for an expert."""

    needs_tokens: ClassVar[bool] = True
    """False for those that every expert has, with tokens or without, and that no choice of formats leaves out."""
    by_default: ClassVar[bool] = True
    """Whether it is tried where nothing says which formats are."""
    is_costly: ClassVar[bool] = False
    """Whether its candidates take so long that some experts of a block tell first which are worth it."""

    def widths(self, inner: int, can_narrow: bool) -> Collection[int]:
        """Numbers of neurons at which it is tried, of `inner`; `can_narrow` tells whether fewer may be kept at all."""
        return {min(inner, rounded(inner * share)) for share in _WIDTHS} if can_narrow else {inner}

    @abstractmethod
    def candidates(self, trial: Trial, narrow: NarrowExpert) -> Iterator[tuple[Candidate, float]]:
        """Candidates at a width, each with its expected damage."""

    @abstractmethod
    def layout(self, candidate: Candidate, gated: bool) -> Layout:
        """What a candidate stores of each projection; `{}` for an expert without neurons."""

    @abstractmethod
    def build(self, expert: Expert, fitter: ExpertFitter, candidate: Candidate) -> StoredExpert:
        """The expert as a candidate says, in its dtype.

        Args:
            expert: The expert.
            fitter: Fits to all of its tokens.
            candidate: One of this format.
        """


def dense_layout(gated: bool) -> Layout:
    """The layout of an expert whose matrices are all dense."""
    return {name: {DEFAULT: 1} for name in PROJECTIONS if gated or name != "gate"}


def budget_formats() -> tuple[str, ...]:
    """Names of the formats that a byte budget tries by default between an empty expert and an untouched one."""
    return tuple(form.name for form in all_formats(BudgetFormat) if form.needs_tokens and form.by_default)


def rounded(value: float) -> int:
    """The nearest size that grouped matrix products take, at least one step."""
    return max(STEP, round(value / STEP) * STEP)
