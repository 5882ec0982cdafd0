"""How alike the neurons of two experts are, in their own order and in the best one.

Shape letters: I intermediate neurons, D features of a neuron (its rows of gate and up and its column of down).
"""

from __future__ import annotations

import torch

from optimum_moe.algorithms.alignment import alignment_permutation, weights_of
from optimum_moe.algorithms.experts import ExpertTensors


def neuron_similarity(experts: ExpertTensors, first: int, second: int) -> tuple[float, float]:
    """Mean cosine between the neurons of two experts ("A Closer Look into Mixture-of-Experts", arXiv:2406.18219).

    Neurons are matched one to one by the assignment of M-SMoE (`alignment_permutation`). Neurons whose order is fixed
    from outside of the expert stay where they are.

    Args:
        experts: The block's routed experts.
        first: One expert.
        second: The other.

    Returns:
        Mean cosine in [-1, 1] of neurons in the same place, and of matched neurons; a neuron of zeros has cosine 0.

    Raises:
        ValueError: If a weight is NaN or infinite.
    """
    one_ID, other_ID = _features(experts, first), _features(experts, second)
    unaligned = float(torch.nn.functional.cosine_similarity(one_ID, other_ID).mean())
    if experts.fixed_neurons:
        return unaligned, unaligned
    perm_I = alignment_permutation(
        experts.up[first],
        experts.down[first],
        experts.up[second],
        experts.down[second],
        None if experts.gate is None else experts.gate[first],
        None if experts.gate is None else experts.gate[second],
    )
    return unaligned, float(torch.nn.functional.cosine_similarity(one_ID, other_ID[perm_I]).mean())


def _features(experts: ExpertTensors, expert: int) -> torch.Tensor:
    """(I, D) float32 features of an expert's neurons on the CPU."""
    return torch.cat([part.detach().float().cpu() for part in weights_of(experts, expert)], dim=1)
