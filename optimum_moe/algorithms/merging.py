"""Weighted mean of the experts of a group.

Shape letters: E experts, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# A chunk of rows of the result stays in the cache while all members are added to it. Below 2^15 elements torch does not
# fork into threads: on a busy machine the barriers of many small parallel steps cost far more than the steps.
_CHUNK_NUMEL = (1 << 15) - 1


def in_parts(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of a matrix in parts that stay in the cache and that torch handles in one thread."""
    return matrix.split(max(1, _CHUNK_NUMEL * len(matrix) // max(1, matrix.numel())))


def merge_weights(frequency_E: torch.Tensor, labels_E: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Share of each expert in its group's mean (M-SMoE, arXiv 2310.01334): its frequency over the group's.

    Args:
        frequency_E: (E,) token counts or shares.
        labels_E: (E,) group of each expert, -1 for a pruned one.
        num_groups: number of groups G.

    Returns:
        (E,) float64. The weights of every group sum to 1, those of pruned experts are 0. A group without any token
        weighs its members equally.

    Raises:
        ValueError: if shapes or labels do not fit, a group is empty, or a frequency is negative or not finite.
    """
    if frequency_E.ndim != 1 or frequency_E.shape != labels_E.shape:
        raise ValueError(
            f"frequency_E {tuple(frequency_E.shape)} and labels_E {tuple(labels_E.shape)} must both be (E,). "
            "Pass one value for each expert."
        )
    frequency_E = frequency_E.detach().double().cpu()
    labels_E = labels_E.cpu().long()
    if not bool((frequency_E.isfinite() & (frequency_E >= 0)).all()):
        raise ValueError("frequency_E holds NaN, infinity or a negative value. Pass token counts or shares.")
    if bool(((labels_E < -1) | (labels_E >= num_groups)).any()):
        raise ValueError(f"labels_E must lie in -1..{num_groups - 1}, got {labels_E.unique().tolist()}.")
    kept_E = labels_E >= 0
    size_G = torch.bincount(labels_E[kept_E], minlength=num_groups)
    if bool((size_G == 0).any()):
        empty = (size_G == 0).nonzero().flatten().tolist()
        raise ValueError(f"Groups {empty} of {num_groups} have no expert. Renumber labels_E without gaps.")
    total_G = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, labels_E[kept_E], frequency_E[kept_E])
    slot_E = labels_E.clamp_min(0)
    weights_E = torch.where(total_G[slot_E] > 0, frequency_E / total_G[slot_E], 1.0 / size_G[slot_E])
    return torch.where(kept_E, weights_E, torch.zeros_like(weights_E))


def merge_matrices(
    matrices: Sequence[torch.Tensor],
    weights: Sequence[float],
    permutations: Sequence[torch.Tensor | None],
    neuron_axis: int | None,
    out: torch.Tensor,
) -> None:
    """Write the weighted sum of a group's aligned matrices (or biases) into `out`.

    Accumulates in float32 (float64 if `out` is float64) and casts once. One member with weight exactly 1.0 and no
    permutation is copied bit for bit; members with weight 0 are not read. The scratch memory is a few rows, and all
    tensors are on one device. `out` may be the storage of a member that is not permuted (the dominant expert), and of
    no other.

    Args:
        matrices: one tensor for each member, all of the shape of `out`.
        weights: weight of each member.
        permutations: (I,) int64 order of each member's neurons, None for the identity.
        neuron_axis: axis that the permutations apply to (0 for gate and up, 1 for down), None where there is none.
        out: tensor to write, any float dtype, also a strided view.

    Raises:
        ValueError: if lengths or shapes differ, a weight is not finite, or all weights are 0.
    """
    if not len(matrices) == len(weights) == len(permutations):
        raise ValueError(
            f"Got {len(matrices)} matrices, {len(weights)} weights and {len(permutations)} permutations: "
            "pass one of each for every member."
        )
    shapes = {tuple(matrix.shape) for matrix in matrices} | {tuple(out.shape)}
    if len(shapes) > 1:
        raise ValueError(f"Members and out must have one shape, got {sorted(shapes)}. Merge one projection at a time.")
    if not torch.tensor(weights, dtype=torch.float64).isfinite().all() or not any(weights):
        raise ValueError(f"weights={list(weights)} must be finite and not all 0. Take them from merge_weights.")
    members = [
        (matrix.detach(), float(weight), None if neuron_axis is None else _proper(order, matrix.device))
        for matrix, weight, order in zip(matrices, weights, permutations, strict=True)
        if weight != 0
    ]
    if len(members) == 1 and members[0][1] == 1.0 and members[0][2] is None:
        out.copy_(members[0][0])
        return
    axis = 0 if neuron_axis is None else neuron_axis % out.ndim
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    # A member that is not permuted may be `out` itself, so these are read before anything is written.
    members.sort(key=lambda member: member[2] is not None)
    step = max(1, _CHUNK_NUMEL * out.shape[0] // max(1, out.numel()))
    total = torch.empty((step, *out.shape[1:]), dtype=dtype, device=out.device)
    gathered: dict[torch.dtype, torch.Tensor] = {}
    in_place = out.dtype == dtype and sum(order is None for _, _, order in members) == 1
    for start in range(0, out.shape[0], step):
        rows = slice(start, min(out.shape[0], start + step))
        part = out[rows] if in_place else total[: rows.stop - start]
        for position, (matrix, weight, order) in enumerate(members):
            if order is not None:
                if matrix.dtype not in gathered:
                    gathered[matrix.dtype] = torch.empty_like(total, dtype=matrix.dtype)
                matrix = _gather(matrix, rows, order, axis, gathered[matrix.dtype][: rows.stop - start])
            else:
                matrix = matrix[rows]
            if position == 0:
                torch.mul(matrix.to(dtype), weight, out=part)
            else:
                part.add_(matrix, alpha=weight)
        if not in_place:
            out[rows].copy_(part)


def gather_neurons(
    matrices: Sequence[torch.Tensor] | torch.Tensor,
    expert_I: torch.Tensor,
    neuron_I: torch.Tensor,
    neuron_axis: int,
    out: torch.Tensor,
) -> None:
    """Write neurons of several experts into `out`, each as it is.

    Args:
        matrices: one tensor for each expert, all of the shape of `out`.
        expert_I: (I,) int64 expert that each neuron is taken from.
        neuron_I: (I,) int64 its number there.
        neuron_axis: axis that the neurons lie along (0 for gate and up, 1 for down).
        out: tensor to write; it may be the storage of one of the experts.
    """
    gathered = torch.empty_like(out)
    for expert in expert_I.unique().tolist():
        slots = (expert_I == expert).nonzero()[:, 0].to(out.device)
        taken = neuron_I[expert_I == expert].to(out.device)
        gathered.index_copy_(neuron_axis, slots, matrices[expert].detach().index_select(neuron_axis, taken))
    out.copy_(gathered)


def _proper(order: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """None in place of an identity permutation, which then costs no gather."""
    if order is None or torch.equal(order.cpu(), torch.arange(order.numel())):
        return None
    return order.to(device)


def _gather(matrix: torch.Tensor, rows: slice, order: torch.Tensor, axis: int, scratch: torch.Tensor) -> torch.Tensor:
    # Fresh memory for every chunk would cost more than the gather itself.
    if axis == 0:
        return torch.index_select(matrix, 0, order[rows], out=scratch)
    return torch.index_select(matrix[rows], axis, order, out=scratch)
