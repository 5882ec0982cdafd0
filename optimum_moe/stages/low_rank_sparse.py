"""Experts as low rank plus structured sparse matrices, with one size setting for all matrices.

MC-SMoE's second step ("Merge, Then Compress", Li et al., ICLR 2024, arXiv:2310.01334, section 3.3), with factors
whitened by the activations (SVD-LLM, arXiv:2403.07378) and rows chosen by their energy on calibration inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.low_rank import Spectrum
from optimum_moe.algorithms.ranks import STEP, rank_from_energy, rank_from_number, rank_from_ratio
from optimum_moe.algorithms.structured_sparse import rows_from_density
from optimum_moe.formats import PROJECTIONS, MatrixFormat, StoredExperts, TensorSpec
from optimum_moe.formats.base import get_format
from optimum_moe.formats.low_rank import LowRank
from optimum_moe.formats.sparse_rows import SparseRows
from optimum_moe.formats.uniform import factorize_expert
from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.plan import BlockPlan, keep_all
from optimum_moe.settings import choose_one, exactly_one
from optimum_moe.stages.base import Stage, register_stage
from optimum_moe.stages.context import BlockContext, aligned_experts, merged_experts
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import check_share, selected_blocks
from optimum_moe.stages.formatting import FormattingStage


@dataclass(frozen=True, eq=False)
class SharedBases:
    """Matrices that the experts of a group share.

    Args:
        labels_E: Group of each expert.
        matrices: (G, O, X) matrices by projection.
        order_EI: (E, I) order of each expert's neurons in its group, None for the original order.
    """

    labels_E: tuple[int, ...]
    matrices: Mapping[str, torch.Tensor]
    order_EI: torch.Tensor | None

    def of_expert(self, expert: int) -> tuple[tuple[int, Mapping[str, torch.Tensor]], torch.Tensor | None]:
        """Number and matrices of an expert's group, and the order of the expert's neurons in it."""
        group = self.labels_E[expert]
        base = group, {name: stack[group] for name, stack in self.matrices.items()}
        return base, None if self.order_EI is None else self.order_EI[expert]


@register_stage
@dataclass(frozen=True)
class LowRankSparse(FormattingStage):
    """Replace every matrix of an expert by U V + S; can follow a stage that merges or prunes.

    The second step of MC-SMoE (arXiv:2310.01334, section 3.3).

    Args:
        rank: Rank of every matrix, a multiple of 8. Exactly one of this and the next two.
        rank_ratio: Share of a matrix's elements that U and V may store, in (0, 1]. With this and the next, a matrix
            remains dense if its factors and sparse rows would not be smaller.
        energy: Share of the squared singular values to keep, in (0, 1]; ranks then differ.
        density: Share of the rows (output neurons) of each matrix that the sparse part keeps, default 0.1 (the
            paper's); None for no sparse part.
        whiten: Weight the error by the calibration tokens (default); False gives the plain SVD and needs no data.
        base: `"group"` keeps every expert as a factorized difference from the merged expert of its group, which the
            stage before this one computes: rank 0 is that merge, the full rank the original.
        layers: Positions of the MoE blocks to factorize, None for all.
        protect: Patterns of block names to leave unchanged.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "low-rank-sparse"
    size_fields: ClassVar[tuple[str, ...]] = ("rank", "rank_ratio", "energy")
    share_fields: ClassVar[tuple[str, ...]] = ("rank_ratio", "energy", "density")

    rank: int | None = None
    rank_ratio: float | None = None
    energy: float | None = None
    density: float | None = 0.1
    whiten: bool = True
    base: Literal["group"] | None = None
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        exactly_one(rank=self.rank, rank_ratio=self.rank_ratio, energy=self.energy)
        for name in ("rank_ratio", "energy"):
            check_share(name, getattr(self, name))
        check_share("density", self.density, " Use None for no sparse part.")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int)):
            raise ValueError(f"rank={self.rank!r} must be an integer. For a share of the elements use rank_ratio.")
        if self.base is not None:
            choose_one("base", self.base, ("group",))

    @property
    def knows_size(self) -> bool:
        """Whether the ranks are fixed in advance, which they are unless `energy` is given."""
        return self.energy is None

    @property
    def needs(self) -> frozenset[str]:
        """Sampled tokens, if `whiten`; else nothing."""
        return frozenset({"frequency", "sample"} if self.whiten else ())

    def check_order(self, before: Stage | None) -> None:
        """See `Stage.check_order`; shared bases need a stage that merges and keeps the router."""
        super().check_order(before)
        if self.base is None:
            return
        if before is None or before.routing is None:
            raise ValueError(
                'base="group" keeps experts as differences from merged ones, but nothing is merged here. Put a stage '
                'that merges before it: [MSMoE(num_experts=8), LowRankSparse(rank=16, base="group")].'
            )
        if before.routing == "reduce":
            raise ValueError(
                f'base="group" keeps every expert, but {before.name} with a smaller router does not. '
                'Merge with routing="map" before it.'
            )
        if not before.averages_experts:
            raise ValueError(
                f'base="group" keeps experts as differences from the mean of their group, but {before.name} with '
                'merge="neurons" makes experts of some neurons of each. Pass merge="mean" to it.'
            )

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`; checks rank and density against the matrices."""
        super().check(model)
        for block in selected_blocks(model, self.layers, self.protect):
            shape = block.intermediate_size, block.hidden_size
            if self.rank is not None:
                self._rank(shape)
            for size in shape:
                self._rows(size)

    def remaining(self, model: ModelInfo, block: BlockInfo, allocated: Any) -> int:
        """All experts; with shared bases the number before the merge."""
        if self.base is None:
            return block.num_experts
        return next(found.num_experts for found in model.original.blocks if found.name == block.name)

    def decide(self, context: BlockContext, allocated: Any) -> BlockPlan:
        """Factorize the experts of one block; with shared bases, their differences from the merged ones."""
        if self.base is None:
            return super().decide(context, allocated)
        assert context.before is not None
        entered, plan = context.before
        kept = keep_all(entered.info.name, entered.info.num_experts, routing="map")
        if not self.applies(context):
            return kept
        aligned = replace(entered, experts=aligned_experts(entered.experts, plan))
        return replace(kept, factors=self._factorized(aligned, _shared_bases(entered.experts, plan)))

    def combine(self, before: BlockPlan, own: BlockPlan) -> BlockPlan:
        """See `Stage.combine`; with shared bases the groups of the merge are part of the factors."""
        return super().combine(before, own) if self.base is None else own

    def factors(self, context: BlockContext, allocated: Any) -> StoredExperts | None:
        """See `FormattingStage.factors`."""
        return self._factorized(context) if self.applies(context) else None

    def _factorized(self, context: BlockContext, shared: SharedBases | None = None) -> StoredExperts:
        """The factors of all experts of a block.

        Args:
            context: The block.
            shared: The bases of its experts, whose neurons are then in the order of the bases.
        """
        sample = context.sample() if self.whiten else None
        experts = []
        for index in range(context.experts.num_experts):
            tokens = None if sample is None else sample.of_expert(index)
            base, neurons = (None, None) if shared is None else shared.of_expert(index)
            single = single_expert(context.experts, index)
            try:
                experts.append(factorize_expert(single, tokens, self._rank_of, self._rows, base, neurons))
            except ValueError as error:
                raise ValueError(f"Expert {index} of {context.info.name} cannot be factorized. {error}") from error
        return StoredExperts(tuple(experts))

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """See `Stage.costs`; exact for a rank or a ratio, an upper bound for an energy."""
        chosen = selected_blocks(model, self.layers, self.protect)
        return {**before, **{block.name: self._cost(block, before[block.name]) for block in chosen}}

    def _cost(self, block: BlockInfo, before: BlockCost) -> BlockCost:
        least, most, indices = self._numbers(block)
        dense, biases = block.expert_multiply_adds, block.expert_parameters - block.expert_multiply_adds
        experts = before.experts
        if self.base is None:
            return replace(
                before,
                parameters=experts * (most + biases),
                multiply_adds=(before.active[0] * least, before.active[1] * most),
                indices=experts * sum(spec.numbers for spec in indices),
                index_bytes=experts * sum(spec.bytes(0) for spec in indices),
                stock=False,
            )
        kept, selected = before.original_experts, block.top_k
        return replace(
            before,
            experts=kept,
            parameters=experts * dense + kept * (most + biases),
            active=(selected, selected),
            multiply_adds=(dense + selected * least, min(selected, experts) * dense + selected * most),
            indices=kept * sum(spec.numbers for spec in indices),
            index_bytes=kept * sum(spec.bytes(0) for spec in indices),
            routing=None,
            stock=False,
        )

    def _numbers(self, block: BlockInfo) -> tuple[float, float, Sequence[TensorSpec]]:
        """Minimum and maximum number of weights in one expert's matrices, and its index tensors."""
        matrices = round(block.expert_multiply_adds / (block.intermediate_size * block.hidden_size))
        shapes = [(block.intermediate_size, block.hidden_size)] * (matrices - 1)
        shapes.append((block.hidden_size, block.intermediate_size))
        specs: list[TensorSpec] = []
        for shape in shapes:
            rank = self._unless_larger(shape, STEP) if self.energy is not None else self._rank(shape)
            specs += self._tensors(shape, rank)
        stored = sum(spec.numbers for spec in specs if spec.dtype is None)
        if self.energy is not None:
            return stored, block.expert_multiply_adds, ()
        return stored, stored, [spec for spec in specs if spec.dtype is not None]

    def _tensors(self, shape: tuple[int, int], rank: int | None) -> list[TensorSpec]:
        """The tensors that a matrix of a rank stores; a rank of None means dense."""
        if rank is None:
            return [TensorSpec(shape)]
        outputs, inputs = shape
        parts = {LowRank.name: rank, SparseRows.name: self._rows(outputs)}
        return [
            spec
            for name, size in parts.items()
            for spec in get_format(name, MatrixFormat).tensors(size, outputs, inputs).values()
        ]

    def _rank(self, shape: tuple[int, int]) -> int | None:
        if self.rank_ratio is not None:
            return self._unless_larger(shape, rank_from_ratio(shape, self.rank_ratio))
        assert self.rank is not None
        return rank_from_number(shape, self.rank, lowest=1 if self.base is None else 0)

    def _rank_of(self, spectrum: Spectrum) -> int | None:
        if self.energy is not None:
            rank = rank_from_energy(spectrum.shape, spectrum.singular_values, self.energy)
            return self._unless_larger(spectrum.shape, rank)
        return self._rank(spectrum.shape)

    def _unless_larger(self, shape: tuple[int, int], rank: int | None) -> int | None:
        """The rank, None if factors and sparse rows are not smaller than the matrix, which then remains dense."""
        if rank is None:
            return None
        stored = sum(spec.numbers for spec in self._tensors(shape, rank))
        return rank if stored < shape[0] * shape[1] else None

    def _rows(self, outputs: int) -> int:
        return 0 if self.density is None else rows_from_density(outputs, self.density)


def _shared_bases(experts: ExpertTensors, plan: BlockPlan) -> SharedBases:
    merged = merged_experts(experts, plan)
    matrices = {name: getattr(merged, name) for name in PROJECTIONS}
    stacked = {name: torch.stack(list(values)) for name, values in matrices.items() if values is not None}
    return SharedBases(plan.labels_E, stacked, plan.permutations_EI)
