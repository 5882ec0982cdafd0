"""What one expert is expected to lose in each form that it could be kept in.

Shape letters: P routed tokens of the expert, H hidden, I intermediate, N kept neurons, R rank, S the smaller of H and
I.

A form keeps N neurons (chosen and refitted by `neurons.elimination`); its gate and up projections are dense, or factors
of rank R of the two stacked, (2N, H), so that both share the right factor: U_gate V and U_up V. Whatever changes gate
and up, the down projection is refitted to it. N = 0 is an empty expert, all neurons without ranks the untouched one.

On the tokens that it was fitted to, a form with many free numbers looks better than it is. So curves are of forms that
were fitted to every other token, and weigh the damage on those that they have not seen three to one against the damage
on those that they have: where the error of n tokens is e + c / n on others and e - c / n on themselves, that is the
error of forms that are fitted to all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from optimum_moe.algorithms.expert_evidence import Evidence, Moments
from optimum_moe.algorithms.factors import ExpertFactors, MatrixFactors
from optimum_moe.algorithms.low_rank import decompose
from optimum_moe.algorithms.neurons import DAMPING, elimination, narrowed, refitted
from optimum_moe.algorithms.one_expert import Expert, ExpertTokens, Form

# Share of the tokens that a form has not seen in what it is expected to lose on others.
_HELD_SHARE = 0.75


@dataclass(frozen=True, eq=False)
class Narrowed:
    """An expert with some of its neurons.

    Args:
        expert: Its gate and up.
        kept_N: (N,) ascending numbers of the neurons.
        made_SN: (S, N) float64 what they are mapped to.
    """

    expert: Expert
    kept_N: torch.Tensor
    made_SN: torch.Tensor


@dataclass(frozen=True, eq=False)
class Factorized:
    """A narrowed expert with factors.

    Args:
        stacked: Gate above up.
        made_SN: (S, N) float64 what its neurons are mapped to.
        moments: On the tokens that it was fitted to.
    """

    stacked: MatrixFactors
    made_SN: torch.Tensor
    moments: Moments


class Cutter:
    """One expert, and the forms that can be made of it from what its tokens say.

    Args:
        expert: Its matrices.
        tokens: At least one.
        damping: Ridge of every Gram as a share of its mean diagonal.
    """

    def __init__(self, expert: Expert, tokens: ExpertTokens, damping: float = DAMPING) -> None:
        self.expert = expert.float()
        self.damping = damping
        self.seen = Evidence(self.expert, tokens)
        self.order_I, _ = elimination(self.seen.gram_II, self.seen.effect_II, damping)

    def narrowed(self, neurons: int) -> Narrowed:
        """With so many neurons, refitted to what all of them gave."""
        gram_II = self.seen.gram_II
        kept_N = self.order_I[self.expert.inner - neurons :].sort().values.to(gram_II.device)
        made_SN = narrowed(self.seen.outputs.target_SI, gram_II, kept_N, self.damping)
        return Narrowed(self.expert.narrowed(kept_N), kept_N, made_SN)

    def at_ranks(self, narrow: Narrowed, ranks: list[int]) -> Iterator[Factorized]:
        """A narrowed expert with factors of each rank, from one decomposition."""
        weight_P, local_OO = self.seen.local(narrow.expert, narrow.made_SN)
        rows_PH = self.seen.input_PH * weight_P.sqrt().to(self.seen.input_PH.dtype)[:, None]
        gram_HH = (rows_PH.T @ rows_PH).double() if len(rows_PH) >= rows_PH.shape[1] else None
        spectrum = decompose(
            narrow.expert.stacked,
            input_gram_XX=gram_HH,
            input_rows_PX=rows_PH if gram_HH is None else None,
            output_gram_OO=local_OO,
            damping=self.damping,
        )
        for rank in ranks:
            moments = self.seen.of_factors(narrow.expert, spectrum.left_OD[:, :rank], spectrum.right_DX[:rank])
            made_SN = refitted(moments.cross_SN, moments.gram_NN, narrow.made_SN, self.damping)
            yield Factorized(spectrum.truncated(rank), made_SN, moments)


class Judge:
    """What the forms of a cutter are expected to lose on tokens that it has not seen, summed over all tokens.

    Args:
        cutter: Saw one half of the tokens.
        held: The other half.
        total: Number of all tokens.
    """

    def __init__(self, cutter: Cutter, held: ExpertTokens, total: int) -> None:
        self.seen, self.held = cutter.seen, Evidence(cutter.expert, held)
        self._held_scale = _HELD_SHARE * total / len(self.held.input_PH)
        self._seen_scale = (1 - _HELD_SHARE) * total / len(self.seen.input_PH)

    @property
    def empty_damage(self) -> float:
        """Of leaving the expert out."""
        return self._total(self.seen.empty_damage, self.held.empty_damage)

    def narrowed(self, narrow: Narrowed) -> float:
        """Of an expert with fewer neurons."""
        seen, held = (e.damage(narrow.made_SN, e.of_neurons(narrow.kept_N)) for e in (self.seen, self.held))
        return self._total(seen, held)

    def factorized(self, narrow: Narrowed, made: Factorized) -> float:
        """Of a narrowed expert with factors."""
        assert made.stacked.u_RO is not None
        assert made.stacked.v_RX is not None
        left_OR, right_RH = (f.to(narrow.expert.up_IH.dtype) for f in (made.stacked.u_RO.T, made.stacked.v_RX))
        held = self.held.of_factors(narrow.expert, left_OR, right_RH)
        return self._total(self.seen.damage(made.made_SN, made.moments), self.held.damage(made.made_SN, held))

    def _total(self, seen: float, held: float) -> float:
        return self._seen_scale * seen + self._held_scale * held


def factors_of(cutter: Cutter, form: Form, dtype: torch.dtype) -> ExpertFactors:
    """The expert in a form, in the dtype that is stored."""
    narrow = cutter.narrowed(form.neurons)
    neurons = None if form.neurons == cutter.expert.inner else narrow.kept_N
    if form.input_rank is None:
        gate_NH = narrow.expert.gate_IH
        return ExpertFactors(
            up=MatrixFactors(dense_OX=narrow.expert.up_IH.to(dtype)),
            down=MatrixFactors(dense_OX=cutter.seen.outputs.down(narrow.made_SN).to(dtype)),
            gate=None if gate_NH is None else MatrixFactors(dense_OX=gate_NH.to(dtype)),
            neurons=neurons,
        )
    (made,) = cutter.at_ranks(narrow, [form.input_rank])
    assert made.stacked.u_RO is not None
    assert made.stacked.v_RX is not None
    v_RH = made.stacked.v_RX.to(dtype)
    parts = [part.to(dtype).contiguous() for part in made.stacked.u_RO.split(form.neurons, dim=1)]
    return ExpertFactors(
        up=MatrixFactors(u_RO=parts[-1], v_RX=v_RH),
        down=MatrixFactors(dense_OX=cutter.seen.outputs.down(made.made_SN).to(dtype)),
        gate=MatrixFactors(u_RO=parts[0], v_RX=v_RH) if len(parts) == 2 else None,
        neurons=neurons,
    )
