"""The narrow format: an expert with fewer neurons, whose down projection takes over what it can of the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert
from optimum_moe.algorithms.expert_fitter import ExpertFitter, NarrowExpert
from optimum_moe.algorithms.ranks import STEP
from optimum_moe.formats.base import Layout, register_format
from optimum_moe.formats.budget_format import BudgetFormat, Trial, dense_layout
from optimum_moe.formats.stored import StoredExpert, stored_matrix

# About as many widths are tried, evenly.
_WIDTHS = 16


@register_format
class Narrow(BudgetFormat):
    """Dense matrices of some neurons, which are chosen by optimal brain surgeon on whole columns."""

    name = "narrow"

    def widths(self, inner: int, can_narrow: bool) -> Collection[int]:
        """Multiples of 8 below all neurons, and the widths of other formats."""
        step = max(1, round(inner / (STEP * _WIDTHS))) * STEP
        return (set(range(step, inner, step)) | set(super().widths(inner, can_narrow))) - {inner} if can_narrow else ()

    def candidates(self, trial: Trial, narrow: NarrowExpert) -> Iterator[tuple[Candidate, float]]:
        """The expert at this width."""
        neurons = len(narrow.kept_N)
        yield Candidate(self.name, neurons), float(trial.estimate.by_neurons_I1[neurons])

    def layout(self, candidate: Candidate, gated: bool) -> Layout:
        """Every matrix dense."""
        return dense_layout(gated)

    def build(self, expert: Expert, fitter: ExpertFitter, candidate: Candidate) -> StoredExpert:
        """Gate and up of the neurons that stay, and a refitted down projection."""
        dtype, narrow = expert.up_IH.dtype, fitter.narrowed(candidate.neurons)
        gate_NH = narrow.expert.gate_IH
        return StoredExpert(
            up=stored_matrix(narrow.expert.up_IH.to(dtype)),
            down=stored_matrix(fitter.loss.outputs.down(narrow.made_SN).to(dtype)),
            gate=None if gate_NH is None else stored_matrix(gate_NH.to(dtype)),
            neurons=narrow.kept_N,
        )
