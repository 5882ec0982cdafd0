"""The protocol of formats: what everything else asks of a way to store an expert or one of its matrices.

A stored expert has a number of neurons and, for each projection, a matrix that is a sum of parts: exactly one body
(dense, low rank, ...) and whatever is added to it (sparse rows, a base that experts share). Each kind of part is a
`MatrixFormat`. What stands in the place of an expert without neurons is an `ExpertFormat`. Formats that a byte budget
may choose are `BudgetFormat`s too (`budget_format.py`). A format is one file; `register_format` makes it known by its
name, which is also the key of its sizes in config.json.

Shape letters: C experts of a stack, O outputs and X inputs of a matrix, P tokens of one expert, Q those of several,
H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch

PROJECTIONS = ("gate", "up", "down")
"""The matrices of an expert; experts without a gate have the last two."""
JOINT = "gate_up"
"""Gate above up, where the two are stored as one matrix."""
DEFAULT = "dense"
"""The body of every matrix of which a specification says nothing else."""

Opened: TypeAlias = dict[tuple[int, str], Sequence[torch.Tensor]]
"""Stacked tensors that one forward pass has split into those of the experts, by module and name."""
Layout: TypeAlias = Mapping[str, Mapping[str, int]]
"""By projection the sizes of a matrix's parts, by format."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a part stores for one expert.

    Args:
        shape: Its shape; experts are stacked along the first axis.
        dtype: None for the dtype of the experts' weights, which makes it a parameter; any other makes it a buffer.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def numbers(self) -> int:
        """Numbers that are stored."""
        return prod(self.shape)

    def bytes(self, itemsize: float) -> float:
        """Bytes that are stored, where a weight has `itemsize` of them."""
        return self.numbers * (itemsize if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True, eq=False)
class StoredPart:
    """The values of one part of a matrix, or of what stands in the place of an expert.

    Args:
        format: Name of its format.
        size: In the format's own terms.
        tensors: Its tensors by name, of the shapes that the format's `tensors` gives.
    """

    format: str
    size: int
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Product:
    """A part of a matrix as products that every device can run: V x, or U^T (V x).

    Args:
        right: V (R, X).
        left: U (R, O); None where V x are outputs themselves.
        rows: (R,) the outputs that these are added to; None for all of them in their order.
    """

    right: torch.Tensor
    left: torch.Tensor | None = None
    rows: torch.Tensor | None = None


class Stacks(Protocol):
    """The stacked tensors of one projection of several experts (`optimum_moe.nn.expert_projection`)."""

    outputs: int
    inputs: int

    def piece(self, name: str, expert: int, opened: Opened | None = None) -> torch.Tensor:
        """What an expert has in the stacked tensor `name`."""

    def run_of(self, name: str, first: int, last: int) -> torch.Tensor:
        """What experts that lie beside each other have in it."""


class Format(ABC):
    """A way to store an expert, or a part of one of its matrices."""

    name: ClassVar[str]


class MatrixFormat(Format):
    """One kind of part of a matrix.

    A part has one whole number, its size, in the format's own terms: a rank, a number of rows, a group. `order` is 0
    for bodies, of which a matrix has exactly one; parts of higher orders are added to it, in this order. `absent` is
    the size that stands for no such part.
    """

    order: ClassVar[int] = 0
    absent: ClassVar[int | None] = None
    is_shared: ClassVar[bool] = False
    """Whether several experts have the same tensors; their size is then the number of what they share."""
    is_exact: ClassVar[bool] = False
    """Whether an original matrix is stored with its own bits."""

    @abstractmethod
    def tensors(self, size: int, outputs: int, inputs: int) -> dict[str, TensorSpec]:
        """The tensors of a part of that size of an (O, X) matrix; names differ from those of all other formats."""

    @abstractmethod
    def multiply_adds(self, size: int, outputs: int, inputs: int) -> int:
        """Multiply-adds that it takes for a token."""

    @abstractmethod
    def densified(self, part: Mapping[str, torch.Tensor], matrix_OX: torch.Tensor | None) -> torch.Tensor:
        """(O, X) the sum of all parts so far, this one included; `matrix_OX` is the sum before it, None for a body."""

    @abstractmethod
    def describe(self, sizes: Sequence[int]) -> str:
        """The parts of several matrices in a few words, such as "of rank 8 to 16"."""

    def fits(self, size: int, outputs: int, inputs: int) -> bool:
        """Whether an (O, X) matrix can have such a part."""
        return True

    def check(self, sizes: Sequence[int | None]) -> bool:
        """Whether all experts of a block together can have parts of these sizes."""
        return True

    def shared_product(self, stacks: Stacks, expert: int, input_PX: torch.Tensor) -> torch.Tensor:
        """(P, O) output of what an expert shares with its group, alone; for formats that share tensors."""
        raise NotImplementedError(f"The format {self.name!r} shares nothing.")

    def product(self, tensors: Mapping[str, torch.Tensor]) -> Product | None:
        """The part of one expert for kernels that run the experts of a block together; None where they cannot.

        Args:
            tensors: Those of the part.
        """
        return None

    def encode(self, matrix_OX: torch.Tensor) -> StoredPart | None:
        """A matrix in this format, where there is one way to store any; None where there is none."""
        return None

    def joined(self, gate: StoredPart, up: StoredPart) -> StoredPart | None:
        """The part of gate above up, None where they cannot be one."""
        return None

    def wants_joint(self, gate: StoredPart, up: StoredPart) -> bool:
        """Whether gate and up have to be stored as one matrix, because they have something in common."""
        return False


