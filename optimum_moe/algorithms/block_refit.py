"""After the cut, the experts of a block together make up for what each of them lost.

Shape letters: S sampled tokens of the block, P routed tokens of one expert, H hidden, N kept neurons.

A token's experts add up, so what one lost (an empty one: all of it) can be made up for by the others that the token
selected. The down projections of all experts that were cut are refitted to the block's original output, by least
squares weighted with the size of the loss gradient. Expert by expert, each to what all others leave over
(Gauss-Seidel), it needs no matrix larger than N x N and comes close to the joint solution in a few sweeps: 2 or 3 where
a token selects few of many experts, more where it selects all of them. A ridge towards the forms that came in keeps it
from fitting the sample where tokens are few for the neurons that each of them meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.factors import ExpertFactors, MatrixFactors
from optimum_moe.algorithms.neurons import damped
from optimum_moe.algorithms.one_expert import Expert

SWEEPS = 16
"""Default limit of the number of times that every expert is refitted."""

# A sweep that takes less than this share of what is left over is the last one.
_LEAST_GAIN = 1e-3
_LEAST_RIDGE = 1e-3


@torch.no_grad()
def refit_block(
    experts: Sequence[Expert],
    factors: Sequence[ExpertFactors],
    tokens: SampledTokens,
    sweeps: int = SWEEPS,
    ridge: float | None = None,
) -> list[ExpertFactors]:
    """Refit the dense down projections of the experts that were cut; untouched and empty ones stay as they are.

    Args:
        experts: the block's experts before the cut, in the order of the ids.
        factors: what each became.
        tokens: the block's sampled tokens.
        sweeps: how often every expert is refitted at most; 0 changes nothing.
        ridge: towards the forms that came in, as a share of the mean diagonal of each expert's Gram; default the
            neurons that a token meets on average, over the number of tokens (at least 1e-3, at most 1).

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
            parts[index] = _Part(token_P, hidden_PN, kept.down.dense_OX.float())
            lost_PH = lost_PH - hidden_PN @ parts[index].down_HN.T
        left_SH.index_add_(0, token_P, lost_PH.float())
    # By what they give the block, so that the order of the experts does not matter.
    ordered = sorted(parts.values(), key=lambda part: -part.energy)
    if ridge is None:
        met = sum(part.hidden_PN.numel() for part in ordered) / max(len(left_SH), 1)
        ridge = min(1.0, max(_LEAST_RIDGE, met / max(len(left_SH), 1)))
    for part in ordered:
        part.solve_with(ridge)
    energy = float("inf")
    for _ in range(sweeps):
        for part in ordered:
            part.step(left_SH)
        before, energy = energy, float(left_SH.square().sum(dtype=torch.float64))
        if energy > (1 - _LEAST_GAIN) * before:
            break
    return [_with_down(kept, parts[e].down_HN) if e in parts else kept for e, kept in enumerate(factors)]


class _Part:
    """One expert's tokens, its scaled hidden activations on them, and its down projection at first and so far."""

    def __init__(self, token_P: torch.Tensor, hidden_PN: torch.Tensor, down_HN: torch.Tensor) -> None:
        self.token_P, self.hidden_PN, self.first_HN, self.down_HN = token_P, hidden_PN, down_HN, down_HN
        self.energy = float(hidden_PN.square().sum(dtype=torch.float64))

    def solve_with(self, ridge: float) -> None:
        """Prepare for steps with a ridge, a share of the Gram's mean diagonal."""
        self.ridge = ridge * self.energy / self.hidden_PN.shape[1]
        self.root_NN = torch.linalg.cholesky(damped(self.hidden_PN.T @ self.hidden_PN, ridge))

    def step(self, left_SH: torch.Tensor) -> None:
        """Take as much as possible of what is left over."""
        cross_NH = (self.hidden_PN.T @ left_SH[self.token_P]).double()
        cross_NH -= self.ridge * (self.down_HN - self.first_HN).double().T
        change_NH = torch.cholesky_solve(cross_NH, self.root_NN).float()
        self.down_HN = self.down_HN + change_NH.T
        left_SH.index_add_(0, self.token_P, self.hidden_PN @ change_NH, alpha=-1)


def _cut(whole: Expert, kept: ExpertFactors) -> Expert:
    """For its biases and activation only."""
    if kept.neurons is None:
        return whole
    return whole.narrowed(kept.neurons)


def _entering(kept: ExpertFactors, input_PH: torch.Tensor) -> torch.Tensor:
    """(P, N or 2N) outputs of the up projection, or of gate and up."""
    matrices = [kept.up] if kept.gate is None else [kept.gate, kept.up]
    return torch.cat([input_PH @ matrix.densified().float().T for matrix in matrices], dim=1)


def _with_down(kept: ExpertFactors, down_HN: torch.Tensor) -> ExpertFactors:
    assert kept.down.dense_OX is not None
    return replace(kept, down=MatrixFactors(dense_OX=down_HN.to(kept.down.dense_OX.dtype)))
