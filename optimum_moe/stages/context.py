"""The inputs from which a stage decides one MoE block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.experts import NEURON_AXIS, ExpertTensors, PerExpert
from optimum_moe.algorithms.merging import gather_neurons, merge_matrices
from optimum_moe.algorithms.rerouting import Rerouter
from optimum_moe.algorithms.router_fit import RouterView
from optimum_moe.formats import PROJECTIONS
from optimum_moe.model_info import BlockInfo
from optimum_moe.nn import map_routing
from optimum_moe.plan import BlockPlan
from optimum_moe.statistics import BlockStatistics, Unseen


@dataclass(frozen=True, eq=False)
class BlockContext:
    """Everything that a stage may read to decide one block, as the block enters the stage.

    Args:
        info: Sizes of the block.
        experts: Its routed experts.
        router: Its original router, before the first stage.
        generator: Random number generator, seeded for this block.
        statistics: Observed statistics, None for data-free stages.
        unseen: Policy for experts that no token was routed to.
        num_blocks: Number of MoE blocks of the model.
        profiled: The statistics that profiles were taken from, if any. Those of `statistics` may come from a later pass
            through compressed layers, in which tokens are routed differently.
        before: The block as it entered the previous stage, and the plan of that stage; None in the first stage.
    """

    info: BlockInfo
    experts: ExpertTensors
    router: RouterView
    generator: torch.Generator
    statistics: BlockStatistics | None = None
    unseen: Unseen = "warn"
    num_blocks: int = 1
    profiled: BlockStatistics | None = None
    before: tuple[BlockContext, BlockPlan] | None = None

    def observed(self) -> BlockStatistics:
        """The observed statistics; only for stages that name some in `needs`."""
        assert self.statistics is not None
        return self.statistics

    def rank(self, values_E: torch.Tensor) -> torch.Tensor:
        """(E,) values for ranking experts; `unseen="keep"` ranks experts without tokens highest."""
        if self.statistics is None or self.unseen != "keep":
            return values_E
        return values_E.masked_fill(self.statistics.token_count_E == 0, 2 * float(values_E.abs().max()) + 1)

    def sample(self) -> SampledTokens:
        """The sampled tokens of the block, on the device of its experts."""
        return self._sample(self.observed())

    def mapped_sample(self, plan: BlockPlan) -> SampledTokens:
        """The sampled tokens with the groups of a plan for expert ids; the weights of experts of one group add up."""
        return self._sample(_mapped(self.observed(), plan))

    def profiled_sample(self) -> SampledTokens:
        """The sampled tokens that the profiles were taken from, on the device of the experts."""
        return self._sample(self.observed() if self.profiled is None else self.profiled)

    def _sample(self, observed: BlockStatistics) -> SampledTokens:
        experts, found = self.experts, observed.reservoir
        device = experts.up[0].device
        # If each expert's output is normalized, the gradient of the sum is not the gradient of one expert's output.
        gradient_SJH = found.gradient_SJH if experts.finish is None else None
        return SampledTokens(
            input_SH=found.experts_input_SH.to(device),
            index_SK=found.index_SK.to(device),
            weights_SK=found.weights_SK.to(device),
            gradient_SJH=None if gradient_SJH is None else gradient_SJH.to(device),
            scales_input=experts.scales_input,
            share=len(found.index_SK) / max(observed.num_tokens, 1) or 1.0,
        )

    def rerouter(self) -> Rerouter:
        """The router's rule on the sampled tokens, for when some experts are gone; on the CPU."""
        info, found = self.info, self.observed().reservoir
        return Rerouter(
            router=self.router,
            input_SX=found.router_input_SH,
            index_SK=found.index_SK.long(),
            weights_SK=found.weights_SK,
            router_groups=info.router_groups,
            groups_used=info.router_groups_used,
        )

    def after(self, plan: BlockPlan) -> BlockContext:
        """The context of the next stage, with the experts that the plan leaves; the block itself is not changed.

        Of the statistics, only the sample and the token counts remain valid for changed experts.
        """
        if plan.keeps_all and plan.sizes is None:
            return replace(self, before=(self, plan))
        experts = merged_experts(self.experts, plan)
        narrow = self.info.with_width(experts.intermediate_size)
        return replace(
            self,
            info=replace(narrow, num_experts=plan.num_groups),
            experts=experts,
            statistics=None if self.statistics is None else _mapped(self.statistics, plan),
            profiled=None if self.profiled is None else _mapped(self.profiled, plan),
            before=(self, plan),
        )


def merged_experts(experts: ExpertTensors, plan: BlockPlan) -> ExpertTensors:
    """The dense experts that a plan leaves, one for each group; a group of one expert gives a copy of it."""
    merged: dict[str, PerExpert] = {}
    stored = () if plan.factors is None or not plan.is_stock else plan.factors.experts
    for name, axis in NEURON_AXIS.items():
        values = getattr(experts, name)
        if values is None:
            continue
        if stored and name in PROJECTIONS:
            merged[name] = [expert.matrices[name].densified().to(values[0].dtype) for expert in stored]
            continue
        stack = [torch.empty_like(values[0], memory_format=torch.contiguous_format) for _ in range(plan.num_groups)]
        for group, out in enumerate(stack):
            taken = plan.sources(group)
            if taken is not None and axis is not None:
                gather_neurons(values, taken[0], taken[1], axis, out)
                continue
            members = plan.members(group)
            weights = [float(plan.merge_weights_E[e]) for e in members]
            order = [None if plan.permutations_EI is None else plan.permutations_EI[e] for e in members]
            merge_matrices([values[e] for e in members], weights, order, axis, out)
        kept = [expert.neurons if axis is not None else None for expert in stored] or [None] * len(stack)
        merged[name] = [
            bias if neurons is None else bias[neurons.to(bias.device)]
            for bias, neurons in zip(stack, kept, strict=True)
        ]
    return replace(experts, **merged)  # type: ignore[arg-type]


def aligned_experts(experts: ExpertTensors, plan: BlockPlan) -> ExpertTensors:
    """All experts with their neurons permuted to the order of their group."""
    if plan.permutations_EI is None:
        return experts
    ordered: dict[str, PerExpert] = {}
    for name, axis in NEURON_AXIS.items():
        values = getattr(experts, name)
        if values is not None and axis is not None:
            pairs = zip(values, plan.permutations_EI, strict=True)
            ordered[name] = [matrix.index_select(axis, order_I.to(matrix.device)) for matrix, order_I in pairs]
    return replace(experts, **ordered)  # type: ignore[arg-type]


def _mapped(statistics: BlockStatistics, plan: BlockPlan) -> BlockStatistics:
    """The sample with group ids for expert ids; slots of pruned experts are dropped, and tokens are not rerouted."""
    sample, groups = statistics.reservoir, plan.num_groups
    map_N = torch.tensor([label if label >= 0 else groups for label in plan.labels_E] + [groups])
    index_SK, weights_SK = map_routing(sample.index_SK.long().clamp(max=plan.num_experts), sample.weights_SK, map_N)
    index_SK = index_SK.masked_fill(weights_SK == 0, groups)
    counts_G = torch.zeros(groups + 1, dtype=torch.float64).index_add_(0, map_N[:-1], statistics.token_count_E)[:-1]
    reservoir = replace(sample, index_SK=index_SK, weights_SK=weights_SK)
    return replace(statistics, reservoir=reservoir, token_count_E=counts_G)
