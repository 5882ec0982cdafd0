"""Factorized experts on a GPU: a few launches of Triton for any mixture of widths, ranks and sparse rows.

Tables say where the matrices lie, which stay where they are. The host waits for nothing, so that a CUDA graph can
capture a forward pass.

Shape letters: T tokens, K top-k, S their pairs (slots), H hidden, n neurons, E experts, M sparse rows of one expert, Z
matrices that read one input (gate and up).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn

from optimum_moe.algorithms.experts import Activate
from optimum_moe.formats.base import JOINT, Product
from optimum_moe.hf.compat import own_entries
from optimum_moe.nn.expert_projection import ExpertProjection
from optimum_moe.nn.factorized_experts import ExpertsWithoutNeurons, FactorizedExperts, WidthClass

if TYPE_CHECKING:
    from optimum_moe.kernels.ragged_matmul import RaggedMatmul, RaggedMatrix, RoutedSlots

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PARTS = (FactorizedExperts, nn.ModuleList, WidthClass, ExpertProjection, ExpertsWithoutNeurons)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def ragged_launches(factors: FactorizedExperts, hidden_TH: torch.Tensor) -> RaggedLaunches | None:
    """What runs the experts of a forward pass without gradients on a GPU; None where something else has to.

    Args:
        factors: All experts of a block.
        hidden_TH: (T, H) its input.
    """
    if hidden_TH.device.type != "cuda" or not len(hidden_TH) or not _has_triton():
        return None
    if factors.launches is None or not factors.launches[0].is_unchanged():
        factors.launches = Watched(factors), launches_of(factors)
    watched, launches = factors.launches
    first = watched.tensors[0] if watched.tensors else None
    if launches is None or first is None or first.dtype != hidden_TH.dtype or first.device != hidden_TH.device:
        return None
    if torch.is_grad_enabled() and (hidden_TH.requires_grad or any(t.requires_grad for t in watched.tensors)):
        return None
    return launches


class Watched:
    """Modules and parameters as they were: others may stand in their places later, or lie elsewhere.

    Args:
        factors: What they are parts of.
    """

    def __init__(self, factors: FactorizedExperts) -> None:
        # The dictionaries themselves, since a walk over hundreds of modules takes longer than the experts.
        self._entries = [
            (entries, name, entry)
            for module in factors.modules()
            for entries in own_entries(module)
            for name, entry in entries.items()
        ]
        self.tensors = [entry for _, _, entry in self._entries if isinstance(entry, torch.Tensor)]
        self._places = [tensor.data_ptr() for tensor in self.tensors]

    def is_unchanged(self) -> bool:
        """Whether everything is where it was."""
        return all(entries.get(name) is entry for entries, name, entry in self._entries) and all(
            tensor.data_ptr() == place for tensor, place in zip(self.tensors, self._places, strict=True)
        )


def launches_of(factors: FactorizedExperts) -> RaggedLaunches | None:
    """The same for experts that are known to lie on a device which runs Triton.

    Returns:
        None where adapters, shards or several dtypes and devices are among them, or a format has no products.
    """
    # Adapters wrap projections, and parametrizations have modules of their own.
    if any(type(module) not in _PARTS for module in factors.modules()):
        return None
    tensors = list(factors.parameters())
    if any(type(tensor) is not nn.Parameter for tensor in tensors):
        return None
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) != 1 or tensors[0].dtype not in _DTYPES:
        return None
    base = tensors[0]
    if any((tensor.data_ptr() - base.data_ptr()) % base.itemsize for tensor in tensors):
        return None
    names = [JOINT] if factors.is_joint else ["gate", "up"] if factors.has_gate else ["up"]
    entering = [_matrices(factors, name) for name in names]
    leaving = _matrices(factors, "down")
    if leaving is None or any(found is None for found in entering):
        return None
    return RaggedLaunches(factors, base, [found for found in entering if found is not None], leaving)


@dataclass(frozen=True)
class _Matrix:
    """One projection of one expert.

    Args:
        body: Its body; None for zeros.
        rows: Its sparse rows; None for none.
        bias: (O,) its bias, or all of its output; None for none.
        outputs: O; 0 for no matrix.
    """

    body: Product | None = None
    rows: Product | None = None
    bias: torch.Tensor | None = None
    outputs: int = 0


def _matrices(factors: FactorizedExperts, name: str) -> list[_Matrix] | None:
    """A projection of all experts; None where one cannot be expressed as products."""
    found: list[_Matrix] = []
    instead = {expert: module for module in factors.without_neurons for expert in module.members}
    for expert in range(factors.num_experts):
        home = factors.home(expert)
        if home is not None:
            stacks = home[0].stored(name)
            products = stacks.products(home[1])
            if products is None or len(products) > 2:
                return None
            body = next((product for product in products if product.rows is None), None)
            rows = next((product for product in products if product.rows is not None), None)
            if (body is not None) + (rows is not None) != len(products):
                return None
            bias = stacks.bias[home[1]] if stacks.has_bias else None
            found.append(_Matrix(body, rows, bias, stacks.outputs))
        elif name != "down":
            found.append(_Matrix())
        elif expert in instead:
            constant = instead[expert].constant(expert)
            if constant is None:
                return None
            found.append(_Matrix(bias=constant, outputs=factors.hidden_size))
        else:
            found.append(_Matrix(outputs=factors.hidden_size))
    return found


class _Projections:
    """Matrices of all experts that read one input.

    Args:
        base: A tensor from which places count.
        found: By projection the matrices of all experts.
        halves: Matrices that are stored as one, above each other.
        none_outputs: Zeros that ids beyond the experts' give.
    """

    def __init__(self, base: torch.Tensor, found: Sequence[Sequence[_Matrix]], halves: int, none_outputs: int) -> None:
        from optimum_moe.kernels.ragged_matmul import RaggedMatmul, RaggedMatrix

        def at(tensor: torch.Tensor) -> int:
            return (tensor.data_ptr() - base.data_ptr()) // base.itemsize

        def whole(matrix: torch.Tensor | None) -> RaggedMatrix:
            if matrix is None:
                return RaggedMatrix()
            return RaggedMatrix(at(matrix), matrix.stride(0), *matrix.shape)

        rights = [[m.body.right if m.body and m.body.left is not None else None for m in own] for own in found]
        self.right: RaggedMatmul | None = None
        if any(right is not None for own in rights for right in own):
            self.right = RaggedMatmul([[whole(right) for right in own] for own in rights], base)
        main: list[list[RaggedMatrix]] = []
        for number, own in enumerate(found):
            for half in range(halves):
                first = number * (self.right.width if self.right is not None else 0)
                main.append([_half(matrix, half, halves, first, at) for matrix in own])
        none = RaggedMatrix(outputs=none_outputs)
        self.main: RaggedMatmul = RaggedMatmul(main, base, none, left_is_transposed=True)
        self.sparse: RaggedMatmul | None = None
        if any(matrix.rows for own in found for matrix in own):
            self.sparse = RaggedMatmul([[whole(m.rows.right if m.rows else None) for m in own] for own in found], base)
            self.columns_EM = self._columns(found, halves, none_outputs or self.main.width)

    def _columns(self, found: Sequence[Sequence[_Matrix]], halves: int, width: int) -> torch.Tensor:
        """(E + 1, Z * width of the sparse rows) column of each sparse row in the result, -1 for none."""
        assert self.sparse is not None
        experts, wide = len(found[0]), self.sparse.width
        columns_EM = torch.full((experts + 1, len(found) * wide), -1, dtype=torch.int64)
        for number, own in enumerate(found):
            for expert, matrix in enumerate(own):
                if matrix.rows is not None and matrix.rows.rows is not None:
                    row_M = matrix.rows.rows.long().cpu()
                    part_M = row_M // (matrix.outputs // halves)
                    column_M = row_M - part_M * (matrix.outputs // halves) + (number * halves + part_M) * width
                    columns_EM[expert, number * wide : number * wide + len(row_M)] = column_M
        return columns_EM.to(self.main.device)

    def __call__(
        self,
        rows: torch.Tensor,
        index_TK: torch.Tensor,
        slots: RoutedSlots,
        rows_are_tokens: bool,
        weights_TK: torch.Tensor | None = None,
        is_exact: bool = False,
    ) -> torch.Tensor:
        """(S, Z * width) outputs; see `RaggedMatmul`."""
        inner = None if self.right is None else self.right(rows, slots, rows_are_tokens)
        output = self.main(rows, slots, rows_are_tokens, inner, weights_TK, is_exact)
        if self.sparse is not None:
            given = self.sparse(rows, slots, rows_are_tokens, None, weights_TK)
            columns = self.columns_EM[index_TK.reshape(-1).clamp(max=len(self.columns_EM) - 1)]
            output.scatter_add_(1, columns.clamp(min=0), given.masked_fill(columns < 0, 0))
        return output


def _half(matrix: _Matrix, half: int, halves: int, first: int, at: Callable[[torch.Tensor], int]) -> RaggedMatrix:
    """Gate or up of what is stored as one matrix, or all of a matrix."""
    from optimum_moe.kernels.ragged_matmul import RaggedMatrix

    outputs = matrix.outputs // halves
    bias = None if matrix.bias is None else at(matrix.bias) + half * outputs
    if matrix.body is None:
        return RaggedMatrix(outputs=outputs, bias=bias)
    left, right = matrix.body.left, matrix.body.right
    if left is None:
        offset = at(right) + half * outputs * right.stride(0)
        return RaggedMatrix(offset, right.stride(0), outputs, right.shape[1], None, bias)
    return RaggedMatrix(at(left) + half * outputs, left.stride(0), outputs, left.shape[0], first, bias)


class RaggedLaunches:
    """Runs the experts of one block where they lie.

    Args:
        factors: All experts.
        base: One of their parameters.
        entering: Gate and up of all experts, or what is stored in their place.
        leaving: Down of all experts.
    """

    def __init__(
        self,
        factors: FactorizedExperts,
        base: torch.Tensor,
        entering: Sequence[Sequence[_Matrix]],
        leaving: Sequence[_Matrix],
    ) -> None:
        self._num_experts, self._has_gate = factors.num_experts, factors.has_gate
        self._entering = _Projections(base, entering, 2 if factors.is_joint else 1, 0)
        self._leaving = _Projections(base, [leaving], 1, factors.hidden_size)

    def __call__(
        self,
        activate: Activate,
        finish: Callable[[torch.Tensor], torch.Tensor] | None,
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """(T, H) weighted sum of the selected experts.

        Args:
            activate: Their gate function, elementwise: columns beyond an expert's neurons go through it too.
            finish: What is done to the output of an expert, None for nothing.
            hidden_TH: (T, H).
            index_TK: (T, K) expert ids, sentinels (>= E) included.
            weights_TK: (T, K) routing weights.
        """
        from optimum_moe.kernels.ragged_matmul import routed_slots

        hidden_TH, weights_TK = hidden_TH.contiguous(), weights_TK.contiguous()
        slots = routed_slots(index_TK, self._num_experts, hidden_TH.dtype)
        projected = self._entering(hidden_TH, index_TK, slots, rows_are_tokens=True)
        gate_Sn, up_Sn = projected.chunk(2, dim=-1) if self._has_gate else (None, projected)
        hidden_Sn = activate(gate_Sn, up_Sn).contiguous()
        inside = weights_TK if finish is None else None
        output_SH = self._leaving(hidden_Sn, index_TK, slots, False, inside, is_exact=True)
        if finish is not None:
            output_SH = finish(output_SH) * weights_TK.reshape(-1, 1)
        return output_SH.view(*index_TK.shape, -1).sum(1, dtype=torch.float32).to(hidden_TH.dtype)
