"""Expert skipping: at run time a token leaves out selected experts with small routing weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from optimum_moe.algorithms.expert_skipping import Skipping, experts_per_token, is_normalized, median_ratios
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan, keep_all
from optimum_moe.stages.base import Stage, register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import selected_blocks
from optimum_moe.statistics import Statistics


@register_stage
@dataclass(frozen=True)
class ExpertSkipping(Stage):
    """Let each token skip the selected experts whose routing weight is small beside its largest.

    Dynamic expert skipping of "Not All Experts are Equal" (Lu et al., ACL 2024, arXiv:2402.14800), section 3.3: the
    second expert is skipped where w_2 < beta w_1, beta a number for each block, the median of w_2 / w_1 over the
    calibration tokens. With more than two experts each rank has its own median, so that half of the tokens skip each
    of them. Remaining weights are normalized again where the router normalizes them (the sum of a token's weights is
    the same for all calibration tokens), as the paper does for Mixtral; else they stay what they are. No weight of the
    model changes; the checkpoint records the ratios, and loading it needs this package.

    Args:
        beta: One ratio in [0, 1] for all ranks and blocks, 0 to skip nothing; None (default) for the medians.
        layers: Positions of the MoE blocks whose experts may be skipped, None for all.
        protect: Patterns of block names in which nothing is skipped.

    Raises:
        ValueError: If `beta` is out of range.
    """

    name: ClassVar[str] = "expert-skipping"
    size_fields: ClassVar[tuple[str, ...]] = ()

    beta: float | None = None
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.beta
        if given is not None and (isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1):
            raise ValueError(
                f"beta={given!r} must be a number in [0, 1], the share of a token's largest routing weight."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Sampled tokens with their routing weights."""
        return frozenset({"sample"})

    @property
    def is_adaptive(self) -> bool:
        """Always True, so that the number of experts a token runs is known for the whole model."""
        return True

    @property
    def skips_experts(self) -> bool:
        """Always True, since the plan says what is skipped."""
        return True

    @property
    def reads_experts(self) -> bool:
        """Always False, since routing weights decide."""
        return False

    @property
    def knows_size(self) -> bool:
        """Always False: what is stored stays the same, and how much is skipped depends on the data."""
        return False

    def check_order(self, before: Stage | None) -> None:
        """See `Stage.check_order`; only dropped layers are observed again."""
        super().check_order(before)
        if before is not None and not before.drops_layers:
            raise ValueError(
                f"{self.name} cannot follow {before.name}: routing weights were observed with the original experts. "
                f"Put {self.name} first, or run {before.name}, and then {self.name} on its checkpoint."
            )

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`."""
        for block in selected_blocks(model, self.layers, self.protect):
            if block.top_k == 1:
                raise ValueError(
                    f"{block.name} selects one expert for each token (top-1), and without it there would be none. "
                    "Skipping needs a router that selects at least two; remove experts instead."
                )
            if block.no_skipping:
                raise ValueError(
                    f"The experts of {block.name} cannot be skipped: {block.no_skipping}. Leave the block out with "
                    f'protect=["{block.name}"], or remove experts instead.'
                )

    def allocate(
        self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]
    ) -> dict[str, Skipping | None]:
        """What is skipped in each block; None for nothing."""
        assert statistics is not None
        chosen = {block.name for block in selected_blocks(model, self.layers, self.protect)}
        found: dict[str, Skipping | None] = dict.fromkeys(block.name for block in model.blocks)
        for name in chosen:
            weights_SK = statistics.blocks[name].reservoir.weights_SK
            if len(weights_SK):
                ranks = weights_SK.shape[1] - 1
                ratios = median_ratios(weights_SK) if self.beta is None else (float(self.beta),) * ranks
                found[name] = Skipping(ratios, is_normalized(weights_SK)) if any(ratios) else None
        return found

    def changed_by_data(self, model: ModelInfo, allocation: Mapping[str, Any]) -> frozenset[str]:
        """All selected blocks."""
        return frozenset(block.name for block in selected_blocks(model, self.layers, self.protect))

    def remarks(self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]) -> tuple[str, ...]:
        """How many experts a token runs."""
        assert statistics is not None
        allocation, before, after = self.allocate(model, statistics, profiles), 0.0, 0.0
        for block in model.blocks:
            skipping = allocation[block.name]
            before += block.top_k
            weights_SK = statistics.blocks[block.name].reservoir.weights_SK
            after += block.top_k if skipping is None else experts_per_token(weights_SK, skipping)
        number = len(model.blocks)
        return (
            f"On the calibration data a token runs {after / number:.2f} experts in a block on average, and ran "
            f"{before / number:.2f} before.",
        )

    def decide(self, context: BlockContext, allocated: Skipping | None) -> BlockPlan:
        """Keep all experts, and skip as allocated."""
        return replace(keep_all(context.info.name, context.info.num_experts), skipping=allocated)

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """See `Stage.costs`; a token runs between one and all of its experts."""
        chosen = selected_blocks(model, self.layers, self.protect)
        if self.beta == 0:
            return dict(before)
        least = {b.name: (float(b.expert_multiply_adds), before[b.name].multiply_adds[1]) for b in chosen}
        return {
            **before,
            **{
                b.name: replace(before[b.name], active=(1, b.top_k), multiply_adds=least[b.name], stock=False)
                for b in chosen
            },
        }
