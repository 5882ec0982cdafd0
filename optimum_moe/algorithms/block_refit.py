"""After the cut, the experts of a block together make up for what each of them lost.

Shape letters: S sampled tokens of the block, P routed tokens of one expert, H hidden, N kept neurons.

A token's experts add up, so what one lost (an empty one: all of it) can be made up for by the others that the token
selected. The down projections of all experts that were cut are refitted to the block's original output, by least
squares weighted with the size of the loss gradient. Expert by expert, each to what all others leave over
(Gauss-Seidel), it needs no matrix larger than N x N and comes close to the joint solution in a few sweeps: 2 or 3 where
a token selects few of many experts, more where it selects all of them. A ridge towards the down projections that came
in keeps it from fitting the sample where tokens are few for the neurons that each of them meets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optimum_moe.algorithms.neurons import damped

SWEEPS = 16
"""Default limit of the number of times that every expert is refitted."""

# A sweep that takes less than this share of what is left over is the last one.
_LEAST_GAIN = 1e-3
_LEAST_RIDGE = 1e-3


class DownRefit:
    """One expert's tokens, its scaled hidden activations on them, and its down projection at first and so far.

    Args:
        token_P: (P,) int64 which of the block's tokens were routed to it.
        hidden_PN: (P, N) float32 hidden activations times routing weight and root of the token's importance.
        down_HN: (H, N) float32 its down projection.
    """

    def __init__(self, token_P: torch.Tensor, hidden_PN: torch.Tensor, down_HN: torch.Tensor) -> None:
        self.token_P, self.hidden_PN, self.first_HN, self.down_HN = token_P, hidden_PN, down_HN, down_HN
        self.energy = float(hidden_PN.square().sum(dtype=torch.float64))

    def prepare(self, ridge: float) -> None:
        """Factorize the Gram with a ridge, a share of its mean diagonal."""
        self.ridge = ridge * self.energy / self.hidden_PN.shape[1]
        self.root_NN = torch.linalg.cholesky(damped(self.hidden_PN.T @ self.hidden_PN, ridge))

    def step(self, left_SH: torch.Tensor) -> None:
        """Take as much as possible of what is left over."""
        cross_NH = (self.hidden_PN.T @ left_SH[self.token_P]).double()
        cross_NH -= self.ridge * (self.down_HN - self.first_HN).double().T
        change_NH = torch.cholesky_solve(cross_NH, self.root_NN).float()
        self.down_HN = self.down_HN + change_NH.T
        left_SH.index_add_(0, self.token_P, self.hidden_PN @ change_NH, alpha=-1)


@torch.no_grad()
def refit_downs(
    parts: Sequence[DownRefit], left_SH: torch.Tensor, sweeps: int = SWEEPS, ridge: float | None = None
) -> None:
    """Refit the down projections of several experts together, in place.

    Args:
        parts: The experts whose down projections may change.
        left_SH: (S, H) float32 the block's original output minus its output after the cut, in the tokens' scale;
            becomes what is left over.
        sweeps: How often every expert is refitted at most; 0 changes nothing.
        ridge: Towards the down projections that came in, as a share of the mean diagonal of each expert's Gram; default
            the neurons that a token meets on average, over the number of tokens (at least 1e-3, at most 1).

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    # By what they give the block, so that the order of the experts does not matter.
    ordered = sorted(parts, key=lambda part: -part.energy)
    if ridge is None:
        met = sum(part.hidden_PN.numel() for part in ordered) / max(len(left_SH), 1)
        ridge = min(1.0, max(_LEAST_RIDGE, met / max(len(left_SH), 1)))
    for part in ordered:
        part.prepare(ridge)
    energy = float("inf")
    for _ in range(sweeps):
        for part in ordered:
            part.step(left_SH)
        before, energy = energy, float(left_SH.square().sum(dtype=torch.float64))
        if energy > (1 - _LEAST_GAIN) * before:
            break
