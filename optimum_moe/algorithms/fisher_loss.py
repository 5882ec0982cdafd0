"""The second-order (Fisher) increase of the loss when one expert is changed, measured on some of its tokens.

Shape letters: P routed tokens of the expert, Q those of all draws of labels, H hidden, I intermediate, N kept neurons,
S the smaller of H and I.

With c the loss gradient at the expert's output, the routing weight in it, the second order of the loss is
1/2 sum_p (c_p . d_p)^2 for a change d of the output (Fisher). One gradient a token says too little about its direction,
so the directions are taken from all tokens of the expert and the size from each: q_p = |c_p|^2, B = sum c c^T / sum q,
damage = 1/2 sum_p q_p d_p^T B d_p. It is computed from the candidate's actual output, so that errors in series need no
model. Measured against the plain second order: the same choices, and no sample of c has to be kept.

Whatever is made of an expert, its output is D X h with the original down projection D, the candidate's hidden
activations h, and some matrix X (I, N). Where I is below H it is X that is solved for, and D^T B D that measures it:
the output of size H never appears.

Damage is a sum of squares and is computed as one: as empty + own - both it would be a small difference of large sums,
and float32 would not do. With B = R^T R of a QR of the directions, a candidate costs one product with R for all of its
tokens; all numbers of neurons are measured at once, by what the root of the Gram says of those that are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.neurons import gram, is_finite, principal_submatrix, times_triangular

# Directions along which a change is measured at a time.
_DIRECTIONS = 4096


class Outputs:
    """The outputs of an expert in a space of size S: what its neurons give (I <= H), or what down makes of them.

    Args:
        down_HI: (H, I) the expert's down projection.
    """

    def __init__(self, down_HI: torch.Tensor) -> None:
        self.down_HI = down_HI
        hidden, inner = down_HI.shape
        self.target_SI = None if inner <= hidden else down_HI
        """(S, I) what the untouched hidden activations are mapped to, None for themselves."""

    def of_hidden(self, value_IN: torch.Tensor) -> torch.Tensor:
        """(S, N) what belongs to the expert's hidden activations, in the space of the outputs."""
        return value_IN if self.target_SI is None else self.target_SI.to(value_IN) @ value_IN

    def down(self, made_SN: torch.Tensor) -> torch.Tensor:
        """(H, N) the down projection that gives such outputs."""
        return made_SN if self.target_SI is not None else self.down_HI.to(made_SN) @ made_SN

    def root(self, rows_QH: torch.Tensor) -> torch.Tensor:
        """(min(Q, S), S) R with R^T R the metric sum r r^T of rows r: that of a QR, or few rows themselves."""
        rows_QS = rows_QH @ self.down_HI.to(rows_QH) if self.target_SI is None else rows_QH
        return _shortened(rows_QS)


@dataclass(frozen=True, eq=False)
class Moments:
    """What a changed expert's hidden activations have to do with each other and with the expert's outputs, over tokens.

    Args:
        gram_NN: (N, N) sum of q h h^T.
        cross_SN: (S, N) sum of q y h^T of the expert's outputs y.
    """

    gram_NN: torch.Tensor
    cross_SN: torch.Tensor


