"""How many experts each layer keeps, where all layers share one number: exact dynamic programming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def allocate_counts(curves: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """The counts that sum to `total` with the least damage in sum; of equal ones, early layers keep fewer.

    Args:
        curves: For each layer the damage by the number of experts that it keeps; numbers that it cannot keep have none.
        total: Experts of all layers together.

    Raises:
        ValueError: If no such counts sum to `total`.
    """
    least_B = torch.full((total + 1,), float("inf"), dtype=torch.float64)
    least_B[0] = 0.0
    taken = []
    for curve in curves:
        next_B, count_B = torch.full_like(least_B, float("inf")), torch.full_like(least_B, -1, dtype=torch.int64)
        for count in sorted(curve):
            if count > total:
                break
            tried_B = least_B[: total + 1 - count] + curve[count]
            better_B = tried_B < next_B[count:]
            next_B[count:][better_B], count_B[count:][better_B] = tried_B[better_B], count
        least_B = next_B
        taken.append(count_B)
    if not bool(least_B[total].isfinite()):
        counts = [f"{min(curve)} to {max(curve)}" for curve in curves]
        raise ValueError(f"No counts of {len(curves)} layers that keep {', '.join(counts[:4])}, ... sum to {total}.")
    counts_L, left = [], total
    for count_B in reversed(taken):
        counts_L.append(int(count_B[left]))
        left -= counts_L[-1]
    return counts_L[::-1]
