"""Common base of stages that reduce each block to a given number of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.plan import Routing
from optimum_moe.stages.base import Stage
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import check_counts, resolve_counts, selected_blocks
from optimum_moe.statistics import Statistics


@dataclass(frozen=True)
class CountedStage(Stage):
    """Leaves a number of experts in each block; subclasses choose them, and merge or remove the others.

    Args:
        num_experts: Experts that remain in each block. Exactly one of this, `keep_ratio` and `target_size`.
        keep_ratio: Share of experts that remain, in (0, 1] or as `"50%"`; rounds up.
        target_size: Maximum size of the weight files, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            their present size.
        layers: Positions of the MoE blocks to compress, None for all.
        protect: Patterns of block names to leave unchanged, for example `["*.layers.0.*"]`.

    Raises:
        ValueError: If a setting is out of range.
    """

    num_experts: int | None = None
    keep_ratio: float | None = None
    target_size: str | int | None = None
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.num_experts, self.keep_ratio, self.target_size)

    @property
    def routing(self) -> Routing | None:
        """How the router reaches the experts that remain; None where something is left of the others."""
        raise NotImplementedError

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`."""
        self.counts(model)

    def counts(self, model: ModelInfo) -> dict[str, int]:
        """Number of experts that remain in each block; the average, if blocks share a budget.

        Raises:
            ValueError: If a router cannot work with that number.
        """
        return resolve_counts(
            model,
            selected_blocks(model, self.layers, self.protect),
            # Where all ids stay, a router works with any number.
            routing=self.routing or "map",
            num_experts=self.num_experts,
            keep_ratio=self.keep_ratio,
            target_size=self.target_size,
        )

    def allocate(self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]) -> dict[str, int]:
        """Number of experts that remain in each block."""
        return self.counts(model)

    def remaining(self, model: ModelInfo, block: BlockInfo, allocated: int) -> int:
        """The allocated number of experts."""
        return allocated

    def changed_by_data(self, model: ModelInfo, allocation: Mapping[str, int]) -> frozenset[str]:
        """Blocks that lose experts, if the stage chooses them by statistics."""
        if not self.needs:
            return frozenset()
        return frozenset(block.name for block in model.blocks if allocation.get(block.name, 0) < block.num_experts)

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """See `Stage.costs`."""
        counts = self.counts(model)
        routing = self.routing or "map"
        return {b.name: before[b.name].with_count(b, counts[b.name], routing) for b in model.blocks}