class FisherLoss:
    """An expert on some of its tokens, and what changes of it cost there.

    Tokens are scaled by the root of their weight. Everything is computed in the dtype of the expert but the Gram and
    the effect of the untouched neurons: neurons are eliminated in float64. Damages are summed over the tokens.

    Args:
        expert: In float32 or better.
        tokens: At least one.

    Raises:
        ValueError: If a value of the tokens is NaN or infinite.
    """

    def __init__(self, expert: Expert, tokens: ExpertTokens) -> None:
        for name, value in vars(tokens).items():
            if value is not None and not is_finite(value):
                raise ValueError(f"{name} holds NaN or infinity. Check the checkpoint and the calibration data.")
        self.expert, self.outputs = expert, Outputs(expert.down_HI)
        self.input_PH = tokens.input_PH.to(expert.up_IH.dtype)
        self.weight_P, self._rows_QH = weights_and_directions(tokens, self.input_PH.dtype)
        self.root_P1 = self.weight_P.sqrt().to(self.input_PH.dtype)[:, None]
        self.stacked_PO = expert.preactivations(self.input_PH)
        """(P, I or 2I) outputs of gate above up, without biases and weights."""
        self.hidden_PI = expert.activated(self.stacked_PO) * self.root_P1
        self.root_QS = self.outputs.root(self._rows_QH)
        self._root_QI = self.root_QS if self.outputs.target_SI is None else self.root_QS @ self.outputs.target_SI

    @cached_property
    def empty_damage(self) -> float:
        """Of leaving the expert out, the largest of all."""
        if len(self.hidden_PI) <= self.expert.inner:
            return _half_of_squares(self._lost_PQ)
        return 0.5 * float((self.effect_II * self.gram_II).sum().clamp(min=0))

    @cached_property
    def _lost_PQ(self) -> torch.Tensor:
        return self.hidden_PI @ self._root_QI.T

    @cached_property
    def effect_II(self) -> torch.Tensor:
        """(I, I) float64 D^T B D."""
        return gram(self._root_QI).double()

    @cached_property
    def gram_II(self) -> torch.Tensor:
        """(I, I) float64 sum of q h h^T."""
        return gram(self.hidden_PI).double()

    @cached_property
    def _output_PS(self) -> torch.Tensor:
        target_SI = self.outputs.target_SI
        return self.hidden_PI if target_SI is None else self.hidden_PI @ target_SI.T

    @cached_property
    def _slopes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, O) squares, and (O, O) the Gram over weighted tokens, of the slopes of all neurons; O = I or 2I."""
        slope_PO = _slopes(self.expert, self.stacked_PO)
        return slope_PO.square(), gram(slope_PO * self.root_P1)

    def hidden_at_ranks(
        self, narrow: Expert, left_OR: torch.Tensor, right_RH: torch.Tensor, ranks: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """(P, N) weighted hidden activations of an expert whose stacked gate and up are factors cut at each rank.

        Args:
            narrow: The expert of N neurons.
            left_OR: (O, R).
            right_RH: (R, H).
            ranks: Ascending, at most R.
        """
        seen_PR = self.input_PH @ right_RH.T
        stacked_PO = seen_PR.new_zeros(len(seen_PR), len(left_OR))
        for start, stop in pairwise((0, *ranks)):
            stacked_PO.addmm_(seen_PR[:, start:stop], left_OR[:, start:stop].T)
            yield narrow.activated(stacked_PO) * self.root_P1

    def moments(self, hidden_PN: torch.Tensor) -> Moments:
        """Of weighted hidden activations."""
        return Moments(gram(hidden_PN), self._output_PS.T @ hidden_PN)

    def damage_of_outputs(self, output_PH: torch.Tensor) -> float:
        """Of any other outputs in place of the expert's.

        Args:
            output_PH: (P, H) for `input_PH`, without the down bias and the routing weight.
        """
        scaled_PH = output_PH.to(self.root_P1.dtype) * self.root_P1
        change_PH, rows_QH = scaled_PH - self.hidden_PI @ self.outputs.down_HI.T, self._rows_QH
        (tokens, hidden), directions = change_PH.shape, len(rows_QH)
        if tokens * directions <= (tokens + directions) * hidden:
            return sum(_half_of_squares(change_PH @ rows_DH.T) for rows_DH in rows_QH.split(_DIRECTIONS))
        along_HQ = change_PH.T @ change_PH @ rows_QH.T
        return 0.5 * float((along_HQ.double() * rows_QH.T.double()).sum().clamp(min=0))

    def damages_of_sums(self, terms_PR: torch.Tensor, outputs_RH: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """(len(numbers),) float64 of sums of a few outputs in place of the expert's, for each number of the first ones.

        Args:
            terms_PR: (P, R) by what each is multiplied for `input_PH`.
            outputs_RH: (R, H) without the down bias and the routing weight.
            numbers: How many of them are summed.
        """
        outputs_RH, terms_PR = outputs_RH.to(self._rows_QH), terms_PR.to(self.root_P1) * self.root_P1
        if self.outputs.target_SI is None:
            both_QC = _shortened(self._rows_QH @ torch.cat([self.outputs.down_HI.T.to(outputs_RH), outputs_RH]).T)
            own_QI, other_QR = both_QC.split([self.expert.inner, len(outputs_RH)], dim=1)
            lost_PQ = self.hidden_PI @ own_QI.T
        else:
            lost_PQ, other_QR = self._lost_PQ, self.root_QS @ outputs_RH.T
        damages = [
            _half_of_squares(torch.addmm(lost_PQ, terms_PR[:, :number], other_QR[:, :number].T, beta=-1))
            for number in numbers
        ]
        return torch.tensor(damages, dtype=torch.float64)

    def damage_of_hidden(self, hidden_PN: torch.Tensor, made_SN: torch.Tensor) -> float:
        """Of weighted hidden activations that are mapped to outputs by a matrix, in place of the expert's own."""
        made_QN = self.root_QS @ made_SN.to(self.root_QS)
        return _half_of_squares(torch.addmm(self._lost_PQ, hidden_PN, made_QN.T, beta=-1))

    def damages_without(self, order_I: torch.Tensor, lower_II: torch.Tensor, inverse_II: torch.Tensor) -> torch.Tensor:
        """(I + 1,) float64 of keeping the first N neurons only, each other given as a linear combination of them.

        With h = L z, the N neurons give all of h but L_:M z_M of the others M: `taken_over` for every N. So the damage
        is the sum over all pairs of M of L^T D^T B D L times the Gram of z, and one sum from the end has them all.

        Args:
            order_I: (I,) int64 the neurons in the order in which they stay.
            lower_II: (I, I) root L of the Gram, in this order, that says how they are given (`neurons.root`).
            inverse_II: (I, I) its inverse.
        """
        effect_II = gram(
            times_triangular(self._root_QI.index_select(1, order_I), lower_II.to(self._root_QI), upper=False)
        )
        upper_II = inverse_II.to(self.hidden_PI).T
        if len(self.hidden_PI) <= len(order_I):
            gram_II = gram(times_triangular(self.hidden_PI.index_select(1, order_I), upper_II, upper=True))
        else:
            half_II = times_triangular(principal_submatrix(self.gram_II, order_I).to(upper_II), upper_II, upper=True)
            gram_II = times_triangular(half_II.T, upper_II, upper=True)
        both_II = effect_II * gram_II
        # Each pair counts from the first of the two on.
        pairs_I = both_II.triu(1).sum(1, dtype=torch.float64) + 0.5 * both_II.diagonal().double()
        # A sum of squares: a rounding error below zero must not reach the curves.
        return torch.cat([pairs_I.flip(0).cumsum(0).flip(0).clamp(min=0), pairs_I.new_zeros(1)])

    def stacked(self, kept_N: torch.Tensor) -> torch.Tensor:
        """(N or 2N,) numbers of the rows of gate above up that belong to some neurons."""
        copies = self.stacked_PO.shape[1] // self.expert.inner
        return torch.cat([kept_N + copy * self.expert.inner for copy in range(copies)])

    def local(self, kept_N: torch.Tensor, made_SN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at the outputs of gate and up of some neurons: (P,) weights and their (O, O) metric of trace 1.

        Args:
            kept_N: (N,) int64 the neurons; O = N, or 2N with a gate.
            made_SN: (S, N) what they are mapped to.
        """
        square_PO, gram_OO = self._slopes
        kept_O = self.stacked(kept_N)
        copies = len(kept_O) // len(kept_N)
        effect_OO = gram(self.root_QS @ made_SN.to(self.root_QS)).repeat(copies, copies)
        share_O = effect_OO.new_zeros(len(gram_OO)).index_copy_(0, kept_O, effect_OO.diagonal())
        weight_P = self.weight_P * (square_PO @ share_O).double()
        local_OO = effect_OO * gram_OO[kept_O][:, kept_O]
        total = local_OO.trace()
        return weight_P, local_OO / (total if total > 0 else 1.0)


def _shortened(rows_QC: torch.Tensor) -> torch.Tensor:
    """(min(Q, C), C) rows with the same Gram: R of a QR, or few rows themselves."""
    return rows_QC if len(rows_QC) <= rows_QC.shape[1] else torch.linalg.qr(rows_QC, mode="r").R


def _half_of_squares(value_PQ: torch.Tensor) -> float:
    # Row by row: a norm of millions of float32 numbers at once is wrong in the fourth digit.
    return 0.5 * float(torch.linalg.vector_norm(value_PQ, dim=1).double().square().sum())


def weights_and_directions(tokens: ExpertTokens, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) float64 q, and rows (Q, H) with B = sum r r^T; the squared error of the output without gradients."""
    gate_P, (_, hidden) = tokens.weight_P.double(), tokens.input_PH.shape
    if tokens.gradient_JPH is None:
        return gate_P.square() * hidden, torch.eye(hidden, dtype=dtype, device=gate_P.device) * hidden**-0.5
    gradient_JPH = tokens.gradient_JPH.reshape(-1, *tokens.input_PH.shape)
    scale_P = gate_P * len(gradient_JPH) ** -0.5
    # Squares of small gradients are no float32 numbers, only their roots are.
    norm_JP = torch.linalg.vector_norm(gradient_JPH, dim=2, dtype=torch.float64) * scale_P
    weight_P = norm_JP.square().sum(0)
    total = float(weight_P.sum())
    scale_P = scale_P * (total**-0.5 if total > 0 else 0.0)
    return weight_P, (gradient_JPH.to(dtype) * scale_P.to(dtype)[:, None]).flatten(0, 1)


def _slopes(expert: Expert, stacked_PO: torch.Tensor) -> torch.Tensor:
    """(P, O) derivative of every hidden activation by its own gate and up value."""
    with torch.enable_grad():
        stacked_PO = stacked_PO.detach().requires_grad_(True)
        (slope_PO,) = torch.autograd.grad(expert.activated(stacked_PO).sum(), stacked_PO)
    return slope_PO
