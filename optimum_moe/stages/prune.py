"""Expert pruning: keep the most salient experts, remove the others and their router rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimum_moe.algorithms.grouping import dominant_experts
from optimum_moe.plan import BlockPlan, Routing, keep_all, keep_some
from optimum_moe.stages.base import register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.counted import CountedStage
from optimum_moe.stages.saliency import SALIENCIES


@register_stage
@dataclass(frozen=True)
class ExpertPruning(CountedStage):
    """Remove the least salient experts of every block; the result is a plain checkpoint.

    Args:
        num_experts: Experts that remain in each block. Exactly one of this, `keep_ratio` and `target_size`.
        keep_ratio: Share of experts that remain, in (0, 1] or as `"50%"`; rounds up.
        target_size: Maximum size of the weight files, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            their present size.
        saliency: Registered criterion: `"reap"`, `"frequency"`, `"gate_sum"`, `"ean"`, `"output_norm"`,
            `"output_norm_squared"`, `"razor"` (what removing the expert changes in the block's output), `"rcs"` (its
            first order), `"easy_ep"`, `"fisher"` (expected rise of the loss), `"aimer"` (data-free), `"random"`
            (baseline), or a name registered with `register_saliency`.
        layers: Positions of the MoE blocks to compress, None for all.
        protect: Patterns of block names to leave unchanged.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "expert-pruning"

    saliency: str = "reap"

    def __post_init__(self) -> None:
        super().__post_init__()
        SALIENCIES[self.saliency]

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

    def decide(self, context: BlockContext, allocated: int) -> BlockPlan:
        """Keep the most salient experts, the same number in each router group."""
        info = context.info
        if allocated == info.num_experts:
            return keep_all(info.name, allocated)
        saliency_E = context.rank(SALIENCIES[self.saliency](context))
        # Criteria may be negative, frequencies may not; only the order counts.
        saliency_E = saliency_E - saliency_E.min()
        return keep_some(info.name, info.num_experts, dominant_experts(saliency_E, allocated, info.router_groups))
