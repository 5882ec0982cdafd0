"""Experts of any width and rank in one flat buffer, with tables of where each expert's matrices lie.

Every matrix is a part of the buffer, (O, X) row-major. An expert's right factors of gate and up lie above each other
(one of them where the two share it), so that one product gives the inputs of both. Sparse rows are further ranks: their
left factor has a one in the row that each belongs to. Nothing here knows vLLM.

Shape letters: T tokens, K top-k, S their pairs (slots), P tokens of one expert, H hidden, n neurons on this process,
R rank, O rows of a matrix (its outputs), X its columns (its inputs), M sparse rows, G experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch.nn import functional

from optimum_moe.formats import JOINT, ExpertsSpec
from optimum_moe.vllm_plugin.activations import Activation

_ALIGNMENT = 16
"""Every matrix starts at a multiple of this, for loads of full width."""


@dataclass(frozen=True)
class Matrix:
    """A matrix in the buffer.

    Args:
        offset: Of its first number.
        outputs: O; 0 for no matrix.
        inputs: X.
        first: The first of its inputs among the products of the right factors; None where it reads the input itself.
    """

    offset: int = 0
    outputs: int = 0
    inputs: int = 0
    first: int | None = None


@dataclass(frozen=True)
class PackedExpert:
    """Where the matrices of one expert lie.

    Args:
        width: n.
        right: Right factors of gate and up, above each other.
        gate: Gate, or its left factor.
        up: Up, or its left factor.
        down_right: Right factor of down.
        down: Down, or its left factor.
        biases: Offsets of the biases by projection.
    """

    width: int
    right: Matrix
    gate: Matrix
    up: Matrix
    down_right: Matrix
    down: Matrix
    biases: Mapping[str, int]


@dataclass(frozen=True)
class Shard:
    """The part of every expert that one process of tensor parallelism has.

    Args:
        rank: Of the process.
        size: Processes.
    """

    rank: int = 0
    size: int = 1

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The process's part of a dimension of neurons."""
        return tensor.chunk(self.size, dim)[self.rank] if self.size > 1 else tensor


