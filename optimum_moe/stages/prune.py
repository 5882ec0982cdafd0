"""Expert pruning: keep the most salient experts, remove the others and their router rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from optimum_moe.algorithms.grouping import dominant_experts
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan, Routing, keep_all, keep_some
from optimum_moe.settings import choose_one
from optimum_moe.stages.base import register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counted import CountedStage
from optimum_moe.stages.counts import fewest_experts, selected_blocks
from optimum_moe.stages.damage_curve import DamageCurve, share_counts
from optimum_moe.stages.saliency import SALIENCIES
from optimum_moe.statistics import Statistics


@register_stage
@dataclass(frozen=True)
class ExpertPruning(CountedStage):
    """Remove the least salient experts of every block.

    Where all blocks keep the same number, the result is a plain checkpoint.

    Args:
        num_experts: Experts that remain in each block (the average, with a global allocation). Exactly one of this,
            `keep_ratio` and `target_size`.
        keep_ratio: Share of experts that remain, in (0, 1] or as `"50%"`; rounds up.
        target_size: Maximum size of the weight files, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            their present size.
        saliency: Registered criterion: `"reap"`, `"frequency"`, `"gate_sum"`, `"ean"`, `"output_norm"`,
            `"output_norm_squared"`, `"razor"` (what removing the expert changes in the block's output), `"rcs"` (its
            first order), `"easy_ep"`, `"reconstruction"` (the set with which the output changes the least), `"fisher"`
            (expected rise of the loss), `"aimer"` (data-free), `"random"` (baseline), or a name registered with
            `register_saliency`.
        allocation: `"uniform"` (default): all blocks keep the same number; `"global"`: blocks share one number, so that
            the sum of what they lose is the least (exact dynamic programming over the sum of the removed experts'
            saliencies). `"fisher"` is compared in the loss, any other criterion as its share of the block's sum. The
            result needs this package to load.
        layers: Positions of the MoE blocks to compress, None for all.
        protect: Patterns of block names to leave unchanged.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "expert-pruning"

    saliency: str = "reap"
    allocation: Literal["uniform", "global"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        criterion = SALIENCIES[self.saliency]
        choose_one("allocation", self.allocation, ("uniform", "global"))
        if not self._is_global:
            return
        measured = 'Use another criterion, such as "fisher" or "reap", or allocation="uniform".'
        if not criterion.observations:
            raise ValueError(
                f'allocation="global" compares what blocks lose on data, and saliency={self.saliency!r} reads none. '
                f"{measured}"
            )
        if criterion.reads("num_kept"):
            raise ValueError(
                f'allocation="global" needs a value of every expert, and saliency={self.saliency!r} chooses a set for '
                f"a given number. {measured}"
            )

    @property
    def _is_global(self) -> bool:
        return self.allocation == "global"

    @property
    def needs_profile(self) -> bool:
        """Whether the saliencies of all blocks are compared before the first one is decided."""
        return self._is_global

    @property
    def needs(self) -> frozenset[str]:
        """The observations that the criterion reads; none for data-free ones."""
        return SALIENCIES[self.saliency].observations

    @property
    def reads_experts(self) -> bool:
        """Whether the criterion reads expert weights; False for criteria that only use statistics."""
        return "experts" in SALIENCIES[self.saliency].parts

    @property
    def routing(self) -> Routing:
        """Always `"reduce"`: the router loses the rows of the removed experts."""
        return "reduce"

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """See `Stage.costs`; configs have no number of experts for each block."""
        costs = super().costs(model, before)
        if self._is_global and len(selected_blocks(model, self.layers, self.protect)) > 1:
            return {name: replace(cost, stock=False) for name, cost in costs.items()}
        return costs

    def profile(self, context: BlockContext) -> DamageCurve:
        """What the block loses by the number of experts that it keeps."""
        info, criterion = context.info, SALIENCIES[self.saliency]
        saliency_E, share, in_loss = criterion(context), 1.0, False
        if "loss_sample" in criterion.parts:
            sample = context.sample()
            # On all tokens that the block saw, which may be more than elsewhere.
            share, in_loss = sample.share, sample.gradient_SJH is not None
        fewest = fewest_experts(info, self.routing)
        rank_E = context.rank(saliency_E)
        return DamageCurve.of_saliencies(saliency_E / share, rank_E, fewest, info.router_groups, in_loss)

    def allocate(self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]) -> dict[str, int]:
        """Number of experts that remain in each block."""
        counts = self.counts(model)
        if not self._is_global:
            return counts
        chosen = [block.name for block in selected_blocks(model, self.layers, self.protect) if block.name in profiles]
        total = sum(counts[name] for name in chosen)
        return counts | share_counts({name: profiles[name] for name in chosen}, total)

    def decide(self, context: BlockContext, allocated: int) -> BlockPlan:
        """Keep the most salient experts, the same number in each router group."""
        info = context.info
        if allocated == info.num_experts:
            return keep_all(info.name, allocated)
        saliency_E = context.rank(SALIENCIES[self.saliency](context, num_kept=allocated))
        # Criteria may be negative, frequencies may not; only the order counts.
        saliency_E = saliency_E - saliency_E.min()
        return keep_some(info.name, info.num_experts, dominant_experts(saliency_E, allocated, info.router_groups))
