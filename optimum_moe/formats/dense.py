"""The dense format: a matrix as it is, and in a byte budget the untouched expert."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert
from optimum_moe.algorithms.expert_fitter import ExpertFitter, NarrowExpert
from optimum_moe.formats.base import (
    BodyFormat,
    Layout,
    Opened,
    Product,
    Stacks,
    StoredPart,
    TensorSpec,
    register_format,
)
from optimum_moe.formats.budget_format import BudgetFormat, Trial, dense_layout
from optimum_moe.formats.grouped import grouped_product
from optimum_moe.formats.stored import StoredExpert, dense_expert


@register_format
class Dense(BodyFormat, BudgetFormat):
    """`weight` (1, O, X) of size 1."""

    name = "dense"
    is_exact = True
    needs_tokens = False

    def tensors(self, size: int, outputs: int, inputs: int) -> dict[str, TensorSpec]:
        """The matrix itself (1, O, X)."""
        return {"weight": TensorSpec((1, outputs, inputs))}

    def multiply_adds(self, size: int, outputs: int, inputs: int) -> int:
        """O X multiply-adds for each token."""
        return outputs * inputs

    def forward(
        self,
        stacks: Stacks,
        expert: int,
        size: int,
        input_PX: torch.Tensor,
        bias_O: torch.Tensor | None,
        opened: Opened | None,
    ) -> torch.Tensor:
        """W x + b."""
        return nn.functional.linear(input_PX, stacks.piece("weight", expert, opened)[0], bias_O)

    def grouped(
        self, stacks: Stacks, experts: Sequence[int], size: int, input_QX: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """One grouped matmul."""
        weight_COX = stacks.run_of("weight", experts[0], experts[-1])
        return grouped_product(input_QX, weight_COX.transpose(1, 2), counts)

    def product(self, tensors: Mapping[str, torch.Tensor]) -> Product:
        """The matrix alone."""
        return Product(tensors["weight"][0])

    def densified(self, part: Mapping[str, torch.Tensor], matrix_OX: torch.Tensor | None) -> torch.Tensor:
        """The stored matrix (O, X)."""
        return part["weight"][0]

    def describe(self, sizes: Sequence[int]) -> str:
        """Only the name of the format."""
        return "dense"

    def encode(self, matrix_OX: torch.Tensor) -> StoredPart:
        """The given tensor itself."""
        return StoredPart(self.name, 1, {"weight": matrix_OX.unsqueeze(0)})

    def joined(self, gate: StoredPart, up: StoredPart) -> StoredPart:
        """Gate and up concatenated by rows."""
        return self.encode(torch.cat([gate.tensors["weight"][0], up.tensors["weight"][0]]))

    def widths(self, inner: int, can_narrow: bool) -> Collection[int]:
        """Always the full width."""
        return {inner}

    def candidates(self, trial: Trial, narrow: NarrowExpert) -> Iterator[tuple[Candidate, float]]:
        """The untouched expert, which loses nothing."""
        yield Candidate(self.name, trial.expert.inner), 0.0

    def layout(self, candidate: Candidate, gated: bool) -> Layout:
        """Every matrix dense."""
        return dense_layout(gated)

    def build(self, expert: Expert, fitter: ExpertFitter, candidate: Candidate) -> StoredExpert:
        """The expert's own tensors."""
        return dense_expert(expert)