class BodyFormat(MatrixFormat):
    """A part that makes a matrix by itself."""

    @abstractmethod
    def forward(
        self,
        stacks: Stacks,
        expert: int,
        size: int,
        input_PX: torch.Tensor,
        bias_O: torch.Tensor | None,
        opened: Opened | None,
    ) -> torch.Tensor:
        """(P, O) output of one expert, in fresh memory that no backward pass reads.

        Args:
            stacks: What holds the tensors.
            expert: Its number there.
            size: Of its part.
            input_PX: (P, X) its tokens.
            bias_O: (O,) its bias.
            opened: Passed on to `Stacks.piece`.
        """

    def grouped(
        self, stacks: Stacks, experts: Sequence[int], size: int, input_QX: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """(Q, O) outputs without biases of experts of one size, which lie beside each other; one by one by default.

        Args:
            stacks: What holds the tensors.
            experts: Their numbers there.
            size: Of their parts.
            input_QX: (Q, X) their tokens, by expert.
            counts: Tokens of each.
        """
        parts = zip(experts, input_QX.split(list(counts)), strict=True)
        return torch.cat([self.forward(stacks, expert, size, rows, None, None) for expert, rows in parts])


class AddedFormat(MatrixFormat):
    """A part that is added to a body."""

    order: ClassVar[int] = 1

    @abstractmethod
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
        """(P, O) output with this part; `in_place` allows to change `output_PO`. The others as in `forward`."""


class ExpertFormat(Format):
    """What stands in the place of an expert that keeps no neurons."""

    @abstractmethod
    def tensors(self, size: int, hidden_size: int, has_bias: bool) -> dict[str, TensorSpec]:
        """The tensors of one expert, in the dtype of its down bias or of the weights; `{}` for nothing to store."""

    @abstractmethod
    def values(self, part: StoredPart | None, bias_H: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The values of these tensors, given the expert's part (None for an empty one) and its down bias."""

    @abstractmethod
    def forward(self, tensors: Mapping[str, torch.Tensor], input_PH: torch.Tensor) -> torch.Tensor:
        """(P, H) or (1, H) output of one expert, given its own tensors."""

    def constant(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """(H,) output of one expert whatever the input; None where it depends on the input."""
        return None

    def terms(self, part: StoredPart, input_PH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(P, T) numbers and (H, T) directions whose product is the output; None where the directions are not refitted.

        Like the hidden activations and the down projection of an expert with T neurons.
        """
        return None

    def with_directions(self, part: StoredPart, direction_HT: torch.Tensor) -> StoredPart:
        """The same numbers with other directions, where `terms` gives some."""
        raise NotImplementedError(f"The directions of format {self.name!r} are not refitted.")

    def multiply_adds(self, size: int, hidden_size: int) -> int:
        """Multiply-adds that it takes for a token."""
        return 0

    def describe(self, sizes: Sequence[int]) -> str:
        """Several of them in a few words."""
        return f"{len(sizes)} {self.name}"


_REGISTRY: dict[str, Format] = {}

_F = TypeVar("_F", bound=type[Format])


def register_format(cls: _F) -> _F:
    """Class decorator that makes a format known by its `name`.

    Raises:
        ValueError: If another format has the name.
    """
    if cls.name in _REGISTRY:
        raise ValueError(f"The format {cls.name!r} is registered already. Give yours another name.")
    _REGISTRY[cls.name] = cls()
    return cls


def all_formats(kind: type[Any] = Format) -> list[Any]:
    """All registered formats of a kind, in the order in which parts are added."""
    found = [form for form in _REGISTRY.values() if isinstance(form, kind)]
    return sorted(found, key=lambda form: (getattr(form, "order", 0), form.name))


def get_format(name: str, kind: type[Any] = Format) -> Any:
    """A registered format.

    Raises:
        ValueError: If there is none of that name and kind.
    """
    found = _REGISTRY.get(name)
    if not isinstance(found, kind):
        known = sorted(form.name for form in all_formats(kind))
        raise ValueError(f"{name!r:.40} is no format of experts; there are {known}.")
    return found
