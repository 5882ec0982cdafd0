"""Experts in smaller forms: low rank + structured sparse at one size, or what a byte budget buys the most with.

One size is MC-SMoE's second step ("Merge, Then Compress", Li et al., ICLR 2024, arXiv:2310.01334, section 3.3), with
factors whitened by the activations (SVD-LLM, arXiv:2403.07378) and rows chosen by their energy on calibration inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from optimum_moe.algorithms.byte_budget import KINDS
from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.algorithms.factors import BlockFactors
from optimum_moe.algorithms.low_rank import Spectrum
from optimum_moe.algorithms.one_expert import Form
from optimum_moe.algorithms.ranks import RANK_STEP, rank_from_energy, rank_from_number, rank_from_ratio
from optimum_moe.algorithms.structured_sparse import rows_from_density
from optimum_moe.algorithms.uniform_factors import factorize_expert
from optimum_moe.blocks import BlockInfo, ModelInfo
from optimum_moe.methods.base import BlockContext, ExpertCost, Method
from optimum_moe.methods.byte_budget import BlockSurvey, build_block, narrowest_item, spend_budget, survey_block
from optimum_moe.methods.counts import (
    bytes_for_tensors,
    check_size,
    choose_one,
    exactly_one,
    header_entry,
    is_selected,
    selected_blocks,
)
from optimum_moe.plan import BlockPlan, Routing, keep_all
from optimum_moe.settings import product


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
    """Keep experts in smaller forms; composes after any method that merges or prunes.

    With `rank`, `rank_ratio` or `energy` every matrix becomes U V + S. With `budget` or `target_size` every expert of
    the whole model becomes one of: empty, some of its neurons, gate and up of a low rank, or as it is, wherever a byte
    saves the most loss (`optimum_moe.algorithms.byte_budget`).

    Args:
        rank: Rank of every matrix, a multiple of 8. Exactly one of this and the next four.
        rank_ratio: Share of a matrix's numbers that U and V may store, in (0, 1]. A matrix whose factors and sparse
            rows would be no smaller than it is stays dense, with this and the next.
        energy: Share of the squared singular values to keep, in (0, 1]; ranks then differ.
        budget: Share of the bytes of the experts' matrices that remains, in (0, 1].
        target_size: Size of the weight files at most, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            what they are.
        density: Share of the rows (output neurons) of each matrix that the sparse part keeps, default 0.1 (the
            paper's); None for no sparse part. A budget makes no sparse parts.
        whiten: Weigh the error by the calibration tokens (default); False gives the plain SVD and needs no data.
        curvature: Measure damage in the loss, by backward passes over the calibration data (default); False measures
            output errors, as where no backward pass is possible. For budgets only.
        kinds: What a budget may make of an expert between empty and untouched: `"neurons"` and `"rank"` (default).
        base: `"group"` keeps every expert apart, as a factorized difference to the merged expert of its group, which
            a method in front of this one makes: rank 0 is that merge, the full rank the original.
        layers: Positions of the MoE blocks to factorize, None for all.
        protect: Patterns of block names that stay as they are.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "low-rank-sparse"
    size_fields: ClassVar[tuple[str, ...]] = ("rank", "rank_ratio", "energy", "budget", "target_size")
    share_fields: ClassVar[tuple[str, ...]] = ("rank_ratio", "energy", "budget", "density")

    rank: int | None = None
    rank_ratio: float | None = None
    energy: float | None = None
    budget: float | None = None
    target_size: str | int | None = None
    density: float | None = 0.1
    whiten: bool = True
    curvature: bool = True
    kinds: Sequence[str] = KINDS
    base: Literal["group"] | None = None
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None
    forms: Mapping[str, Sequence[Form]] | None = field(default=None, init=False, repr=False)
    """The form of every expert by block, once a budget is spent; no setting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        exactly_one(**{name: getattr(self, name) for name in self.size_fields})
        for name in ("rank_ratio", "energy", "budget", "density"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                hint = " Use None for no sparse part." if name == "density" else ""
                raise ValueError(f"{name}={value!r} must be a number in (0, 1].{hint}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int)):
            raise ValueError(f"rank={self.rank!r} must be an integer. For a share of the numbers use rank_ratio.")
        if self.target_size is not None:
            check_size(self.target_size)
        if self.base is not None:
            choose_one("base", self.base, ("group",))
        if isinstance(self.kinds, str):
            raise ValueError(f"kinds={self.kinds!r} must be a list, for example ['neurons'].")
        for kind in self.kinds:
            choose_one("kinds", kind, KINDS)
        if self.needs_survey and (self.density not in (None, 0.1) or not self.whiten or self.base is not None):
            raise ValueError(
                "density=, whiten=False and base= are for one rank of all matrices, and a byte budget chooses its own "
                "forms. Leave them out, or use rank=, rank_ratio= or energy=."
            )

    @property
    def knows_size(self) -> bool:
        """Not with an energy."""
        return self.energy is None

    @property
    def needs_survey(self) -> bool:
        """Whether bytes are spent over all blocks at once."""
        return self.budget is not None or self.target_size is not None

    @property
    def gradient_draws(self) -> int:
        """One: four gave hardly better forms, and take four times the backward passes and the memory."""
        return 1 if self.needs_survey and self.curvature else 0

    @property
    def needs_statistics(self) -> bool:
        """If factors are whitened."""
        return self.whiten

    @property
    def needs_sample(self) -> bool:
        """If factors are whitened."""
        return self.whiten

    @property
    def sample_size(self) -> int:
        """Enough tokens for Grams of single experts."""
        return 32768

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
        if self.target_size is not None:
            self._budget(model)
        return {block.name: block.num_experts for block in model.blocks}

    def check(self, model: ModelInfo) -> None:
        """Raise a `ValueError` unless the settings fit the matrices of all blocks to factorize."""
        for block in selected_blocks(model, self.layers, self.protect):
            shape = block.intermediate_size, block.hidden_size
            if block.no_factors:
                raise ValueError(
                    f"The experts of {block.name} cannot be kept in factors: {block.no_factors}. Merge them instead."
                )
            if self.rank is not None:
                self._rank(shape)
            for size in shape if not self.needs_survey else ():
                self._rows(size)

    def changed_by_data(self, model: ModelInfo, counts: Mapping[str, int]) -> set[str]:
        """All blocks to factorize, where factors are whitened."""
        chosen = selected_blocks(model, self.layers, self.protect) if self.needs_statistics else ()
        return {block.name for block in chosen}

    def sparing(self, names: Collection[str]) -> LowRankSparse:
        """See `Method.sparing`; forms that were chosen stay."""
        spared = super().sparing(names)
        assert isinstance(spared, LowRankSparse)
        return spared._with_forms(self.forms)

    def applies(self, context: BlockContext) -> bool:
        """Whether a block is one of those to factorize."""
        return is_selected(context.info, context.num_blocks, self.layers, self.protect)

    def survey(self, context: BlockContext, count: int) -> BlockSurvey | None:
        """What each expert loses in each form; None for a block that stays as it is."""
        return survey_block(context, self.kinds) if self.applies(context) else None

    def settled(self, model: ModelInfo, surveys: Mapping[str, BlockSurvey | None]) -> LowRankSparse:
        """With the forms that the budget buys."""
        return self._with_forms(spend_budget(model, surveys, self._budget(model)))

    def _with_forms(self, forms: Mapping[str, Sequence[Form]] | None) -> LowRankSparse:
        made = replace(self)
        object.__setattr__(made, "forms", forms)
        return made

    def _budget(self, model: ModelInfo) -> int:
        """Numbers that the matrices of all experts may store, wider ones counted as several of the narrowest."""
        chosen = selected_blocks(model, self.layers, self.protect)
        dense, narrowest = _dense(chosen), narrowest_item(chosen)
        if self.target_size is None:
            assert self.budget is not None
            return int(product(self.budget, dense))
        rest = int(model.bytes - dense * narrowest)
        # Experts lie in stacks by width, a multiple of 8: gate and up dense or in two factors, down dense. One number
        # guards them.
        headers = 0
        for block in chosen:
            stacks = min(block.num_experts, block.intermediate_size // RANK_STEP + 1)
            biases = 3 if block.expert_parameters > block.expert_multiply_adds else 0
            headers += (stacks * (7 + biases) + 3) * header_entry(block)
        left = int((bytes_for_tensors(model, self.target_size, headers) - rest) / narrowest)
        if left < 0:
            raise ValueError(
                f"target_size={self.target_size!r} cannot be reached: without any expert "
                f"{rest + model.header_bytes + headers:,} of {model.bytes:,} bytes are left, headers included. Ask for "
                "more than that."
            )
        return min(left, dense)

    def decide(self, context: BlockContext, count: int) -> BlockPlan:
        """Factorize the experts of one block."""
        kept = keep_all(context.info.name, context.info.num_experts, self.block_routing)
        return replace(kept, factors=self.factorize(context))

    def factorize(self, context: BlockContext, shared: SharedBases | None = None) -> BlockFactors | None:
        """The factors of all experts of a block; None for a block that stays as it is.

        Args:
            context: The block.
            shared: The bases of its experts, which then have their neurons in the bases' order.
        """
        if not self.applies(context):
            return None
        if self.forms is not None:
            return build_block(context, self.forms[context.info.name])
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
        if shared is None:
            return BlockFactors(tuple(experts))
        return BlockFactors(tuple(experts), shared.labels_E, shared.matrices)

    def cost(self, model: ModelInfo, block: BlockInfo, count: int) -> ExpertCost:
        """Exact for a rank or a ratio; the bounds for an energy, with the bytes of the upper one, and for a budget."""
        if not is_selected(block, len(model.blocks), self.layers, self.protect):
            return super().cost(model, block, count)
        least, most, indices = self.numbers(model, block)
        biases = block.expert_parameters - block.expert_multiply_adds
        low, high = self.active(block, count, least)[0], self.active(block, count, most)[1]
        stored = self.share(model) * block.num_experts * most if self.needs_survey else count * most
        return ExpertCost(stored + count * biases, (low, high), count * indices, stock=False)

    def share(self, model: ModelInfo) -> float:
        """Share of the original experts' numbers that a budget leaves."""
        chosen = selected_blocks(model, self.layers, self.protect)
        return self._budget(model) / _dense(chosen)

    def numbers(self, model: ModelInfo, block: BlockInfo) -> tuple[float, float, float]:
        """The fewest and the most numbers that one expert's matrices store, and its indices of sparse rows."""
        if self.needs_survey:
            return 0.0, block.expert_multiply_adds, 0.0
        matrices = round(block.expert_multiply_adds / (block.intermediate_size * block.hidden_size))
        shapes = [(block.intermediate_size, block.hidden_size)] * (matrices - 1)
        shapes.append((block.hidden_size, block.intermediate_size))
        factored, indices = 0, 0
        for shape in shapes:
            rank = self._unless_larger(shape, RANK_STEP) if self.energy is not None else self._rank(shape)
            rows = 0 if rank is None else self._rows(shape[0])
            factored += shape[0] * shape[1] if rank is None else rank * sum(shape) + rows * shape[1]
            indices += rows
        if self.energy is not None:
            return factored, block.expert_multiply_adds, 0.0
        return factored, factored, indices

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
        """The rank, None where factors and sparse rows together are no smaller than the matrix: it then stays dense."""
        if rank is None:
            return None
        numbers = rank * sum(shape) + self._rows(shape[0]) * (shape[1] + 1)
        return rank if numbers < shape[0] * shape[1] else None

    def _rows(self, outputs: int) -> int:
        return 0 if self.density is None else rows_from_density(outputs, self.density)


def _dense(blocks: Sequence[BlockInfo]) -> int:
    """What the matrices of all experts store as they are, in numbers of the narrowest dtype among them."""
    narrowest = narrowest_item(blocks)
    return round(sum(b.num_experts * b.expert_multiply_adds * b.expert_itemsize / narrowest for b in blocks))
