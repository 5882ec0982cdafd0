"""Experts that are differences to a base which they share with their group: what the base computes runs once.

Shape letters: T tokens, K top-k, H hidden, I intermediate, P routed pairs of a token and an expert, Q of a token and a
group.
"""

from __future__ import annotations

from typing import Any

import torch

from optimum_moe.algorithms.experts import Activate
from optimum_moe.formats.base import Opened
from optimum_moe.nn.factorized_experts import FactorizedExperts, WidthClass
from optimum_moe.nn.merged_experts import accumulator, sort_pairs, wide


def run_shared(
    experts: Any, activate: Activate, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the selected experts, with one product of a base for each token and group.

    What goes into a base is the same for all experts of a group; what comes out of down is linear in the neurons,
    W sum_e g_e h_e + sum_e g_e U_e V_e h_e, so that their weighted sum goes through it.

    Args:
        experts: A module with `factors` that share bases, and nothing behind down.
        activate: Its gate function.
        hidden_TH: (T, H).
        index_TK: (T, K) expert ids, sentinels (>= E) included.
        weights_TK: (T, K) routing weights.

    Returns:
        (T, H) in the dtype of `hidden_TH`.
    """
    factors: FactorizedExperts = experts.factors
    found = factors.classes[0]
    assert isinstance(found, WidthClass)
    up, down = found.projection("up"), found.projection("down")
    projections = ([found.projection("gate")] if factors.has_gate else []) + [up]
    labels_E = found.stored("up").labels_C
    order_P, ends_E, expert_P = sort_pairs(index_TK, factors.num_experts)
    output_TH = accumulator(hidden_TH)
    if len(order_P) == 0:
        return factors.in_step(output_TH.to(hidden_TH.dtype))
    token_P, tokens = order_P // index_TK.shape[-1], len(hidden_TH)
    group_E = torch.tensor(labels_E, device=hidden_TH.device)
    key_Q, place_P = (group_E[expert_P] * tokens + token_P).unique(return_inverse=True)
    token_Q = key_Q % tokens
    group_ends = torch.searchsorted(key_Q, torch.arange(1, max(labels_E) + 2, device=key_Q.device) * tokens).tolist()
    groups = [slice(start, end) for start, end in zip([0, *group_ends[:-1]], group_ends, strict=True)]
    input_QH = hidden_TH.index_select(0, token_Q)
    based = [torch.cat([p(input_QH[rows], group=g) for g, rows in enumerate(groups)]) for p in projections]
    weight_P1 = weights_TK.reshape(-1).index_select(0, order_P).unsqueeze(-1)
    summed_QI = torch.zeros_like(based[-1], dtype=torch.promote_types(based[-1].dtype, torch.float32))
    opened: Opened = {}
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        rows = slice(start, end)
        start = end
        if rows.start == rows.stop:
            continue
        place, weight, token = place_P[rows], weight_P1[rows], token_P[rows]
        input_PH = hidden_TH.index_select(0, token)
        own = [
            shared[place] + projection(input_PH, expert=expert, with_shared=False, opened=opened)
            for shared, projection in zip(based, projections, strict=True)
        ]
        hidden_PI = activate(own[0] if factors.has_gate else None, own[-1])
        output_TH.index_add_(0, token, wide(down(hidden_PI, expert=expert, with_shared=False, opened=opened) * weight))
        summed_QI = summed_QI.index_add(0, place, wide(hidden_PI * weight))
    summed_QI = summed_QI.to(hidden_TH.dtype)
    shared_QH = torch.cat([down(summed_QI[rows], group=g) for g, rows in enumerate(groups)])
    return factors.in_step(output_TH.index_add_(0, token_Q, wide(shared_QH)).to(hidden_TH.dtype))
