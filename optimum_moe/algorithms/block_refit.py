"""After the cut, the experts of a block together make up for what each of them lost.

Shape letters: S sampled tokens of the block, P routed tokens of one expert, H hidden, N kept neurons.

A token's experts add up, so what one lost (an empty one: all of it) can be made up for by the others that the token
selected. The down projections of all experts that were cut are refitted to the block's original output, by least
squares weighted with the size of the loss gradient. Expert by expert, each to what all others leave over
(Gauss-Seidel), it needs no matrix larger than N x N and comes close to the joint solution in a few sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from optimum_moe.algorithms.expert_curves import Expert
from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.factors import ExpertFactors, MatrixFactors
from optimum_moe.algorithms.neurons import DAMPING, damped

SWEEPS = 4
"""Default number of times that every expert is refitted."""


@torch.no_grad()
def refit_block(
    experts: Sequence[Expert],
    factors: Sequence[ExpertFactors],
    tokens: SampledTokens,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> list[ExpertFactors]:
    """Refit the dense down projections of the experts that were cut; untouched and empty ones stay as they are.

    Args:
        experts: the block's experts before the cut, in the order of the ids.
        factors: what each became.
        tokens: the block's sampled tokens.
        sweeps: how often every expert is refitted; 0 changes nothing.
        damping: ridge of each step as a share of the mean diagonal.

    Raises:
        ValueError: If the numbers of experts differ, or a value is NaN or infinite.
    """
    if len(experts) != len(factors):
        raise ValueError(f"Got {len(experts)} experts and {len(factors)} forms: pass one form of each expert.")
    root_S = tokens.importance().sqrt()
    left_SH = torch.zeros(tokens.input_SH.shape, device=tokens.input_SH.device)
    parts: dict[int, _Part] = {}
    for index, (expert, kept) in enumerate(zip(experts, factors, strict=True)):
        if kept.neurons is None and kept.up.is_dense and kept.down.dense_OX is expert.down_HI:
            continue
        token_P, seen = tokens.routed(index)
        scale_P1 = (seen.weight_P.float() * root_S[token_P])[:, None]
        whole, input_PH = expert.float(), seen.input_PH.float()
        lost_PH = whole.activated(whole.preactivations(input_PH)) * scale_P1 @ whole.down_HI.T
        if kept.width and len(token_P) and kept.down.dense_OX is not None:
            hidden_PN = _cut(whole, kept).activated(_entering(kept, input_PH)) * scale_P1
            parts[index] = _Part(token_P, hidden_PN, kept.down.dense_OX.float(), damping)
            lost_PH = lost_PH - hidden_PN @ parts[index].down_HN.T
        left_SH.index_add_(0, token_P, lost_PH.float())
    # By what they give the block, so that the order of the experts does not matter.
    ordered = sorted(parts.values(), key=lambda part: -part.energy)
    for _ in range(sweeps):
        for part in ordered:
            part.step(left_SH)
    return [_with_down(kept, parts[e].down_HN) if e in parts else kept for e, kept in enumerate(factors)]


class _Part:
    """One expert's tokens, its scaled hidden activations on them, and its down projection so far."""

    def __init__(self, token_P: torch.Tensor, hidden_PN: torch.Tensor, down_HN: torch.Tensor, damping: float) -> None:
        self.token_P, self.hidden_PN, self.down_HN = token_P, hidden_PN, down_HN
        self.energy = float(hidden_PN.square().sum(dtype=torch.float64))
        self.root_NN = torch.linalg.cholesky(damped(hidden_PN.T @ hidden_PN, damping))

    def step(self, left_SH: torch.Tensor) -> None:
        """Take as much as possible of what is left over."""
        cross_NH = (self.hidden_PN.T @ left_SH[self.token_P]).double()
        change_NH = torch.cholesky_solve(cross_NH, self.root_NN).float()
        self.down_HN = self.down_HN + change_NH.T
        left_SH.index_add_(0, self.token_P, self.hidden_PN @ change_NH, alpha=-1)


def _cut(whole: Expert, kept: ExpertFactors) -> Expert:
    """For its biases and activation only."""
    if kept.neurons is None:
        return whole
    return whole.narrowed(kept.neurons, whole.down_HI[:, kept.neurons])


def _entering(kept: ExpertFactors, input_PH: torch.Tensor) -> torch.Tensor:
    """(P, N or 2N) outputs of the up projection, or of gate and up."""
    matrices = [kept.up] if kept.gate is None else [kept.gate, kept.up]
    return torch.cat([input_PH @ matrix.densified().float().T for matrix in matrices], dim=1)


def _with_down(kept: ExpertFactors, down_HN: torch.Tensor) -> ExpertFactors:
    assert kept.down.dense_OX is not None
    return replace(kept, down=MatrixFactors(dense_OX=down_HN.to(kept.down.dense_OX.dtype)))
