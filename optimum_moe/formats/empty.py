"""The empty format: nothing is left of an expert but its down bias, where it has one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert
from optimum_moe.algorithms.expert_fitter import ExpertFitter, NarrowExpert
from optimum_moe.formats.base import ExpertFormat, Layout, StoredPart, TensorSpec, register_format
from optimum_moe.formats.budget_format import BudgetFormat, Trial
from optimum_moe.formats.stored import StoredExpert, without_neurons


@register_format
class Empty(ExpertFormat, BudgetFormat):
    """`bias` (1, H), where experts have a down bias."""

    name = "empty"
    needs_tokens = False

    def tensors(self, size: int, hidden_size: int, has_bias: bool) -> dict[str, TensorSpec]:
        """The down bias."""
        return {"bias": TensorSpec((1, hidden_size))} if has_bias else {}

    def values(self, part: StoredPart | None, bias_H: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The down bias."""
        return {} if bias_H is None else {"bias": bias_H.unsqueeze(0)}

    def forward(self, tensors: Mapping[str, torch.Tensor], input_PH: torch.Tensor) -> torch.Tensor:
        """The down bias."""
        return tensors["bias"]

    def constant(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The down bias, whatever the input."""
        return tensors["bias"][0]

    def widths(self, inner: int, can_narrow: bool) -> Collection[int]:
        """Always zero neurons."""
        return {0}

    def candidates(self, trial: Trial, narrow: NarrowExpert) -> Iterator[tuple[Candidate, float]]:
        """Leaving the expert out."""
        yield Candidate(self.name, 0), trial.estimate.empty_damage

    def layout(self, candidate: Candidate, gated: bool) -> Layout:
        """Empty, since there are no matrices."""
        return {}

    def build(self, expert: Expert, fitter: ExpertFitter, candidate: Candidate) -> StoredExpert:
        """The expert without its neurons."""
        return without_neurons(expert)
