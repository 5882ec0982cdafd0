"""Dominant experts and the groups around them.

Shape letters: E experts, G groups. A router group is the architecture's own `n_group` block of consecutive experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

Linkage = Literal["single", "complete", "average", "ward"]


def _check_frequency(frequency_E: torch.Tensor, name: str = "frequency_E") -> torch.Tensor:
    if frequency_E.ndim != 1 or frequency_E.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(frequency_E.shape)}, one value for each expert is needed: pass (E,)."
        )
    frequency_E = frequency_E.detach().double().cpu()
    if not bool((frequency_E.isfinite() & (frequency_E >= 0)).all()):
        raise ValueError(f"{name} holds NaN, infinity or a negative value. Pass token counts or shares.")
    return frequency_E


def _check_groups(num_experts: int, num_groups: int, router_groups: int) -> None:
    if router_groups < 1 or num_experts % router_groups:
        raise ValueError(
            f"router_groups={router_groups} does not divide {num_experts} experts. Pass the model's own n_group."
        )
    if not 1 <= num_groups <= num_experts:
        raise ValueError(
            f"num_groups={num_groups} is outside 1..{num_experts}, the number of experts of the block. "
            "Choose a number in that range."
        )
    if num_groups % router_groups:
        raise ValueError(
            f"num_groups={num_groups} is not a multiple of router_groups={router_groups}: every router group must "
            f"keep as many experts as the others. Choose a multiple of {router_groups}."
        )


def _check_dominants(dominants_G: Sequence[int], num_experts: int, router_groups: int) -> None:
    if len(set(dominants_G)) != len(dominants_G) or not all(0 <= d < num_experts for d in dominants_G):
        raise ValueError(
            f"dominants_G={tuple(dominants_G)} must be distinct experts in 0..{num_experts - 1}. "
            "Take them from dominant_experts or adaptive_dominants."
        )
    if router_groups < 1 or num_experts % router_groups:
        raise ValueError(
            f"router_groups={router_groups} does not divide {num_experts} experts. Pass the model's own n_group."
        )
    width = num_experts // router_groups
    if len({d // width for d in dominants_G}) != router_groups:
        raise ValueError(
            f"dominants_G={tuple(dominants_G)} leaves a router group without a dominant: each of the "
            f"{router_groups} router groups of {width} experts needs one. Pass router_groups to dominant_experts too."
        )


def _descending(values_E: torch.Tensor) -> list[int]:
    return torch.argsort(values_E, descending=True, stable=True).tolist()


def dominant_experts(frequency_E: torch.Tensor, num_groups: int, router_groups: int = 1) -> tuple[int, ...]:
    """The most frequent experts of a block (M-SMoE, arXiv 2310.01334, uniform budget).

    Args:
        frequency_E: (E,) token counts or shares.
        num_groups: number of dominant experts G.
        router_groups: number of router groups; each gives G / router_groups dominants.

    Returns:
        Expert indices by descending frequency (ties: lower index first); with router groups, those of router group 0
        first, then those of router group 1, and so on, so that the reduced router's rows stay grouped.

    Raises:
        ValueError: if the counts do not fit each other, or a frequency is negative or not finite.
    """
    frequency_E = _check_frequency(frequency_E)
    _check_groups(frequency_E.numel(), num_groups, router_groups)
    width = frequency_E.numel() // router_groups
    share = num_groups // router_groups
    return tuple(
        start + expert
        for start in range(0, frequency_E.numel(), width)
        for expert in _descending(frequency_E[start : start + width])[:share]
    )


def adaptive_dominants(
    frequencies: Sequence[torch.Tensor], num_groups_total: int, floor: int = 1
) -> list[tuple[int, ...]]:
    """Dominant experts of all blocks under one budget ("globally group" of M-SMoE, arXiv 2310.01334).

    The largest frequency of each block counts as 1.0, so every block keeps at least one group; all (block, expert)
    pairs are then ranked by value, block and expert, and exactly `num_groups_total` are taken. A `floor` above 1
    likewise takes the `floor` most frequent experts of each block before any other.

    Args:
        frequencies: one (E,) tensor for each block, shares of the block's tokens (E may differ between blocks).
        num_groups_total: number of groups over all blocks.
        floor: least number of groups of a block.

    Returns:
        For each block its dominant experts by descending frequency, ties by lower index.

    Raises:
        ValueError: if the budget lies outside what floor and expert counts allow, or a frequency is invalid.
    """
    blocks = [_check_frequency(values_E, f"frequencies[{b}]") for b, values_E in enumerate(frequencies)]
    if not blocks:
        raise ValueError("frequencies is empty: a budget needs at least one block. Pass one (E,) tensor for each.")
    smallest = min(values_E.numel() for values_E in blocks)
    total = sum(values_E.numel() for values_E in blocks)
    if not 1 <= floor <= smallest:
        raise ValueError(f"floor={floor} is outside 1..{smallest}, the experts of the smallest block. Lower it.")
    if not floor * len(blocks) <= num_groups_total <= total:
        raise ValueError(
            f"num_groups_total={num_groups_total} is outside {floor * len(blocks)}..{total}: {len(blocks)} blocks keep "
            f"at least {floor} each and have {total} experts in all. Choose a number in that range."
        )
    ranked = [_descending(values_E) for values_E in blocks]
    rest = [
        (-float(values_E[expert]), block, expert)
        for block, values_E in enumerate(blocks)
        for expert in ranked[block][floor:]
    ]
    kept = [order[:floor] for order in ranked]
    for _, block, expert in sorted(rest)[: num_groups_total - floor * len(blocks)]:
        kept[block].append(expert)
    return [tuple(experts) for experts in kept]


def join_dominants(similarity_EE: torch.Tensor, dominants_G: Sequence[int], router_groups: int = 1) -> torch.Tensor:
    """Let every expert join the dominant expert it is most similar to (M-SMoE, arXiv 2310.01334).

    Args:
        similarity_EE: (E, E), higher means more alike.
        dominants_G: the dominant expert of each group.
        router_groups: number of router groups; an expert only joins a dominant of its own.

    Returns:
        (E,) int64 labels. The dominant of group g has label g, whatever the similarities; ties take the lowest label.

    Raises:
        ValueError: if shapes or indices do not fit, a similarity is NaN, or a router group has no dominant.
    """
    if similarity_EE.ndim != 2 or similarity_EE.shape[0] != similarity_EE.shape[1]:
        raise ValueError(f"similarity_EE has shape {tuple(similarity_EE.shape)}, it must be square: pass (E, E).")
    num_experts = similarity_EE.shape[0]
    _check_dominants(dominants_G, num_experts, router_groups)
    width = num_experts // router_groups
    if bool(similarity_EE.isnan().any()):
        raise ValueError("similarity_EE holds NaN. Compute it with gram_similarity or vector_similarity.")
    dominant_index_G = torch.tensor(dominants_G)
    candidate_EG = similarity_EE.detach().double().cpu()[:, dominant_index_G]
    same_EG = (torch.arange(num_experts) // width)[:, None] == dominant_index_G // width
    candidate_EG.masked_fill_(~same_EG, -torch.inf)
    # torch.argmax does not promise which of equal values it returns, NumPy's promises the first.
    labels_E = torch.from_numpy(candidate_EG.numpy().argmax(axis=1))
    labels_E[dominant_index_G] = torch.arange(len(dominants_G))
    return labels_E


def take_nearest(
    similarity_EE: torch.Tensor, centroids_G: Sequence[int], most_taken: int, router_groups: int = 1
) -> torch.Tensor:
    """Let every centroid in turn take the most similar of the experts that are left (REAM, arXiv 2604.04356).

    The first centroids take as many as they may, so that most of the others stay as they are: close to pruning, but
    removed experts are merged into some that stay.

    Args:
        similarity_EE: (E, E), higher means more alike.
        centroids_G: the centroid of each group, in the order in which they take.
        most_taken: experts that a centroid takes at most, at least ceil(E / G) - 1.
        router_groups: number of router groups; a centroid only takes experts of its own.

    Returns:
        (E,) int64 labels. The centroid of group g has label g; ties take the lower index.

    Raises:
        ValueError: if the centroids do not fit the experts, or there are experts that no centroid can take.
    """
    num_experts = len(similarity_EE)
    _check_dominants(centroids_G, num_experts, router_groups)
    width = num_experts // router_groups
    left = set(range(num_experts)) - set(centroids_G)
    labels_E = torch.full((num_experts,), -1)
    labels_E[list(centroids_G)] = torch.arange(len(centroids_G))
    for group, centroid in enumerate(centroids_G):
        nearest = _descending(similarity_EE[centroid].detach().double().cpu())
        taken = [e for e in nearest if e in left and e // width == centroid // width][:most_taken]
        labels_E[taken] = group
        left -= set(taken)
    if left:
        raise ValueError(
            f"most_taken={most_taken} leaves experts {sorted(left)} without a group: {len(centroids_G)} centroids of "
            f"{num_experts} experts in {router_groups} router groups take too few. Pass at least "
            f"{math.ceil(num_experts / len(centroids_G)) - 1}."
        )
    return labels_E


def random_groups(
    num_experts: int, num_groups: int, generator: torch.Generator | None, router_groups: int = 1
) -> torch.Tensor:
    """Random partition of the experts, the baseline for every grouping.

    Args:
        num_experts: number of experts E.
        num_groups: number of groups G; none of them is empty.
        generator: seeded CPU generator; the same seed gives the same groups.
        router_groups: number of router groups; groups do not cross them, and labels follow their order.

    Returns:
        (E,) int64 labels in 0..G-1.

    Raises:
        ValueError: if the counts do not fit each other.
    """
    _check_groups(num_experts, num_groups, router_groups)
    width, share = num_experts // router_groups, num_groups // router_groups
    labels_E = torch.empty(num_experts, dtype=torch.int64)
    for router_group in range(router_groups):
        seats = torch.cat([torch.arange(share), torch.randint(share, (width - share,), generator=generator)])
        order = torch.randperm(width, generator=generator)
        start = router_group * width
        labels_E[start + order] = router_group * share + seats
    return labels_E


def dendrogram(similarity_EE: torch.Tensor, method: Linkage) -> np.ndarray:
    """The tree of an agglomerative clustering, the two nearest clusters merged first.

    Args:
        similarity_EE: (E, E), higher means more alike; the distance of two experts is what it is below the largest.
        method: As in `linkage_groups`.

    Returns:
        (E - 1, 4) float64 in scipy's format: the two clusters that merge, their distance, and the number of experts of
        the new one, which has the number E + row. (0, 4) for one expert.
    """
    return _tree(_distances(similarity_EE), method)


def _distances(similarity_EE: torch.Tensor) -> torch.Tensor:
    return (similarity_EE.max() - similarity_EE).detach().double().cpu().fill_diagonal_(0)


def _tree(distance_EE: torch.Tensor, method: Linkage) -> np.ndarray:
    if len(distance_EE) == 1:
        return np.empty((0, 4))
    return linkage(squareform(distance_EE.numpy(), checks=False), method)


def linkage_groups(
    similarity_EE: torch.Tensor, num_groups: int, method: Linkage, router_groups: int = 1
) -> torch.Tensor:
    """Groups by agglomerative clustering: the two nearest clusters merge until `num_groups` are left.

    Args:
        similarity_EE: (E, E), higher means more alike; the distance of two experts is what it is below the largest.
        num_groups: number of groups G.
        method: what the distance of two clusters is, as in `scipy.cluster.hierarchy.linkage`. `"ward"` takes the
            distances for Euclidean ones.
        router_groups: number of router groups; each is clustered by itself into G / router_groups groups.

    Returns:
        (E,) int64 labels in 0..G-1, in the order of the first expert of each group.

    Raises:
        ValueError: if the counts do not fit each other.
    """
    num_experts = len(similarity_EE)
    _check_groups(num_experts, num_groups, router_groups)
    distance_EE = _distances(similarity_EE)
    width, share = num_experts // router_groups, num_groups // router_groups
    labels_E = torch.empty(num_experts, dtype=torch.int64)
    for router_group in range(router_groups):
        own = slice(router_group * width, (router_group + 1) * width)
        clusters = {expert: [expert] for expert in range(width)}
        # The rows of a tree are in the order of the distances: the first of them leave as many clusters as wanted.
        for row, (first, second, *_) in enumerate(_tree(distance_EE[own, own], method)[: width - share]):
            clusters[width + row] = clusters.pop(int(first)) + clusters.pop(int(second))
        for label, members in enumerate(sorted(map(sorted, clusters.values()))):
            labels_E[[router_group * width + expert for expert in members]] = router_group * share + label
    return labels_E
