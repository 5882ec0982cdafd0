"""Expert merging: a similarity, a grouping, a weighting and router rows, each chosen by name.

M-SMoE is one combination of them: align neurons, group experts by routing policy, merge weighted by frequency ("Merge,
Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", Li et al., ICLR 2024, arXiv:2310.01334,
section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from optimum_moe.algorithms.alignment import align_experts
from optimum_moe.algorithms.grouping import adaptive_dominants
from optimum_moe.algorithms.merging import merge_weights
from optimum_moe.algorithms.neuron_features import TIES, activation_features
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan, Routing, keep_all
from optimum_moe.settings import choose_one
from optimum_moe.stages.base import GRAM_TOKENS, register_stage
from optimum_moe.stages.context import BlockContext, merged_experts
from optimum_moe.stages.counted import CountedStage
from optimum_moe.stages.counts import selected_blocks
from optimum_moe.stages.merge_choices import GROUPINGS, ROUTER_ROWS, SIMILARITIES, WEIGHTINGS
from optimum_moe.stages.merge_refit import MergedBlock, Refit
from optimum_moe.stages.results import Groups
from optimum_moe.statistics import Statistics

_WEIGHTS_SHARE = {"activations": TIES, "both": 1.0}
"""What the weights of neurons count beside their activations."""


@register_stage
@dataclass(frozen=True)
class ExpertMerging(CountedStage):
    """Merge experts: similarity x grouping x weighting x router rows. The defaults are those of M-SMoE.

    Args:
        num_experts: Experts that remain in each block (the average, with an adaptive allocation). Exactly one of this,
            `keep_ratio` and `target_size`.
        keep_ratio: Share of experts that remain, in (0, 1] or as `"50%"`; rounds up.
        target_size: Maximum size of the weight files, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            their present size.
        allocation: `"uniform"`, or `"adaptive"`: dominant experts are the most frequent of the whole model, with
            frequencies divided by the largest one of each block.
        similarity: Measure of similarity: `"router_logits"` over calibration tokens (the paper), `"router_weights"`,
            `"expert_weights"`, or a name registered with `register_similarity`.
        grouping: `"routing"` assigns each expert to the most similar dominant one; `"random"` is a baseline; or a name
            registered with `register_grouping`.
        weighting: `"frequency"` or `"uniform"` weights in the merge, or a name registered with `register_weighting`.
        align: Permute each expert's neurons to its group's dominant expert before merging.
        align_by: What neurons are matched by: their `"weights"` (the paper), their `"activations"` on the sampled
            tokens of the group, or the sum of `"both"`, each neuron scaled to norm 1 (REAM). Experts of MTP layers,
            which no token reaches, are matched by their weights.
        merge: What a merged expert is made of: the weighted `"mean"` of its members' matrices, or those `"neurons"` of
            all of them that together come closest to what the members gave (optimal brain surgeon).
        refit: Refit the down projections of merged experts by least squares on sampled tokens: not at all (`"none"`),
            each to what its `"group"` gave (MergeMoE, arXiv:2510.14436), or after that all of a `"block"` together to
            the block's output. Tokens weigh by the gradient of the loss where a backward pass is possible. Needs
            `routing="map"`.
        routing: `"map"` keeps the router and maps its ids (the paper; needs this package to load), `"reduce"`
            shrinks the router, which gives a plain checkpoint.
        router_rows: Router row of a merged expert with `"reduce"`: that of its `"dominant"` expert, the
            frequency-weighted `"mean"`, rows fitted to the original routing weights (`"fit"`, the default), or a name
            registered with `register_router_rows`.
        layers: Positions of the MoE blocks to compress, None for all.
        protect: Patterns of block names to leave unchanged, for example `["*.layers.0.*"]`.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "expert-merging"

    allocation: Literal["uniform", "adaptive"] = "uniform"
    similarity: str = "router_logits"
    grouping: str = "routing"
    weighting: str = "frequency"
    align: bool = True
    align_by: Literal["weights", "activations", "both"] = "weights"
    merge: Literal["mean", "neurons"] = "mean"
    refit: Refit = "none"
    routing: Routing = "map"
    router_rows: str = "fit"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_one("allocation", self.allocation, ("uniform", "adaptive"))
        choose_one("routing", self.routing, ("map", "reduce"))
        choose_one("align_by", self.align_by, ("weights", *_WEIGHTS_SHARE))
        choose_one("merge", self.merge, ("mean", "neurons"))
        choose_one("refit", self.refit, ("none", "group", "block"))
        if self.refits and self._reduces:
            raise ValueError(
                f'refit={self.refit!r} fits merged experts to the tokens of their members, but with routing="reduce" '
                'the router chooses other tokens for them. Pass routing="map", or use ByteBudget(runs_in="any"), which '
                "refits the experts that a smaller router reaches."
            )
        if not self.averages_experts and not self.refits:
            raise ValueError(
                'merge="neurons" chooses neurons for a down projection that is fitted to them. Pass refit="block" or '
                'refit="group".'
            )
        if self.align_by != "weights" and not self._aligns:
            raise ValueError(
                f"align_by={self.align_by!r} has no meaning with align={self.align!r} and merge={self.merge!r}, where "
                'no neurons are aligned. Leave it out, or pass align=True and merge="mean".'
            )
        for choice, chosen in self._choices:
            choice[chosen]

    @property
    def _choices(self) -> tuple[tuple[Any, str], ...]:
        return (
            (SIMILARITIES, self.similarity),
            (GROUPINGS, self.grouping),
            (WEIGHTINGS, self.weighting),
            (ROUTER_ROWS, self.router_rows),
        )

    @property
    def needs(self) -> frozenset[str]:
        """Frequencies, to find the dominant experts, the inputs of the chosen functions, and what a refit reads."""
        used = [choice[chosen] for choice, chosen in self._choices if choice is not ROUTER_ROWS or self._reduces]
        fitted = {"sample", "gradients"} if self.refits else set()
        aligned = {"sample"} if self.align_by != "weights" else set()
        return frozenset({"frequency", *fitted, *aligned}).union(*(function.observations for function in used))

    @property
    def sample_size(self) -> int:
        """Number of tokens to sample; refits and correlations need more than there are neurons in an expert."""
        return GRAM_TOKENS if self.refits or self.align_by != "weights" else super().sample_size

    @property
    def refits(self) -> bool:
        """Whether down projections are fitted to what the members of a group gave."""
        return self.refit != "none"

    @property
    def averages_experts(self) -> bool:
        """Whether merged matrices are weighted means."""
        return self.merge == "mean"

    @property
    def _aligns(self) -> bool:
        return self.align and self.averages_experts

    @property
    def _reduces(self) -> bool:
        return self.routing == "reduce"

    @property
    def is_adaptive(self) -> bool:
        """True for the adaptive allocation, which ranks the experts of all blocks together."""
        return self.allocation == "adaptive"

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`; checks that the experts can be refitted."""
        super().check(model)
        for block in selected_blocks(model, self.layers, self.protect) if self.refits else ():
            if reason := block.no_factors or block.no_refit:
                raise ValueError(
                    f'The experts of {block.name} cannot be refitted: {reason}. Pass refit="none" and merge="mean", or '
                    f'leave the block out with protect=["{block.name}"].'
                )

    def counts(self, model: ModelInfo) -> dict[str, int]:
        """See `CountedStage.counts`."""
        chosen = selected_blocks(model, self.layers, self.protect)
        grouped = [block.name for block in chosen if block.router_groups > 1]
        if self.is_adaptive and self._reduces and grouped:
            raise ValueError(
                f'allocation="adaptive" with routing="reduce" cannot keep router groups equal in {grouped[0]}. '
                'Use allocation="uniform" or routing="map".'
            )
        return super().counts(model)

    def allocate(self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]) -> dict[str, int]:
        """Uniform expert counts, or the adaptive ones of the paper ("globally group")."""
        counts = self.counts(model)
        if not self.is_adaptive:
            return counts
        assert statistics is not None
        chosen = selected_blocks(model, self.layers, self.protect)
        frequencies = [statistics.blocks[block.name].frequency_E for block in chosen]
        total = sum(counts[block.name] for block in chosen)
        floor = max(block.top_k for block in chosen) if self._reduces else 1
        dominants = adaptive_dominants(frequencies, total, floor=floor)
        return counts | {block.name: len(d) for block, d in zip(chosen, dominants, strict=True)}

    def decide(self, context: BlockContext, allocated: int) -> BlockPlan:
        """Group, weigh and align the experts of one block."""
        info = context.info
        if allocated == info.num_experts:
            return keep_all(info.name, allocated, self.routing)
        labels_E, dominants_G = self._groups(context, allocated)
        grouped = {"labels_E": labels_E, "dominants_G": dominants_G}
        weights_E = WEIGHTINGS[self.weighting](context, **grouped)
        rows = ROUTER_ROWS[self.router_rows](context, **grouped) if self._reduces else None
        plan = BlockPlan(
            name=info.name,
            labels_E=tuple(labels_E.tolist()),
            dominants_G=dominants_G,
            routing=self.routing,
            merge_weights_E=merge_weights(weights_E, labels_E, allocated),
            permutations_EI=self._permutations(context, labels_E, dominants_G) if self._aligns else None,
            router_weights_E=None if rows is None else merge_weights(rows.weights_E, labels_E, allocated),
            router_fit=None if rows is None else rows.fit,
        )
        return self._refitted(context, plan) if self.refits else plan

    def _permutations(
        self, context: BlockContext, labels_E: torch.Tensor, dominants_G: tuple[int, ...]
    ) -> torch.Tensor:
        """(E, I) the order in which the neurons of each expert match those of its dominant expert."""
        share, features = _WEIGHTS_SHARE.get(self.align_by), None
        if share is not None:
            features = activation_features(context.experts, context.sample(), labels_E, share)
        return align_experts(context.experts, labels_E, dominants_G, features=features)

    def _refitted(self, context: BlockContext, plan: BlockPlan) -> BlockPlan:
        """The plan with the neurons that merged experts are made of, and their refitted down projections."""
        block = MergedBlock(context, plan)
        if not self.averages_experts:
            plan = replace(plan, sources_GI=block.sources())
        factors = block.refitted(merged_experts(context.experts, plan), self.refit)
        return replace(plan, factors=factors, refits_down=True, is_stock=True)

    def _groups(self, context: BlockContext, count: int) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Labels and dominant experts; groups are numbered by ascending dominant expert."""
        rank_E = context.rank(context.observed().token_count_E)
        found: Groups = GROUPINGS[self.grouping](
            context,
            similarity=lambda: SIMILARITIES[self.similarity](context),
            rank_E=rank_E,
            num_groups=count,
            router_groups=context.info.router_groups if self._reduces else 1,
        )
        labels_E, dominants = found.labels_E, found.dominants
        if dominants is None:
            members = [(labels_E == group).nonzero()[:, 0] for group in range(count)]
            dominants = tuple(int(m[rank_E[m].argmax()]) for m in members)
        order = sorted(range(count), key=lambda group: dominants[group])
        renumber_G = torch.empty(count, dtype=torch.int64)
        renumber_G[order] = torch.arange(count)
        return renumber_G[labels_E], tuple(dominants[group] for group in order)


@register_stage
@dataclass(frozen=True)
class MSMoE(ExpertMerging):
    """Merge experts into the most frequently used ones, grouped by routing policy (arXiv:2310.01334, section 3.2).

    The settings are those of `ExpertMerging`.
    """

    name: ClassVar[str] = "m-smoe"
