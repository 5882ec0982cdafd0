"""The leading singular directions of a matrix, without a decomposition of all of it.

Randomized subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061), from a fixed random start, so that a
matrix always gives the same directions.

Shape letters: O rows and X columns of a matrix, R directions, B directions that are iterated.
"""

from __future__ import annotations

import torch

# Directions that are iterated beyond those that are wanted, and the rounds: each squares what separates the two.
_BEYOND = 16
_ROUNDS = 4


def leading_rows(matrix_OX: torch.Tensor, number: int) -> torch.Tensor:
    """(R, X) orthonormal right singular vectors of the largest singular values, in descending order.

    Exact where most directions are wanted; else spanned closely where singular values decay, and any good ones where
    they do not. R is at most the smaller side.

    Args:
        matrix_OX: (O, X) float32 or float64.
        number: How many.
    """
    rows, columns = matrix_OX.shape
    if 4 * (number + _BEYOND) >= min(rows, columns):
        return torch.linalg.svd(matrix_OX, full_matrices=False).Vh[:number]
    basis_XB = start(columns, number + _BEYOND).to(matrix_OX)
    for _ in range(_ROUNDS):
        image_OB = torch.linalg.qr(matrix_OX @ basis_XB).Q
        basis_XB = torch.linalg.qr(matrix_OX.T @ image_OB).Q
    turn_BB = torch.linalg.svd(matrix_OX @ basis_XB, full_matrices=False).Vh
    return turn_BB[:number] @ basis_XB.T


def start(rows: int, directions: int) -> torch.Tensor:
    """(rows, B) float32 standard normal numbers, always the same."""
    return torch.randn(rows, directions, generator=torch.Generator().manual_seed(0))
