"""Expert pruning: keep the most salient experts, remove the others and their router rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from optimum_moe.algorithms.grouping import dominant_experts
from optimum_moe.blocks import ModelInfo
from optimum_moe.methods.base import BlockContext, Method
from optimum_moe.methods.counts import check_counts, resolve_counts, selected_blocks
from optimum_moe.methods.saliency import get_saliency
from optimum_moe.plan import BlockPlan, Routing, keep_all


@dataclass(frozen=True)
class ExpertPruning(Method):
    """Remove the least salient experts of every block; the result is a plain checkpoint.

    Args:
        num_experts: Experts that remain in each block. Exactly one of this, `keep_ratio` and `target_size`.
        keep_ratio: Share of experts that remain, in (0, 1] or as `"50%"`; rounds up.
        target_size: Size of the weight files at most, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            what they are.
        saliency: Registered criterion: `"reap"`, `"frequency"`, `"gate_sum"`, `"ean"`, `"output_norm"`,
            `"output_norm_squared"`, `"aimer"` (data-free) or `"random"` (baseline).
        layers: Positions of the MoE blocks to cut, None for all.
        protect: Patterns of block names that stay as they are.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "expert-pruning"

    num_experts: int | None = None
    keep_ratio: float | None = None
    target_size: str | int | None = None
    saliency: str = "reap"
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.num_experts, self.keep_ratio, self.target_size)
        get_saliency(self.saliency)

    @property
    def needs_statistics(self) -> bool:
        """False for data-free criteria."""
        return "statistics" in get_saliency(self.saliency).needs

    @property
    def reads_experts(self) -> bool:
        """False for criteria that look at statistics only, or at nothing."""
        return "experts" in get_saliency(self.saliency).needs

    @property
    def block_routing(self) -> Routing:
        """The router loses the rows of the removed experts."""
        return "reduce"

    def counts(self, model: ModelInfo) -> dict[str, int]:
        """See `Method.counts`."""
        chosen = selected_blocks(model, self.layers, self.protect)
        return resolve_counts(model, chosen, "reduce", self.num_experts, self.keep_ratio, self.target_size)

    def decide(self, context: BlockContext, count: int) -> BlockPlan:
        """Keep the `count` most salient experts, equally many of each router group."""
        info = context.info
        if count == info.num_experts:
            return keep_all(info.name, count)
        saliency_E = context.rank(get_saliency(self.saliency)(context))
        # Criteria may be negative, frequencies may not; only the order counts.
        saliency_E = saliency_E - saliency_E.min()
        kept = tuple(sorted(dominant_experts(saliency_E, count, info.router_groups)))
        labels = [-1] * info.num_experts
        for slot, expert in enumerate(kept):
            labels[expert] = slot
        weights_E = torch.tensor([float(label >= 0) for label in labels], dtype=torch.float64)
        return BlockPlan(info.name, tuple(labels), kept, "reduce", weights_E, router_weights_E=weights_E)
