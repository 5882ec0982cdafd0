"""The four choices of a merge, each a registry: similarity, grouping, weighting, router rows.

What a registered function reads is said by the names of its parameters, see `register_saliency`.

Shape letters: E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.grouping import (
    Linkage,
    dominant_experts,
    join_dominants,
    linkage_groups,
    random_groups,
    take_nearest,
)
from optimum_moe.algorithms.merge_damage import pair_damages
from optimum_moe.algorithms.router_fit import Choices, RouterView, fit_router
from optimum_moe.algorithms.similarity import (
    distance_similarity,
    gram_similarity,
    mean_gated_outputs,
    mean_outputs,
    vector_similarity,
)
from optimum_moe.model_info import BlockInfo
from optimum_moe.stages.from_context import Choice, Function
from optimum_moe.stages.results import Groups, Returned, RouterRows
from optimum_moe.stages.saliency import expected_loss, router_weighted_activation
from optimum_moe.statistics import Reservoir

# Numbers of all experts that are multiplied with each other at a time.
_AT_ONCE = 2**24

SIMILARITIES = Choice("similarity", Returned.similarities)
GROUPINGS = Choice("grouping", Returned.groups, "similarity", "rank_E", "num_groups", "router_groups")
WEIGHTINGS = Choice("weighting", Returned.merge_weights, "labels_E", "dominants_G")
ROUTER_ROWS = Choice("router_rows", Returned.router_rows, "labels_E", "dominants_G")


def register_similarity(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a similarity available as `ExpertMerging(similarity=name)`.

    The function may read what `register_saliency` lists. It returns a finite, symmetric (E, E) matrix in which larger
    values mean more similar.

    Raises:
        ValueError: If the name is that of another function, or a parameter is unknown.
    """
    return SIMILARITIES.register(name)