class PackedExperts:
    """The experts of one block on one process.

    Args:
        spec: The formats that they are stored in: dense, low rank and sparse rows, narrow or without neurons.
        hidden_size: H.
        biases: Projections that have biases.
        constants: Experts that give a constant.
        activation: Theirs.
        shard: The part that this process has.
        dtype: Of the weights.
        device: Of the weights; the default one by default.

    Raises:
        ValueError: If a width does not divide by the number of processes.
    """

    def __init__(
        self,
        spec: ExpertsSpec,
        hidden_size: int,
        biases: Sequence[str],
        constants: Sequence[int],
        activation: Activation,
        shard: Shard,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        odd = sorted({width for width in spec.widths if width % shard.size})
        if odd:
            raise ValueError(
                f"experts of {', '.join(map(str, odd[:5]))} neurons do not divide by tensor_parallel_size="
                f"{shard.size}. Choose a size that divides all widths ({sorted(set(spec.widths))}), or compress again "
                f"with tensor_parallel={shard.size}."
            )
        self.spec, self.hidden_size, self.activation, self.shard = spec, hidden_size, activation, shard
        self._biases, self._constants = tuple(biases), frozenset(constants)
        self._size = 0
        self.experts = tuple(self._place(expert) for expert in range(len(spec.widths)))
        self.flat = torch.zeros(self._size, dtype=dtype, device=device)

    def _reserve(self, outputs: int, inputs: int, first: int | None = None) -> Matrix:
        found = Matrix(self._size, outputs, inputs, first)
        self._size += -(-outputs * inputs // _ALIGNMENT) * _ALIGNMENT
        return found

    def _place(self, expert: int) -> PackedExpert:
        width = self.spec.widths[expert] // self.shard.size
        hidden = self.hidden_size
        biases = [name for name in self._biases if width or name == "down"]
        biases += ["down"] if expert in self._constants and "down" not in biases else []
        offsets = {name: self._reserve(1, hidden if name == "down" else width).offset for name in biases}
        if not width:
            return PackedExpert(0, Matrix(), Matrix(), Matrix(), Matrix(), Matrix(), offsets)
        ranks = {name: self._rank(expert, name) for name in ("gate", "up", "down")}
        entering = ("gate", "up") if self.spec.has_gate else ("up",)
        first = dict.fromkeys(entering, 0)
        rows = ranks["up"] or 0
        if not self.spec.is_joint and self.spec.has_gate:
            first["up"] = ranks["gate"] or 0
            rows += first["up"]
        right = self._reserve(rows, hidden)
        matrices = {"gate": Matrix()}
        for name in entering:
            rank = ranks[name]
            matrices[name] = self._reserve(
                width, hidden if rank is None else rank, None if rank is None else first[name]
            )
        rank = ranks["down"]
        down_right = Matrix() if rank is None else self._reserve(rank, width)
        down = self._reserve(hidden, width if rank is None else rank, None if rank is None else 0)
        return PackedExpert(width, right, matrices["gate"], matrices["up"], down_right, down, offsets)

    def _rank(self, expert: int, projection: str) -> int | None:
        """Ranks of a matrix, sparse rows included; None for a dense one."""
        sizes = self.spec.sizes_of(projection, expert)
        return sizes["low_rank"] + sizes.get("sparse_rows", 0) if "low_rank" in sizes else None

    def matrix(self, place: Matrix) -> torch.Tensor:
        """(O, X) of a matrix in the buffer."""
        return self.flat[place.offset : place.offset + place.outputs * place.inputs].view(place.outputs, place.inputs)

    def bias(self, expert: int, projection: str) -> torch.Tensor | None:
        """(O,) bias of an expert's gate, up or down; None for none."""
        place = self.experts[expert]
        if projection not in place.biases:
            return None
        offset = place.biases[projection]
        return self.flat[offset : offset + (self.hidden_size if projection == "down" else place.width)]

    def tensors(self) -> Iterator[tuple[int, str, str, tuple[int, ...], Callable[[torch.Tensor], None]]]:
        """What the checkpoint stores: expert, projection, tensor, its shape in the files, and what takes it.

        A constant has no projection but `approx_value`, and biases have the tensor `bias`.
        """
        for expert, place in enumerate(self.experts):
            if place.width:
                for projection in self.spec.projections:
                    yield from self._tensors_of(expert, place, projection)
            elif expert in self._constants:
                yield expert, "approx_value", "", (self.hidden_size,), self._taking_output(expert)
            elif "down" in self._biases:
                yield expert, "down", "bias", (self.hidden_size,), self._taking_output(expert)

    def _tensors_of(
        self, expert: int, place: PackedExpert, projection: str
    ) -> Iterator[tuple[int, str, str, tuple[int, ...], Callable[[torch.Tensor], None]]]:
        sizes, hidden, width = self.spec.sizes_of(projection, expert), self.hidden_size, self.spec.widths[expert]
        rank, rows = sizes.get("low_rank", 0), sizes.get("sparse_rows", 0)
        if projection == "down":
            outputs, inputs, right = hidden, width, place.down_right
            lefts = [place.down]
        else:
            lefts = [place.gate, place.up] if projection == JOINT else [getattr(place, projection)]
            outputs, inputs, right = len(lefts) * width, hidden, place.right
        first = lefts[0].first or 0
        is_down = projection == "down"
        if "low_rank" not in sizes:
            take = self._taking(lefts, dim=1 if is_down else 0)
            yield expert, projection, "weight", (outputs, inputs), take
        if rank:
            yield expert, projection, "weight_u", (rank, outputs), self._taking_left(lefts, rank, is_down)
            take = self._taking_right(right, first, rank, is_down)
            yield expert, projection, "weight_v", (rank, inputs), take
        if rows:
            take = self._taking_right(right, first + rank, rows, is_down)
            yield expert, projection, "weight_rows", (rows, inputs), take
            yield expert, projection, "weight_row_index", (rows,), self._taking_index(lefts, rank, width, is_down)
        names = ("gate", "up") if projection == JOINT else (projection,)
        if names[-1] in self._biases:
            take = self._taking_output(expert) if is_down else self._taking_biases(expert, names)
            yield expert, projection, "bias", (outputs,), take

    def _taking(self, lefts: Sequence[Matrix], dim: int) -> Callable[[torch.Tensor], None]:
        def take(tensor: torch.Tensor) -> None:
            for place, part in zip(lefts, tensor.chunk(len(lefts)), strict=True):
                self.matrix(place).copy_(self.shard.of(part, dim))

        return take

    def _taking_left(self, lefts: Sequence[Matrix], rank: int, is_down: bool) -> Callable[[torch.Tensor], None]:
        def take(tensor_RO: torch.Tensor) -> None:
            for place, part_RO in zip(lefts, tensor_RO.chunk(len(lefts), 1), strict=True):
                self.matrix(place)[:, :rank].copy_((part_RO if is_down else self.shard.of(part_RO, 1)).T)

        return take

    def _taking_right(self, place: Matrix, first: int, rows: int, is_down: bool) -> Callable[[torch.Tensor], None]:
        def take(tensor_RX: torch.Tensor) -> None:
            self.matrix(place)[first : first + rows].copy_(self.shard.of(tensor_RX, 1) if is_down else tensor_RX)

        return take

    def _taking_index(
        self, lefts: Sequence[Matrix], rank: int, width: int, is_down: bool
    ) -> Callable[[torch.Tensor], None]:
        def take(index_M: torch.Tensor) -> None:
            rows_M = index_M.long()
            column_M = rank + torch.arange(len(rows_M), device=rows_M.device)
            start = 0 if is_down else self.shard.rank * width // self.shard.size
            for number, place in enumerate(lefts):
                local_M = rows_M - number * width - start
                own_M = (local_M >= 0) & (local_M < place.outputs)
                self.matrix(place)[local_M[own_M].to(self.flat.device), column_M[own_M].to(self.flat.device)] = 1

        return take

    def _taking_biases(self, expert: int, names: Sequence[str]) -> Callable[[torch.Tensor], None]:
        def take(tensor: torch.Tensor) -> None:
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                own = self.bias(expert, name)
                assert own is not None
                own.copy_(self.shard.of(part, 0))

        return take

    def _taking_output(self, expert: int) -> Callable[[torch.Tensor], None]:
        def take(tensor_H: torch.Tensor) -> None:
            # The outputs of all processes are added up.
            if self.shard.rank == 0:
                own = self.bias(expert, "down")
                assert own is not None
                own.copy_(tensor_H)

        return take

    def __call__(
        self, input_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor, scales_input: bool = False
    ) -> torch.Tensor:
        """(T, H) weighted sum of the selected experts on this process, expert by expert in torch.

        Args:
            input_TH: (T, H).
            weights_TK: (T, K) routing weights.
            index_TK: (T, K) experts.
            scales_input: Whether routing weights multiply the input instead of the output.
        """
        output_TH = torch.zeros_like(input_TH, dtype=torch.float32)
        expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
        weight_S1 = weights_TK.reshape(-1)[order_S, None]
        start = 0
        for expert, run in groupby(expert_S.tolist()):
            stop = start + len(list(run))
            token_P = order_S[start:stop] // index_TK.shape[1]
            weight_P1 = weight_S1[start:stop]
            input_PH = input_TH[token_P]
            if scales_input:
                input_PH, weight_P1 = (input_PH * weight_P1).to(input_TH.dtype), torch.ones_like(weight_P1)
            output_PH = self.run(expert, input_PH)
            if output_PH is not None:
                output_TH.index_add_(0, token_P, output_PH.float() * weight_P1)
            start = stop
        return output_TH.to(input_TH.dtype)

    def run(self, expert: int, input_PH: torch.Tensor) -> torch.Tensor | None:
        """(P, H) output of one expert; None for zeros."""
        place = self.experts[expert]
        bias_H = self.bias(expert, "down")
        if not place.width:
            return None if bias_H is None else bias_H.expand(len(input_PH), -1)
        inner_PR = functional.linear(input_PH, self.matrix(place.right)) if place.right.outputs else input_PH
        gate_Pn = (
            self._product(input_PH, inner_PR, place.gate, self.bias(expert, "gate")) if place.gate.outputs else None
        )
        up_Pn = self._product(input_PH, inner_PR, place.up, self.bias(expert, "up"))
        hidden_Pn = self.activation(gate_Pn, up_Pn)
        if place.down.first is not None:
            hidden_Pn = functional.linear(hidden_Pn, self.matrix(place.down_right))
        return functional.linear(hidden_Pn, self.matrix(place.down), bias_H)

    def _product(
        self, input_PH: torch.Tensor, inner_PR: torch.Tensor, place: Matrix, bias_n: torch.Tensor | None
    ) -> torch.Tensor:
        if place.first is not None:
            input_PH = inner_PR[:, place.first : place.first + place.inputs]
        return functional.linear(input_PH, self.matrix(place), bias_n)
