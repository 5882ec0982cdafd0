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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_moe.algorithms.expert import Expert, ExpertTokens


class Outputs:
    """The outputs of an expert in a space of size S: what its neurons give (I <= H), or what down makes of them.

    Args:
        down_HI: (H, I) the expert's down projection.
    """

    def __init__(self, down_HI: torch.Tensor) -> None:
        self.down_HI = down_HI.double()
        hidden, inner = down_HI.shape
        self.target_SI = None if inner <= hidden else self.down_HI
        """(S, I) what the untouched hidden activations are mapped to, None for themselves."""

    def of_hidden(self, value_IN: torch.Tensor) -> torch.Tensor:
        """(S, N) what belongs to the expert's hidden activations, in the space of the outputs."""
        return value_IN if self.target_SI is None else self.target_SI @ value_IN

    def down(self, made_SN: torch.Tensor) -> torch.Tensor:
        """(H, N) the down projection that gives such outputs."""
        return made_SN if self.target_SI is not None else self.down_HI @ made_SN

    def metric(self, rows_QH: torch.Tensor) -> torch.Tensor:
        """(S, S) float64 the metric sum r r^T over rows."""
        rows_QS = rows_QH @ self.down_HI.to(rows_QH.dtype) if self.target_SI is None else rows_QH
        return (rows_QS.T @ rows_QS).double()


@dataclass(frozen=True, eq=False)
class Moments:
    """What a changed expert's hidden activations have to do with each other and with the expert's outputs, over tokens.

    Args:
        gram_NN: (N, N) float64 sum of q h h^T.
        cross_SN: (S, N) float64 sum of q y h^T of the expert's outputs y.
    """

    gram_NN: torch.Tensor
    cross_SN: torch.Tensor


class FisherLoss:
    """An expert on some of its tokens, and what changes of it cost there.

    Tokens are scaled by the root of their weight and multiplied in float32; what is solved is float64. `empty_damage`
    is that of leaving the expert out; damages are summed over the tokens.

    Args:
        expert: In float32 or better.
        tokens: At least one.

    Raises:
        ValueError: If a value of the tokens is NaN or infinite.
    """

    def __init__(self, expert: Expert, tokens: ExpertTokens) -> None:
        for name, value in vars(tokens).items():
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity. Check the checkpoint and the calibration data.")
        self.outputs = Outputs(expert.down_HI)
        self.input_PH = tokens.input_PH.to(expert.up_IH.dtype)
        self.weight_P, rows_QH = _weights_and_directions(tokens)
        self._rows_QH = rows_QH.to(self.input_PH.dtype)
        self.metric_SS = self.outputs.metric(self._rows_QH)
        self.root_P1 = self.weight_P.sqrt().to(self.input_PH.dtype)[:, None]
        self.hidden_PI = expert.activated(expert.preactivations(self.input_PH)) * self.root_P1
        self.gram_II = (self.hidden_PI.T @ self.hidden_PI).double()
        self.cross_SI = self.outputs.of_hidden(self.gram_II)
        self.empty_damage = 0.5 * float((self.effect_II * self.gram_II).sum())

    @property
    def effect_II(self) -> torch.Tensor:
        """(I, I) D^T B D."""
        target_SI = self.outputs.target_SI
        return self.metric_SS if target_SI is None else target_SI.T @ self.metric_SS @ target_SI

    def of_neurons(self, kept_N: torch.Tensor) -> Moments:
        """Of some of the expert's neurons as they are."""
        return Moments(self.gram_II[kept_N][:, kept_N], self.cross_SI[:, kept_N])

    def of_factors(self, narrow: Expert, left_OR: torch.Tensor, right_RH: torch.Tensor) -> Moments:
        """Of the neurons of an expert whose stacked gate and up are such factors."""
        hidden_PN = narrow.activated(self.input_PH @ right_RH.T @ left_OR.T) * self.root_P1
        cross_IN = (self.hidden_PI.T @ hidden_PN).double()
        return Moments((hidden_PN.T @ hidden_PN).double(), self.outputs.of_hidden(cross_IN))

    def damage_of_outputs(self, output_PH: torch.Tensor) -> float:
        """Of any other outputs in place of the expert's.

        Args:
            output_PH: (P, H) for `input_PH`, without the down bias and the routing weight.
        """
        scaled_PH = output_PH.to(self.root_P1.dtype) * self.root_P1
        change_PH = scaled_PH - self.hidden_PI @ self.outputs.down_HI.to(self.hidden_PI.dtype).T
        along_HQ = change_PH.T @ change_PH @ self._rows_QH.T
        return 0.5 * float((along_HQ.double() * self._rows_QH.T.double()).sum().clamp(min=0))

    def damage(self, made_SN: torch.Tensor, moments: Moments) -> float:
        """Of a changed expert with such moments, whose hidden activations are mapped to outputs by a matrix."""
        effect_NS = made_SN.T @ self.metric_SS
        own = float((effect_NS @ made_SN * moments.gram_NN).sum())
        both = float((effect_NS * moments.cross_SN.T).sum())
        # A sum of squares: a rounding error below zero must not reach the curves.
        return max(0.0, self.empty_damage + 0.5 * own - both)

    def local(self, narrow: Expert, made_SN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at the outputs of gate and up: (P,) weights and their (O, O) metric, O = N or 2N, of trace 1."""
        slope_PO = _slopes(narrow, self.input_PH)
        copies = slope_PO.shape[1] // narrow.inner
        effect_OO = (made_SN.T @ self.metric_SS @ made_SN).repeat(copies, copies)
        weight_P = self.weight_P * (slope_PO.square() @ effect_OO.diagonal().to(slope_PO.dtype)).double()
        scaled_PO = slope_PO * self.root_P1
        local_OO = effect_OO * (scaled_PO.T @ scaled_PO).double()
        total = local_OO.trace()
        return weight_P, local_OO / (total if total > 0 else 1.0)


def _weights_and_directions(tokens: ExpertTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) float64 q, and float64 rows (Q, H) with B = sum r r^T; the squared error of the output without gradients."""
    gate_P, (_, hidden) = tokens.weight_P.double(), tokens.input_PH.shape
    if tokens.gradient_JPH is None:
        eye_HH = torch.eye(hidden, dtype=torch.float64, device=gate_P.device)
        return gate_P.square() * hidden, eye_HH * hidden**-0.5
    gradient_JPH = tokens.gradient_JPH.reshape(-1, *tokens.input_PH.shape)
    cotangent_JPH = gradient_JPH.double() * (gate_P[:, None] * len(gradient_JPH) ** -0.5)
    weight_P = cotangent_JPH.square().sum((0, 2))
    total = float(weight_P.sum())
    return weight_P, cotangent_JPH.flatten(0, 1) * (total**-0.5 if total > 0 else 0.0)


def _slopes(expert: Expert, input_PH: torch.Tensor) -> torch.Tensor:
    """(P, I or 2I) derivative of every hidden activation by its own gate and up value."""
    with torch.enable_grad():
        stacked_PS = expert.preactivations(input_PH).detach().requires_grad_(True)
        (slope_PS,) = torch.autograd.grad(expert.activated(stacked_PS).sum(), stacked_PS)
    return slope_PS
