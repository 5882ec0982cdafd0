"""Which experts of a block to keep, so that its output stays as it was (arXiv:2402.14800, "Not All Experts are Equal").

The paper tries every subset of a block's experts and keeps the one whose output is closest to the original's on
calibration tokens, which are routed again among those that stay. Here the error is squared, so that it does not depend
on how tokens are batched, and where there are too many subsets experts are removed one by one, each time the one whose
removal leaves the least error.

Shape letters: E experts, S sampled tokens, C tokens of a chunk, K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from math import ceil, comb

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens, routed_output
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.rerouting import Rerouter

MOST_SUBSETS = 20_000
"""Subsets that are all tried."""

# Numbers that the products of all experts' outputs may have, and their outputs at once: 512 and 256 MB.
_LARGEST_GRAMS, _LARGEST_CHUNK = 2**27, 2**26


class Reconstruction:
    """What a block's output loses on its sample for any set of experts that stay.

    Every expert runs once on every token; what any weights give then follows from the products of their outputs.

    Args:
        experts: The block's experts.
        tokens: Its sample, of which evenly spaced tokens are taken where all would need more than 512 MB.
        rerouter: The router's rule on the same sample.

    Raises:
        ValueError: If the router's rule is not known.
    """

    def __init__(self, experts: ExpertTensors, tokens: SampledTokens, rerouter: Rerouter) -> None:
        self.num_experts, self._rerouter = experts.num_experts, rerouter
        stride = ceil(len(tokens.input_SH) * self.num_experts**2 / _LARGEST_GRAMS) or 1
        self._token_S = torch.arange(0, len(tokens.input_SH), stride)
        self._scales_input = experts.scales_input
        self._before = self._routed(range(experts.num_experts))
        input_SH = tokens.input_SH[self._token_S.to(tokens.input_SH.device)]
        weights_SE = self._input_weights(input_SH, self._before[0].shape[1])
        size = max(1, _LARGEST_CHUNK // (self.num_experts * input_SH.shape[1]))
        parts = zip(input_SH.split(size), weights_SE.split(size), strict=True)
        self._gram_SEE = torch.cat([_gram(experts, *part).cpu() for part in parts])

    def error(self, kept: Sequence[int]) -> float:
        """Squared change of the block's output over all tokens where only these experts stay."""
        return float(self.errors(kept).sum())

    def errors(self, kept: Sequence[int]) -> torch.Tensor:
        """(S,) the same token by token."""
        (index_SK, weights_SK), (kept_SK, other_SK) = self._before, self._routed(kept)
        index_SJ, weight_SJ = torch.cat([index_SK, kept_SK], 1), torch.cat([weights_SK, -other_SK], 1).double()
        row_S = torch.arange(len(index_SJ))[:, None, None]
        gram_SJJ = self._gram_SEE[row_S, index_SJ[:, :, None], index_SJ[:, None]].double()
        return torch.einsum("sj,sjk,sk->s", weight_SJ, gram_SJJ, weight_SJ).clamp(min=0)

    def _routed(self, kept: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, K) selected experts, and the (S, K) factors of their outputs."""
        found = self._rerouter.route(kept, self._token_S)
        if found is None:
            raise ValueError(
                "Where this router sends the tokens of a removed expert does not follow from its logits alone, and a "
                'reconstruction has to know it. Use a criterion that does not, such as "reap".'
            )
        index_SK, weights_SK = found
        return index_SK, (weights_SK != 0).float() if self._scales_input else weights_SK.float()

    def _input_weights(self, input_SH: torch.Tensor, top_k: int) -> torch.Tensor:
        """(S, E) what the inputs of experts are scaled by: 1, or the weights of a router that scales them."""
        weights_SE = torch.ones(len(input_SH), self.num_experts)
        if self._scales_input:
            # Such a router weighs each expert by its own score, whichever others it selects.
            for first in range(0, self.num_experts, top_k):
                last = min(first + top_k, self.num_experts)
                index_SK, weights_SK = self._rerouter.route(range(last - top_k, last), self._token_S) or (None, None)
                assert index_SK is not None
                assert weights_SK is not None
                weights_SE.scatter_(1, index_SK, weights_SK.float())
        return weights_SE.to(input_SH.device)


def _gram(experts: ExpertTensors, input_CH: torch.Tensor, weights_CE: torch.Tensor) -> torch.Tensor:
    """(C, E, E) products of the outputs of all experts on the same token."""
    token_C = torch.arange(len(input_CH), device=input_CH.device)
    outputs = [routed_output(experts, e, input_CH, token_C, weights_CE[:, e]) for e in range(experts.num_experts)]
    output_CEH = torch.stack(outputs, dim=1)
    return output_CEH @ output_CEH.transpose(1, 2)


def kept_by_reconstruction(
    block: Reconstruction, num_kept: int, router_groups: int = 1, most_subsets: int = MOST_SUBSETS
) -> tuple[int, ...]:
    """The experts to keep, ascending: the best of all subsets where there are few, else what greedy removal leaves.

    Args:
        block: The block.
        num_kept: How many, the same number in each router group.
        router_groups: Router groups.
        most_subsets: How many subsets are few.
    """
    size, each = block.num_experts // router_groups, num_kept // router_groups
    if comb(size, each) ** router_groups > most_subsets:
        return removal_path(block, num_kept, router_groups)[-1][0]
    parts = [combinations(range(g * size, (g + 1) * size), each) for g in range(router_groups)]
    return min((sum(subset, ()) for subset in product(*parts)), key=block.error)


def removal_path(block: Reconstruction, num_kept: int, router_groups: int = 1) -> list[tuple[tuple[int, ...], float]]:
    """What stays, and the error of it, after each step of a greedy removal down to `num_kept` experts.

    A step removes an expert of each router group, one after the other.

    Args:
        block: The block.
        num_kept: Experts that stay at the end.
        router_groups: Router groups.
    """
    size, kept = block.num_experts // router_groups, list(range(block.num_experts))
    path = [(tuple(kept), 0.0)]
    while len(kept) > num_kept:
        left = set(range(router_groups))
        while left:
            tried = {e: block.error([k for k in kept if k != e]) for e in kept if e // size in left}
            removed = min(tried, key=lambda e: tried[e])
            kept.remove(removed)
            left.remove(removed // size)
        path.append((tuple(kept), tried[removed]))
    return path
