"""Two methods after each other: experts are merged or pruned, and what remains is kept in smaller forms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from optimum_moe.algorithms.experts import NEURON_AXIS, ExpertTensors, PerExpert
from optimum_moe.algorithms.factors import PROJECTIONS
from optimum_moe.algorithms.low_rank import estimated_stable_rank
from optimum_moe.algorithms.merging import merge_matrices
from optimum_moe.blocks import BlockInfo, ModelInfo
from optimum_moe.methods.base import BlockContext, ExpertCost, Method
from optimum_moe.methods.counts import is_selected
from optimum_moe.methods.low_rank_sparse import LowRankSparse, SharedBases
from optimum_moe.nn import map_routing
from optimum_moe.plan import BlockPlan, Routing, keep_all
from optimum_moe.statistics import BlockStatistics, Statistics


@dataclass(frozen=True)
class Composed(Method):
    """A method that merges or prunes experts, then one that keeps the remaining ones in smaller forms.

    Both are decided from one observation: the merged experts are computed on the sampled tokens. Plan, report and card
    say how merging changed the mean stable rank of the experts' matrices, which tells what a low rank loses.

    Args:
        first: Merges or prunes.
        then: Factorizes what remains.

    Raises:
        ValueError: If `first` leaves nothing to be composed.
    """

    name: ClassVar[str] = "composed"

    first: Method
    then: LowRankSparse
    plans: Mapping[str, BlockPlan] = field(default_factory=dict, init=False, repr=False)
    """What the first decided of each block, once a budget is spent on what that leaves; no setting."""

    def __post_init__(self) -> None:
        if self.then.base is not None and self.first.block_routing == "reduce":
            raise ValueError(
                f'base="group" keeps every expert, and {self.first.name} with a smaller router does not. '
                'Merge with routing="map" in front of it.'
            )
        if isinstance(self.first, Composed | LowRankSparse):
            raise ValueError(
                f"A list of methods is one that merges or prunes experts and one that factorizes them, got "
                f"{self.first.name} first. Give for example [MSMoE(num_experts=8), LowRankSparse(rank=32)]."
            )

    @property
    def needs_statistics(self) -> bool:
        """If one of them does."""
        return self.first.needs_statistics or self.then.needs_statistics

    @property
    def gradient_draws(self) -> int:
        """As many as one of them wants."""
        return max(self.first.gradient_draws, self.then.gradient_draws)

    @property
    def needs_survey(self) -> bool:
        """If the second does."""
        return self.then.needs_survey

    @property
    def needs_sample(self) -> bool:
        """If one of them does."""
        return self.first.needs_sample or self.then.needs_sample

    @property
    def sample_size(self) -> int:
        """The larger sample."""
        return max(self.first.sample_size, self.then.sample_size)

    @property
    def is_adaptive(self) -> bool:
        """If the first is."""
        return self.first.is_adaptive

    @property
    def knows_size(self) -> bool:
        """If both do."""
        return self.first.knows_size and self.then.knows_size

    @property
    def block_routing(self) -> Routing:
        """The first's."""
        return self.first.block_routing

    def counts(self, model: ModelInfo) -> dict[str, int]:
        """The first's."""
        self.then.check(model)
        return self.first.counts(model)

    def allocate(self, model: ModelInfo, statistics: Statistics | None) -> dict[str, int]:
        """The first's."""
        return self.first.allocate(model, statistics)

    def changed_by_data(self, model: ModelInfo, counts: Mapping[str, int]) -> set[str]:
        """By the first, the second or both."""
        return self.first.changed_by_data(model, counts) | self.then.changed_by_data(model, counts)

    def sparing(self, names: Collection[str]) -> Composed:
        """By both."""
        spared = replace(self, first=self.first.sparing(names), then=self.then.sparing(names))
        return spared._with_plans({name: plan for name, plan in self.plans.items() if name not in names})

    @property
    def survey_key(self) -> str:
        """With all settings of the first."""
        return f"{self.first.settings()!r} {self.then.survey_key}"

    def survey(self, context: BlockContext, count: int) -> Any:
        """The first's plan, and the second's survey of what that leaves."""
        plan = self.first.decide(context, count)
        return plan, self.then.survey(after(context, plan), count)

    def settled(self, model: ModelInfo, surveys: Mapping[str, Any]) -> Method:
        """With the second settled, whose forms are those of the experts that the first's plans leave."""
        settled = self.then.settled(model, {name: survey for name, (_, survey) in surveys.items()})
        return replace(self, then=settled)._with_plans({name: plan for name, (plan, _) in surveys.items()})

    def _with_plans(self, plans: Mapping[str, BlockPlan]) -> Composed:
        made = replace(self)
        object.__setattr__(made, "plans", plans)
        return made

    def decide(self, context: BlockContext, count: int) -> BlockPlan:
        """Merge or prune, and factorize what remains; with shared bases, factorize what sets experts apart."""
        plan = self.plans.get(context.info.name) or self.first.decide(context, count)
        if self.then.base is None:
            left, ranks = after(context, plan), None
            if any(len(plan.members(group)) > 1 for group in range(plan.num_groups)):
                ranks = _mean_stable_rank(context.experts), _mean_stable_rank(left.experts)
            return replace(plan, factors=self.then.factorize(left), stable_rank=ranks)
        aligned = replace(context, experts=_aligned(context.experts, plan))
        kept = keep_all(context.info.name, context.info.num_experts, self.block_routing)
        return replace(kept, factors=self.then.factorize(aligned, _shared(context.experts, plan)))

    def cost(self, model: ModelInfo, block: BlockInfo, count: int) -> ExpertCost:
        """Of the first's experts in the second's forms."""
        if not is_selected(block, len(model.blocks), self.then.layers, self.then.protect):
            return self.first.cost(model, block, count)
        least, most, indices = self.then.numbers(model, block)
        biases, dense = block.expert_parameters - block.expert_multiply_adds, block.expert_multiply_adds
        if self.then.base is None:
            low, high = self.active(block, count, least)[0], self.active(block, count, most)[1]
            stored = count * most
            if self.then.needs_survey:
                stored = min(stored, self.then.share(model) * block.num_experts * most)
            return ExpertCost(stored + count * biases, (low, high), count * indices, stock=False)
        experts = block.num_experts
        bounds = dense + block.top_k * least, min(block.top_k, count) * dense + block.top_k * most
        return ExpertCost(count * dense + experts * (most + biases), bounds, experts * indices, stock=False)

    def settings(self) -> Mapping[str, Any]:
        """The first's, with the second's as `then`."""
        return {**self.first.settings(), "then": self.then.settings()}


