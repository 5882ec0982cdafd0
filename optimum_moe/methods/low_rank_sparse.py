"""MC-SMoE's second step: experts as low rank + structured sparse, by calibration alone.

"Merge, Then Compress" (Li et al., ICLR 2024, arXiv:2310.01334), section 3.3, with factors whitened by the activations
(SVD-LLM, arXiv:2403.07378) and rows chosen by their energy on calibration inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.algorithms.factors import BlockFactors
from optimum_moe.algorithms.low_rank import Spectrum
from optimum_moe.algorithms.ranks import RANK_STEP, rank_from_energy, rank_from_number, rank_from_ratio
from optimum_moe.algorithms.structured_sparse import rows_from_density
from optimum_moe.algorithms.uniform_factors import factorise_expert
from optimum_moe.blocks import BlockInfo, ModelInfo
from optimum_moe.methods.base import BlockContext, ExpertCost, Method
from optimum_moe.methods.counts import choose_one, exactly_one, is_selected, selected_blocks
from optimum_moe.plan import BlockPlan, Routing, keep_all

INDEX_BYTES = 4
"""Bytes of the index of a sparse row."""


@dataclass(frozen=True, eq=False)
class SharedBases:
    """Matrices that the experts of a group share.

    Args:
        labels_E: Group of each expert.
        matrices: By projection (G, O, X).
        order_EI: (E, I) order of each expert's neurons in its group, None for the model's own.
    """

    labels_E: tuple[int, ...]
    matrices: Mapping[str, torch.Tensor]
    order_EI: torch.Tensor | None

    def of_expert(self, expert: int) -> tuple[Mapping[str, torch.Tensor], torch.Tensor | None]:
        """The matrices of an expert's group, and the order of its neurons there."""
        base = {name: stack[self.labels_E[expert]] for name, stack in self.matrices.items()}
        return base, None if self.order_EI is None else self.order_EI[expert]


