"""Experts in the formats in which they are stored, with their values.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), P tokens, H hidden, I intermediate, n neurons
kept, G experts of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from optimum_moe.algorithms.expert import Expert
from optimum_moe.formats.base import DEFAULT, JOINT, ExpertFormat, MatrixFormat, StoredPart, get_format
from optimum_moe.formats.specification import ExpertsSpec, layout_bytes, layout_numbers


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """One (O, X) matrix as a sum of parts.

    Args:
        shape: (O, X).
        parts: One body and what is added to it.

    Raises:
        ValueError: If there is not exactly one body, or a tensor has another shape than its format says.
    """

    shape: tuple[int, int]
    parts: tuple[StoredPart, ...]

    def __post_init__(self) -> None:
        forms = [get_format(part.format, MatrixFormat) for part in self.parts]
        if [form.order for form in forms].count(0) != 1:
            raise ValueError(
                f"A matrix has one body and parts that are added to it, got {[form.name for form in forms]}. Pass one "
                "body."
            )
        for form, part in zip(forms, self.parts, strict=True):
            wanted = {name: spec.shape for name, spec in form.tensors(part.size, *self.shape).items()}
            found = {name: tuple(tensor.shape) for name, tensor in part.tensors.items()}
            if found != wanted:
                raise ValueError(
                    f"A {form.name} part of size {part.size} of a {self.shape} matrix has tensors of shapes {wanted}, "
                    f"got {found}. Make it with the format's own functions."
                )

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each part by its format."""
        return {part.format: part.size for part in self.parts}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of all parts by name."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors.items()}

    @property
    def is_dense(self) -> bool:
        """Whether the matrix is stored as it is."""
        return [part.format for part in self.parts] == [DEFAULT]

    def densified(self) -> torch.Tensor:
        """(O, X) the matrix that the parts stand for."""
        matrix_OX: torch.Tensor | None = None
        for part in sorted(self.parts, key=lambda part: get_format(part.format).order):
            matrix_OX = get_format(part.format, MatrixFormat).densified(part.tensors, matrix_OX)
        assert matrix_OX is not None
        return matrix_OX

    def encoded_again(self, matrix_OX: torch.Tensor) -> StoredMatrix | None:
        """Another matrix in the same format; None where the format cannot store any matrix."""
        if len(self.parts) > 1:
            return None
        part = get_format(self.parts[0].format, MatrixFormat).encode(matrix_OX)
        return None if part is None else StoredMatrix(self.shape, (part,))


def stored_matrix(matrix_OX: torch.Tensor, *added: StoredPart) -> StoredMatrix:
    """A matrix as it is: the given tensor itself, with or without parts that are added to it."""
    body = get_format(DEFAULT, MatrixFormat).encode(matrix_OX)
    assert body is not None
    return StoredMatrix((int(matrix_OX.shape[0]), int(matrix_OX.shape[1])), (body, *added))


