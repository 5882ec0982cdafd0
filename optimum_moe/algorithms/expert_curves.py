"""What one expert loses in each form it could be kept in, in the unit of the loss.

Shape letters: P routed tokens of the expert, J draws of labels, H hidden, I intermediate, N kept neurons, R rank.

A form keeps N neurons (chosen and refitted by `neurons.elimination`); its gate and up projections are dense, or factors
of rank R of the two stacked, (2N, H), so that both share the right factor: U_gate V and U_up V. Whatever changes gate
and up, the down projection is refitted to it. N = 0 is an empty expert, all neurons without ranks the untouched one.

With c the loss gradient at the expert's output, the routing weight in it, the second order of the loss is
1/2 sum_p (c_p . d_p)^2 for a change d of the output (Fisher). One gradient a token says too little about its direction,
so the directions are taken from all tokens of the expert and the size from each: q_p = |c_p|^2, B = sum c c^T / sum q,
damage = 1/2 sum_p q_p d_p^T B d_p. It is computed from the candidate's actual output, so that errors in series need no
model. Measured against the plain second order: the same choices, and no sample of c has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from optimum_moe.algorithms.factors import ExpertFactors, MatrixFactors
from optimum_moe.algorithms.low_rank import decompose
from optimum_moe.algorithms.neurons import DAMPING, elimination, narrowed, refitted

Activate = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]

STEP = 8
"""Numbers of kept neurons and ranks are multiples of it: grouped matrix products need strides of 16 bytes."""


@dataclass(frozen=True, eq=False)
class Expert:
    """The matrices of one routed expert.

    Args:
        up_IH: (I, H) any float dtype.
        down_HI: (H, I).
        activate: hidden activations of (gate_PI or None, up_PI), neuron by neuron and differentiable.
        gate_IH: (I, H), None for non-gated experts.
        up_bias_I: (I,) or None.
        gate_bias_I: (I,) or None. A down bias is part of every form and changes nothing here.
    """

    up_IH: torch.Tensor
    down_HI: torch.Tensor
    activate: Activate
    gate_IH: torch.Tensor | None = None
    up_bias_I: torch.Tensor | None = None
    gate_bias_I: torch.Tensor | None = None

    @property
    def inner(self) -> int:
        """Number of neurons I."""
        return len(self.up_IH)

    @property
    def stacked(self) -> torch.Tensor:
        """(I or 2I, H) up, or gate above up."""
        return self.up_IH if self.gate_IH is None else torch.cat([self.gate_IH, self.up_IH])

    def float(self) -> Expert:
        """The same in float32 (or float64 if it is that already)."""
        return Expert(
            _wide(self.up_IH),
            _wide(self.down_HI),
            self.activate,
            None if self.gate_IH is None else _wide(self.gate_IH),
            None if self.up_bias_I is None else _wide(self.up_bias_I),
            None if self.gate_bias_I is None else _wide(self.gate_bias_I),
        )

    def narrowed(self, kept_N: torch.Tensor, down_HN: torch.Tensor) -> Expert:
        """With these neurons only, and their down projection."""
        return Expert(
            self.up_IH[kept_N],
            down_HN.to(self.up_IH.dtype),
            self.activate,
            None if self.gate_IH is None else self.gate_IH[kept_N],
            None if self.up_bias_I is None else self.up_bias_I[kept_N],
            None if self.gate_bias_I is None else self.gate_bias_I[kept_N],
        )

    def with_stacked(self, stacked: torch.Tensor) -> Expert:
        """With other gate and up projections, given as `stacked`."""
        stacked = stacked.to(self.up_IH.dtype)
        if self.gate_IH is None:
            return replace(self, up_IH=stacked)
        return replace(self, gate_IH=stacked[: self.inner], up_IH=stacked[self.inner :])

    def preactivations(self, input_PH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(P, I) what `activate` gets."""
        linear = torch.nn.functional.linear
        gate_PI = None if self.gate_IH is None else linear(input_PH, self.gate_IH, self.gate_bias_I)
        return gate_PI, linear(input_PH, self.up_IH, self.up_bias_I)

    def hidden(self, input_PH: torch.Tensor) -> torch.Tensor:
        """(P, I) hidden activations."""
        return self.activate(*self.preactivations(input_PH))


