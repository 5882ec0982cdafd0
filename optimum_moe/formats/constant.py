"""The constant format: an expert becomes half of its mean output, for which the router goes on selecting it.

MoNE (arXiv:2507.00390) replaces redundant experts so; vLLM calls them approximate experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert
from optimum_moe.algorithms.expert_fitter import ExpertFitter, NarrowExpert
from optimum_moe.formats.base import ExpertFormat, Layout, StoredPart, TensorSpec, register_format
from optimum_moe.formats.budget_format import BudgetFormat, Trial
from optimum_moe.formats.stored import StoredExpert, without_neurons

# Share of the mean output that is stored, and of the gain over an empty expert that is counted on: what is good for one
# layer by itself is less so where others change as well. On the two reference models half of the mean loses less than
# all of it, and less than nothing.
_SHARE = 0.5
_CERTAIN = 0.5


@register_format
class Constant(ExpertFormat, BudgetFormat):
    """`approx_value` (1, H), the down bias included, of size 1; the name is that of vLLM."""

    name = "constant"

    def tensors(self, size: int, hidden_size: int, has_bias: bool) -> dict[str, TensorSpec]:
        """The stored output."""
        return {"approx_value": TensorSpec((1, hidden_size))}

    def values(self, part: StoredPart | None, bias_H: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The mean output and the down bias."""
        assert part is not None
        output_1H = part.tensors["approx_value"]
        return {"approx_value": output_1H if bias_H is None else output_1H + bias_H.to(output_1H)}

    def forward(self, tensors: Mapping[str, torch.Tensor], input_PH: torch.Tensor) -> torch.Tensor:
        """The output, whatever the input."""
        return tensors["approx_value"]

    def constant(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The stored output, whatever the input."""
        return tensors["approx_value"][0]

    def widths(self, inner: int, can_narrow: bool) -> Collection[int]:
        """Always zero neurons."""
        return {0}

    def candidates(self, trial: Trial, narrow: NarrowExpert) -> Iterator[tuple[Candidate, float]]:
        """What is stored, by the fitted tokens."""
        output_1H = _SHARE * _mean(trial.fitter)
        (damage,) = trial.estimate.of_sums(lambda input_PH: input_PH.new_ones(len(input_PH), 1), output_1H, [1])
        yield Candidate(self.name, 0, 1), trial.expected(damage, _CERTAIN)

    def layout(self, candidate: Candidate, gated: bool) -> Layout:
        """Empty, since there are no matrices."""
        return {}

    def build(self, expert: Expert, fitter: ExpertFitter, candidate: Candidate) -> StoredExpert:
        """No neurons, and half of the mean output on all tokens."""
        return without_neurons(expert, constant_part(_SHARE * _mean(fitter), expert.up_IH.dtype))


def constant_part(output_1H: torch.Tensor, dtype: torch.dtype) -> StoredPart:
    """What stands in the place of an expert: this output, whatever the input."""
    return StoredPart(Constant.name, 1, {"approx_value": output_1H.to(dtype)})


def _mean(fitter: ExpertFitter) -> torch.Tensor:
    """(1, H) mean output without the down bias, weighted as the loss is."""
    loss = fitter.loss
    weight_P1 = loss.weight_P[:, None].to(loss.input_PH.dtype)
    hidden_PI = fitter.expert.activated(loss.stacked_PO)
    total = weight_P1.sum()
    return (weight_P1 * hidden_PI).sum(0, keepdim=True) @ fitter.expert.down_HI.T / (total if total > 0 else 1.0)
