"""Saliency criteria for expert pruning; a higher saliency means that the expert is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens, routed_output, single_expert
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.fisher_loss import FisherLoss
from optimum_moe.algorithms.merging import in_parts
from optimum_moe.algorithms.reconstruction import Reconstruction, kept_by_reconstruction
from optimum_moe.algorithms.removal import distances_to_mean, over_tokens, removal_changes, turned_norms
from optimum_moe.algorithms.rerouting import Rerouter
from optimum_moe.model_info import BlockInfo
from optimum_moe.stages.from_context import Choice, Function
from optimum_moe.stages.results import Returned

SALIENCIES = Choice("saliency", Returned.saliencies, "num_kept")


def register_saliency(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a criterion available as `ExpertPruning(saliency=name)`.

    The names of the function's parameters say what it reads: fields of `BlockStatistics` such as `gated_norm_sum_E`,
    and `experts` (an `ExpertTensors`), `router` (a `RouterView`), `info` (a `BlockInfo`), `sample` (`SampledTokens`),
    `loss_sample` (the same with gradients of the loss), `reservoir` (a `Reservoir`), `rerouter` (a `Rerouter` of the
    same tokens), `residual_SH` (their residual stream before the block) and `generator` (a seeded `torch.Generator`).
    `num_kept` is how many experts stay, for functions whose choice depends on it. What reads `loss_sample` gives the
    expected rise of the loss, which `allocation="global"` compares between blocks as it is.
    Only the statistics that it names are observed. Without any it is data-free; without `experts` a streaming run does
    not read removed experts. It returns a finite value for each expert, (E,); experts with higher values are kept.

    Args:
        name: Name of the criterion in recipes.

    Raises:
        ValueError: If the name is that of another function, or a parameter is none of the above.
    """
    return SALIENCIES.register(name)


def _mean(sum_E: torch.Tensor, token_count_E: torch.Tensor) -> torch.Tensor:
    return sum_E / token_count_E.clamp(min=1)


@register_saliency("frequency")
def frequency(token_count_E: torch.Tensor) -> torch.Tensor:
    """Share of the (token, expert) pairs that are routed to the expert."""
    return token_count_E / token_count_E.sum().clamp(min=1)


@register_saliency("gate_sum")
def gate_sum(gate_sum_E: torch.Tensor) -> torch.Tensor:
    """Sum of routing weights ("soft count")."""
    return gate_sum_E


@register_saliency("ean")
def expert_activation_norm(output_norm_sum_E: torch.Tensor) -> torch.Tensor:
    """Sum of output norms over the expert's tokens."""
    return output_norm_sum_E


@register_saliency("output_norm")
def mean_activation_norm(output_norm_sum_E: torch.Tensor, token_count_E: torch.Tensor) -> torch.Tensor:
    """Mean output norm over the expert's tokens."""
    return _mean(output_norm_sum_E, token_count_E)


@register_saliency("output_norm_squared")
def mean_squared_activation_norm(output_sq_sum_E: torch.Tensor, token_count_E: torch.Tensor) -> torch.Tensor:
    """Mean squared output norm over the expert's tokens."""
    return _mean(output_sq_sum_E, token_count_E)


@register_saliency("reap")
def router_weighted_activation(gated_norm_sum_E: torch.Tensor, token_count_E: torch.Tensor) -> torch.Tensor:
    """Mean of g ||f(x)|| over the expert's tokens (REAP, arXiv:2510.13999)."""
    return _mean(gated_norm_sum_E, token_count_E)


@register_saliency("razor")
def change_of_the_output(
    experts: ExpertTensors, sample: SampledTokens, rerouter: Rerouter, info: BlockInfo
) -> torch.Tensor:
    """Root mean square, over the expert's sampled tokens, of what removing it changes in the block's output (RAZOR).

    The next best expert of the token comes in, and weights are renormalized where the router does so
    (arXiv:2609.30465; formula from its abstract, derived again for every router in `algorithms.removal`). It is
    measured on the sample, and for one removed expert at a time.

    Raises:
        ValueError: If the router's rule is not known (`algorithms.rerouting`).
    """
    change_SK = removal_changes(experts, sample, rerouter)
    if change_SK is None:
        raise ValueError(
            f"Where {info.name} sends the tokens of a removed expert does not follow from its router logits alone, and "
            '"razor" has to know it. Use "rcs", which does not, or "reap".'
        )
    return _root_mean_square(change_SK, sample, info.num_experts)


@register_saliency("rcs")
def distance_from_the_mean(experts: ExpertTensors, sample: SampledTokens, info: BlockInfo) -> torch.Tensor:
    """Root mean square of g ||f(x) - c|| over the expert's sampled tokens, c the weighted mean of their experts.

    The variant of RAZOR (arXiv:2609.30465) to first order in g, which does not know what comes in for the expert.
    """
    return _root_mean_square(distances_to_mean(experts, sample), sample, info.num_experts)


