"""Which experts the sampled tokens select, and with what weights, once some experts are gone.

Shape letters: E experts, S sampled tokens, P some of them, K top-k, N router logits (E and those of no routed expert),
X width of the router's last linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from optimum_moe.algorithms.router_fit import RouterView, select

# Shares of the sample whose experts, and whose weights, have to come out as the model's own.
_SAME_EXPERTS, _SAME_WEIGHTS = 0.99, 0.02


@dataclass(frozen=True, eq=False)
class Rerouter:
    """A router's selection and weights, computed again for some of its experts.

    Args:
        router: The original router.
        input_SX: (S, X) inputs of its last linear layer.
        index_SK: (S, K) what it selected of all experts.
        weights_SK: (S, K) with what weights.
        router_groups: Router groups.
        groups_used: Router groups that a token may use.
    """

    router: RouterView
    input_SX: torch.Tensor
    index_SK: torch.Tensor
    weights_SK: torch.Tensor
    router_groups: int = 1
    groups_used: int = 1

    def route(
        self, kept: Sequence[int], token_P: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(P, K) original ids and weights that the tokens have among the experts `kept`.

        Args:
            kept: Ids of the experts that stay.
            token_P: (P,) numbers of the tokens; default all of the sample.

        Returns:
            None where the model's own routing does not follow from its logits by a rule that is known here: a selection
            of the highest scores within router groups, with weights that are the scores, or their shares, times one
            factor for each expert.
        """
        if self._rule is None:
            return None
        shares, factor_E = self._rule
        index_PK, scores_PK = self._selected(kept, token_P)
        return index_PK, (_raw(scores_PK, shares) * factor_E[index_PK]).to(self.weights_SK.dtype)

    @cached_property
    def _rule(self) -> tuple[bool, torch.Tensor] | None:
        """Whether weights are shares of the scores, and the factor (E,) of each expert; None where neither fits."""
        width = int(self.router.rows_NX.shape[1])
        if bool((self.index_SK >= self.router.num_experts).any()) or self.input_SX.shape[1] != width:
            return None
        index_SK, scores_SK = self._selected(range(self.router.num_experts))
        for shares in (False, True):
            raw_SK = _raw(scores_SK, shares)
            factor_E = self._factors(index_SK, raw_SK)
            if self._agrees(index_SK, raw_SK * factor_E[index_SK]):
                return shares, factor_E
        return None

    @cached_property
    def _logits_SN(self) -> torch.Tensor:
        return self.router.logits(self.input_SX)

    def _factors(self, index_SK: torch.Tensor, raw_SK: torch.Tensor) -> torch.Tensor:
        """(E,) what the router multiplies the weights of each expert by; the mean for experts without tokens."""

        def sums(values_SK: torch.Tensor, ids_SK: torch.Tensor) -> torch.Tensor:
            empty_E = torch.zeros(self.router.num_experts, dtype=torch.float64, device=ids_SK.device)
            return empty_E.index_add(0, ids_SK.flatten().long(), values_SK.flatten().double())

        own_E, raw_E = sums(self.weights_SK, self.index_SK), sums(raw_SK, index_SK)
        mean = own_E.sum() / raw_E.sum().clamp(min=1e-12)
        return torch.where(raw_E > 0, own_E.to(raw_E) / raw_E.clamp(min=1e-300), mean)

    def _selected(self, kept: Sequence[int], token_P: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, K) original ids, and their scores."""
        router, total = self.router, self.router.num_experts
        logits_PN = self._logits_SN if token_P is None else self._logits_SN[token_P]
        kept_E = torch.tensor(list(kept), device=logits_PN.device)
        column_N = torch.cat([kept_E, torch.arange(total, logits_PN.shape[1], device=logits_PN.device)])
        logits_PN = logits_PN[:, column_N]
        scores_PE = router.scores(logits_PN)[:, : len(kept_E)]
        choice_PE = logits_PN[:, : len(kept_E)] if router.selects_by == "logits" else scores_PE
        if router.correction_E is not None:
            choice_PE = choice_PE + router.correction_E.to(choice_PE)[kept_E]
        # Router groups are those of all experts, whichever of them stay.
        every_PE = choice_PE.new_full((len(choice_PE), total), float("-inf")).index_copy_(1, kept_E, choice_PE)
        index_PK = select(every_PE, self.index_SK.shape[1], self.router_groups, self.groups_used)
        return index_PK, torch.zeros_like(every_PE).index_copy_(1, kept_E, scores_PE).gather(1, index_PK)

    def _agrees(self, index_SK: torch.Tensor, weights_SK: torch.Tensor) -> bool:
        """Whether a routing is the model's own, up to rounding and ties."""
        order_SK, own_SK = index_SK.argsort(-1), self.index_SK.argsort(-1)
        same_SK = index_SK.gather(1, order_SK) == self.index_SK.long().gather(1, own_SK)
        same_S = same_SK.all(-1)
        if float(same_S.double().mean()) < _SAME_EXPERTS:
            return False
        mine_SK, theirs_SK = weights_SK.gather(1, order_SK)[same_S], self.weights_SK.double().gather(1, own_SK)[same_S]
        near_SK = (mine_SK - theirs_SK).abs() <= _SAME_WEIGHTS * theirs_SK.abs().mean()
        return float(near_SK.double().mean()) >= _SAME_EXPERTS


def _raw(scores_SK: torch.Tensor, shares: bool) -> torch.Tensor:
    """(S, K) scores of the selected experts, or what each of them has of their sum."""
    return scores_SK / scores_SK.sum(-1, keepdim=True).clamp(min=1e-12) if shares else scores_SK
