"""The four choices of a merge, each a registry: similarity, grouping, weighting, router rows.

The parameters of a registered function say what it reads, by name: fields of `BlockStatistics` such as
`router_gram_EE`, and `experts` (an `ExpertTensors`), `info` (a `BlockInfo`), `router` (a `RouterView`), `sample`
(`SampledTokens`) and `generator` (a seeded `torch.Generator`). Only the statistics that it names are observed.

Shape letters: E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.grouping import dominant_experts, join_dominants, random_groups
from optimum_moe.algorithms.merging import merge_weights
from optimum_moe.algorithms.router_fit import Choices, RouterFit, RouterView, fit_router
from optimum_moe.algorithms.similarity import gram_similarity, vector_similarity
from optimum_moe.model_info import BlockInfo
from optimum_moe.stages.from_context import Choice, Function
from optimum_moe.statistics import Reservoir


@dataclass(frozen=True, eq=False)
class Groups:
    """Which experts are merged.

    Args:
        labels_E: (E,) int64 group of each expert, in any numbering.
        dominants: The dominant expert of each group, by label; None for the most frequent expert of each group.
    """

    labels_E: torch.Tensor
    dominants: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class RouterRows:
    """The rows of a router with one row for each group.

    Args:
        weights_E: (E,) float64 weight of each expert's row in the row of its group.
        fit: Fitted rows, which replace the weighted ones.
    """

    weights_E: torch.Tensor
    fit: RouterFit | None = None


SIMILARITIES = Choice("similarity")
GROUPINGS = Choice("grouping", "similarity", "rank_E", "num_groups", "router_groups")
WEIGHTINGS = Choice("weighting", "labels_E", "dominants_G")
ROUTER_ROWS = Choice("router_rows", "labels_E", "dominants_G")


def register_similarity(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a similarity available as `ExpertMerging(similarity=name)`.

    The function returns a symmetric (E, E) matrix in which larger values mean more similar; the module's docstring
    lists what it may read.

    Raises:
        ValueError: If the name is taken, or a parameter of the function is unknown.
    """
    return SIMILARITIES.register(name)


def register_grouping(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a grouping available as `ExpertMerging(grouping=name)`.

    In addition to the inputs that the module's docstring lists, the function may take `similarity` (a function without
    arguments that gives the (E, E) matrix), `rank_E` ((E,) frequency of each expert, with the highest values for
    experts that must be kept), `num_groups` and `router_groups` (experts of different router groups must not be merged
    together). It returns `Groups`.

    Raises:
        ValueError: If the name is taken, or a parameter of the function is unknown.
    """
    return GROUPINGS.register(name)


def register_weighting(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a weighting available as `ExpertMerging(weighting=name)`.

    In addition to the inputs that the module's docstring lists, the function may take `labels_E` ((E,) group of each
    expert) and `dominants_G`. It returns (E,) nonnegative weights, which are divided by their sum in each group.

    Raises:
        ValueError: If the name is taken, or a parameter of the function is unknown.
    """
    return WEIGHTINGS.register(name)


def register_router_rows(name: str) -> Callable[[Function], Function]:
    """Decorator that makes router rows available as `ExpertMerging(routing="reduce", router_rows=name)`.

    In addition to the inputs that the module's docstring lists, the function may take `labels_E` ((E,) group of each
    expert) and `dominants_G`. It returns `RouterRows`.

    Raises:
        ValueError: If the name is taken, or a parameter of the function is unknown.
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
    fields = [m for m in (experts.gate, experts.up, experts.down) if m is not None]
    gram_EE = torch.zeros(experts.num_experts, experts.num_experts, dtype=torch.float64)
    for matrices in fields:
        for i in range(experts.num_experts):
            for j in range(i + 1):
                gram_EE[i, j] += (matrices[i].float() * matrices[j].float()).sum().cpu()
    return gram_similarity(gram_EE.tril() + gram_EE.tril(-1).T)


@register_grouping("routing")
def group_by_routing(
    similarity: Callable[[], torch.Tensor], rank_E: torch.Tensor, num_groups: int, router_groups: int
) -> Groups:
    """The most frequent experts are dominant, and every other expert joins the most similar of them (M-SMoE)."""
    dominants = dominant_experts(rank_E, num_groups, router_groups)
    return Groups(join_dominants(similarity(), dominants, router_groups), dominants)


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


@register_router_rows("dominant")
def dominant_rows(labels_E: torch.Tensor, dominants_G: tuple[int, ...]) -> RouterRows:
    """Take the router row of each group's dominant expert."""
    weights_E = torch.zeros(len(labels_E), dtype=torch.float64)
    weights_E[list(dominants_G)] = 1.0
    return RouterRows(weights_E)


@register_router_rows("mean")
def mean_rows(token_count_E: torch.Tensor, labels_E: torch.Tensor, dominants_G: tuple[int, ...]) -> RouterRows:
    """Average the router rows of each group, weighted by frequency."""
    return RouterRows(merge_weights(token_count_E, labels_E, len(dominants_G)))


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
