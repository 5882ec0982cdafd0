"""`LowRankSparseLinear`: a linear layer as a low rank plus the rows that it cannot express.

Shape letters: O outputs, X inputs, R rank, M rows of the sparse part.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from optimum_moe.algorithms.factors import MatrixFactors
from optimum_moe.nn.sparse_part import SparsePart, keep_rows


class LowRankSparseLinear(nn.Module):
    """y = x W^T + b with W = U^T V + S, of which only the kept rows of S are stored (MC-SMoE, arXiv 2310.01334).

    Parameters `u` (R, O), `v` (R, X), `rows` (M, X) and optionally `bias` (O,); buffer `row_index` (M,) int64,
    ascending, says which outputs the rows add to. All sizes follow from the constructor, so that a checkpoint can be
    loaded into a module built on the meta device.

    Args:
        in_features: X.
        out_features: O.
        rank: R, 0 for no low rank.
        num_rows: M, 0 for no sparse part.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: If a size is out of range.
    """

    bias: torch.Tensor | None
    row_index: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        num_rows: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (0 <= rank <= min(in_features, out_features) and 0 <= num_rows <= out_features):
            raise ValueError(
                f"rank={rank} must be in 0..{min(in_features, out_features)} and num_rows={num_rows} in "
                f"0..{out_features} for {in_features} inputs and {out_features} outputs. Use less, or nn.Linear."
            )
        self.in_features, self.out_features = in_features, out_features
        self.u = nn.Parameter(torch.empty(rank, out_features, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.rows = nn.Parameter(torch.empty(num_rows, in_features, device=device, dtype=dtype))
        self.register_buffer("row_index", torch.empty(num_rows, device=device, dtype=torch.int64))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random low rank of the variance of `nn.Linear`, zeros elsewhere."""
        bound = math.sqrt(1 / self.in_features)
        self.v.uniform_(-bound, bound)
        self.u.uniform_(-1, 1).mul_(math.sqrt(3 / max(1, self.rank)))
        self.rows.zero_()
        self.row_index.copy_(torch.arange(self.num_rows))
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    def from_factors(cls, factors: MatrixFactors, bias: torch.Tensor | None = None) -> LowRankSparseLinear:
        """The layer of a factored matrix, with the factors' dtype and device and memory of its own.

        Args:
            factors: low rank with or without sparse rows.
            bias: (O,) or None.

        Raises:
            ValueError: If the row index is not ascending within the matrix.
        """
        outputs, inputs = factors.shape
        u_RO, v_RX, rows_MX, index_M = factors.u_RO, factors.v_RX, factors.rows_MX, factors.row_index_M
        layer = cls(
            inputs, outputs, len(u_RO), factors.num_rows, bias is not None, device=u_RO.device, dtype=u_RO.dtype
        )
        with torch.no_grad():
            layer.u.copy_(u_RO)
            layer.v.copy_(v_RX)
            if index_M is not None and rows_MX is not None and len(index_M):
                if int(index_M[0]) < 0 or int(index_M[-1]) >= outputs or bool((index_M.diff() <= 0).any()):
                    raise ValueError(
                        f"The row index must ascend within 0..{outputs - 1}, got {index_M.tolist()}. Sort it."
                    )
                layer.row_index.copy_(index_M)
                layer.rows.copy_(rows_MX)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    @property
    def rank(self) -> int:
        """Rank R of the product."""
        return len(self.u)

    @property
    def num_rows(self) -> int:
        """Number of sparse rows (M)."""
        return len(self.row_index)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., X) to (..., O)."""
        output = functional.linear(input, self.v) @ self.u
        if self.num_rows:
            sparse = functional.linear(input, self.rows)
            # The product is fresh memory that its backward pass does not read: adding in place saves a copy.
            output = output.index_add_(-1, self.row_index, sparse.to(output.dtype))
        # Under autocast the product is narrower than the bias.
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def factors(self) -> MatrixFactors:
        """What the layer stores, without its bias: views of the parameters without gradients."""
        sparse = (self.row_index, self.rows.detach()) if self.num_rows else (None, None)
        return MatrixFactors(u_RO=self.u.detach(), v_RX=self.v.detach(), row_index_M=sparse[0], rows_MX=sparse[1])

    @torch.no_grad()
    def densify(self) -> nn.Linear:
        """A plain linear layer of the same function, for runtimes without this module."""
        dtype = self.u.dtype
        wide = torch.promote_types(dtype, torch.float32)
        stored = self.factors()
        full_OX = MatrixFactors(
            u_RO=stored.u_RO.to(wide),
            v_RX=stored.v_RX.to(wide),
            row_index_M=stored.row_index_M,
            rows_MX=stored.rows_MX,
        ).densified()
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device=self.u.device, dtype=dtype
        )
        linear.weight.copy_(full_OX)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def sparse_parts(self) -> dict[str, SparsePart]:
        """Its sparse part as `rows`, where it has one."""
        return {"rows": SparsePart(self.rows, self.row_index, self.out_features)} if self.num_rows else {}

    def keep_rows(self, mask: torch.Tensor, name: str = "rows") -> None:
        """Store only the rows whose (M,) mask is True.

        Raises:
            ValueError: If the mask does not have one value for each stored row.
        """
        self.row_index = keep_rows(SparsePart(self.rows, self.row_index, self.out_features), mask)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"num_rows={self.num_rows}, bias={self.bias is not None}"
        )
