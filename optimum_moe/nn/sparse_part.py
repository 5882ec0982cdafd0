"""The structured sparse part of a module: which rows of a matrix are stored, and how to store fewer.

A module that has such parts follows `HasSparseRows`; training finds it by that (`optimum_moe.recovery.RowPruning`).

Shape letters: C matrices that are stacked, M stored rows of each, O rows of the whole matrix, X columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class SparsePart:
    """Stored rows of one matrix, or of a stack of matrices with equally many rows each.

    Args:
        rows: (M, X) or (C, M, X) parameter of the module.
        row_index: (M,) or (C, M) int64 buffer of the module: where each row lies in its matrix.
        num_outputs: rows O of the whole matrix.
    """

    rows: nn.Parameter
    row_index: torch.Tensor
    num_outputs: int


@runtime_checkable
class HasSparseRows(Protocol):
    """A module with structured sparse parts."""

    def sparse_parts(self) -> dict[str, SparsePart]:
        """Its parts that store rows, by the attribute name of the parameter."""

    def keep_rows(self, mask: torch.Tensor, name: str = "rows") -> None:
        """Store fewer rows of the part `name`: see `keep_rows`, which does it."""


def keep_rows(part: SparsePart, mask: torch.Tensor) -> torch.Tensor:
    """Drop stored rows for real: the parameter shrinks in place and stays the object that others refer to.

    In a stack M stays equal for all its matrices: it becomes the largest number that one of them keeps, and the others
    fill up with dropped rows set to zero. So the function of the module is that of the masked rows, exactly.

    Args:
        part: the part.
        mask: (M,) or (C, M) bool, True for rows that stay.

    Returns:
        (M',) or (C, M') int64, the new row index, ascending where the old one was.

    Raises:
        ValueError: If the mask has another shape than the index.
    """
    if mask.shape != part.row_index.shape:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)} and there are {tuple(part.row_index.shape)} rows. Pass one value "
            "for each stored row."
        )
    mask = mask.to(part.row_index.device, torch.bool)
    most = int(mask.sum(-1).max()) if mask.numel() else 0
    place = (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most].sort(dim=-1).values
    with torch.no_grad():
        rows = part.rows.masked_fill(~mask.to(part.rows.device).unsqueeze(-1), 0)
        wide = place.to(rows.device).unsqueeze(-1).expand(*place.shape, rows.shape[-1])
        part.rows.data = rows.gather(-2, wide)
    part.rows.grad = None
    return part.row_index.gather(-1, place)
