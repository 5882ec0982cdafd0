"""Common base of stages that keep all experts in other formats than dense matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.low_rank import estimated_stable_rank
from optimum_moe.formats import PROJECTIONS, StoredExperts
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan, keep_all
from optimum_moe.stages.base import GRAM_TOKENS, Stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.counts import is_selected, selected_blocks


class FormattingStage(Stage):
    """Keeps all experts in other formats; it must be the last stage if experts are also merged or pruned.

    After a merge the plan records the change of the mean stable rank of the experts' matrices, which indicates how much
    a low rank loses.
    """

    # Fields of the subclasses, whose order is theirs.
    layers: Sequence[int] | None
    protect: Sequence[str] | None

    @property
    def leaves_dense_experts(self) -> bool:
        """Always False, since experts are stored in other formats than dense matrices."""
        return False

    @property
    def sample_size(self) -> int:
        """Number of tokens to sample, enough for Gram matrices of single experts if the stage reads any."""
        return GRAM_TOKENS if "sample" in self.needs else super().sample_size

    def check(self, model: ModelInfo) -> None:
        """Check that the experts of all selected blocks can be stored in other formats."""
        for block in selected_blocks(model, self.layers, self.protect):
            if block.no_factors:
                raise ValueError(
                    f"The experts of {block.name} cannot be factorized: {block.no_factors}. Merge them instead."
                )

    def applies(self, context: BlockContext) -> bool:
        """Whether the block of a context is selected by `layers` and `protect`."""
        return is_selected(context.info, context.num_blocks, self.layers, self.protect)

    def changed_by_data(self, model: ModelInfo, allocation: Mapping[str, Any]) -> frozenset[str]:
        """All selected blocks, if the stage reads statistics."""
        chosen = selected_blocks(model, self.layers, self.protect) if self.needs else ()
        return frozenset(block.name for block in chosen)

    @abstractmethod
    def factors(self, context: BlockContext, allocated: Any) -> StoredExperts | None:
        """The experts of a block in their formats; None for an unchanged block."""

    def decide(self, context: BlockContext, allocated: Any) -> BlockPlan:
        """Keep all experts in the formats of `factors`."""
        plan = keep_all(context.info.name, context.info.num_experts, routing="map")
        return replace(plan, factors=self.factors(context, allocated), stable_rank=_change_of_stable_rank(context))


def _change_of_stable_rank(context: BlockContext) -> tuple[float, float] | None:
    """Mean stable rank before and after the merge of the previous stage; None without a merge."""
    if context.before is None:
        return None
    entered, plan = context.before
    if all(len(plan.members(group)) == 1 for group in range(plan.num_groups)):
        return None
    return _mean_stable_rank(entered.experts), _mean_stable_rank(context.experts)


def _mean_stable_rank(experts: ExpertTensors) -> float:
    """Mean stable rank of the matrices of all experts, rounded to three decimals."""
    named = [getattr(experts, name) for name in PROJECTIONS]
    found = [estimated_stable_rank(matrix) for values in named if values is not None for matrix in values]
    return round(sum(found) / len(found), 3)