@dataclass(frozen=True, eq=False)
class ExpertTokens:
    """The sampled tokens that were routed to one expert.

    Args:
        input_PH: (P, H) inputs of the experts call.
        weight_P: (P,) routing weights.
        gradient_JPH: (J, P, H) gradients of the loss summed over tokens with respect to the output of the whole
            experts call, one for each draw of labels; (P, H) is one draw. None where no backward pass ran: damage is
            then the squared error of the weighted output, in a unit of its own.

    Raises:
        ValueError: If the shapes do not fit.
    """

    input_PH: torch.Tensor
    weight_P: torch.Tensor
    gradient_JPH: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(self.weight_P.shape)]
        shapes += [] if self.gradient_JPH is None else [tuple(self.gradient_JPH.shape[-2:])]
        if shapes != [tuple(self.input_PH.shape[:1]), tuple(self.input_PH.shape)][: len(shapes)]:
            raise ValueError(
                f"Tokens of shape {tuple(self.input_PH.shape)} have weights and gradients of shapes {shapes}. "
                "Pass (P, H), (P,) and (J, P, H) of the same tokens."
            )


@dataclass(frozen=True)
class Form:
    """How an expert is kept; small, hashable and picklable.

    Args:
        neurons: N, a multiple of 8, or all of them.
        input_rank: R of gate and up stacked, None for dense ones.
    """

    neurons: int
    input_rank: int | None = None

    def numbers(self, hidden: int, gated: bool) -> int:
        """Numbers that are stored: 2NH + NH dense, R (2N + H) + NH with a rank (N for 2N without a gate)."""
        rows = (2 if gated else 1) * self.neurons
        entering = rows * hidden if self.input_rank is None else self.input_rank * (rows + hidden)
        return entering + self.neurons * hidden


class Cutter:
    """One expert, what its tokens say, and the forms that can be made of it."""

    def __init__(self, expert: Expert, tokens: ExpertTokens, damping: float = DAMPING) -> None:
        self.expert = expert.float()
        self.damping = damping
        self.input_PH = tokens.input_PH.to(self.expert.up_IH.dtype)
        self.metric = _Metric.of(tokens)
        hidden_PI = self.expert.hidden(self.input_PH)
        self.output_PH = hidden_PI @ self.expert.down_HI.T
        self.gram_II = hidden_PI.double().T @ (hidden_PI.double() * self.metric.weight_P[:, None])
        down_HI = self.expert.down_HI.double()
        self.order_I, _ = elimination(self.gram_II, down_HI.T @ self.metric.gram_HH @ down_HI, damping)

    def narrowed(self, neurons: int) -> tuple[torch.Tensor, Expert]:
        """The neurons that are kept, ascending, and the expert that has them only."""
        kept_N = self.order_I[self.expert.inner - neurons :].sort().values.to(self.gram_II.device)
        return kept_N, self.expert.narrowed(kept_N, narrowed(self.expert.down_HI, self.gram_II, kept_N, self.damping))

    def at_ranks(self, narrow: Expert, ranks: list[int]) -> Iterator[tuple[Expert, torch.Tensor, torch.Tensor]]:
        """A narrowed expert with factors of each rank: itself, u (R, I or 2I) and v (R, H); one decomposition."""
        weight_P, local_SS = self.metric.local(narrow, self.input_PH)
        rows_PH = self.input_PH.double() * weight_P.sqrt()[:, None]
        spectrum = decompose(narrow.stacked, input_rows_PX=rows_PH, output_gram_OO=local_SS, damping=self.damping)
        for rank in ranks:
            factors = spectrum.truncated(rank)
            assert factors.u_RO is not None
            assert factors.v_RX is not None
            cut = narrow.with_stacked(factors.densified())
            hidden_PN = cut.hidden(self.input_PH)
            down_HN, _ = refitted(self.output_PH, hidden_PN, self.metric.weight_P, narrow.down_HI, self.damping)
            yield replace(cut, down_HI=down_HN.to(cut.down_HI.dtype)), factors.u_RO, factors.v_RX

    def damage(self, cut: Expert | None) -> float:
        """Of an expert in place of the original; None for an empty one."""
        change_PH = -self.output_PH
        if cut is not None:
            change_PH = change_PH + cut.hidden(self.input_PH) @ cut.down_HI.T
        return self.metric.damage(change_PH)