@dataclass(frozen=True)
class LowRankSparse(Method):
    """Keep every matrix of the experts as U V + S; composes after any method that merges or prunes.

    Args:
        rank: Rank of every matrix, a multiple of 8. Exactly one of this, `rank_ratio` and `energy`.
        rank_ratio: Share of a matrix's numbers that U and V may store, in (0, 1].
        energy: Share of the squared singular values to keep, in (0, 1]; ranks then differ.
        density: Share of the rows (output neurons) of each matrix that the sparse part keeps, default 0.1 (the
            paper's); None for no sparse part.
        whiten: Weigh the error by the calibration tokens (default); False gives the plain SVD and needs no data.
        base: `"group"` keeps every expert apart, as a factorised difference to the merged expert of its group, which
            a method in front of this one makes: rank 0 is that merge, the full rank the original.
        layers: Positions of the MoE blocks to factorise, None for all.
        protect: Patterns of block names that stay as they are.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "low-rank-sparse"

    rank: int | None = None
    rank_ratio: float | None = None
    energy: float | None = None
    density: float | None = 0.1
    whiten: bool = True
    base: Literal["group"] | None = None
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        exactly_one(rank=self.rank, rank_ratio=self.rank_ratio, energy=self.energy)
        for name in ("rank_ratio", "energy", "density"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                hint = " Use None for no sparse part." if name == "density" else ""
                raise ValueError(f"{name}={value!r} must be a number in (0, 1].{hint}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int)):
            raise ValueError(f"rank={self.rank!r} must be an integer. For a share of the numbers use rank_ratio.")
        if self.base is not None:
            choose_one("base", self.base, ("group",))

    @property
    def needs_statistics(self) -> bool:
        """If factors are whitened."""
        return self.whiten

    @property
    def sample_size(self) -> int:
        """Enough tokens for Grams of single experts."""
        return 16384

    @property
    def block_routing(self) -> Routing:
        """The router stays as it is."""
        return "map"

    def counts(self, model: ModelInfo) -> dict[str, int]:
        """All experts remain; checks rank and density against the matrices."""
        if self.base is not None:
            raise ValueError(
                'base="group" keeps experts as differences to merged ones, and nothing is merged here. Put a method '
                'that merges in front: [MSMoE(num_experts=8), LowRankSparse(rank=16, base="group")].'
            )
        self.check(model)
        return {block.name: block.num_experts for block in model.blocks}

    def check(self, model: ModelInfo) -> None:
        """Raise a `ValueError` unless the settings fit the matrices of all blocks to factorise."""
        for block in selected_blocks(model, self.layers, self.protect):
            shape = block.intermediate_size, block.hidden_size
            if block.no_factors:
                raise ValueError(
                    f"The experts of {block.name} cannot be kept in factors: {block.no_factors}. Merge them instead."
                )
            if self.rank is not None:
                self._rank(shape)
            for size in shape:
                self._rows(size)

    def applies(self, context: BlockContext) -> bool:
        """Whether a block is one of those to factorise."""
        return is_selected(context.info, context.num_blocks, self.layers, self.protect)

    def decide(self, context: BlockContext, count: int) -> BlockPlan:
        """Factorise the experts of one block."""
        kept = keep_all(context.info.name, context.info.num_experts, self.block_routing)
        return replace(kept, factors=self.factorise(context))

    def factorise(self, context: BlockContext, shared: SharedBases | None = None) -> BlockFactors | None:
        """The factors of all experts of a block; None for a block that stays as it is.

        Args:
            context: The block.
            shared: The bases of its experts, which then have their neurons in the bases' order.
        """
        if not self.applies(context):
            return None
        sample = context.sample() if self.whiten else None
        experts = []
        for index in range(context.experts.num_experts):
            tokens = None if sample is None else sample.of_expert(index)
            base, neurons = (None, None) if shared is None else shared.of_expert(index)
            single = single_expert(context.experts, index)
            experts.append(factorise_expert(single, tokens, self._rank_of, self._rows, base, neurons))
        if shared is None:
            return BlockFactors(tuple(experts))
        return BlockFactors(tuple(experts), shared.labels_E, shared.matrices)

    def cost(self, model: ModelInfo, block: BlockInfo, count: int) -> ExpertCost:
        """Exact for a rank or a ratio; for an energy the bounds, and the bytes of the upper one."""
        if not is_selected(block, len(model.blocks), self.layers, self.protect):
            return super().cost(model, block, count)
        least, most, index_bytes = self.numbers(block)
        biases = block.expert_parameters - block.expert_multiply_adds
        low, high = self.active(block, count, least)[0], self.active(block, count, most)[1]
        return ExpertCost(count * (most + biases), (low, high), count * index_bytes, stock=False)

    def numbers(self, block: BlockInfo) -> tuple[float, float, float]:
        """The fewest and the most numbers that one expert's matrices store, and the bytes of its indices."""
        shape = block.intermediate_size, block.hidden_size
        dense = shape[0] * shape[1]
        matrices = round(block.expert_multiply_adds / dense)
        smallest = RANK_STEP if self.energy is not None else self._rank(shape)
        if smallest is None:
            return block.expert_multiply_adds, block.expert_multiply_adds, 0.0
        outputs = [shape[0]] * (matrices - 1) + [shape[1]]
        rows = [self._rows(count) for count in outputs]
        sparse = sum(count * dense // size for count, size in zip(rows, outputs, strict=True))
        factored = matrices * smallest * sum(shape) + sparse
        most = block.expert_multiply_adds if self.energy is not None else factored
        return factored, most, sum(rows) * INDEX_BYTES

    def _rank(self, shape: tuple[int, int]) -> int | None:
        if self.rank_ratio is not None:
            return rank_from_ratio(shape, self.rank_ratio)
        assert self.rank is not None
        return rank_from_number(shape, self.rank, lowest=1 if self.base is None else 0)

    def _rank_of(self, spectrum: Spectrum) -> int | None:
        if self.energy is not None:
            return rank_from_energy(spectrum.shape, spectrum.singular_values, self.energy)
        return self._rank(spectrum.shape)

    def _rows(self, outputs: int) -> int:
        return 0 if self.density is None else rows_from_density(outputs, self.density)
