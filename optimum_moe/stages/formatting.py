"""What stages share that keep all experts, in other formats than dense matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.low_rank import estimated_stable_rank
from optimum_moe.formats import PROJECTIONS, StoredExperts
from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.plan import BlockPlan, keep_all
from optimum_moe.stages.base import Stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.counts import is_selected, selected_blocks


@dataclass(frozen=True)
class FormattingStage(Stage):
    """Keeps all experts that enter, in other formats; comes last where experts are merged or pruned too.

    Behind a merge the plan says how that changed the mean stable rank of the experts' matrices, which tells what a low
    rank loses.
    """

    layers: Any = None
    protect: Any = None

    @property
    def leaves_dense_experts(self) -> bool:
        """False."""
        return False

    def check(self, model: ModelInfo) -> None:
        """Check that the experts of all selected blocks can be kept in other formats."""
        for block in selected_blocks(model, self.layers, self.protect):
            if block.no_factors:
                raise ValueError(
                    f"The experts of {block.name} cannot be kept in factors: {block.no_factors}. Merge them instead."
                )

    def selects(self, model: ModelInfo, block: BlockInfo) -> bool:
        """Whether a block is one of those to change."""
        return is_selected(block, len(model.blocks), self.layers, self.protect)

    def applies(self, context: BlockContext) -> bool:
        """Whether the block of a context is one of those to change."""
        return is_selected(context.info, context.num_blocks, self.layers, self.protect)

    def changed_by_data(self, model: ModelInfo, allocation: Mapping[str, Any]) -> frozenset[str]:
        """All selected blocks, where anything was observed."""
        chosen: Sequence[BlockInfo] = selected_blocks(model, self.layers, self.protect) if self.needs else ()
        return frozenset(block.name for block in chosen)

    @abstractmethod
    def factors(self, context: BlockContext, allocated: Any) -> StoredExperts | None:
        """The experts of a block in their formats; None for a block that stays as it is."""

    def decide(self, context: BlockContext, allocated: Any) -> BlockPlan:
        """Keep all experts, in their formats."""
        plan = keep_all(context.info.name, context.info.num_experts, routing="map")
        return replace(plan, factors=self.factors(context, allocated), stable_rank=_change_of_stable_rank(context))


def _change_of_stable_rank(context: BlockContext) -> tuple[float, float] | None:
    """Before and after the merge in front of a stage; None where nothing was merged."""
    if context.before is None:
        return None
    entered, plan = context.before
    if all(len(plan.members(group)) == 1 for group in range(plan.num_groups)):
        return None
    return _mean_stable_rank(entered.experts), _mean_stable_rank(context.experts)


def _mean_stable_rank(experts: ExpertTensors) -> float:
    """Over the matrices of all experts, rounded to three decimals."""
    named = [getattr(experts, name) for name in PROJECTIONS]
    found = [estimated_stable_rank(matrix) for values in named if values is not None for matrix in values]
    return round(sum(found) / len(found), 3)
