"""The joint refit of the down projections of a block's stored experts (`optimum_moe.algorithms.block_refit`).

Shape letters: S sampled tokens of the block, P routed tokens of one expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from optimum_moe.algorithms.block_refit import SWEEPS, DownRefit, refit_downs
from optimum_moe.algorithms.expert import Expert
from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.formats.stored import StoredExpert


@torch.no_grad()
def refit_block(
    experts: Sequence[Expert],
    stored: Sequence[StoredExpert],
    tokens: SampledTokens,
    sweeps: int = SWEEPS,
    ridge: float | None = None,
    target_SH: torch.Tensor | None = None,
) -> list[StoredExpert]:
    """Refit the down projections of the experts that were changed, and what stands for them in affine maps.

    Untouched experts, and those in a format that cannot store any matrix, stay as they are.

    Args:
        experts: The block's experts before the cut, in the order of the ids.
        stored: What each became.
        tokens: The block's sampled tokens.
        sweeps: As in `refit_downs`.
        ridge: As in `refit_downs`.
        target_SH: (S, H) the output to come close to, where it is not that of `experts` for these tokens, because
            experts were removed and tokens rerouted; untouched experts are then refitted too.

    Raises:
        ValueError: If the numbers of experts differ, or a value is NaN or infinite.
    """
    if len(experts) != len(stored):
        raise ValueError(f"Got {len(experts)} experts and {len(stored)} stored ones: pass one for each expert.")
    root_S = tokens.importance().sqrt()
    left_SH = torch.zeros(tokens.input_SH.shape, device=tokens.input_SH.device)
    if target_SH is not None:
        left_SH += target_SH.float() * root_S[:, None]
    parts: dict[int, DownRefit] = {}
    scales: dict[int, torch.Tensor] = {}
    for index, (expert, kept) in enumerate(zip(experts, stored, strict=True)):
        if target_SH is None and _is_untouched(expert, kept):
            continue
        token_P, seen = tokens.routed(index)
        scale_P1 = (seen.weight_P.float() * root_S[token_P])[:, None]
        whole, input_PH = expert.float(), seen.input_PH.float()
        lost_PH = torch.zeros_like(input_PH)
        if target_SH is None:
            lost_PH = whole.activated(whole.preactivations(input_PH)) * scale_P1 @ whole.down_HI.T
        terms = kept.terms(whole, input_PH) if len(token_P) else None
        if terms is None:
            lost_PH = lost_PH - kept.run(whole, input_PH) * scale_P1
        else:
            hidden_PN, down_HN = terms[0] * scale_P1, terms[1]
            if not kept.width:
                # Unlike those of neurons, the numbers of a map have any scale, and one ridge serves all of them.
                size_N = hidden_PN.square().mean(0).sqrt()
                scales[index] = size_N.where(size_N > 0, 1.0)
                hidden_PN, down_HN = hidden_PN / scales[index], down_HN * scales[index]
            lost_PH = lost_PH - hidden_PN @ down_HN.T
            parts[index] = DownRefit(token_P, hidden_PN, down_HN)
        left_SH.index_add_(0, token_P, lost_PH.float())
    refit_downs(list(parts.values()), left_SH, sweeps, ridge)
    found = list(stored)
    for index, part in parts.items():
        down_HN = part.down_HN / scales[index] if index in scales else part.down_HN
        found[index] = stored[index].with_directions(down_HN)
    return found


def _is_untouched(expert: Expert, kept: StoredExpert) -> bool:
    same = kept.down.is_dense and kept.down.densified().data_ptr() == expert.down_HI.data_ptr()
    return kept.neurons is None and kept.up.is_dense and same


def is_worth_refitting(
    experts: Sequence[Expert], stored: Sequence[StoredExpert], tokens: SampledTokens, target_SH: torch.Tensor
) -> bool:
    """Whether down projections that are refitted to every other token come closer to the target on the rest.

    Args:
        experts: As for `refit_block`.
        stored: Likewise.
        tokens: Likewise.
        target_SH: Likewise.
    """
    halves = [
        (
            replace(
                tokens,
                input_SH=tokens.input_SH[n::2],
                index_SK=tokens.index_SK[n::2],
                weights_SK=tokens.weights_SK[n::2],
                gradient_SJH=None if tokens.gradient_SJH is None else tokens.gradient_SJH[n::2],
            ),
            target_SH[n::2],
        )
        for n in (0, 1)
    ]
    (seen, seen_target_SH), (held_out, target_SH) = halves
    fitted = refit_block(experts, stored, seen, target_SH=seen_target_SH)
    return _error(experts, fitted, held_out, target_SH) < _error(experts, stored, held_out, target_SH)


def _error(
    experts: Sequence[Expert], stored: Sequence[StoredExpert], tokens: SampledTokens, target_SH: torch.Tensor
) -> float:
    """Squared distance of the experts' sum from the target, weighted as `refit_block` does."""
    left_SH = target_SH.float().clone()
    for index, (expert, kept) in enumerate(zip(experts, stored, strict=True)):
        token_P, seen = tokens.routed(index)
        output_PH = kept.run(expert.float(), seen.input_PH.float()) * seen.weight_P.float()[:, None]
        left_SH.index_add_(0, token_P, output_PH, alpha=-1)
    return float((left_SH.square().sum(1).double() * tokens.importance().double()).sum())
