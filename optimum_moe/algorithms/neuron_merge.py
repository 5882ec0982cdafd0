"""An expert made of the neurons of several: those that together give the most of what the members of a group gave.

Shape letters: P tokens of the group, Q directions of the loss gradient, H hidden, U neurons of all members, N those
that are kept.

A mean of two matrices is neither of them, unless their neurons are alike. Neurons that are taken over as they are keep
their function, and a down projection that is fitted to the sum of the members' weighted outputs makes up for those that
go (optimal brain surgeon on whole columns, as in `neurons.elimination`). It starts from the down projection that all
U neurons would have if each of them ran on every token of the group, as neurons of one expert do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from optimum_moe.algorithms.neurons import DAMPING, elimination, gram, refitted


def choose_neurons(
    hidden_PU: torch.Tensor, target_PH: torch.Tensor, rows_QH: torch.Tensor, count: int, damping: float = DAMPING
) -> torch.Tensor:
    """The neurons of a group that one expert keeps.

    Args:
        hidden_PU: (P, U) hidden activations of all members, times the routing weight that the merged expert has for a
            token and the root of the token's importance.
        target_PH: (P, H) sum of the members' outputs, each times its own routing weight and that root.
        rows_QH: (Q, H) rows r with the metric sum r r^T of the output.
        count: Number of neurons to keep.
        damping: Ridge as a share of the Gram's mean diagonal.

    Returns:
        (N,) int64, ascending.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    gram_UU, cross_HU = gram(hidden_PU), target_PH.T @ hidden_PU
    down_HU = refitted(cross_HU.double(), gram_UU, torch.zeros_like(cross_HU), damping)
    effect_UU = gram(rows_QH.double() @ down_HU)
    kept_U = torch.ones(len(gram_UU), dtype=torch.bool)
    kept_U[elimination(gram_UU, effect_UU, damping, len(gram_UU) - count).order_D] = False
    return kept_U.nonzero().flatten()


def fit_down(
    hidden_PN: torch.Tensor, target_PH: torch.Tensor, prior_HN: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """(H, N) down projection by ridge regression of the members' weighted outputs (MergeMoE, arXiv:2510.14436).

    Args:
        hidden_PN: (P, N) hidden activations of the merged expert, scaled as in `choose_neurons`.
        target_PH: (P, H) likewise.
        prior_HN: (H, N) what it falls back to where the tokens say nothing.
        damping: Ridge as a share of the Gram's mean diagonal.
    """
    cross_HN = target_PH.T @ hidden_PN
    return refitted(cross_HN.double(), gram(hidden_PN), prior_HN, damping).to(prior_HN)


def in_turns(members: Iterable[int], each: int, largest: int) -> list[list[int]]:
    """Members in the order given, as many at a time as have `largest` neurons with those that were kept before.

    Args:
        members: The experts of a group.
        each: Neurons of one of them.
        largest: Neurons to choose from at a time; at least those of two experts.
    """
    first, *others = members
    step = max(1, largest // each - 1)
    turns = [others[start : start + step] for start in range(0, len(others), step)]
    return [[first, *turns[0]], *turns[1:]] if turns else [[first]]