@dataclass(frozen=True, eq=False)
class _Metric:
    """How much a change of the expert's output costs: q (P,) = |c|^2 and B (H, H) = sum c c^T / sum q."""

    weight_P: torch.Tensor
    gram_HH: torch.Tensor

    @classmethod
    def of(cls, tokens: ExpertTokens) -> _Metric:
        gate_P = tokens.weight_P.double()
        hidden = tokens.input_PH.shape[1]
        for name, value in vars(tokens).items():
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity. Check the checkpoint and the calibration data.")
        if tokens.gradient_JPH is None:
            eye_HH = torch.eye(hidden, dtype=torch.float64, device=gate_P.device)
            return cls(gate_P.square() * hidden, eye_HH / hidden)
        gradient_JPH = tokens.gradient_JPH.reshape(-1, *tokens.input_PH.shape)
        scale = len(gradient_JPH) ** -0.5
        cotangent_JPH = gradient_JPH.double() * (gate_P[:, None] * scale)
        rows_QH = cotangent_JPH.flatten(0, 1)
        weight_P = cotangent_JPH.square().sum((0, 2))
        total = weight_P.sum()
        gram_HH = rows_QH.T @ rows_QH / (total if total > 0 else 1.0)
        return cls(weight_P, gram_HH)

    def damage(self, change_PH: torch.Tensor) -> float:
        change_PH = change_PH.double()
        # B is a sum of squares; a rounding error below zero must not reach the curves.
        return max(0.0, 0.5 * float(((change_PH @ self.gram_HH * change_PH).sum(1) * self.weight_P).sum()))

    def local(self, narrow: Expert, input_PH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at the outputs of gate and up: (P,) weights and their (S, S) metric, S = I or 2I, of trace 1."""
        slope_PS = _slopes(narrow, input_PH).double()
        down_HI = narrow.down_HI.double()
        copies = slope_PS.shape[1] // narrow.inner
        effect_SS = (down_HI.T @ self.gram_HH @ down_HI).repeat(copies, copies)
        weight_P = self.weight_P * (slope_PS.square() @ effect_SS.diagonal())
        local_SS = effect_SS * (slope_PS.T @ (slope_PS * self.weight_P[:, None]))
        total = local_SS.trace()
        return weight_P, local_SS / (total if total > 0 else 1.0)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _slopes(expert: Expert, input_PH: torch.Tensor) -> torch.Tensor:
    """(P, I or 2I) derivative of every hidden activation by its own gate and up value."""
    values = [value for value in expert.preactivations(input_PH) if value is not None]
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_(True) for value in values]
        gate_PI = leaves[0] if expert.gate_IH is not None else None
        total = expert.activate(gate_PI, leaves[-1]).sum()
        return torch.cat(torch.autograd.grad(total, leaves), dim=1)


def factors_of(cutter: Cutter, form: Form, dtype: torch.dtype) -> ExpertFactors:
    """The expert in a form, in the dtype that is stored."""
    kept_N, narrow = cutter.narrowed(form.neurons)
    neurons = None if form.neurons == cutter.expert.inner else kept_N
    if form.input_rank is None:
        return ExpertFactors(
            up=MatrixFactors(dense_OX=narrow.up_IH.to(dtype)),
            down=MatrixFactors(dense_OX=narrow.down_HI.to(dtype)),
            gate=None if narrow.gate_IH is None else MatrixFactors(dense_OX=narrow.gate_IH.to(dtype)),
            neurons=neurons,
        )
    ((cut, u_RS, v_RH),) = cutter.at_ranks(narrow, [form.input_rank])
    v_RH = v_RH.to(dtype)
    parts = [part.to(dtype).contiguous() for part in u_RS.split(form.neurons, dim=1)]
    return ExpertFactors(
        up=MatrixFactors(u_RO=parts[-1], v_RX=v_RH),
        down=MatrixFactors(dense_OX=cut.down_HI.to(dtype)),
        gate=MatrixFactors(u_RO=parts[0], v_RX=v_RH) if len(parts) == 2 else None,
        neurons=neurons,
    )
