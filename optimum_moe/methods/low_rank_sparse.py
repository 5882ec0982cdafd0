"""MC-SMoE's second step: experts as low rank + structured sparse, by calibration alone.

"Merge, Then Compress" (Li et al., ICLR 2024, arXiv:2310.01334), section 3.3, with factors whitened by the activations
(SVD-LLM, arXiv:2403.07378) and rows chosen by their energy on calibration inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from optimum_moe.algorithms.expert_tokens import SingleExpert
from optimum_moe.algorithms.factors import BlockFactors
from optimum_moe.algorithms.low_rank import Spectrum
from optimum_moe.algorithms.ranks import RANK_STEP, rank_from_energy, rank_from_number, rank_from_ratio
from optimum_moe.algorithms.structured_sparse import rows_from_density
from optimum_moe.algorithms.uniform_factors import factorise_expert
from optimum_moe.blocks import BlockInfo, ModelInfo
from optimum_moe.methods.base import BlockContext, ExpertCost, Method
from optimum_moe.methods.counts import exactly_one, is_selected, selected_blocks
from optimum_moe.plan import BlockPlan, Routing, keep_all


@dataclass(frozen=True)
class LowRankSparse(Method):
    """Keep every matrix of the experts as U V + S; composes after any method that merges or prunes.

    Args:
        rank: Rank of every matrix, a multiple of 8. Exactly one of this, `rank_ratio` and `energy`.
        rank_ratio: Share of a matrix's numbers that U and V may store, in (0, 1]. A matrix whose factors and sparse
            rows would be no smaller than it is stays dense, with this and the next.
        energy: Share of the squared singular values to keep, in (0, 1]; ranks then differ.
        density: Share of the rows (output neurons) of each matrix that the sparse part keeps, default 0.1 (the
            paper's); None for no sparse part.
        whiten: Weigh the error by the calibration tokens (default); False gives the plain SVD and needs no data.
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
        for block in selected_blocks(model, self.layers, self.protect):
            shape = block.intermediate_size, block.hidden_size
            if block.no_factors:
                raise ValueError(
                    f"The experts of {block.name} cannot be kept in factors: {block.no_factors}. Merge them instead."
                )
            if self.rank is not None:
                rank_from_number(shape, self.rank)
            for size in shape:
                self._rows(size)
        return {block.name: block.num_experts for block in model.blocks}

    def applies(self, context: BlockContext) -> bool:
        """Whether a block is one of those to factorise."""
        return is_selected(context.info, context.num_blocks, self.layers, self.protect)

    def decide(self, context: BlockContext, count: int) -> BlockPlan:
        """Factorise the experts of one block."""
        kept = keep_all(context.info.name, context.info.num_experts, self.block_routing)
        return replace(kept, factors=self.factorise(context))

    def factorise(self, context: BlockContext) -> BlockFactors | None:
        """The factors of all experts of a block; None for a block that stays as it is."""
        if not self.applies(context):
            return None
        sample = context.sample() if self.whiten else None
        experts = []
        for index in range(context.experts.num_experts):
            tokens = None if sample is None else sample.of_expert(index)
            experts.append(factorise_expert(SingleExpert(context.experts, index), tokens, self._rank_of, self._rows))
        return BlockFactors(tuple(experts))

    def cost(self, model: ModelInfo, block: BlockInfo, count: int) -> ExpertCost:
        """Exact for a rank or a ratio; for an energy, the bounds are what the smallest rank and dense ones take."""
        if not is_selected(block, len(model.blocks), self.layers, self.protect):
            return super().cost(model, block, count)
        matrices = round(block.expert_multiply_adds / (block.intermediate_size * block.hidden_size))
        shapes = [(block.intermediate_size, block.hidden_size)] * (matrices - 1)
        shapes.append((block.hidden_size, block.intermediate_size))
        factored, indices = 0.0, 0
        for shape in shapes:
            rank = self._unless_larger(shape, RANK_STEP) if self.energy is not None else self._rank(shape)
            rows = 0 if rank is None else self._rows(shape[0])
            factored += shape[0] * shape[1] if rank is None else rank * sum(shape) + rows * shape[1]
            indices += rows
        stored = factored if self.energy is None else float(block.expert_multiply_adds)
        biases = block.expert_parameters - block.expert_multiply_adds
        return ExpertCost(
            count * (stored + biases), float(count * indices) if self.energy is None else 0.0, (factored, stored)
        )

    def _rank(self, shape: tuple[int, int]) -> int | None:
        if self.rank_ratio is not None:
            return self._unless_larger(shape, rank_from_ratio(shape, self.rank_ratio))
        assert self.rank is not None
        return rank_from_number(shape, self.rank)

    def _rank_of(self, spectrum: Spectrum) -> int | None:
        if self.energy is not None:
            rank = rank_from_energy(spectrum.shape, spectrum.singular_values, self.energy)
            return self._unless_larger(spectrum.shape, rank)
        return self._rank(spectrum.shape)

    def _unless_larger(self, shape: tuple[int, int], rank: int | None) -> int | None:
        """The rank, None where factors and sparse rows together are no smaller than the matrix: it then stays dense."""
        if rank is None:
            return None
        numbers = rank * sum(shape) + self._rows(shape[0]) * (shape[1] + 1)
        return rank if numbers < shape[0] * shape[1] else None

    def _rows(self, outputs: int) -> int:
        return 0 if self.density is None else rows_from_density(outputs, self.density)