def register_grouping(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a grouping available as `ExpertMerging(grouping=name)`.

    In addition to what `register_saliency` lists, the function may read `similarity` (a function without arguments
    that gives the (E, E) matrix), `rank_E` ((E,) frequency of each expert, with the highest values for experts that
    must be kept), `num_groups` and `router_groups` (experts of different router groups must not be merged together).
    It returns `Groups`.

    Raises:
        ValueError: If the name is that of another function, or a parameter is unknown.
    """
    return GROUPINGS.register(name)


def register_weighting(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a weighting available as `ExpertMerging(weighting=name)`.

    In addition to what `register_saliency` lists, the function may read `labels_E` ((E,) group of each expert) and
    `dominants_G` (tuple of the dominant expert of each group). It returns finite, nonnegative (E,) weights, which are
    divided by their sum in each group; a group whose weights are all 0 takes the plain mean.

    Raises:
        ValueError: If the name is that of another function, or a parameter is unknown.
    """
    return WEIGHTINGS.register(name)


def register_router_rows(name: str) -> Callable[[Function], Function]:
    """Decorator that makes router rows available as `ExpertMerging(routing="reduce", router_rows=name)`.

    In addition to what `register_saliency` lists, the function may read `labels_E` ((E,) group of each expert) and
    `dominants_G` (tuple of the dominant expert of each group). It returns `RouterRows`.

    Raises:
        ValueError: If the name is that of another function, or a parameter is unknown.
    """
    return ROUTER_ROWS.register(name)


@register_similarity("router_logits")
def router_logits(router_gram_EE: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of router logits over the calibration tokens (M-SMoE, arXiv:2310.01334, section 3.2)."""
    return gram_similarity(router_gram_EE)


@register_similarity("router_weights")
def router_weights(router: RouterView, info: BlockInfo) -> torch.Tensor:
    """Cosine similarity of the router's rows; data-free."""
    return vector_similarity(router.rows_NX[: info.num_experts])


@register_similarity("expert_weights")
def expert_weights(experts: ExpertTensors) -> torch.Tensor:
    """Cosine similarity of all matrices of the experts, without neuron alignment; data-free."""
    gram_EE = torch.zeros(experts.num_experts, experts.num_experts, dtype=torch.float64)
    for matrices in (m for m in (experts.gate, experts.up, experts.down) if m is not None):
        height, width = matrices[0].shape
        rows = max(1, _AT_ONCE // (experts.num_experts * width))
        for start in range(0, height, rows):
            part_ED = torch.stack([matrix[start : start + rows].float().flatten() for matrix in matrices])
            gram_EE += (part_ED @ part_ED.T).double().cpu()
    return gram_similarity(gram_EE)


@register_similarity("expert_outputs")
def expert_outputs(experts: ExpertTensors, sample: SampledTokens) -> torch.Tensor:
    """Minus the distance of the experts' mean outputs, each over all sampled tokens (HC-SMoE, arXiv:2410.08589)."""
    return distance_similarity(mean_outputs(experts, sample))


@register_similarity("router_logits_x_outputs")
def router_logits_x_outputs(
    router_gram_EE: torch.Tensor, experts: ExpertTensors, sample: SampledTokens
) -> torch.Tensor:
    """Cosine similarity of router logits times that of mean outputs, both in [0, 1]: alike by both or not at all."""
    return gram_similarity(router_gram_EE) * vector_similarity(mean_outputs(experts, sample))


@register_similarity("router_logits_and_outputs")
def router_logits_and_outputs(
    router_gram_EE: torch.Tensor, experts: ExpertTensors, sample: SampledTokens
) -> torch.Tensor:
    """Mean of the cosine similarities of router logits and of mean weighted outputs (REAM, arXiv:2604.04356).

    Both are in [0, 1]. Outputs are weighted by the routing weights that tokens really have; the public code weighs
    those of all tokens by a softmax of the logits, and compares logits by their distance over the largest distance.
    """
    outputs_EH = mean_gated_outputs(experts, sample)
    return (gram_similarity(router_gram_EE) + vector_similarity(outputs_EH)) / 2


@register_similarity("damage")
def merge_damage(experts: ExpertTensors, loss_sample: SampledTokens) -> torch.Tensor:
    """Minus what the loss is expected to rise by when one of two experts serves both, see `algorithms.merge_damage`."""
    return -pair_damages(experts, loss_sample)


@register_grouping("routing")
def group_by_routing(
    similarity: Callable[[], torch.Tensor], rank_E: torch.Tensor, num_groups: int, router_groups: int
) -> Groups:
    """The most frequent experts are dominant, and every other expert joins the most similar of them (M-SMoE)."""
    dominants = dominant_experts(rank_E, num_groups, router_groups)
    return Groups(join_dominants(similarity(), dominants, router_groups), dominants)


@register_grouping("loss")
def group_by_loss(
    similarity: Callable[[], torch.Tensor],
    experts: ExpertTensors,
    loss_sample: SampledTokens,
    token_count_E: torch.Tensor,
    rank_E: torch.Tensor,
    num_groups: int,
    router_groups: int,
) -> Groups:
    """The experts whose absence costs the most loss are dominant, and every other one joins the most similar of them.

    As `"routing"`, with the expected rise of the loss (saliency `"fisher"`) in place of the frequency.
    """
    damage_E = _kept_first(expected_loss(experts, loss_sample), token_count_E, rank_E)
    dominants = dominant_experts(damage_E, num_groups, router_groups)
    return Groups(join_dominants(similarity(), dominants, router_groups), dominants)


@register_grouping("saliency")
def group_by_saliency(
    similarity: Callable[[], torch.Tensor],
    gated_norm_sum_E: torch.Tensor,
    token_count_E: torch.Tensor,
    rank_E: torch.Tensor,
    num_groups: int,
    router_groups: int,
) -> Groups:
    """The most salient experts by `"reap"` are dominant, and take the most similar of the others in that order (REAM).

    Each takes up to 15, or as many as it has to. All are taken before most of the dominant experts have their turn,
    which therefore stay as they are (the pseudo-pruning of arXiv:2604.04356, with its groups of at most 16).
    """
    saliency_E = _kept_first(router_weighted_activation(gated_norm_sum_E, token_count_E), token_count_E, rank_E)
    centroids = dominant_experts(saliency_E, num_groups, router_groups)
    most_taken = max(_MOST_TAKEN, -(-len(saliency_E) // num_groups) - 1)
    return Groups(take_nearest(similarity(), centroids, most_taken, router_groups), centroids)


_MOST_TAKEN = 15


def _kept_first(values_E: torch.Tensor, token_count_E: torch.Tensor, rank_E: torch.Tensor) -> torch.Tensor:
    """(E,) values with the highest for experts without tokens that are to be kept, which have a rank above 0."""
    kept_E = (token_count_E == 0) & (rank_E > 0)
    return values_E.masked_fill(kept_E, 2 * float(values_E.max()) + 1)


def _register_linkage(method: Linkage) -> None:
    @register_grouping(f"{method}_linkage")
    def group_by_linkage(similarity: Callable[[], torch.Tensor], num_groups: int, router_groups: int) -> Groups:
        return Groups(linkage_groups(similarity(), num_groups, method, router_groups))


for _method in get_args(Linkage):
    _register_linkage(_method)


@register_grouping("partial")
def group_half(
    similarity: Callable[[], torch.Tensor], rank_E: torch.Tensor, num_groups: int, router_groups: int
) -> Groups:
    """The more frequent half of the dominant experts stays as it is; the others take in all that is merged.

    Partial preservation, after SlimQwen (as described in its abstract; frequency stands for its saliency).
    """
    dominants = dominant_experts(rank_E, num_groups, router_groups)
    share = num_groups // router_groups
    taking = [expert for place, expert in enumerate(dominants) if place % share >= share // 2]
    similarity_EE = similarity()
    labels_E = torch.tensor(taking)[join_dominants(similarity_EE, taking, router_groups)]
    labels_E[list(dominants)] = torch.tensor(dominants)
    slot_E = torch.empty_like(labels_E)
    slot_E[list(dominants)] = torch.arange(num_groups)
    return Groups(slot_E[labels_E], dominants)


@register_grouping("random")
def group_at_random(info: BlockInfo, num_groups: int, generator: torch.Generator, router_groups: int) -> Groups:
    """Groups of random experts: a baseline."""
    return Groups(random_groups(info.num_experts, num_groups, generator, router_groups))


@register_weighting("frequency")
def weight_by_frequency(token_count_E: torch.Tensor) -> torch.Tensor:
    """Weight each expert by its number of tokens (M-SMoE)."""
    return token_count_E


@register_weighting("uniform")
def weight_uniformly(info: BlockInfo) -> torch.Tensor:
    """Weight all experts equally."""
    return torch.ones(info.num_experts, dtype=torch.float64)


@register_weighting("dominant")
def weight_dominants(labels_E: torch.Tensor, dominants_G: tuple[int, ...]) -> torch.Tensor:
    """The dominant expert stands for its group, whose other experts are pruned (a baseline of M-SMoE's code)."""
    weights_E = torch.zeros(len(labels_E), dtype=torch.float64)
    weights_E[list(dominants_G)] = 1.0
    return weights_E


@register_weighting("reap")
def weight_by_saliency(gated_norm_sum_E: torch.Tensor, token_count_E: torch.Tensor) -> torch.Tensor:
    """Weight each expert by the mean of g ||f(x)|| over its tokens, its saliency of REAP (REAM, arXiv:2604.04356)."""
    return router_weighted_activation(gated_norm_sum_E, token_count_E)


@register_weighting("fisher")
def weight_by_loss(experts: ExpertTensors, loss_sample: SampledTokens) -> torch.Tensor:
    """Weight each expert by what the loss is expected to rise by without it (Fisher-weighted merging)."""
    return expected_loss(experts, loss_sample)


@register_router_rows("dominant")
def dominant_rows(labels_E: torch.Tensor, dominants_G: tuple[int, ...]) -> RouterRows:
    """Take the router row of each group's dominant expert."""
    weights_E = torch.zeros(len(labels_E), dtype=torch.float64)
    weights_E[list(dominants_G)] = 1.0
    return RouterRows(weights_E)


@register_router_rows("mean")
def mean_rows(token_count_E: torch.Tensor) -> RouterRows:
    """Average the router rows of each group, weighted by frequency."""
    return RouterRows(token_count_E)


@register_router_rows("fit")
def fitted_rows(
    router: RouterView,
    reservoir: Reservoir,
    info: BlockInfo,
    generator: torch.Generator,
    labels_E: torch.Tensor,
    dominants_G: tuple[int, ...],
) -> RouterRows:
    """Fit rows to the routing weights that the original router gave each group; see `algorithms.router_fit`."""
    rows = [*dominants_G, *range(router.num_experts, len(router.rows_NX))]
    start = replace(
        router,
        rows_NX=router.rows_NX[rows],
        num_experts=len(dominants_G),
        bias_N=None if router.bias_N is None else router.bias_N[rows],
        correction_E=None if router.correction_E is None else router.correction_E[list(dominants_G)],
    )
    choices = Choices(
        input_SX=reservoir.router_input_SH,
        index_SK=reservoir.index_SK,
        weights_SK=reservoir.weights_SK,
        labels_E=labels_E,
        num_groups=len(dominants_G),
    )
    fit = fit_router(
        router,
        start,
        choices,
        info.top_k,
        router_groups=info.router_groups,
        groups_used=info.router_groups_used,
        generator=generator,
    )
    return RouterRows(dominant_rows(labels_E, dominants_G).weights_E, fit)
