"""The routing map: a router that keeps its N logits while the experts behind it are G merged ones.

The map sits on the router and not inside the experts because expert parallelism shards by id after the router.
"""

from __future__ import annotations

from typing import Any

import torch

from optimum_moe.nn.class_swap import SwappedModule


def map_routing(
    index_TK: torch.Tensor, weights_TK: torch.Tensor, expert_map_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map selected experts to groups so that each group runs once a token.

    The weights of slots that land in one group add up in the first of them; the others keep a valid id and get
    weight 0 (an id outside the experts would break expert parallelism with gradients).

    Args:
        index_TK: (T, K) selected experts, integers in [0, N).
        weights_TK: (T, K) their routing weights.
        expert_map_N: (N,) group of each expert.

    Returns:
        (T, K) groups in the dtype of `index_TK`, (T, K) weights in the dtype of `weights_TK`.
    """
    groups_TK = expert_map_N[index_TK]
    if index_TK.shape[-1] == 1:
        return groups_TK.to(index_TK.dtype), weights_TK
    if index_TK.shape[-1] == 2:
        return groups_TK.to(index_TK.dtype), _sum_pair(groups_TK, weights_TK)
    # Of equal values `max` returns the first.
    first_TK = (groups_TK.unsqueeze(-1) == groups_TK.unsqueeze(-2)).max(-1).indices
    # bfloat16 would round the sum of several slots once per addition.
    wide_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    summed_TK = torch.zeros_like(wide_TK).scatter_add_(-1, first_TK, wide_TK)
    return groups_TK.to(index_TK.dtype), summed_TK.to(weights_TK.dtype)


def _sum_pair(groups_T2: torch.Tensor, weights_T2: torch.Tensor) -> torch.Tensor:
    """The sums for top-2 in fewer steps; one addition rounds once in every dtype."""
    repeats_T1 = groups_T2[..., 1:] == groups_T2[..., :1]
    moved_T1 = weights_T2[..., 1:] * repeats_T1
    return weights_T2 + torch.cat((moved_T1, -moved_T1), -1)


class MappedRouter(SwappedModule):
    """Mixin put in front of a router class: same parameters, same logits, ids mapped to merged experts.

    `expert_map` is a persistent (N,) int64 buffer: the group of each expert.
    """

    expert_map: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The router's outputs `(logits, weights, index, ...)` with weights and index mapped."""
        logits, weights_TK, index_TK, *rest = super().forward(*args, **kwargs)
        groups_TK, summed_TK = map_routing(index_TK, weights_TK, self.expert_map)
        return (logits, summed_TK, groups_TK, *rest)
