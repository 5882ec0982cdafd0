"""Ranks that a user asks for by number, by share of the numbers or by energy.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), D = min(O, X), R rank.
"""

from __future__ import annotations

import torch

STEP = 8
"""Ranks and numbers of kept neurons are multiples of this: `grouped_mm` needs strides of 16 bytes."""


def rank_from_number(shape: tuple[int, int], rank: int, lowest: int = 1) -> int:
    """A rank that the user names: a multiple of 8, or the full rank.

    Args:
        shape: (O, X) of the matrix.
        rank: in lowest..min(O, X).
        lowest: 0 where what is factorized is added to something.

    Raises:
        ValueError: If it is neither, or the matrix has no such rank.
    """
    check_rank(shape, rank, lowest)
    if rank % STEP and rank != min(shape):
        below = rank - rank % STEP
        nearest = [str(r) for r in (below, below + STEP) if 0 < r <= min(shape)] or [str(min(shape))]
        raise ValueError(
            f"rank={rank} must be a multiple of {STEP}, which grouped matmuls need. Use {' or '.join(nearest)}."
        )
    return rank


def rank_from_ratio(shape: tuple[int, int], rank_ratio: float) -> int | None:
    """The rank whose factors store a share of the matrix's own numbers: R (O + X) <= rank_ratio O X.

    Args:
        shape: (O, X) of the matrix.
        rank_ratio: in (0, 1].

    Returns:
        R, rounded down to a multiple of 8 and at least 8; None where the factors would not be smaller than the matrix,
        which then stays dense.

    Raises:
        ValueError: If the ratio is outside (0, 1].
    """
    if not 0 < rank_ratio <= 1:
        raise ValueError(
            f"rank_ratio={rank_ratio} must be in (0, 1]: the share of a matrix's numbers that its factors may store. "
            "Use for example 0.25."
        )
    rows, columns = shape
    # A product such as 0.3 * 640 / 24 may fall a rounding error short of the multiple that is meant.
    steps = int(rank_ratio * rows * columns / (rows + columns) / STEP * (1 + 1e-12))
    return _unless_dense(shape, max(steps, 1) * STEP)


def rank_from_energy(shape: tuple[int, int], singular_values_D: torch.Tensor, energy: float) -> int | None:
    """The smallest rank that keeps a share of the squared singular values.

    Args:
        shape: (O, X) of the matrix.
        singular_values_D: (D,) descending.
        energy: in (0, 1].

    Returns:
        R, a multiple of 8 and at least 8, also where all singular values are 0; None where the factors would not be
        smaller than the matrix.

    Raises:
        ValueError: If the share is outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must be in (0, 1]: the share of the squared singular values. Use 0.9.")
    kept_D = singular_values_D.double().square().cumsum(0)
    # Compared with a margin, so that 1.0 does not ask for singular values that are rounding errors.
    rank = int((kept_D < energy * kept_D[-1] * (1 - 1e-12)).sum()) + 1
    return _unless_dense(shape, -(-rank // STEP) * STEP)


def _unless_dense(shape: tuple[int, int], rank: int) -> int | None:
    return rank if rank * sum(shape) < shape[0] * shape[1] else None


def check_rank(shape: tuple[int, int], rank: int, lowest: int) -> None:
    """Check that a matrix has a rank.

    Raises:
        ValueError: If it is outside lowest..min(O, X).
    """
    if not lowest <= rank <= min(shape):
        raise ValueError(
            f"rank={rank} must be in {lowest}..{min(shape)} for a matrix of shape {tuple(shape)}. "
            f"Use at most {min(shape)}, or keep the matrix dense."
        )
