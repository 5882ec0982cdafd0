"""Experts in compressed forms: fewer neurons, and matrices that are dense or U V + S, each with sizes of its own.

Experts of one width lie in one `WidthClass`; in it, matrices of a projection that have equal sizes lie in one stack
(`RankClass`), so that a few grouped matmuls serve any mixture, and every size is known before a weight is read.

Shape letters: C experts of a class, O outputs and X inputs of a projection, R rank, M sparse rows, n neurons kept,
P tokens of one expert, T all of them by expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from optimum_moe.algorithms.experts import PerExpert
from optimum_moe.algorithms.factors import BlockFactors, FactorSizes, MatrixFactors


class RankClass(nn.Module):
    """Matrices of equal sizes, of some experts of one projection.

    Args:
        members: The experts, numbered within their width class.
        outputs: O.
        inputs: X.
        rank: R, None for dense matrices.
        num_rows: M.
        bias: Whether there are biases.
        factory: Device and dtype.
    """

    row_index: torch.Tensor

    def __init__(
        self,
        members: Sequence[int],
        outputs: int,
        inputs: int,
        rank: int | None,
        num_rows: int,
        bias: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.members, self.outputs, self.inputs = tuple(members), outputs, inputs
        self.rank, self.num_rows = rank, num_rows

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(len(members), *shape, **factory))

        if rank is None:
            self.weight = parameter(outputs, inputs)
        elif rank:
            self.u, self.v = parameter(rank, outputs), parameter(rank, inputs)
        if num_rows:
            self.rows = parameter(num_rows, inputs)
            index = torch.zeros(len(members), num_rows, dtype=torch.int32, device=factory.get("device"))
            self.register_buffer("row_index", index)
        if bias:
            self.bias = parameter(outputs)

    def forward(
        self, input_TX: torch.Tensor, slot: int | None = None, counts_C: Sequence[int] | None = None
    ) -> torch.Tensor:
        """(T, O) outputs of the expert in a slot, or of tokens that lie by expert, `counts_C` of each."""
        if slot is not None:
            return self._one(slot, input_TX)
        assert counts_C is not None
        return self._grouped(input_TX, counts_C)

    def _one(self, slot: int, input_PX: torch.Tensor) -> torch.Tensor:
        if self.rank is None:
            output_PO = nn.functional.linear(input_PX, self.weight[slot])
        elif self.rank:
            output_PO = nn.functional.linear(input_PX, self.v[slot]) @ self.u[slot]
        else:
            output_PO = input_PX.new_zeros(len(input_PX), self.outputs)
        if self.num_rows:
            sparse_PM = nn.functional.linear(input_PX, self.rows[slot])
            output_PO = output_PO.index_add(-1, self.row_index[slot], sparse_PM.to(output_PO.dtype))
        return output_PO + self.bias[slot] if hasattr(self, "bias") else output_PO

    def _grouped(self, input_TX: torch.Tensor, counts_C: Sequence[int]) -> torch.Tensor:
        ends_C = torch.tensor(list(accumulate(counts_C)), dtype=torch.int32, device=input_TX.device)

        def multiply(rows_TX: torch.Tensor, matrices_CXO: torch.Tensor) -> torch.Tensor:
            return nn.functional.grouped_mm(rows_TX.to(matrices_CXO.dtype), matrices_CXO, offs=ends_C)

        if self.rank is None:
            output_TO = multiply(input_TX, self.weight.transpose(1, 2))
        elif self.rank:
            output_TO = multiply(multiply(input_TX, self.v.transpose(1, 2)), self.u)
        else:
            output_TO = input_TX.new_zeros(len(input_TX), self.outputs)
        slot_T = torch.repeat_interleave(
            torch.arange(len(counts_C), device=input_TX.device),
            torch.tensor(counts_C, device=input_TX.device),
            output_size=len(input_TX),
        )
        if self.num_rows:
            sparse_TM = multiply(input_TX, self.rows.transpose(1, 2))
            output_TO = output_TO.scatter_add(-1, self.row_index.long()[slot_T], sparse_TM)
        return output_TO + self.bias[slot_T] if hasattr(self, "bias") else output_TO

    @torch.no_grad()
    def fill(self, slot: int, matrix: MatrixFactors, bias_O: torch.Tensor | None) -> None:
        """Take over one expert's matrix."""
        if self.rank is None:
            self.weight[slot] = matrix.densified()
        elif self.rank:
            assert matrix.u_RO is not None
            assert matrix.v_RX is not None
            self.u[slot], self.v[slot] = matrix.u_RO, matrix.v_RX
        if matrix.row_index_M is not None and matrix.rows_MX is not None and self.num_rows:
            self.rows[slot], self.row_index[slot] = matrix.rows_MX, matrix.row_index_M
        if bias_O is not None:
            self.bias[slot] = bias_O

    def matrix(self, slot: int) -> MatrixFactors:
        """One expert's matrix."""
        if self.rank is None:
            return MatrixFactors(dense_OX=self.weight[slot])
        u_RO, v_RX = (self.u[slot], self.v[slot]) if self.rank else self._no_factors()
        if not self.num_rows:
            return MatrixFactors(u_RO=u_RO, v_RX=v_RX)
        return MatrixFactors(None, u_RO, v_RX, self.row_index[slot].long(), self.rows[slot])

    def _no_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        first = next(self.parameters(), torch.empty(0))
        return first.new_empty(0, self.outputs), first.new_empty(0, self.inputs)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"experts={len(self.members)}, rank={self.rank}, rows={self.num_rows}"