def _root_mean_square(values_SK: torch.Tensor, sample: SampledTokens, num_experts: int) -> torch.Tensor:
    sum_E, count_E = over_tokens(values_SK.double().square(), sample, num_experts)
    return _mean(sum_E, count_E).sqrt()


@register_saliency("easy_ep")
def turning_of_the_residual(
    experts: ExpertTensors, sample: SampledTokens, residual_SH: torch.Tensor, info: BlockInfo
) -> torch.Tensor:
    """Sum of g ||f(x)|| (1 - cos(r, r + c)) over the expert's sampled tokens (EASY-EP, arXiv:2504.06792).

    r is the residual stream before the block, c the weighted sum of the token's routed experts. Where an architecture
    scales or normalizes the sum before it is added, c is the sum before that.
    """
    return over_tokens(turned_norms(experts, sample, residual_SH), sample, info.num_experts)[0]


@register_saliency("mone")
def spread_around_the_mean(experts: ExpertTensors, sample: SampledTokens) -> torch.Tensor:
    """Sum of ||f(x) - m||^2 over the expert's sampled tokens, m the mean of f(x) over them: frequency times variance.

    It is what a constant in the place of the expert does not give (MoNE, arXiv:2507.00390).
    """
    spreads = []
    for e in range(experts.num_experts):
        tokens = sample.of_expert(e)
        place_P = torch.arange(len(tokens), device=tokens.input_PH.device)
        ones_P = torch.ones_like(tokens.weight_P)
        # Weights that scale inputs are in these already.
        unscaled = replace(experts, scales_input=False)
        output_PH = routed_output(unscaled, e, tokens.input_PH, place_P, ones_P)
        spreads.append(float((output_PH - output_PH.mean(0)).double().square().sum()) if len(tokens) else 0.0)
    return torch.tensor(spreads, dtype=torch.float64)


@register_saliency("reconstruction")
def least_change_of_the_output(
    experts: ExpertTensors, sample: SampledTokens, rerouter: Rerouter, info: BlockInfo, num_kept: int
) -> torch.Tensor:
    """1 for the experts with which alone the block's output changes the least on the sample, 0 for the others.

    Tokens are routed again among those that stay; the error is squared ("Not All Experts are Equal", arXiv:2402.14800).
    All sets are tried where there are at most 20,000; else experts are removed one by one.

    Raises:
        ValueError: If the router's rule is not known (`algorithms.rerouting`).
    """
    kept = kept_by_reconstruction(Reconstruction(experts, sample, rerouter), num_kept, info.router_groups)
    return torch.zeros(info.num_experts, dtype=torch.float64).index_fill_(0, torch.tensor(kept), 1.0)


@register_saliency("fisher")
def expected_loss(experts: ExpertTensors, loss_sample: SampledTokens) -> torch.Tensor:
    """What the loss is expected to rise by when the expert gives nothing, in second order (Fisher information).

    It does not know which experts the tokens of a removed one are routed to. Without gradients it is half of the
    squared output.
    """
    damages = []
    for e in range(experts.num_experts):
        tokens = loss_sample.of_expert(e)
        damages.append(FisherLoss(single_expert(experts, e), tokens).empty_damage if len(tokens) else 0.0)
    return torch.tensor(damages, dtype=torch.float64)


@register_saliency("aimer")
def absolute_mean_over_rms(experts: ExpertTensors) -> torch.Tensor:
    """Minus mean|w| / rms(w) over all matrices of the expert; data-free.

    The value is at least -1. An expert with an all-zero matrix is dead and ranks below all others.
    """
    values = []
    for e in range(experts.num_experts):
        matrices = [m[e] for m in (experts.gate, experts.up, experts.down) if m is not None]
        sums = [[_sums(part) for part in in_parts(matrix)] for matrix in matrices]
        count = sum(m.numel() for m in matrices)
        mean, rms = (torch.stack([*chain.from_iterable(sums)]).sum(0) / count).tolist()
        is_dead = any(not any(float(total) for total, _ in parts) for parts in sums)
        values.append(_DEAD if is_dead else -mean / rms**0.5)
    return torch.tensor(values, dtype=torch.float64)


_DEAD = -2.0


def _sums(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of absolute values and sum of squares in float64; single rows are summed in float32."""
    rows = matrix.float()
    return torch.stack([rows.abs().sum(-1), rows.square().sum(-1)]).sum(-1, dtype=torch.float64)


@register_saliency("random")
def random_saliency(info: BlockInfo, generator: torch.Generator) -> torch.Tensor:
    """Uniform random values, as a baseline."""
    return torch.rand(info.num_experts, generator=generator, dtype=torch.float64)