@dataclass(frozen=True, eq=False)
class StoredExpert:
    """One expert in the formats in which it is stored.

    Args:
        up: (n, H) matrix.
        down: (H, n) matrix.
        gate: (n, H) matrix, None for non-gated experts.
        neurons: (n,) int64, the intermediate neurons that are kept, in their order here; None for all as they are.
        instead: What stands in the place of an expert without neurons; None for nothing, so that it gives zeros (and
            its down bias, where it has one).

    Raises:
        ValueError: If the matrices disagree about the number of neurons, or something stands beside them.
    """

    up: StoredMatrix
    down: StoredMatrix
    gate: StoredMatrix | None = None
    neurons: torch.Tensor | None = None
    instead: StoredPart | None = None

    def __post_init__(self) -> None:
        widths = {self.up.shape[0], self.down.shape[1]}
        widths |= set() if self.gate is None else {self.gate.shape[0]}
        widths |= set() if self.neurons is None else {len(self.neurons)}
        if len(widths) > 1:
            raise ValueError(f"The matrices of an expert have {sorted(widths)} neurons: they must agree.")
        if self.width and self.instead is not None:
            raise ValueError(f"An expert of {self.width} neurons has nothing in its place. Drop its neurons.")

    @property
    def width(self) -> int:
        """Intermediate neurons that are kept (n)."""
        return self.up.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream (H)."""
        return self.up.shape[1]

    @property
    def matrices(self) -> dict[str, StoredMatrix]:
        """Its matrices by the name of the projection: gate (where there is one), up, down."""
        named = {"up": self.up, "down": self.down}
        return named if self.gate is None else {"gate": self.gate, **named}

    @property
    def wants_joint(self) -> bool:
        """Whether gate and up have something in common, so that they have to be stored as one matrix."""
        pairs = self._pairs()
        return pairs is not None and any(get_format(g.format).wants_joint(g, u) for g, u in pairs)

    @cached_property
    def joint(self) -> dict[str, StoredMatrix] | None:
        """Its matrices with gate above up in one; None where they cannot be."""
        pairs = self._pairs()
        if pairs is None:
            return None
        joined = [get_format(gate.format).joined(gate, up) for gate, up in pairs]
        if None in joined:
            return None
        return {JOINT: StoredMatrix((2 * self.width, self.hidden_size), tuple(joined)), "down": self.down}

    def _pairs(self) -> list[tuple[StoredPart, StoredPart]] | None:
        if self.gate is None or self.gate.sizes != self.up.sizes:
            return None
        return list(zip(self.gate.parts, self.up.parts, strict=True))

    @property
    def layout(self) -> dict[str, dict[str, int]]:
        """By projection the sizes of its parts; gate and up as one where they have to be."""
        matrices = self.joint if self.wants_joint else self.matrices
        assert matrices is not None
        return {name: matrix.sizes for name, matrix in matrices.items()}

    @property
    def numbers(self) -> int:
        """Numbers that its matrices store, biases excluded."""
        return layout_numbers(self.layout, self.width, self.hidden_size)

    def bytes(self, itemsize: float) -> float:
        """Bytes that its matrices store, biases excluded, where a weight has `itemsize` of them."""
        return layout_bytes(self.layout, self.width, self.hidden_size, itemsize)

    def hidden(self, expert: Expert, input_PH: torch.Tensor) -> torch.Tensor:
        """(P, n) hidden activations.

        Args:
            expert: The expert before it was stored, for its biases and activation, in the dtype of the input.
            input_PH: (P, H) tokens.
        """
        narrow = expert if self.neurons is None else expert.narrowed(self.neurons)
        entering = [self.up] if self.gate is None else [self.gate, self.up]
        stacked_PS = torch.cat([input_PH @ matrix.densified().to(input_PH.dtype).T for matrix in entering], dim=1)
        return narrow.activated(stacked_PS)

    def terms(self, expert: Expert, input_PH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(P, N) numbers and (H, N) directions whose product is the output, down bias excluded.

        Arguments as for `hidden`, which the numbers are where there are neurons. None where other directions cannot be
        stored (`with_directions`).
        """
        if self.width:
            down_HN = self.down.densified()
            if self.down.encoded_again(down_HN) is None:
                return None
            return self.hidden(expert, input_PH), down_HN.to(input_PH.dtype)
        if self.instead is None:
            return None
        form: ExpertFormat = get_format(self.instead.format, ExpertFormat)
        return form.terms(self.instead, input_PH)

    def with_directions(self, direction_HN: torch.Tensor) -> StoredExpert:
        """The expert with other directions than those of `terms`, in their dtype."""
        if self.instead is not None:
            form: ExpertFormat = get_format(self.instead.format, ExpertFormat)
            return replace(self, instead=form.with_directions(self.instead, direction_HN))
        down = self.down.encoded_again(direction_HN.to(self.down.densified().dtype))
        assert down is not None
        return replace(self, down=down)

    def run(self, expert: Expert, input_PH: torch.Tensor) -> torch.Tensor:
        """(P, H) outputs without the down bias; arguments as for `hidden`."""
        if self.width:
            return self.hidden(expert, input_PH) @ self.down.densified().to(input_PH.dtype).T
        if self.instead is None:
            return input_PH.new_zeros(len(input_PH), self.hidden_size)
        form: ExpertFormat = get_format(self.instead.format, ExpertFormat)
        output_PH = form.forward(form.values(self.instead, None), input_PH)
        return output_PH.to(input_PH.dtype).expand(len(input_PH), -1)


def dense_expert(expert: Expert) -> StoredExpert:
    """An expert in its own matrices, the given tensors themselves."""
    gate_IH = expert.gate_IH
    return StoredExpert(
        up=stored_matrix(expert.up_IH),
        down=stored_matrix(expert.down_HI),
        gate=None if gate_IH is None else stored_matrix(gate_IH),
    )


def without_neurons(expert: Expert, instead: StoredPart | None = None) -> StoredExpert:
    """An expert that keeps no neurons.

    Args:
        expert: The expert.
        instead: What stands in its place, None for nothing.
    """
    gate_IH = expert.gate_IH
    return StoredExpert(
        up=stored_matrix(expert.up_IH[:0]),
        down=stored_matrix(expert.down_HI[:, :0]),
        gate=None if gate_IH is None else stored_matrix(gate_IH[:0]),
        neurons=torch.zeros(0, dtype=torch.int64, device=expert.up_IH.device),
        instead=instead,
    )


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """The experts of one block in the formats in which they are stored.

    Args:
        experts: Each of the G experts.
    """

    experts: tuple[StoredExpert, ...]

    def within(self, neurons: Sequence[torch.Tensor | None]) -> StoredExperts:
        """The same experts, whose neurons were counted among those that an earlier cut had kept.

        Args:
            neurons: The neurons of that cut by expert, None for all.
        """
        found = list(self.experts)
        for index, (expert, kept) in enumerate(zip(self.experts, neurons, strict=True)):
            if kept is not None:
                found[index] = replace(expert, neurons=kept if expert.neurons is None else kept[expert.neurons])
        return StoredExperts(tuple(found))

    @cached_property
    def joint(self) -> bool:
        """Whether gate and up are stored as one matrix: where some experts need it, and all can."""
        return any(e.wants_joint for e in self.experts) and all(e.joint is not None for e in self.experts)

    def matrices(self, expert: int) -> Mapping[str, StoredMatrix]:
        """The matrices of an expert, by the projections that are stored."""
        found = self.experts[expert].joint if self.joint else self.experts[expert].matrices
        assert found is not None
        return found

    @property
    def spec(self) -> ExpertsSpec:
        """What rebuilds the structure without the values."""
        layouts = [{n: m.sizes for n, m in self.matrices(e).items()} for e in range(len(self.experts))]
        instead = [None if e.instead is None else (e.instead.format, e.instead.size) for e in self.experts]
        return ExpertsSpec.of_layouts([expert.width for expert in self.experts], layouts, instead)
