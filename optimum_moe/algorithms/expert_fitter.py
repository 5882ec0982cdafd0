"""Fits of one expert with fewer neurons or changed matrices, and an estimate of what they lose on other tokens.

Shape letters: P routed tokens of the expert, H hidden, I intermediate, N kept neurons, S the smaller of H and I.

The N neurons that stay are chosen, and the down projection refitted, by `neurons.elimination` (optimal brain surgeon).
Whatever changes gate and up, the down projection is refitted to it.

On the tokens that it was fitted to, a fit with many free numbers looks better than it is. So candidates are fitted to
every other token, and the damage on the tokens that they have not seen weighs three to one against the damage on those
that they have: where the error of n tokens is e + c / n on others and e - c / n on themselves, that is the error of
fits to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch

from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.fisher_loss import FisherLoss, Outputs
from optimum_moe.algorithms.neurons import DAMPING, elimination, principal_submatrix, root, taken_over

# Share of the tokens that a fit has not seen in what it is expected to lose on others.
_HELD_OUT_SHARE = 0.75

_Damage = TypeVar("_Damage", float, torch.Tensor)


@dataclass(frozen=True, eq=False)
class Survivors:
    """The neurons of an expert in the order in which they stay.

    Args:
        order_I: (I,) int64 their numbers, the one that is eliminated last first.
        lower_II: (I, I) float64 root of their Gram in this order.
        inverse_II: (I, I) float64 its inverse.
    """

    order_I: torch.Tensor
    lower_II: torch.Tensor
    inverse_II: torch.Tensor


class NarrowExpert:
    """An expert with some of its neurons; nothing is computed before it is asked for.

    Args:
        expert: The expert.
        survivors: Its neurons.
        neurons: How many stay.
    """

    def __init__(self, expert: Expert, survivors: Survivors, neurons: int) -> None:
        self._expert, self._survivors = expert, survivors
        self.kept_N, self._by_N = survivors.order_I[:neurons].sort()
        """(N,) ascending numbers of the neurons."""

    @cached_property
    def expert(self) -> Expert:
        """Its gate and up."""
        return self._expert.narrowed(self.kept_N)

    @cached_property
    def made_SN(self) -> torch.Tensor:
        """(S, N) float64 what its neurons are mapped to, in the space of `FisherLoss.outputs`, to do what all did."""
        neurons, order_I = len(self.kept_N), self._survivors.order_I
        taken_DN, dropped_D = taken_over(self._survivors.lower_II, neurons)[:, self._by_N], order_I[neurons:]
        target_SI = Outputs(self._expert.down_HI).target_SI
        if target_SI is not None:
            return target_SI[:, self.kept_N].double() + target_SI[:, dropped_D].double() @ taken_DN
        made_SN = taken_DN.new_zeros(len(order_I), neurons).index_copy_(0, dropped_D, taken_DN)
        made_SN[self.kept_N, torch.arange(neurons, device=self.kept_N.device)] = 1.0
        return made_SN


class ExpertFitter:
    """One expert, and what can be fitted to its tokens; nothing is computed before it is asked for.

    Args:
        expert: Its matrices.
        tokens: At least one.
        damping: Ridge of every Gram as a share of its mean diagonal.
    """

    def __init__(self, expert: Expert, tokens: ExpertTokens, damping: float = DAMPING) -> None:
        self.expert = expert.float()
        self.damping = damping
        self._tokens = tokens

    @cached_property
    def loss(self) -> FisherLoss:
        """What changes of the expert cost on the tokens."""
        return FisherLoss(self.expert, self._tokens)

    @cached_property
    def survivors(self) -> Survivors:
        """The neurons, and what they have to do with each other."""
        gram_II = self.loss.gram_II
        gone = elimination(gram_II, self.loss.effect_II, self.damping)
        order_I = gone.order_D.flip(0).to(gram_II.device)
        inverse_II = gone.root_DI.flip(0).to(gram_II.device).index_select(1, order_I)
        return Survivors(order_I, root(principal_submatrix(gram_II, order_I), self.damping), inverse_II)

    def narrowed(self, neurons: int) -> NarrowExpert:
        """The expert with so many neurons, refitted to what all of them gave."""
        return NarrowExpert(self.expert, self.survivors, neurons)


class HeldOutEstimate:
    """What fits are expected to lose on tokens that they were not fitted to, summed over all tokens.

    Args:
        fitter: Sees one half of the tokens.
        held_out: The other half.
        total: Number of all tokens.
    """

    def __init__(self, fitter: ExpertFitter, held_out: ExpertTokens, total: int) -> None:
        self._fitter = fitter
        self.seen, self.held_out = fitter.loss, FisherLoss(fitter.expert, held_out)
        self._held_out_scale = _HELD_OUT_SHARE * total / len(self.held_out.input_PH)
        self._seen_scale = (1 - _HELD_OUT_SHARE) * total / len(self.seen.input_PH)

    @property
    def empty_damage(self) -> float:
        """Of leaving the expert out."""
        return self._weighed(lambda loss: loss.empty_damage)

    @cached_property
    def by_neurons_I1(self) -> torch.Tensor:
        """(I + 1,) of an expert with the first so many of its neurons."""
        all_I = self._fitter.survivors
        return self._weighed(lambda loss: loss.damages_without(all_I.order_I, all_I.lower_II, all_I.inverse_II))

    def of_hidden(self, made_SN: torch.Tensor, seen_PN: torch.Tensor, held_out_PN: torch.Tensor) -> float:
        """Of weighted hidden activations on either tokens, and a refitted down projection."""
        return self._weighed(lambda loss: loss.damage_of_hidden(seen_PN if loss is self.seen else held_out_PN, made_SN))

    def of_sums(
        self, terms: Callable[[torch.Tensor], torch.Tensor], outputs_RH: torch.Tensor, numbers: Sequence[int]
    ) -> list[float]:
        """Of sums of a few outputs, each times what `terms` gives, (P, R) for (P, H) inputs; one for each number R."""
        damages = self._weighed(lambda loss: loss.damages_of_sums(terms(loss.input_PH), outputs_RH, numbers))
        return [float(damage) for damage in damages]

    def of_outputs(self, run: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Of anything that gives (P, H) outputs, without down bias and routing weight, for (P, H) inputs."""
        return self._weighed(lambda loss: loss.damage_of_outputs(run(loss.input_PH)))

    def _weighed(self, damage: Callable[[FisherLoss], _Damage]) -> _Damage:
        return self._seen_scale * damage(self.seen) + self._held_out_scale * damage(self.held_out)
