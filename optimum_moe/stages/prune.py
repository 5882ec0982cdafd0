"""Expert pruning: keep the most salient experts, remove the others and their router rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from optimum_moe.algorithms.grouping import dominant_experts
from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.plan import BlockPlan, Routing, keep_all, keep_some
from optimum_moe.settings import check_count, choose_one
from optimum_moe.stages.base import register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counted import CountedStage
from optimum_moe.stages.counts import fewest_experts, selected_blocks
from optimum_moe.stages.damage_curve import DamageCurve, share_counts
from optimum_moe.stages.left_experts import LEAVES, left_numbers, stored_experts
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
            first order), `"easy_ep"`, `"mone"` (what a constant in its place does not give), `"reconstruction"` (the
            set with which the output changes the least), `"fisher"` (expected rise of the loss), `"aimer"` (data-free),
            `"random"` (baseline), or a name registered with `register_saliency`.
        allocation: `"uniform"` (default): all blocks keep the same number; `"global"`: blocks share one number, so that
            the sum of what they lose is the least (exact dynamic programming over the sum of the removed experts'
            saliencies). `"fisher"` is compared in the loss, any other criterion as its share of the block's sum. The
            result needs this package to load.
        leaves: What is left of a removed expert. `"nothing"` (default): its row of the router goes, and tokens select
            another one. `"constant"`: its mean output over its sampled tokens (MoNE, arXiv:2507.00390). `"low_rank"`: a
            map c + U V x, fitted to them by ridge regression ("tilted novice", arXiv:2610.41366). With the last two the
            router stays as it is, and the result needs this package to load.
        rank: Rank of U V, only with `leaves="low_rank"` and required there.
        layers: Positions of the MoE blocks to compress, None for all.
        protect: Patterns of block names to leave unchanged.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "expert-pruning"

    saliency: str = "reap"
    allocation: Literal["uniform", "global"] = "uniform"
    leaves: Literal["nothing", "constant", "low_rank"] = "nothing"
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        criterion = SALIENCIES[self.saliency]
        choose_one("allocation", self.allocation, ("uniform", "global"))
        self._check_leaves()
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

    def _check_leaves(self) -> None:
        choose_one("leaves", self.leaves, LEAVES)
        if self.leaves == "low_rank" and self.rank is None:
            raise ValueError('leaves="low_rank" needs the rank of the maps. Pass rank=8, for example.')
        if self.leaves != "low_rank" and self.rank is not None:
            raise ValueError(
                f"rank={self.rank!r} has no meaning with leaves={self.leaves!r}. Leave it out, or pass "
                'leaves="low_rank".'
            )
        if self.rank is not None:
            check_count("rank", self.rank, 1)
        if self._leaves_something and self.target_size is not None:
            raise ValueError(
                f"target_size={self.target_size!r} cannot be met with leaves={self.leaves!r}: what is left of experts "
                'is not counted. Pass keep_ratio= or num_experts=, or use a ByteBudget with runs_in="transformers".'
            )
        if self._leaves_something and SALIENCIES[self.saliency].reads("num_kept"):
            raise ValueError(
                f"saliency={self.saliency!r} chooses the experts among which tokens are routed again, and with leaves="
                f'{self.leaves!r} none is. Use another criterion, or leaves="nothing".'
            )

    @property
    def _leaves_something(self) -> bool:
        return self.leaves != "nothing"

    @property
    def _is_global(self) -> bool:
        return self.allocation == "global"

    @property
    def needs_profile(self) -> bool:
        """Whether the saliencies of all blocks are compared before the first one is decided."""
        return self._is_global

    @property
    def needs(self) -> frozenset[str]:
        """The observations that the criterion reads, none for data-free ones, and tokens to fit what is left."""
        return SALIENCIES[self.saliency].observations | ({"sample"} if self._leaves_something else frozenset())

    @property
    def reads_experts(self) -> bool:
        """Whether the stage reads expert weights; False for criteria that only use statistics, and leave nothing."""
        return self._leaves_something or "experts" in SALIENCIES[self.saliency].parts

    @property
    def routing(self) -> Routing | None:
        """`"reduce"`, since the router loses the rows of the removed experts; None where something is left of them."""
        return None if self._leaves_something else "reduce"

    @property
    def chooses_experts(self) -> bool:
        """Always True, whatever is left of removed experts."""
        return True

    @property
    def knows_size(self) -> bool:
        """Whether nothing is left of removed experts; else nothing is left of those without tokens."""
        return not self._leaves_something

    @property
    def leaves_dense_experts(self) -> bool:
        """Whether nothing is left of removed experts."""
        return not self._leaves_something

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`."""
        super().check(model)
        for block in selected_blocks(model, self.layers, self.protect) if self._leaves_something else ():
            if block.no_factors:
                raise ValueError(
                    f"Of the experts of {block.name} nothing can be left: {block.no_factors}. "
                    f'Pass leaves="nothing", or leave the block out with protect=["{block.name}"].'
                )
            if self.rank is not None and 2 * self.rank >= block.hidden_size:
                raise ValueError(
                    f"rank={self.rank} is too large: it must be less than half of the {block.hidden_size} channels of "
                    f"{block.name}, or a whole matrix would store less. Use a smaller rank."
                )

    def remaining(self, model: ModelInfo, block: BlockInfo, allocated: int) -> int:
        """The allocated number of experts; all ids, where something is left of the others."""
        return block.num_experts if self._leaves_something else allocated

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """See `Stage.costs`; configs have no number of experts for each block."""
        costs = super().costs(model, before)
        if self._leaves_something:
            return {block.name: self._cost(block, before[block.name], costs[block.name]) for block in model.blocks}
        if self._is_global and len(selected_blocks(model, self.layers, self.protect)) > 1:
            return {name: replace(cost, stock=False) for name, cost in costs.items()}
        return costs

    def _cost(self, block: BlockInfo, before: BlockCost, kept: BlockCost) -> BlockCost:
        """The cost with what is left of removed experts, of which a token may select none or only such."""
        gone = before.experts - kept.experts
        if not gone:
            return before
        return replace(
            before,
            parameters=kept.parameters + gone * left_numbers(block, self.rank),
            multiply_adds=(0.0, before.multiply_adds[1]),
            stock=False,
        )

    def profile(self, context: BlockContext) -> DamageCurve:
        """What the block loses by the number of experts that it keeps."""
        info, criterion = context.info, SALIENCIES[self.saliency]
        saliency_E, share, in_loss = criterion(context), 1.0, False
        if "loss_sample" in criterion.parts:
            sample = context.sample()
            # On all tokens that the block saw, which may be more than elsewhere.
            share, in_loss = sample.share, sample.gradient_SJH is not None
        fewest, groups = fewest_experts(info, self.routing or "map"), self._router_groups(info)
        return DamageCurve.of_saliencies(saliency_E / share, context.rank(saliency_E), fewest, groups, in_loss)

    def _router_groups(self, info: BlockInfo) -> int:
        """Groups of experts of which as many have to stay."""
        return 1 if self._leaves_something else info.router_groups

    def allocate(self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]) -> dict[str, int]:
        """Number of experts that remain in each block."""
        counts = self.counts(model)
        if not self._is_global:
            return counts
        chosen = [block.name for block in selected_blocks(model, self.layers, self.protect) if block.name in profiles]
        total = sum(counts[name] for name in chosen)
        return counts | share_counts({name: profiles[name] for name in chosen}, total)

    def decide(self, context: BlockContext, allocated: int) -> BlockPlan:
        """Keep the most salient experts, the same number in each router group where the router shrinks."""
        info = context.info
        if allocated == info.num_experts:
            return keep_all(info.name, allocated)
        saliency_E = context.rank(SALIENCIES[self.saliency](context, num_kept=allocated))
        # Criteria may be negative, frequencies may not; only the order counts.
        saliency_E = saliency_E - saliency_E.min()
        kept = dominant_experts(saliency_E, allocated, self._router_groups(info))
        if not self._leaves_something:
            return keep_some(info.name, info.num_experts, kept)
        plan = keep_all(info.name, info.num_experts, routing="map")
        return replace(plan, factors=stored_experts(context, kept, self.rank))
