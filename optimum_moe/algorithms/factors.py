"""The forms in which a compressed expert is kept: fewer neurons, and matrices that are dense or U V + S.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), R rank, M kept rows of the sparse part,
H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class MatrixFactors:
    """One (O, X) matrix: either dense, or W = U^T V + S with a low rank and a structured sparse part.

    Args:
        dense_OX: (O, X) the matrix itself; the other fields are None then.
        u_RO: (R, O) left factor, transposed.
        v_RX: (R, X) right factor.
        row_index_M: (M,) int64 ascending rows that S keeps, None where there is no sparse part.
        rows_MX: (M, X) these rows of S.

    Raises:
        ValueError: If neither form is complete, or shapes do not fit.
    """

    dense_OX: torch.Tensor | None = None
    u_RO: torch.Tensor | None = None
    v_RX: torch.Tensor | None = None
    row_index_M: torch.Tensor | None = None
    rows_MX: torch.Tensor | None = None

    def __post_init__(self) -> None:
        factored = self.u_RO is not None and self.v_RX is not None
        if (self.dense_OX is not None) == factored or (self.row_index_M is None) != (self.rows_MX is None):
            raise ValueError(
                "A matrix is dense or has both factors, and its sparse rows have an index. Pass one form completely."
            )
        if self.dense_OX is not None and self.rows_MX is not None:
            raise ValueError("A dense matrix has no sparse part. Add it to the matrix.")
        if self.u_RO is not None and self.v_RX is not None and len(self.u_RO) != len(self.v_RX):
            raise ValueError(
                f"The factors have ranks {len(self.u_RO)} and {len(self.v_RX)}: they must agree. "
                "Pass (R, O) and (R, X)."
            )

    @property
    def is_dense(self) -> bool:
        """Whether the matrix is kept as it is."""
        return self.dense_OX is not None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, X)."""
        if self.dense_OX is not None:
            return int(self.dense_OX.shape[0]), int(self.dense_OX.shape[1])
        assert self.u_RO is not None
        assert self.v_RX is not None
        return int(self.u_RO.shape[1]), int(self.v_RX.shape[1])

    @property
    def rank(self) -> int | None:
        """R, None for a dense matrix."""
        return None if self.u_RO is None else len(self.u_RO)

    @property
    def num_rows(self) -> int:
        """M, 0 without a sparse part."""
        return 0 if self.row_index_M is None else len(self.row_index_M)

    @property
    def numbers(self) -> int:
        """Numbers that are stored: R (O + X) + M X + M, or O X."""
        rows, columns = self.shape
        rank = self.rank
        return rows * columns if rank is None else rank * (rows + columns) + self.num_rows * (columns + 1)

    def densified(self) -> torch.Tensor:
        """(O, X) the matrix that the form stands for."""
        if self.dense_OX is not None:
            return self.dense_OX
        assert self.u_RO is not None
        assert self.v_RX is not None
        full_OX = self.u_RO.T @ self.v_RX
        if self.row_index_M is not None and self.rows_MX is not None:
            full_OX = full_OX.index_add(0, self.row_index_M.to(full_OX.device), self.rows_MX.to(full_OX.dtype))
        return full_OX


@dataclass(frozen=True, eq=False)
class ExpertFactors:
    """One expert in the form in which it is kept.

    Args:
        up: (n, H) matrix.
        down: (H, n) matrix.
        gate: (n, H) matrix, None for non-gated experts.
        neurons: (n,) int64 ascending, the intermediate neurons that are kept; None for all of them. An expert with
            none gives zeros (and its down bias, where it has one).

    Raises:
        ValueError: If the matrices disagree about the number of neurons.
    """

    up: MatrixFactors
    down: MatrixFactors
    gate: MatrixFactors | None = None
    neurons: torch.Tensor | None = None

    def __post_init__(self) -> None:
        widths = {self.up.shape[0], self.down.shape[1]}
        widths |= set() if self.gate is None else {self.gate.shape[0]}
        widths |= set() if self.neurons is None else {len(self.neurons)}
        if len(widths) > 1:
            raise ValueError(f"The matrices of an expert have {sorted(widths)} neurons: they must agree.")

    @property
    def width(self) -> int:
        """Intermediate neurons that are kept (n)."""
        return self.up.shape[0]

    @property
    def matrices(self) -> dict[str, MatrixFactors]:
        """Its matrices by the name of the projection: gate (where there is one), up, down."""
        named = {"up": self.up, "down": self.down}
        return named if self.gate is None else {"gate": self.gate, **named}

    @property
    def numbers(self) -> int:
        """Numbers that are stored, biases excluded."""
        return sum(matrix.numbers for matrix in self.matrices.values())
