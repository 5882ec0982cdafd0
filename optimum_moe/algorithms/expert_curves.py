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

On the tokens that it was fitted to, a form with many free numbers looks better than it is. So curves are of forms that
were fitted to every other token, and weigh the damage on those that they have not seen three to one against the damage
on those that they have: where the error of n tokens is e + c / n on others and e - c / n on themselves, that is the
error of forms that are fitted to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from optimum_moe.algorithms.factors import ExpertFactors, MatrixFactors
from optimum_moe.algorithms.low_rank import decompose
from optimum_moe.algorithms.neurons import DAMPING, elimination, narrowed, refitted

# Share of the tokens that a form has not seen in what it is expected to lose on others.
_HELD_SHARE = 0.75

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

    def preactivations(self, input_PH: torch.Tensor) -> torch.Tensor:
        """(P, I or 2I) outputs of `stacked`, without biases."""
        return input_PH @ self.stacked.T

    def activated(self, stacked_PS: torch.Tensor) -> torch.Tensor:
        """(P, I) hidden activations of the outputs of `stacked`."""
        up_PI = stacked_PS[:, -self.inner :]
        up_PI = up_PI if self.up_bias_I is None else up_PI + self.up_bias_I
        if self.gate_IH is None:
            return self.activate(None, up_PI)
        gate_PI = stacked_PS[:, : self.inner]
        return self.activate(gate_PI if self.gate_bias_I is None else gate_PI + self.gate_bias_I, up_PI)


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

    def __len__(self) -> int:
        return len(self.input_PH)

    def halves(self) -> tuple[ExpertTokens, ExpertTokens]:
        """Every other token, and the rest; a single token is both."""
        if len(self) == 1:
            return self, self
        return self._every_other(0), self._every_other(1)

    def _every_other(self, first: int) -> ExpertTokens:
        gradient_JPH = None if self.gradient_JPH is None else self.gradient_JPH[..., first::2, :]
        return ExpertTokens(self.input_PH[first::2], self.weight_P[first::2], gradient_JPH)


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


@dataclass(frozen=True, eq=False)
class Moments:
    """What a form's hidden activations have to do with each other and with the expert's output, over tokens.

    Args:
        gram_NN: (N, N) float64 sum of q h h^T.
        cross_HN: (H, N) float64 sum of q y h^T of the expert's output y.
    """

    gram_NN: torch.Tensor
    cross_HN: torch.Tensor


class Evidence:
    """An expert on some of its tokens, and what changes of it cost there.

    Tokens are scaled by the root of their weight and multiplied in float32; what is solved is float64. `empty_damage`
    is that of leaving the expert out; damages are summed over the tokens.

    Args:
        expert: In float32 or better.
        tokens: At least one.
    """

    def __init__(self, expert: Expert, tokens: ExpertTokens) -> None:
        self.tokens = len(tokens)
        self.down_HI = expert.down_HI.double()
        self.input_PH = tokens.input_PH.to(expert.up_IH.dtype)
        self.metric = Metric.of(tokens)
        self.root_P1 = self.metric.weight_P.sqrt().to(self.input_PH.dtype)[:, None]
        self.hidden_PI = expert.activated(expert.preactivations(self.input_PH)) * self.root_P1
        self.gram_II = (self.hidden_PI.T @ self.hidden_PI).double()
        self.cross_HI = self.down_HI @ self.gram_II
        self.empty_damage = 0.5 * float((self.metric.gram_HH @ self.down_HI * self.cross_HI).sum())

    def of_neurons(self, kept_N: torch.Tensor) -> Moments:
        """Of some of the expert's neurons as they are."""
        return Moments(self.gram_II[kept_N][:, kept_N], self.cross_HI[:, kept_N])

    def of_factors(self, narrow: Expert, left_OR: torch.Tensor, right_RH: torch.Tensor) -> Moments:
        """Of the neurons of an expert whose stacked gate and up are such factors."""
        hidden_PN = narrow.activated(self.input_PH @ right_RH.T @ left_OR.T) * self.root_P1
        cross_IN = (self.hidden_PI.T @ hidden_PN).double()
        return Moments((hidden_PN.T @ hidden_PN).double(), self.down_HI @ cross_IN)

    def damage(self, down_HN: torch.Tensor, moments: Moments) -> float:
        """Of a form with such moments and this down projection."""
        effect_NH = down_HN.T @ self.metric.gram_HH
        own = float((effect_NH @ down_HN * moments.gram_NN).sum())
        both = float((effect_NH * moments.cross_HN.T).sum())
        # A sum of squares: a rounding error below zero must not reach the curves.
        return max(0.0, self.empty_damage + 0.5 * own - both)


