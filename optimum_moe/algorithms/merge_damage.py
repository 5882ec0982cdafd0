"""What merging two experts is expected to cost, in the unit of the loss.

Shape letters: E experts, S sampled tokens, P those of a pair, H hidden, I intermediate, Q directions of the loss.

One of the two experts serves the tokens of both, with the sum of their routing weights, after its down projection is
refitted to what they gave together. The squared error that is left, in the metric of the loss gradients, is the damage;
the better of the two experts counts. Similar weights or similar routing are guesses of this number: on the balanced
reference model at half of the experts, groups by it give a KL of 0.107, groups by router logits 0.116.
"""

from __future__ import annotations

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens, single_expert
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.neurons import DAMPING, gram, refitted

# Tokens of a block that are looked at: the pairs need their order, not their exact damage.
_TOKENS = 8192
_DIRECTIONS = 128


@torch.no_grad()
def pair_damages(experts: ExpertTensors, sample: SampledTokens, damping: float = DAMPING) -> torch.Tensor:
    """(E, E) float64 damage of merging each two experts, symmetric, 0 on the diagonal and without common tokens.

    Args:
        experts: The block's routed experts.
        sample: The block's sampled tokens; without gradients the damage is half of the squared error of the output.
        damping: Ridge of the refit as a share of the Gram's mean diagonal.
    """
    step = -(-len(sample.input_SH) // _TOKENS) or 1
    sample = sample.every(step)
    num_experts = experts.num_experts
    weight_SE = torch.zeros(len(sample.input_SH), num_experts, device=sample.input_SH.device)
    is_routed_SK = (sample.index_SK >= 0) & (sample.index_SK < num_experts)
    ids_SK = sample.index_SK.long().clamp(0, num_experts - 1)
    weight_SE.scatter_add_(1, ids_SK, sample.weights_SK.float() * is_routed_SK)
    input_SH = sample.input_SH.float()
    if sample.scales_input:
        # Routers that scale the input select one expert, whose weight this is.
        input_SH, weight_SE = input_SH * weight_SE.amax(1, keepdim=True), (weight_SE != 0).float()
    root_S1 = sample.importance().sqrt()[:, None]
    rows_QH = _directions(sample)
    token_P, given = [], []
    for e in range(num_experts):
        own_P = weight_SE[:, e].nonzero()[:, 0]
        single = single_expert(experts, e)
        hidden_PI = single.activated(single.preactivations(input_SH[own_P]))
        output_PQ = hidden_PI @ (rows_QH @ single.down_HI).T
        token_P.append(own_P)
        given.append(output_PQ * weight_SE[own_P, e, None] * root_S1[own_P])
    damage_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for host in range(num_experts):
        single = single_expert(experts, host)
        hidden_SI = single.activated(single.preactivations(input_SH)) * root_S1
        prior_QI = rows_QH @ single.down_HI
        for other in range(num_experts):
            if other == host or not len(token_P[other]):
                continue
            target_SQ = input_SH.new_zeros(len(input_SH), len(rows_QH))
            for e in (host, other):
                target_SQ.index_add_(0, token_P[e], given[e])
            both_S = weight_SE[:, host] + weight_SE[:, other]
            pair_P = both_S.nonzero()[:, 0]
            hidden_PI = hidden_SI[pair_P] * both_S[pair_P, None]
            cross_QI = target_SQ[pair_P].T @ hidden_PI
            down_QI = refitted(cross_QI.double(), gram(hidden_PI), prior_QI, damping).float()
            left_PQ = target_SQ[pair_P] - hidden_PI @ down_QI.T
            damage_EE[other, host] = 0.5 * float(left_PQ.square().sum(dtype=torch.float64)) * step
    return torch.minimum(damage_EE, damage_EE.T)


def _directions(sample: SampledTokens) -> torch.Tensor:
    """(Q, H) rows r so that sum r r^T is the metric of the loss, of trace 1, in its largest directions."""
    gradient_SJH, hidden = sample.gradient_SJH, sample.input_SH.shape[1]
    eye_HH = torch.eye(hidden, device=sample.input_SH.device)
    if gradient_SJH is None:
        return eye_HH
    rows_QH = gradient_SJH.float().flatten(0, 1)
    metric_HH = gram(rows_QH).double()
    total = metric_HH.trace()
    if not float(total):
        return eye_HH * hidden**-0.5
    values_H, vectors_HH = torch.linalg.eigh(metric_HH / total)
    largest = min(_DIRECTIONS, hidden)
    return (vectors_HH * values_H.clamp(min=0).sqrt()).T[-largest:].float()