def after(context: BlockContext, plan: BlockPlan) -> BlockContext:
    """What a block looks like once its experts are merged or pruned, without cutting it."""
    if plan.keeps_all:
        return context
    return replace(
        context,
        info=replace(context.info, num_experts=plan.num_groups),
        experts=_merged(context.experts, plan),
        statistics=None if context.statistics is None else _mapped(context.statistics, plan),
        surveyed=None if context.surveyed is None else _mapped(context.surveyed, plan),
    )


def _mean_stable_rank(experts: ExpertTensors) -> float:
    """Over the matrices of all experts, to three digits behind the point."""
    named = [getattr(experts, name) for name in PROJECTIONS]
    found = [estimated_stable_rank(matrix) for values in named if values is not None for matrix in values]
    return round(sum(found) / len(found), 3)


def _merged(experts: ExpertTensors, plan: BlockPlan) -> ExpertTensors:
    """The merged experts of all groups, by themselves."""
    merged: dict[str, PerExpert] = {}
    for name, axis in NEURON_AXIS.items():
        values = getattr(experts, name)
        if values is None:
            continue
        merged[name] = [torch.empty_like(values[0], memory_format=torch.contiguous_format) for _ in plan.dominants_G]
        for group, out in enumerate(merged[name]):
            members = plan.members(group)
            weights = [float(plan.merge_weights_E[e]) for e in members]
            order = [None if plan.permutations_EI is None else plan.permutations_EI[e] for e in members]
            merge_matrices([values[e] for e in members], weights, order, axis, out)
    return replace(experts, **merged)  # type: ignore[arg-type]


def _aligned(experts: ExpertTensors, plan: BlockPlan) -> ExpertTensors:
    """All experts with their neurons in the order of their group."""
    if plan.permutations_EI is None:
        return experts
    ordered: dict[str, PerExpert] = {}
    for name, axis in NEURON_AXIS.items():
        values = getattr(experts, name)
        if values is not None and axis is not None:
            pairs = zip(values, plan.permutations_EI, strict=True)
            ordered[name] = [matrix.index_select(axis, order_I.to(matrix.device)) for matrix, order_I in pairs]
    return replace(experts, **ordered)  # type: ignore[arg-type]


def _shared(experts: ExpertTensors, plan: BlockPlan) -> SharedBases:
    merged = _merged(experts, plan)
    matrices = {name: getattr(merged, name) for name in PROJECTIONS}
    stacked = {name: torch.stack(list(values)) for name, values in matrices.items() if values is not None}
    return SharedBases(plan.labels_E, stacked, plan.permutations_EI)


def _mapped(statistics: BlockStatistics, plan: BlockPlan) -> BlockStatistics:
    """The sample with groups for ids; the slots of pruned experts are no experts, their tokens are not routed anew."""
    sample, groups = statistics.reservoir, plan.num_groups
    map_N = torch.tensor([label if label >= 0 else groups for label in plan.labels_E] + [groups])
    index_SK, weights_SK = map_routing(sample.index_SK.long().clamp(max=plan.num_experts), sample.weights_SK, map_N)
    index_SK = index_SK.masked_fill(weights_SK == 0, groups)
    counts_G = torch.zeros(groups + 1, dtype=torch.float64).index_add_(0, map_N[:-1], statistics.token_count_E)[:-1]
    reservoir = replace(sample, index_SK=index_SK, weights_SK=weights_SK)
    return replace(statistics, reservoir=reservoir, token_count_E=counts_G)
