"""The sparse-rows format: some whole rows (output neurons) that are added to a matrix (structured sparsity)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from optimum_moe.formats.base import AddedFormat, Opened, Product, Stacks, StoredPart, TensorSpec, register_format
from optimum_moe.formats.specification import span


@register_format
class SparseRows(AddedFormat):
    """S of M rows: `rows` (M, X) and `row_index` (M,) int32 of size M."""

    name = "sparse_rows"
    order = 1
    absent = 0

    def tensors(self, size: int, outputs: int, inputs: int) -> dict[str, TensorSpec]:
        """The rows (M, X) and their indices (M,)."""
        return {"rows": TensorSpec((size, inputs)), "row_index": TensorSpec((size,), torch.int32)}

    def multiply_adds(self, size: int, outputs: int, inputs: int) -> int:
        """M X multiply-adds for each token."""
        return size * inputs

    def add(
        self,
        stacks: Stacks,
        expert: int,
        size: int,
        output_PO: torch.Tensor,
        input_PX: torch.Tensor,
        opened: Opened | None,
        in_place: bool,
    ) -> torch.Tensor:
        """Add to the columns of the output that these rows belong to."""
        sparse_PM = nn.functional.linear(input_PX, stacks.piece("rows", expert, opened)).to(output_PO.dtype)
        index_M = stacks.piece("row_index", expert)
        if not in_place:
            return output_PO.index_add(-1, index_M, sparse_PM)
        if output_PO.device.type == "cpu":
            # Three times faster there for many tokens.
            return output_PO.scatter_add_(-1, index_M.long().expand_as(sparse_PM), sparse_PM)
        return output_PO.index_add_(-1, index_M, sparse_PM)

    def product(self, tensors: Mapping[str, torch.Tensor]) -> Product:
        """The rows, each added to an output of its own."""
        return Product(tensors["rows"], rows=tensors["row_index"])

    def densified(self, part: Mapping[str, torch.Tensor], matrix_OX: torch.Tensor | None) -> torch.Tensor:
        """The matrix (O, X) with these rows added."""
        assert matrix_OX is not None
        return matrix_OX.index_add(0, part["row_index"].to(matrix_OX.device), part["rows"].to(matrix_OX.dtype))

    def describe(self, sizes: Sequence[int]) -> str:
        """The range of row counts."""
        return f"with {span(sizes)} sparse rows"

    def fits(self, size: int, outputs: int, inputs: int) -> bool:
        """No more rows than the matrix has."""
        return size <= outputs


def sparse_rows_part(row_index_M: torch.Tensor, rows_MX: torch.Tensor) -> StoredPart:
    """Rows that are added to a matrix.

    Args:
        row_index_M: (M,) ascending numbers of the rows.
        rows_MX: (M, X).
    """
    return StoredPart(SparseRows.name, len(rows_MX), {"rows": rows_MX, "row_index": row_index_M})
