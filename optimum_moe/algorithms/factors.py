"""A matrix as low rank + structured sparse: W = U V + S.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), R rank, M kept rows of the sparse part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class MatrixFactors:
    """The factors of one (O, X) matrix W = U^T V + S.

    Args:
        u_RO: (R, O) left factor, transposed.
        v_RX: (R, X) right factor.
        row_index_M: (M,) int64 ascending rows that S keeps, None where there is no sparse part.
        rows_MX: (M, X) these rows of S.

    Raises:
        ValueError: If the ranks differ, or sparse rows lack their index.
    """

    u_RO: torch.Tensor
    v_RX: torch.Tensor
    row_index_M: torch.Tensor | None = None
    rows_MX: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.row_index_M is None) != (self.rows_MX is None):
            raise ValueError("Sparse rows need an index, and an index needs rows. Pass both or none.")
        if len(self.u_RO) != len(self.v_RX):
            raise ValueError(
                f"The factors have ranks {len(self.u_RO)} and {len(self.v_RX)}: they must agree. Pass (R, O), (R, X)."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(O, X)."""
        return int(self.u_RO.shape[1]), int(self.v_RX.shape[1])

    @property
    def rank(self) -> int:
        """Rank R of the product."""
        return len(self.u_RO)

    @property
    def num_rows(self) -> int:
        """M, 0 without a sparse part."""
        return 0 if self.row_index_M is None else len(self.row_index_M)

    @property
    def numbers(self) -> int:
        """Numbers that are stored: R (O + X) + M X + M."""
        rows, columns = self.shape
        return self.rank * (rows + columns) + self.num_rows * (columns + 1)

    def densified(self) -> torch.Tensor:
        """(O, X) the matrix W."""
        full_OX = self.u_RO.T @ self.v_RX
        if self.row_index_M is not None and self.rows_MX is not None:
            full_OX = full_OX.index_add(0, self.row_index_M.to(full_OX.device), self.rows_MX.to(full_OX.dtype))
        return full_OX
