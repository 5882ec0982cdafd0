"""One projection (gate, up or down) of many experts, whose matrices are dense or U V + S, each with a rank of its own.

Shape letters: C experts of a class, O outputs and X inputs of a projection, R rank, M sparse rows, P tokens of one
expert, T all of them by expert, Q those of all experts of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any, TypeAlias

import torch
from torch import nn

from optimum_moe.algorithms.factors import MatrixFactors
from optimum_moe.hf.compat import own_parameter
from optimum_moe.nn.sparse_part import SparsePart, keep_rows

Opened: TypeAlias = dict[tuple[int, str], Sequence[torch.Tensor]]
"""Stacked tensors that one forward pass has split into those of the experts, by projection and name."""


class ExpertProjection(nn.Module):
    """One projection (gate, up or down) of all experts of a width class.

    Experts lie in the order of their rank, dense ones first, so that the factors of those of one rank are a regular
    stack. Parameters, where there is something to hold: `weight` (dense experts, O, X), `u` (sum of R, O), `v` (sum of
    R, X), `rows` (sum of M, X) with the buffer `row_index` (sum of M,), `bias` (C, O), `base` (bases, O, X).

    Args:
        outputs: O.
        inputs: X.
        ranks_C: Rank of each expert, None for dense.
        rows_C: Sparse rows of each expert.
        bias: Whether there are biases.
        base_C: Base of each expert, where they share some.
        num_bases: Number of bases.
        factory: Device and dtype.
    """

    row_index: torch.Tensor

    def __init__(
        self,
        outputs: int,
        inputs: int,
        ranks_C: Sequence[int | None],
        rows_C: Sequence[int],
        bias: bool,
        base_C: Sequence[int] | None = None,
        num_bases: int = 0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.outputs, self.inputs, self.ranks_C = outputs, inputs, tuple(ranks_C)
        self.base_C, self.num_bases, self.has_bias = base_C, num_bases, bias
        # A number below 0 stands for dense.
        keys = [-1 if rank is None else rank for rank in ranks_C]
        self.order_C = sorted(range(len(keys)), key=lambda expert: (keys[expert], expert))
        self.place_C = [self.order_C.index(expert) for expert in range(len(keys))]
        self._set_rows(rows_C)
        total = sum(rank for rank in ranks_C if rank is not None)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        if None in ranks_C:
            self.weight = parameter(keys.count(-1), outputs, inputs)
        if total:
            self.u, self.v = parameter(total, outputs), parameter(total, inputs)
        if sum(rows_C):
            self.rows = parameter(sum(rows_C), inputs)
            index = torch.zeros(sum(rows_C), dtype=torch.int32, device=factory.get("device"))
            self.register_buffer("row_index", index)
        if bias:
            self.bias = parameter(len(keys), outputs)
        if base_C is not None:
            self.base = parameter(num_bases, outputs, inputs)

    def _set_rows(self, rows_C: Sequence[int]) -> None:
        self.rows_C = tuple(rows_C)
        ranks, rows = [0], [0]
        for expert in self.order_C:
            ranks.append(ranks[-1] + (self.ranks_C[expert] or 0))
            rows.append(rows[-1] + rows_C[expert])
        # Where each expert, or base, lies in the stacked tensors.
        factors, kept = _parts(ranks), _parts(rows)
        ones = _parts(range(max(len(rows_C), self.num_bases) + 1))
        self._parts_of = {"u": factors, "v": factors, "rows": kept, "weight": ones, "bias": ones, "base": ones}

    def forward(
        self,
        input_TX: torch.Tensor,
        expert: int | None = None,
        counts_C: Sequence[int] | None = None,
        base: int | None = None,
        with_base: bool = True,
        opened: Opened | None = None,
    ) -> torch.Tensor:
        """(T, O) outputs of one expert, with or without its base's; of a base; or of tokens that lie by expert.

        Args:
            input_TX: (T, X).
            expert: Number in the width class.
            counts_C: Tokens of each expert.
            base: Number of a base, for its output alone.
            with_base: Whether the output of the expert's base is added.
            opened: What this forward pass of the experts has split already; it starts with an empty one.
        """
        if base is not None:
            return nn.functional.linear(input_TX, self.base[base])
        if expert is not None:
            return self._one(expert, input_TX, with_base, opened)
        assert counts_C is not None
        return self._grouped(input_TX, counts_C)

    def _factors_of(self, expert: int) -> slice:
        return self._parts_of["u"][self.place_C[expert]]

    def _rows_of(self, expert: int) -> slice:
        return self._parts_of["rows"][self.place_C[expert]]

    def _piece(self, name: str, place: int, opened: Opened | None) -> torch.Tensor:
        """What the expert at a place has in the stacked tensor `name`."""
        stacked, parts = own_parameter(self, name), self._parts_of[name]
        if stacked is not None and not (stacked.requires_grad and torch.is_grad_enabled()):
            return stacked[parts[place]]
        if opened is None:
            return getattr(self, name)[parts[place]]
        # The gradient of a split is one stack, that of selections a full-sized tensor for each. A parametrized tensor
        # (an adapter) is computed anew at each access.
        key = (id(self), name)
        if key not in opened:
            stacked = getattr(self, name)
            opened[key] = stacked.split([part.stop - part.start for part in parts if part.stop <= len(stacked)])
        return opened[key][place]

    def _one(self, expert: int, input_PX: torch.Tensor, with_base: bool, opened: Opened | None) -> torch.Tensor:
        rank, place = self.ranks_C[expert], self.place_C[expert]
        bias_O = self._piece("bias", expert, opened)[0] if self.has_bias else None
        if rank is None:
            output_PO = nn.functional.linear(input_PX, self._piece("weight", place, opened)[0], bias_O)
        elif rank:
            hidden_PR = nn.functional.linear(input_PX, self._piece("v", place, opened))
            u_RO = self._piece("u", place, opened)
            output_PO = torch.mm(hidden_PR, u_RO) if bias_O is None else torch.addmm(bias_O, hidden_PR, u_RO)
        else:
            output_PO = input_PX.new_zeros(input_PX.shape[0], self.outputs)
            output_PO = output_PO if bias_O is None else output_PO + bias_O
        if self.rows_C[expert]:
            sparse_PM = nn.functional.linear(input_PX, self._piece("rows", place, opened))
            output_PO = _add_columns(output_PO, self.row_index[self._parts_of["rows"][place]], sparse_PM)
        if self.base_C is not None and with_base:
            base_OX = self._piece("base", self.base_C[expert], opened)[0]
            output_PO = output_PO + nn.functional.linear(input_PX, base_OX)
        return output_PO

    def _grouped(self, input_TX: torch.Tensor, counts_C: Sequence[int]) -> torch.Tensor:
        """One grouped matmul for each rank and factor; rows, bases and biases expert by expert."""
        parts = input_TX.split(list(counts_C))
        outputs: dict[int, torch.Tensor] = {}
        for rank, run in groupby(self.order_C, key=lambda expert: self.ranks_C[expert]):
            members = list(run)
            counts = [counts_C[expert] for expert in members]
            rows_QX = torch.cat([parts[expert] for expert in members])
            output_QO = self._of_rank(rank, members, rows_QX, counts)
            outputs |= zip(members, output_QO.split(counts), strict=True)
        for expert, output_PO in outputs.items():
            if len(output_PO) and self.rows_C[expert]:
                part = self._rows_of(expert)
                sparse_PM = nn.functional.linear(parts[expert], self.rows[part])
                output_PO = output_PO.index_add(-1, self.row_index[part], sparse_PM.to(output_PO.dtype))
            if len(output_PO) and self.base_C is not None:
                output_PO = output_PO + nn.functional.linear(parts[expert], self.base[self.base_C[expert]])
            outputs[expert] = output_PO + self.bias[expert] if self.has_bias else output_PO
        return torch.cat([outputs[expert] for expert in range(len(outputs))])

    def _of_rank(
        self, rank: int | None, members: Sequence[int], input_QX: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        if rank == 0:
            return input_QX.new_zeros(len(input_QX), self.outputs)
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=input_QX.device)

        def multiply(rows_QX: torch.Tensor, matrices_CXO: torch.Tensor) -> torch.Tensor:
            return nn.functional.grouped_mm(rows_QX.to(matrices_CXO.dtype), matrices_CXO, offs=ends)

        if rank is None:
            return multiply(input_QX, self.weight.transpose(1, 2))
        part = slice(self._factors_of(members[0]).start, self._factors_of(members[-1]).stop)
        u_CRO, v_CRX = self.u[part].unflatten(0, (-1, rank)), self.v[part].unflatten(0, (-1, rank))
        return multiply(multiply(input_QX, v_CRX.transpose(1, 2)), u_CRO)

    @torch.no_grad()
    def fill(self, expert: int, matrix: MatrixFactors, bias_O: torch.Tensor | None) -> None:
        """Take over one expert's matrix."""
        if self.ranks_C[expert] is None:
            self.weight[self.place_C[expert]] = matrix.densified()
        elif self.ranks_C[expert]:
            assert matrix.u_RO is not None
            assert matrix.v_RX is not None
            self.u[self._factors_of(expert)], self.v[self._factors_of(expert)] = matrix.u_RO, matrix.v_RX
        if matrix.row_index_M is not None and matrix.rows_MX is not None and self.rows_C[expert]:
            self.rows[self._rows_of(expert)] = matrix.rows_MX
            self.row_index[self._rows_of(expert)] = matrix.row_index_M.to(self.row_index)
        if bias_O is not None:
            self.bias[expert] = bias_O

    def densified(self, expert: int) -> torch.Tensor:
        """(O, X) one expert's matrix, its base included."""
        rank = self.ranks_C[expert]
        if rank is None:
            dense_OX = self.weight[self.place_C[expert]]
        else:
            first = next(self.parameters())
            dense_OX = first.new_zeros(self.outputs, self.inputs)
            if rank:
                dense_OX = self.u[self._factors_of(expert)].T @ self.v[self._factors_of(expert)]
        if self.rows_C[expert]:
            part = self._rows_of(expert)
            dense_OX = dense_OX.index_add(0, self.row_index[part], self.rows[part])
        return dense_OX if self.base_C is None else dense_OX + self.base[self.base_C[expert]]

    def sparse_parts(self) -> dict[str, SparsePart]:
        """The sparse rows of all experts, as those of one tall matrix; see `HasSparseRows`."""
        if not sum(self.rows_C):
            return {}
        offsets = [self.outputs * self.place_C[expert] for expert in self.order_C for _ in range(self.rows_C[expert])]
        tall = self.row_index.long() + torch.tensor(offsets, device=self.row_index.device)
        factored = [rank for rank in self.ranks_C if rank is not None]
        return {"rows": SparsePart(self.rows, tall, self.outputs * len(factored))}

    def keep_rows(self, mask: torch.Tensor, name: str = "rows") -> None:
        """Store fewer rows; experts may keep different numbers of them, or none."""
        part = self.sparse_parts()[name]
        kept = keep_rows(part, mask)
        flat = mask.to(kept.device, torch.bool)
        self.row_index = (kept % self.outputs).to(torch.int32)
        counts = [int(flat[self._rows_of(expert)].sum()) for expert in range(len(self.ranks_C))]
        self._set_rows(counts)
        if not sum(counts):
            # What is built from the sizes has neither of the two.
            del self.rows, self.row_index

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.inputs} to {self.outputs}, ranks={self.ranks_C}, rows={self.rows_C}"


def _parts(ends: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(ends)]


def _add_columns(output_PO: torch.Tensor, index_M: torch.Tensor, sparse_PM: torch.Tensor) -> torch.Tensor:
    """Add to some columns of a product, which is fresh memory that its backward pass does not read: in place."""
    sparse_PM = sparse_PM.to(output_PO.dtype)
    if output_PO.device.type == "cpu":
        # Three times faster there for many tokens.
        return output_PO.scatter_add_(-1, index_M.long().expand_as(sparse_PM), sparse_PM)
    return output_PO.index_add_(-1, index_M, sparse_PM)