class ExpertProjection(nn.ModuleList):
    """One projection (gate, up or down) of all experts of a width class, as the `RankClass` stacks it consists of.

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
        by_sizes: dict[tuple[int, int], list[int]] = {}
        for expert, (rank, rows) in enumerate(zip(ranks_C, rows_C, strict=True)):
            by_sizes.setdefault((-1 if rank is None else rank, rows), []).append(expert)
        sizes = (outputs, inputs)
        super().__init__(
            RankClass(members, *sizes, None if rank < 0 else rank, rows, bias, **factory)
            for (rank, rows), members in sorted(by_sizes.items())
        )
        self.home_C = {e: (number, slot) for number, c in enumerate(self) for slot, e in enumerate(self._of(c).members)}
        self.base_C = base_C
        if base_C is not None:
            self.base = nn.Parameter(torch.empty(num_bases, outputs, inputs, **factory))

    @staticmethod
    def _of(module: nn.Module) -> RankClass:
        assert isinstance(module, RankClass)
        return module

    def stack_of(self, expert: int) -> tuple[RankClass, int]:
        """The stack that holds an expert's matrix, and its slot there."""
        number, slot = self.home_C[expert]
        return self._of(self[number]), slot

    def forward(
        self, input_TX: torch.Tensor, expert: int | None = None, counts_C: Sequence[int] | None = None
    ) -> torch.Tensor:
        """(T, O) outputs of one expert, or of tokens that lie by expert, `counts_C` of each."""
        if expert is not None:
            stack, slot = self.stack_of(expert)
            output_TO = stack(input_TX, slot=slot)
            if self.base_C is None:
                return output_TO
            return output_TO + nn.functional.linear(input_TX, self.base[self.base_C[expert]])
        assert counts_C is not None
        output_TO = self._grouped(input_TX, counts_C)
        if self.base_C is None:
            return output_TO
        shared = zip(input_TX.split(list(counts_C)), self.base_C, strict=True)
        return output_TO + torch.cat([nn.functional.linear(rows, self.base[group]) for rows, group in shared])

    def _grouped(self, input_TX: torch.Tensor, counts_C: Sequence[int]) -> torch.Tensor:
        if len(self) == 1:
            return self._of(self[0])(input_TX, counts_C=counts_C)
        parts = input_TX.split(list(counts_C))
        outputs: list[torch.Tensor | None] = [None] * len(counts_C)
        for module in self:
            stack = self._of(module)
            counts = [counts_C[e] for e in stack.members]
            found = stack(torch.cat([parts[e] for e in stack.members]), counts_C=counts).split(counts)
            for expert, output in zip(stack.members, found, strict=True):
                outputs[expert] = output
        return torch.cat([output for output in outputs if output is not None])


class WidthClass(nn.Module):
    """Experts with equally many neurons.

    Args:
        members: Their numbers in the block.
        width: n.
        hidden_size: H.
        sizes: Of all experts of the block.
        biases: Projections that have biases.
        factory: Device and dtype.
    """

    def __init__(
        self,
        members: Sequence[int],
        width: int,
        hidden_size: int,
        sizes: FactorSizes,
        biases: Sequence[str],
        **factory: Any,
    ) -> None:
        super().__init__()
        self.members, self.width = tuple(members), width
        base_C = None if sizes.base is None else [sizes.base[e] for e in members]
        num_bases = 0 if sizes.base is None else max(sizes.base) + 1
        for name, ranks in sizes.ranks.items():
            outputs, inputs = (hidden_size, width) if name == "down" else (width, hidden_size)
            rows_C = [sizes.rows[name][e] if name in sizes.rows else 0 for e in members]
            ranks_C, bias = [ranks[e] for e in members], name in biases
            projection = ExpertProjection(outputs, inputs, ranks_C, rows_C, bias, base_C, num_bases, **factory)
            # Short names such as `gate` are patterns that some architectures rename on loading.
            self.add_module(f"{name}_stacks", projection)

    def projection(self, name: str) -> ExpertProjection:
        """Gate, up or down."""
        found = self.get_submodule(f"{name}_stacks")
        assert isinstance(found, ExpertProjection)
        return found