class Cutter:
    """One expert, and the forms that can be made of it from what its tokens say."""

    def __init__(self, expert: Expert, tokens: ExpertTokens, damping: float = DAMPING) -> None:
        self.expert = expert.float()
        self.damping = damping
        self.seen = Evidence(self.expert, tokens)
        down_HI = self.seen.down_HI
        effect_II = down_HI.T @ self.seen.metric.gram_HH @ down_HI
        self.order_I, _ = elimination(self.seen.gram_II, effect_II, damping)

    def narrowed(self, neurons: int) -> tuple[Expert, torch.Tensor]:
        """The expert with so many neurons, refitted; the neurons that it kept, ascending."""
        gram_II = self.seen.gram_II
        kept_N = self.order_I[self.expert.inner - neurons :].sort().values.to(gram_II.device)
        return self.expert.narrowed(kept_N, narrowed(self.expert.down_HI, gram_II, kept_N, self.damping)), kept_N

    def at_ranks(self, narrow: Expert, ranks: list[int]) -> Iterator[tuple[MatrixFactors, torch.Tensor, Moments]]:
        """A narrowed expert with factors of each rank: gate and up stacked, down (H, N), moments; one decomposition."""
        weight_P, local_SS = self.seen.metric.local(narrow, self.seen.input_PH)
        rows_PH = self.seen.input_PH * weight_P.sqrt().to(self.seen.input_PH.dtype)[:, None]
        gram_HH = (rows_PH.T @ rows_PH).double() if len(rows_PH) >= rows_PH.shape[1] else None
        spectrum = decompose(
            narrow.stacked,
            input_gram_XX=gram_HH,
            input_rows_PX=rows_PH if gram_HH is None else None,
            output_gram_OO=local_SS,
            damping=self.damping,
        )
        for rank in ranks:
            moments = self.seen.of_factors(narrow, spectrum.left_OD[:, :rank], spectrum.right_DX[:rank])
            down_HN = refitted(moments.cross_HN, moments.gram_NN, narrow.down_HI, self.damping)
            yield spectrum.truncated(rank), down_HN, moments


class Judge:
    """What the forms of a cutter are expected to lose on tokens that it has not seen, summed over all tokens.

    Args:
        cutter: Saw one half of the tokens.
        held: The other half.
        total: Number of all tokens.
    """

    def __init__(self, cutter: Cutter, held: ExpertTokens, total: int) -> None:
        self.seen, self.held = cutter.seen, Evidence(cutter.expert, held)
        self._held_scale = _HELD_SHARE * total / len(held)
        self._seen_scale = (1 - _HELD_SHARE) * total / self.seen.tokens

    @property
    def empty_damage(self) -> float:
        """Of leaving the expert out."""
        return self._seen_scale * self.seen.empty_damage + self._held_scale * self.held.empty_damage

    def narrowed(self, narrow: Expert, kept_N: torch.Tensor) -> float:
        """Of an expert with these neurons."""
        down_HN = narrow.down_HI.double()
        return self._total(down_HN, self.seen.of_neurons(kept_N), self.held.of_neurons(kept_N))

    def at_rank(self, narrow: Expert, stacked: MatrixFactors, down_HN: torch.Tensor, moments: Moments) -> float:
        """Of a narrowed expert with factors."""
        assert stacked.u_RO is not None
        assert stacked.v_RX is not None
        factors = stacked.u_RO.T.to(narrow.up_IH.dtype), stacked.v_RX.to(narrow.up_IH.dtype)
        return self._total(down_HN, moments, self.held.of_factors(narrow, *factors))

    def _total(self, down_HN: torch.Tensor, seen: Moments, held: Moments) -> float:
        lost_seen, lost_held = self.seen.damage(down_HN, seen), self.held.damage(down_HN, held)
        return self._seen_scale * lost_seen + self._held_scale * lost_held


@dataclass(frozen=True, eq=False)
class Metric:
    """How much a change of the expert's output costs: q (P,) = |c|^2 and B (H, H) = sum c c^T / sum q."""

    weight_P: torch.Tensor
    gram_HH: torch.Tensor

    @classmethod
    def of(cls, tokens: ExpertTokens) -> Metric:
        """From gradients, or the squared error of the weighted output without them."""
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
    with torch.enable_grad():
        stacked_PS = expert.preactivations(input_PH).detach().requires_grad_(True)
        (slope_PS,) = torch.autograd.grad(expert.activated(stacked_PS).sum(), stacked_PS)
    return slope_PS


def factors_of(cutter: Cutter, form: Form, dtype: torch.dtype) -> ExpertFactors:
    """The expert in a form, in the dtype that is stored."""
    narrow, kept_N = cutter.narrowed(form.neurons)
    neurons = None if form.neurons == cutter.expert.inner else kept_N
    if form.input_rank is None:
        return ExpertFactors(
            up=MatrixFactors(dense_OX=narrow.up_IH.to(dtype)),
            down=MatrixFactors(dense_OX=narrow.down_HI.to(dtype)),
            gate=None if narrow.gate_IH is None else MatrixFactors(dense_OX=narrow.gate_IH.to(dtype)),
            neurons=neurons,
        )
    ((stacked, down_HN, _),) = cutter.at_ranks(narrow, [form.input_rank])
    assert stacked.u_RO is not None
    assert stacked.v_RX is not None
    v_RH = stacked.v_RX.to(dtype)
    parts = [part.to(dtype).contiguous() for part in stacked.u_RO.split(form.neurons, dim=1)]
    return ExpertFactors(
        up=MatrixFactors(u_RO=parts[-1], v_RX=v_RH),
        down=MatrixFactors(dense_OX=down_HN.to(dtype)),
        gate=MatrixFactors(u_RO=parts[0], v_RX=v_RH) if len(parts) == 2 else None,
        neurons=neurons,
    )
