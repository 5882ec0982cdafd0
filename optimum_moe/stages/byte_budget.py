"""The byte budget: every expert of the model is stored in the format in which a byte saves the most loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from optimum_moe.algorithms.byte_budget import Candidate, Point
from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.algorithms.ranks import STEP
from optimum_moe.formats import StoredExperts, budget_formats, build_expert, candidates, choose, refit_block
from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.settings import choose_one, exactly_one, product
from optimum_moe.stages.base import register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import bytes_for_tensors, check_share, check_size, header_entry, selected_blocks
from optimum_moe.stages.formatting import FormattingStage
from optimum_moe.statistics import Statistics


@dataclass(frozen=True)
class BlockProfile:
    """The candidates of one block's experts.

    Args:
        points: For each expert, see `optimum_moe.formats.candidates`.
        in_loss: Whether damages are changes of the loss; else squared output errors, not comparable between blocks.
    """

    points: tuple[tuple[Point, ...], ...]
    in_loss: bool


@register_stage
@dataclass(frozen=True)
class ByteBudget(FormattingStage):
    """Allocate a budget of bytes among the experts of the whole model, wherever a byte saves the most loss.

    Every expert becomes empty, keeps some of its neurons, gets low-rank gate and up projections, or is unchanged
    (`optimum_moe.formats`). Can follow a stage that merges or prunes.

    Args:
        share: Share of the original experts' bytes that remains, in (0, 1] or as `"50%"`. Exactly one of this and
            `target_size`.
        target_size: Maximum size of the weight files, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            their present size.
        formats: Formats that an expert may get between empty and unchanged: `"narrow"` (fewer neurons), `"low_rank"`
            and other registered ones; default all that come with the package.
        curvature: Measure damage in the loss, with backward passes over the calibration data (default); False measures
            output errors, which are also used if no backward pass is possible.
        layers: Positions of the MoE blocks to compress, None for all.
        protect: Patterns of block names to leave unchanged.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "byte-budget"
    size_fields: ClassVar[tuple[str, ...]] = ("share", "target_size")
    share_fields: ClassVar[tuple[str, ...]] = ("share",)

    share: float | None = None
    target_size: str | int | None = None
    formats: Sequence[str] = budget_formats()
    curvature: bool = True
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        exactly_one(share=self.share, target_size=self.target_size)
        check_share("share", self.share)
        if self.target_size is not None:
            check_size(self.target_size)
        if isinstance(self.formats, str):
            raise ValueError(f"formats={self.formats!r} must be a list, for example ['narrow'].")
        for name in self.formats:
            choose_one("formats", name, budget_formats())

    @property
    def needs_profile(self) -> bool:
        """Always True, since bytes are allocated over all blocks at once."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """Frequencies, sampled tokens, and with `curvature` the gradients of the loss at them."""
        return frozenset({"frequency", "sample", *(("gradients",) if self.curvature else ())})

    @property
    def sample_size(self) -> int:
        """Number of tokens to sample, enough for Gram matrices of single experts."""
        return 32768

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`."""
        super().check(model)
        self._budget(model.original, selected_blocks(model.original, self.layers, self.protect))

    def profile(self, context: BlockContext) -> BlockProfile | None:
        """The damage of each candidate of each expert; None for an unchanged block.

        Damages are summed over all tokens that the block saw. If neurons cannot be removed, no candidate is narrow. An
        expert without tokens has no damage when it is emptied, unless `unseen` keeps or prunes it.

        Raises:
            ValueError: If all gradients are zero.
        """
        if not self.applies(context):
            return None
        sample, found = context.sample(), []
        gradient_SJH = sample.gradient_SJH
        if gradient_SJH is not None and len(gradient_SJH) and not gradient_SJH.any():
            name = context.info.name
            raise ValueError(
                f"All gradients of the loss at {name} are zero, so all of its experts would be emptied. Check the "
                "weights of the layers after it; load the model in a wider dtype, leave the block out with "
                f'protect=["{name}"], or pass curvature=False.'
            )
        info = context.info
        down_bias = 0 if context.experts.down_bias is None else len(context.experts.down_bias[0])
        for index in range(context.experts.num_experts):
            expert, tokens = single_expert(context.experts, index), sample.of_expert(index)
            points = candidates(
                expert,
                tokens,
                formats=self.formats,
                fixed_neurons=context.experts.fixed_neurons,
                itemsize=info.expert_itemsize,
                bias_itemsize=info.bias_itemsize,
                constant_bytes=down_bias * info.bias_itemsize,
            )
            if len(tokens) == 0 and context.unseen in ("keep", "prune"):
                points = points[-1:] if context.unseen == "keep" else points[:1]
            found.append(tuple(replace(point, damage=point.damage / sample.share) for point in points))
        return BlockProfile(tuple(found), gradient_SJH is not None)

    def allocate(
        self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, BlockProfile | None]
    ) -> dict[str, tuple[Candidate, ...] | None]:
        """The chosen candidate of every expert, by block; None for unchanged blocks."""
        chosen = [block for block in model.original.blocks if profiles.get(block.name) is not None]
        found: dict[str, tuple[Candidate, ...]] = {}
        if chosen:
            found = spend_budget(chosen, profiles, self._budget(model.original, chosen))
        return {block.name: found.get(block.name) for block in model.blocks}

    def _budget(self, model: ModelInfo, chosen: Sequence[BlockInfo]) -> int:
        """Budget in bytes for all experts of the chosen blocks, biases and indices included."""
        whole = _stored(chosen)
        if self.target_size is None:
            assert self.share is not None
            return int(product(self.share, whole))
        rest = model.bytes - whole
        # Experts are stacked by width, a multiple of 8: gate and up dense or in two factors, down dense. The guard has
        # one element.
        headers = 0
        for block in chosen:
            stacks = min(block.num_experts, block.intermediate_size // STEP + 1)
            biases = 3 if block.expert_parameters > block.expert_multiply_adds else 0
            headers += (stacks * (7 + biases) + 3) * header_entry(block)
        left = bytes_for_tensors(model, self.target_size, headers) - rest
        if left < 0:
            raise ValueError(
                f"target_size={self.target_size!r} cannot be reached: without any expert "
                f"{rest + model.header_bytes + headers:,} of {model.bytes:,} bytes remain, headers included. Use a "
                "larger size."
            )
        return min(left, whole)

    def factors(self, context: BlockContext, allocated: Sequence[Candidate] | None) -> StoredExperts | None:
        """All experts of a block as the chosen candidates, with down projections refitted to the block's outputs.

        An expert that no token selects any more is fitted to the tokens of the profile.
        """
        if allocated is None:
            return None
        sample, profiled = context.sample(), context.profiled_sample()
        experts = [single_expert(context.experts, index) for index in range(len(allocated))]
        tokens = [found if len(found := sample.of_expert(e)) else profiled.of_expert(e) for e in range(len(experts))]
        chosen = zip(experts, tokens, allocated, strict=True)
        stored = [build_expert(expert, seen, candidate) for expert, seen, candidate in chosen]
        # If expert outputs are not simply summed, one expert cannot compensate the error of another.
        summed = context.experts.finish is None and not context.experts.fixed_neurons
        return StoredExperts(tuple(refit_block(experts, stored, sample) if summed else stored))

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """Bounds of the costs: from no expert at all to the whole budget."""
        chosen = selected_blocks(model.original, self.layers, self.protect)
        share = self._budget(model.original, chosen) / _stored(chosen)
        costs = dict(before)
        for block in chosen:
            cost = before[block.name]
            costs[block.name] = replace(
                cost,
                parameters=min(cost.parameters, share * cost.original_experts * block.expert_parameters),
                multiply_adds=(0.0, cost.active[1] * block.expert_multiply_adds),
                stock=False,
            )
        return costs


def spend_budget(
    blocks: Sequence[BlockInfo], profiles: Mapping[str, BlockProfile | None], budget: float
) -> dict[str, tuple[Candidate, ...]]:
    """Choose a candidate for every expert, so that all of them store at most `budget` bytes.

    Args:
        blocks: The blocks.
        profiles: Profile of each block.
        budget: Budget in bytes.

    Raises:
        ValueError: If experts that must be kept need more than the budget.
    """
    taken = {block.name: profile for block in blocks if (profile := profiles[block.name]) is not None}
    without = [name for name, profile in taken.items() if not profile.in_loss]
    if without:
        warnings.warn(
            f"No gradient of the loss was observed at {len(without)} of {len(taken)} blocks ({without[0]}, ...): "
            "damage is measured by output errors, and all blocks have the same weight. A backward pass needs "
            'engine="memory" without error propagation, and a model that returns logits.',
            stacklevel=2,
        )
    offered, owners = [], []
    for name, profile in taken.items():
        # Squared errors of different blocks are only comparable relative to the error of emptying all experts.
        total = sum(points[0].damage for points in profile.points) or 1.0
        for points in profile.points:
            unit = total if without else 1.0
            offered.append([replace(point, damage=point.damage / unit) for point in points])
            owners.append(name)
    allocated: dict[str, list[Candidate]] = {name: [] for name in taken}
    for name, point in zip(owners, choose(offered, budget), strict=True):
        allocated[name].append(point.candidate)
    return {name: tuple(found) for name, found in allocated.items()}


def _stored(blocks: Sequence[BlockInfo]) -> int:
    """Bytes that the unchanged experts of some blocks store."""
    return round(sum(b.bytes_of_experts(b.num_experts, b.num_experts * b.expert_parameters) for b in blocks))