class EmptyExperts(nn.Module):
    """What experts without neurons give: their down bias.

    Args:
        members: Their numbers in the block.
        hidden_size: H.
        factory: Device and dtype.
    """

    def __init__(self, members: Sequence[int], hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.members = tuple(members)
        self.bias = nn.Parameter(torch.empty(len(members), hidden_size, **factory))

    def forward(self, expert: int) -> torch.Tensor:
        """(H,) output of one of them."""
        return self.bias[self.members.index(expert)]


class FactorisedExperts(nn.Module):
    """All routed experts of one block in compressed forms.

    Args:
        sizes: Of the experts.
        hidden_size: H.
        biases: Projections that have biases; an empty expert keeps its down bias.
        factory: Device and dtype.
    """

    def __init__(self, sizes: FactorSizes, hidden_size: int, biases: Sequence[str] = (), **factory: Any) -> None:
        super().__init__()
        self.sizes, self.hidden_size = sizes, hidden_size
        by_width: dict[int, list[int]] = {}
        for expert, width in enumerate(sizes.widths):
            by_width.setdefault(width, []).append(expert)
        empty = by_width.pop(0, [])
        self.classes = nn.ModuleList(
            WidthClass(members, width, hidden_size, sizes, biases, **factory)
            for width, members in sorted(by_width.items())
        )
        self.empty = EmptyExperts(empty, hidden_size, **factory) if empty and "down" in biases else None
        ordered = [members for _, members in sorted(by_width.items())]
        self._home_E = {e: (number, slot) for number, members in enumerate(ordered) for slot, e in enumerate(members)}

    @property
    def num_experts(self) -> int:
        """Experts of the block (G)."""
        return len(self.sizes.widths)

    def home(self, expert: int) -> tuple[WidthClass, int] | None:
        """The width class of an expert and its slot there; None for an empty expert."""
        if expert not in self._home_E:
            return None
        number, slot = self._home_E[expert]
        found = self.classes[number]
        assert isinstance(found, WidthClass)
        return found, slot

    def project_in(self, expert: int, input_PH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gate (P, n), None for experts without one, and up (P, n) of an expert's tokens."""
        home = self.home(expert)
        if home is None:
            nothing = input_PH.new_zeros(len(input_PH), 0)
            return (nothing if self.sizes.has_gate else None), nothing
        found, slot = home
        gate_Pn = found.projection("gate")(input_PH, expert=slot) if self.sizes.has_gate else None
        return gate_Pn, found.projection("up")(input_PH, expert=slot)

    def project_out(self, expert: int, hidden_Pn: torch.Tensor) -> torch.Tensor:
        """(P, H) output of an expert from its hidden neurons."""
        home = self.home(expert)
        if home is not None:
            return home[0].projection("down")(hidden_Pn, expert=home[1])
        output_PH = hidden_Pn.new_zeros(len(hidden_Pn), self.hidden_size)
        return output_PH if self.empty is None else output_PH + self.empty(expert)

    def fill(self, factors: BlockFactors, biases: Mapping[str, PerExpert]) -> None:
        """Take over the forms of all experts.

        Args:
            factors: The forms.
            biases: By projection the bias of each expert, before neurons were dropped.
        """
        for expert, form in enumerate(factors.experts):
            home = self.home(expert)
            if home is None:
                if self.empty is not None:
                    with torch.no_grad():
                        self.empty.bias[self.empty.members.index(expert)] = biases["down"][expert]
                continue
            for name, matrix in form.matrices.items():
                bias = biases[name][expert] if name in biases else None
                if bias is not None and form.neurons is not None and name != "down":
                    bias = bias[form.neurons.to(bias.device)]
                stack, slot = home[0].projection(name).stack_of(home[1])
                stack.fill(slot, matrix, bias)
        with torch.no_grad():
            for name, base in factors.bases.items():
                for module in self.classes:
                    assert isinstance(module, WidthClass)
                    module.projection(name).base.copy_(base)

    def densified(self, expert: int) -> dict[str, torch.Tensor]:
        """The matrices of one expert by projection, of the neurons that are kept; `{}` for an empty one."""
        home = self.home(expert)
        if home is None:
            return {}
        dense = {}
        for name in self.sizes.ranks:
            projection = home[0].projection(name)
            stack, slot = projection.stack_of(home[1])
            dense[name] = stack.matrix(slot).densified()
            if projection.base_C is not None:
                dense[name] = dense[name] + projection.base[projection.base_C[home[1]]]
        return dense
