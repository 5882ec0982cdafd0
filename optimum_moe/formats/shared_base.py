"""The shared-base format: a matrix that all experts of a group have in common, to which each adds its own parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from optimum_moe.formats.base import AddedFormat, Opened, Stacks, StoredPart, TensorSpec, register_format


@register_format
class SharedBase(AddedFormat):
    """`base` (1, O, X) of a group; the size is the number of the group."""

    name = "shared_base"
    order = 2
    is_shared = True

    def tensors(self, size: int, outputs: int, inputs: int) -> dict[str, TensorSpec]:
        """The group's matrix."""
        return {"base": TensorSpec((1, outputs, inputs))}

    def multiply_adds(self, size: int, outputs: int, inputs: int) -> int:
        """O X, once for all experts of a group that a token selects."""
        return outputs * inputs

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
        """Add the product with the group's matrix."""
        return output_PO + nn.functional.linear(input_PX, stacks.piece("base", expert, opened)[0])

    def shared_product(self, stacks: Stacks, expert: int, input_PX: torch.Tensor) -> torch.Tensor:
        """The product with the group's matrix."""
        return nn.functional.linear(input_PX, stacks.piece("base", expert)[0])

    def densified(self, part: Mapping[str, torch.Tensor], matrix_OX: torch.Tensor | None) -> torch.Tensor:
        """With the group's matrix."""
        assert matrix_OX is not None
        return matrix_OX + part["base"][0]

    def describe(self, sizes: Sequence[int]) -> str:
        """How many there are."""
        return f"on {len(set(sizes))} shared bases"

    def check(self, sizes: Sequence[int | None]) -> bool:
        """Every expert has a base, and there are no more of them than experts."""
        return all(size is not None and size < len(sizes) for size in sizes)


def shared_base_part(group: int, base_OX: torch.Tensor) -> StoredPart:
    """The base of an expert's matrix.

    Args:
        group: Number of its group.
        base_OX: (O, X).
    """
    return StoredPart(SharedBase.name, group, {"base": base_OX.unsqueeze(0)})
