"""M-SMoE: align neurons, group experts by routing policy, merge weighted by frequency.

"Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy" (Li et al., ICLR 2024,
arXiv:2310.01334), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from optimum_moe.algorithms.alignment import align_experts
from optimum_moe.algorithms.grouping import adaptive_dominants, dominant_experts, join_dominants, random_groups
from optimum_moe.algorithms.merging import merge_weights
from optimum_moe.algorithms.router_fit import Choices, RouterFit, fit_router
from optimum_moe.algorithms.similarity import gram_similarity, vector_similarity
from optimum_moe.blocks import ModelInfo
from optimum_moe.methods.base import BlockContext, Method
from optimum_moe.methods.counts import check_counts, choose_one, resolve_counts, selected_blocks
from optimum_moe.plan import BlockPlan, Routing, keep_all
from optimum_moe.statistics import Statistics


@dataclass(frozen=True)
class MSMoE(Method):
    """Merge experts into the most frequently used ones.

    Args:
        num_experts: Experts that remain in each block (the average, with an adaptive budget). Exactly one of this,
            `keep_ratio` and `target_size`.
        keep_ratio: Share of experts that remain, in (0, 1] or as `"50%"`; rounds up.
        target_size: Size of the weight files at most, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            what they are.
        budget: `"uniform"`, or `"adaptive"`: dominant experts are the most frequent of the whole model, each
            block's largest frequency counting as 1.
        similarity: What makes experts similar: `"router_logits"` over calibration tokens (the paper),
            `"router_weights"` or `"expert_weights"`.
        grouping: `"routing"` joins each expert to the most similar dominant one; `"random"` is a baseline.
        weighting: `"frequency"` or `"uniform"` weights in the merge.
        align: Permute each expert's neurons to its dominant expert before merging.
        routing: `"map"` keeps the router and maps its ids (the paper; needs this package to load), `"reduce"`
            shrinks the router, which gives a plain checkpoint.
        router_rows: Row of a merged expert under `"reduce"`: that of its `"dominant"` expert or the frequency-weighted
            `"mean"`, or rows that were fitted to how the original router shared its weight (`"fit"`, the default).
        layers: Positions of the MoE blocks to cut, None for all.
        protect: Patterns of block names that stay as they are, for example `["*.layers.0.*"]`.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "m-smoe"

    num_experts: int | None = None
    keep_ratio: float | None = None
    target_size: str | int | None = None
    budget: Literal["uniform", "adaptive"] = "uniform"
    similarity: Literal["router_logits", "router_weights", "expert_weights"] = "router_logits"
    grouping: Literal["routing", "random"] = "routing"
    weighting: Literal["frequency", "uniform"] = "frequency"
    align: bool = True
    routing: Routing = "map"
    router_rows: Literal["dominant", "mean", "fit"] = "fit"
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.num_experts, self.keep_ratio, self.target_size)
        choose_one("budget", self.budget, ("uniform", "adaptive"))
        choose_one("similarity", self.similarity, ("router_logits", "router_weights", "expert_weights"))
        choose_one("grouping", self.grouping, ("routing", "random"))
        choose_one("weighting", self.weighting, ("frequency", "uniform"))
        choose_one("routing", self.routing, ("map", "reduce"))
        choose_one("router_rows", self.router_rows, ("dominant", "mean", "fit"))

    @property
    def needs_statistics(self) -> bool:
        """Dominant experts are the most frequent ones, so calibration data are always needed."""
        return True

    @property
    def needs_sample(self) -> bool:
        """If rows of the router are fitted."""
        return self.routing == "reduce" and self.router_rows == "fit"

    @property
    def is_adaptive(self) -> bool:
        """With the paper's global ranking."""
        return self.budget == "adaptive"

    @property
    def block_routing(self) -> Routing:
        """As set."""
        return self.routing

    def counts(self, model: ModelInfo) -> dict[str, int]:
        """See `Method.counts`."""
        chosen = selected_blocks(model, self.layers, self.protect)
        grouped = [block.name for block in chosen if block.router_groups > 1]
        if self.budget == "adaptive" and self.routing == "reduce" and grouped:
            raise ValueError(
                f'budget="adaptive" with routing="reduce" cannot keep router groups equal in {grouped[0]}. '
                'Use budget="uniform" or routing="map".'
            )
        return resolve_counts(model, chosen, self.routing, self.num_experts, self.keep_ratio, self.target_size)

    def allocate(self, model: ModelInfo, statistics: Statistics | None) -> dict[str, int]:
        """Uniform counts, or the adaptive ones of the paper ("globally group")."""
        counts = self.counts(model)
        if self.budget == "uniform":
            return counts
        assert statistics is not None
        chosen = selected_blocks(model, self.layers, self.protect)
        frequencies = [statistics.blocks[block.name].frequency_E for block in chosen]
        total = sum(counts[block.name] for block in chosen)
        floor = max(block.top_k for block in chosen) if self.routing == "reduce" else 1
        dominants = adaptive_dominants(frequencies, total, floor=floor)
        return counts | {block.name: len(d) for block, d in zip(chosen, dominants, strict=True)}

    def decide(self, context: BlockContext, count: int) -> BlockPlan:
        """Group, weigh and align the experts of one block."""
        info, statistics = context.info, context.observed()
        if count == info.num_experts:
            return keep_all(info.name, count, self.routing)
        labels_E, dominants_G = self._groups(context, count)
        frequency_E = statistics.token_count_E
        weighting_E = frequency_E if self.weighting == "frequency" else torch.ones_like(frequency_E)
        router_weights_E = None
        if self.routing == "reduce":
            router_weights_E = merge_weights(frequency_E, labels_E, count)
            if self.router_rows != "mean":
                router_weights_E = torch.zeros_like(router_weights_E)
                router_weights_E[list(dominants_G)] = 1.0
        return BlockPlan(
            name=info.name,
            labels_E=tuple(labels_E.tolist()),
            dominants_G=dominants_G,
            routing=self.routing,
            merge_weights_E=merge_weights(weighting_E, labels_E, count),
            permutations_EI=align_experts(context.experts, labels_E, dominants_G) if self.align else None,
            router_weights_E=router_weights_E,
            router_fit=self._fit(context, labels_E, dominants_G),
        )

    def _fit(self, context: BlockContext, labels_E: torch.Tensor, dominants_G: tuple[int, ...]) -> RouterFit | None:
        if self.routing == "map" or self.router_rows != "fit":
            return None
        original, sample = context.router, context.observed().reservoir
        rows = [*dominants_G, *range(original.num_experts, len(original.rows_NX))]
        bias_N, correction_E = original.bias_N, original.correction_E
        start = replace(
            original,
            rows_NX=original.rows_NX[rows],
            num_experts=len(dominants_G),
            bias_N=None if bias_N is None else bias_N[rows],
            correction_E=None if correction_E is None else correction_E[list(dominants_G)],
        )
        choices = Choices(sample.router_input_SH, sample.index_SK, sample.weights_SK, labels_E, len(dominants_G))
        info = context.info
        groups = info.router_groups, info.router_groups_used
        return fit_router(original, start, choices, info.top_k, *groups, generator=context.generator)

    def _groups(self, context: BlockContext, count: int) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Labels and dominant experts, groups numbered by ascending dominant expert."""
        rank_E = context.rank(context.observed().token_count_E)
        router_groups = context.info.router_groups if self.routing == "reduce" else 1
        if self.grouping == "random":
            labels_E = random_groups(context.info.num_experts, count, context.generator, router_groups)
            members = [(labels_E == group).nonzero()[:, 0] for group in range(count)]
            dominants = tuple(int(m[rank_E[m].argmax()]) for m in members)
        else:
            dominants = dominant_experts(rank_E, count, router_groups)
            labels_E = join_dominants(self._similarity(context), dominants, router_groups)
        order = sorted(range(count), key=lambda group: dominants[group])
        renumber_G = torch.empty(count, dtype=torch.int64)
        renumber_G[order] = torch.arange(count)
        return renumber_G[labels_E], tuple(dominants[group] for group in order)

    def _similarity(self, context: BlockContext) -> torch.Tensor:
        if self.similarity == "router_logits":
            return gram_similarity(context.observed().router_gram_EE)
        if self.similarity == "router_weights":
            return vector_similarity(context.router.rows_NX[: context.info.num_experts])
        experts = context.experts
        fields = [m for m in (experts.gate, experts.up, experts.down) if m is not None]
        gram_EE = torch.zeros(experts.num_experts, experts.num_experts, dtype=torch.float64)
        for matrices in fields:
            for i in range(experts.num_experts):
                for j in range(i + 1):
                    gram_EE[i, j] += (matrices[i].float() * matrices[j].float()).sum().cpu()
        return gram_similarity(gram_EE.tril() + gram_EE.tril(-1).T)
