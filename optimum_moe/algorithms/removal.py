"""What single experts contribute to the output of their block, token by token, next to the others that the token has.

Shape letters: E experts, S sampled tokens, C tokens of a chunk, P of them with one expert, K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens, routed_output
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.rerouting import Rerouter

# Tokens whose outputs are held at once.
_CHUNK = 512


@torch.no_grad()
def removal_changes(experts: ExpertTensors, tokens: SampledTokens, rerouter: Rerouter) -> torch.Tensor | None:
    """(S, K) norm of the change of the block's output when the expert of one slot is removed.

    The router then selects the next best expert for the token, and gives all that it selects their weights by its own
    rule. Where it divides weights by their sum, this is RAZOR's delta with refill (arXiv:2609.30465): with c the
    weighted mean of the selected experts, lambda the sum of their weights, w the shares of it and r the expert that
    comes in, lambda ||w_i (f_i - c) - w_r (f_r - c)|| / (1 - w_i + w_r). Slots without an expert have 0.

    Args:
        experts: The block's experts.
        tokens: Its sample.
        rerouter: The router's rule on the same sample.

    Returns:
        None where the router's rule is not known.
    """
    slots = tokens.index_SK.shape[1]
    index_SKK = tokens.index_SK[:, None].repeat(1, slots, 1).cpu()
    weights_SKK = torch.zeros(index_SKK.shape)
    for expert in range(experts.num_experts):
        token_P, slot_P = ((tokens.index_SK == expert) & (tokens.weights_SK != 0)).cpu().nonzero(as_tuple=True)
        routed = rerouter.route([e for e in range(experts.num_experts) if e != expert], token_P)
        if routed is None:
            return None
        index_SKK[token_P, slot_P], weights_SKK[token_P, slot_P] = routed[0], routed[1].float()
    found: list[torch.Tensor] = []
    for chunk in _chunks(tokens):
        rows = slice(len(found) * _CHUNK, len(found) * _CHUNK + len(chunk.input_SH))
        index_CKK, weights_CKK = (t[rows].to(chunk.input_SH.device) for t in (index_SKK, weights_SKK))
        before_CH = chunk.input_SH.new_zeros(chunk.input_SH.shape, dtype=torch.float32)
        after_CKH = before_CH[:, None].repeat(1, slots, 1)
        for expert in range(experts.num_experts):
            own_P, own_slot_P = ((chunk.index_SK == expert) & (chunk.weights_SK != 0)).nonzero(as_tuple=True)
            token_P, slot_P, place_P = ((index_CKK == expert) & (weights_CKK != 0)).nonzero(as_tuple=True)
            weight_P = torch.cat([chunk.weights_SK[own_P, own_slot_P].float(), weights_CKK[token_P, slot_P, place_P]])
            output_PH = routed_output(experts, expert, chunk.input_SH, torch.cat([own_P, token_P]), weight_P)
            before_CH.index_add_(0, own_P, output_PH[: len(own_P)])
            after_CKH.flatten(0, 1).index_add_(0, token_P * slots + slot_P, output_PH[len(own_P) :])
        change_CK = torch.linalg.vector_norm(after_CKH - before_CH[:, None], dim=-1)
        # Nothing is removed from a slot without an expert.
        found.append(change_CK * (weights_CKK != 0).any(-1))
    return torch.cat(found)


@torch.no_grad()
def distances_to_mean(experts: ExpertTensors, tokens: SampledTokens) -> torch.Tensor:
    """(S, K) w ||f - c|| of each slot: f the expert's output, c the weighted mean of those that the token has.

    It is RAZOR's delta to first order in w and without refill (arXiv:2609.30465), times the sum of the weights.

    Args:
        experts: The block's experts.
        tokens: Its sample.
    """
    found = []
    for chunk in _chunks(tokens):
        weighted_CKH = _weighted_outputs(experts, chunk)
        weights_CK = _routed_weights(chunk, experts.num_experts)
        mean_CH = weighted_CKH.sum(1) / weights_CK.sum(1, keepdim=True).clamp(min=1e-12)
        distance_CK = torch.linalg.vector_norm(weighted_CKH - weights_CK[..., None] * mean_CH[:, None], dim=-1)
        found.append(distance_CK * (weights_CK != 0))
    return torch.cat(found)


@torch.no_grad()
def turned_norms(experts: ExpertTensors, tokens: SampledTokens, residual_SH: torch.Tensor) -> torch.Tensor:
    """(S, K) w ||f|| of each slot, times how far the block's routed experts turn the residual stream of the token.

    That is max(1 - cos(x, x + c), 0), x the residual stream before the block and c the sum of the weighted outputs
    (EASY-EP, arXiv:2504.06792).

    Args:
        experts: The block's experts.
        tokens: Its sample.
        residual_SH: (S, H) the residual stream of the same tokens before the block.
    """
    found = []
    for chunk, before_CH in zip(_chunks(tokens), residual_SH.split(_CHUNK), strict=True):
        weighted_CKH, before_CH = _weighted_outputs(experts, chunk), before_CH.to(chunk.input_SH.device).float()
        similarity_C = torch.nn.functional.cosine_similarity(before_CH, before_CH + weighted_CKH.sum(1), dim=-1)
        found.append(torch.linalg.vector_norm(weighted_CKH, dim=-1) * (1 - similarity_C).clamp(min=0)[:, None])
    return torch.cat(found)


def over_tokens(values_SK: torch.Tensor, tokens: SampledTokens, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(E,) float64 sums on the CPU of the values of each expert's slots, and (E,) how many slots it has."""
    index_P = tokens.index_SK.flatten().long().clamp(max=num_experts).cpu()
    index_P = index_P.where(tokens.weights_SK.flatten().cpu() != 0, num_experts)
    zeros_E = torch.zeros(num_experts + 1, dtype=torch.float64)
    sum_E = zeros_E.index_add(0, index_P, values_SK.flatten().double().cpu())
    return sum_E[:-1], torch.bincount(index_P, minlength=num_experts + 1)[:-1].double()


def _chunks(tokens: SampledTokens) -> Iterator[SampledTokens]:
    for start in range(0, len(tokens.input_SH), _CHUNK):
        rows = slice(start, start + _CHUNK)
        yield replace(
            tokens,
            input_SH=tokens.input_SH[rows],
            index_SK=tokens.index_SK[rows],
            weights_SK=tokens.weights_SK[rows],
            gradient_SJH=None,
        )


def _routed_weights(tokens: SampledTokens, num_experts: int) -> torch.Tensor:
    """(C, K) float32 weights, 0 where a slot has no routed expert."""
    return tokens.weights_SK.float().masked_fill(tokens.index_SK >= num_experts, 0.0)


def _weighted_outputs(experts: ExpertTensors, tokens: SampledTokens) -> torch.Tensor:
    """(C, K, H) what each slot adds to the block's output."""
    rows, slots = tokens.index_SK.shape
    output_PH = tokens.input_SH.new_zeros(rows * slots, tokens.input_SH.shape[1], dtype=torch.float32)
    for expert in range(experts.num_experts):
        token_P, slot_P = ((tokens.index_SK == expert) & (tokens.weights_SK != 0)).nonzero(as_tuple=True)
        weight_P = tokens.weights_SK[token_P, slot_P]
        output_PH[token_P * slots + slot_P] = routed_output(experts, expert, tokens.input_SH, token_P, weight_P)
    return output_PH.unflatten(0, (rows, slots))
