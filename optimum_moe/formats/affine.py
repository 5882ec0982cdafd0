"""The affine format: an expert becomes a low-rank affine map of its input, for which the router goes on selecting it.

A "tilted novice" (arXiv:2610.41366): a constant that leans with the input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from optimum_moe.algorithms.affine import AffineFit
from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert
from optimum_moe.algorithms.expert_fitter import ExpertFitter, NarrowExpert
from optimum_moe.formats.base import ExpertFormat, Layout, StoredPart, TensorSpec, register_format
from optimum_moe.formats.budget_format import BudgetFormat, Trial
from optimum_moe.formats.stored import StoredExpert, without_neurons

# Ranks that a byte budget tries.
_RANKS = (1, 2, 4, 8, 16, 32)
# Share of the gain over an empty expert that is counted on: the map meets other inputs once the layers before it have
# changed. Where a tenth of the bytes stays of SmolLM2's experts, counting on all of it makes half of them maps, and the
# model worse than without any; the two reference models hardly care.
_CERTAIN = 0.8


@register_format
class Affine(ExpertFormat, BudgetFormat):
    """`affine_offset` (1, H), the down bias included, `affine_u` (R, H) and `affine_v` (R, H), of size R."""

    name = "affine"
    is_costly = True

    def tensors(self, size: int, hidden_size: int, has_bias: bool) -> dict[str, TensorSpec]:
        """What is added, and the two factors."""
        factor = TensorSpec((size, hidden_size))
        return {"affine_offset": TensorSpec((1, hidden_size)), "affine_u": factor, "affine_v": factor}

    def values(self, part: StoredPart | None, bias_H: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The fitted map and the down bias."""
        assert part is not None
        added_1H = part.tensors["affine_offset"]
        return {**part.tensors, "affine_offset": added_1H if bias_H is None else added_1H + bias_H.to(added_1H)}

    def forward(self, tensors: Mapping[str, torch.Tensor], input_PH: torch.Tensor) -> torch.Tensor:
        """(P, H) c + U V x."""
        offset_1H, left_RH, right_RH = (tensors[n].to(input_PH.dtype) for n in self.tensors(1, 1, False))
        return torch.addmm(offset_1H, input_PH @ right_RH.T, left_RH)

    def terms(self, part: StoredPart, input_PH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, 1 + R) one and V x; (H, 1 + R) c and U."""
        tensors = {name: tensor.to(input_PH.dtype) for name, tensor in part.tensors.items()}
        along_PR = input_PH @ tensors["affine_v"].T
        direction_RH = torch.cat([tensors["affine_offset"], tensors["affine_u"]])
        return _one_and(along_PR), direction_RH.T

    def with_directions(self, part: StoredPart, direction_HT: torch.Tensor) -> StoredPart:
        """Another c and U."""
        offset_1H, left_RH = direction_HT.T.to(part.tensors["affine_u"].dtype).split([1, part.size])
        changed = {"affine_offset": offset_1H.contiguous(), "affine_u": left_RH.contiguous()}
        return replace(part, tensors={**part.tensors, **changed})

    def multiply_adds(self, size: int, hidden_size: int) -> int:
        """Those of the two factors."""
        return 2 * size * hidden_size

    def describe(self, sizes: Sequence[int]) -> str:
        """Their number and the span of their ranks."""
        span = str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        return f"{len(sizes)} affine of rank {span}"

    def widths(self, inner: int, can_narrow: bool) -> Collection[int]:
        """Always zero neurons."""
        return {0}

    def candidates(self, trial: Trial, narrow: NarrowExpert) -> Iterator[tuple[Candidate, float]]:
        """Maps of a few ranks, each as good as it is on tokens that it was not fitted to."""
        hidden = trial.expert.up_IH.shape[1]
        ranks = [rank for rank in _RANKS if 2 * rank < hidden and trial.wants(Candidate(self.name, 0, rank))]
        if not ranks:
            return
        fit = _fit(trial.fitter, ranks[-1])
        outputs_RH = torch.cat([fit.output_H[None], fit.left_RH]).float()

        def terms(input_PH: torch.Tensor) -> torch.Tensor:
            return _one_and((input_PH - fit.input_H.to(input_PH)) @ fit.right_RH.to(input_PH).T)

        damages = trial.estimate.of_sums(terms, outputs_RH, [rank + 1 for rank in ranks])
        for rank, damage in zip(ranks, damages, strict=True):
            yield Candidate(self.name, 0, rank), trial.expected(damage, _CERTAIN)

    def layout(self, candidate: Candidate, gated: bool) -> Layout:
        """Empty, since there are no matrices."""
        return {}

    def build(self, expert: Expert, fitter: ExpertFitter, candidate: Candidate) -> StoredExpert:
        """No neurons, and the map of the candidate's rank."""
        return without_neurons(expert, affine_part(_fit(fitter, candidate.size), candidate.size, expert.up_IH.dtype))


def affine_part(fit: AffineFit, rank: int, dtype: torch.dtype) -> StoredPart:
    """What stands in the place of an expert: the fitted map of that rank, at least 1."""
    offset_H, left_RH, right_RH = fit.at(rank, dtype)
    tensors = {"affine_offset": offset_H[None], "affine_u": left_RH.contiguous(), "affine_v": right_RH.contiguous()}
    return StoredPart(Affine.name, rank, tensors)


def _one_and(along_PR: torch.Tensor) -> torch.Tensor:
    """(P, 1 + R) what c and U are multiplied with."""
    return torch.nn.functional.pad(along_PR, (1, 0), value=1.0)


def _fit(fitter: ExpertFitter, rank: int) -> AffineFit:
    """Fitted to the outputs without the down bias, weighted as the loss is."""
    expert, loss = fitter.expert, fitter.loss
    output_PH = expert.activated(loss.stacked_PO) @ expert.down_HI.T
    return AffineFit(loss.input_PH, output_PH, rank, loss.weight_P)
