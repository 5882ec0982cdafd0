"""Fewer neurons in every expert, the same number everywhere: structured slimming in a checkpoint that loads anywhere.

Neurons go by optimal brain surgeon, and the down projections of a block are refitted together, as in the byte budget,
which chooses the number of experts and their width itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.algorithms.ranks import STEP
from optimum_moe.formats import StoredExperts, build_expert, refit_block
from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.plan import BlockPlan, keep_all
from optimum_moe.runtimes import Quantizer, get_quantizer
from optimum_moe.settings import check_count, exactly_one, product
from optimum_moe.stages.base import GRAM_TOKENS, Stage, register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import check_share
from optimum_moe.stages.plain_budget import possible_widths, tokens_of


@register_stage
@dataclass(frozen=True)
class NeuronPruning(Stage):
    """Keep as many neurons in every expert of every block; can follow a stage that prunes experts.

    Stock classes load the result: the experts' own tensors shrink, and `config.json` says the new width.

    Args:
        num_neurons: Neurons that every expert keeps, a multiple of 8, or of the blocks of `quantize`. Exactly one of
            this and `keep_ratio`.
        keep_ratio: Share of the neurons that stays, in (0, 1) or as `"75%"`; rounds up to a multiple of 32, or of 16 or
            8 where experts are small, or of the blocks of `quantize`.
        quantize: The quantizer that comes after it, such as `"q8_0"` or `"awq"` (`optimum_moe.runtimes.QUANTIZERS`).
        curvature: Weigh errors by the loss, with backward passes over the calibration data (default); False measures
            output errors.
        refit: Refit the down projections of each block together, to what the block gave before (default).

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "neuron-pruning"
    size_fields: ClassVar[tuple[str, ...]] = ("num_neurons", "keep_ratio")

    num_neurons: int | None = None
    keep_ratio: float | None = None
    quantize: str | None = None
    curvature: bool = True
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        exactly_one(num_neurons=self.num_neurons, keep_ratio=self.keep_ratio)
        check_share("keep_ratio", self.keep_ratio)
        if self.num_neurons is not None:
            check_count("num_neurons", self.num_neurons, 1)
        _ = self.quantizer

    @property
    def quantizer(self) -> Quantizer | None:
        """What comes after the compression."""
        return None if self.quantize is None else get_quantizer(self.quantize)

    @property
    def needs(self) -> frozenset[str]:
        """Frequencies, sampled tokens, and with `curvature` the gradients of the loss at them."""
        return frozenset({"frequency", "sample", *(("gradients",) if self.curvature else ())})

    @property
    def sample_size(self) -> int:
        """Number of tokens to sample, enough for Gram matrices of single experts."""
        return GRAM_TOKENS

    @property
    def stores_stock_experts(self) -> bool:
        """Always True: narrower experts are stored in the original's own tensors."""
        return True

    def check_order(self, before: Stage | None) -> None:
        """See `Stage.check_order`; one config cannot say the width of experts that a map reaches."""
        super().check_order(before)
        if before is not None and before.routing == "map":
            raise ValueError(
                f'{self.name} cannot follow {before.name} with routing="map", whose checkpoint stock classes do not '
                'load. Pass routing="reduce" to it, or use ByteBudget(runs_in="transformers") after it.'
            )

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`; all blocks have to be alike, and of a class whose config says the width of experts."""
        first = model.blocks[0]
        sizes = sorted({(block.intermediate_size, block.hidden_size) for block in model.blocks})
        if len(sizes) > 1:
            shown = ", ".join(f"{width} neurons of {hidden} inputs" for width, hidden in sizes)
            raise ValueError(
                f"{self.name} gives all experts the same width, but those of this model differ: {shown}. Use "
                'ByteBudget(runs_in="transformers").'
            )
        for block in model.blocks:
            reason = block.fixed_width or block.no_factors
            if reason:
                raise ValueError(f"The experts of {block.name} cannot lose neurons: {reason}. Prune experts instead.")
        width = self._width_of(first)
        if width >= first.intermediate_size:
            narrower = [str(n) for n in possible_widths(first, self.quantizer) if n < first.intermediate_size]
            asked = f"num_neurons={width}" if self.keep_ratio is None else f"keep_ratio={self.keep_ratio}"
            raise ValueError(
                f"{asked} gives {width} of the {first.intermediate_size} neurons of every expert, so nothing would be "
                f"removed. Experts of this model can have {', '.join(narrower) or 'no fewer'} neurons."
            )

    def _width_of(self, block: BlockInfo) -> int:
        """The neurons that stay.

        Raises:
            ValueError: If a quantizer or shared experts do not allow that width.
        """
        widths = possible_widths(block, self.quantizer)
        if self.keep_ratio is not None:
            wanted = product(self.keep_ratio, block.intermediate_size)
            return next((width for width in widths if width >= wanted), block.intermediate_size)
        width = self.num_neurons
        assert width is not None
        step, why = STEP, "which grouped matmuls need"
        if self.quantizer is not None:
            step, why = self.quantizer.block, f"the block of quantize={self.quantize!r}"
        near = min(widths, key=lambda possible: abs(possible - width))
        if width % step:
            raise ValueError(f"num_neurons={width} is no multiple of {step}, {why}. Use {near}.")
        if width < block.intermediate_size and block.width_divides and block.width_divides % width:
            raise ValueError(
                f"num_neurons={width} does not divide {block.width_divides}, the neurons of the shared experts, whose "
                f"width the same config field says. Use {near}."
            )
        return width

    def changed_by_data(self, model: ModelInfo, allocation: Mapping[str, Any]) -> frozenset[str]:
        """All blocks, which lose neurons by statistics."""
        return frozenset(block.name for block in model.blocks)

    def allocate(self, model: ModelInfo, statistics: Any, profiles: Mapping[str, Any]) -> Mapping[str, int]:
        """The width of every expert."""
        return {block.name: self._width_of(block) for block in model.blocks}

    def width(self, model: ModelInfo, block: BlockInfo, allocated: int) -> int:
        """The allocated width."""
        return allocated

    def decide(self, context: BlockContext, allocated: int) -> BlockPlan:
        """Keep all experts, with the neurons that are chosen."""
        info, sample = context.info, context.sample()
        experts = [single_expert(context.experts, index) for index in range(info.num_experts)]
        narrow = Candidate("narrow", allocated)
        stored = [build_expert(expert, tokens_of(sample, e), narrow) for e, expert in enumerate(experts)]
        # Where outputs are not simply summed, one expert cannot make up for the error of another.
        if self.refit and context.experts.finish is None:
            stored = refit_block(experts, stored, sample)
        plan = keep_all(info.name, info.num_experts)
        return replace(plan, factors=StoredExperts(tuple(stored)), is_stock=True)

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """See `Stage.costs`."""
        return {block.name: self._cost(block, before[block.name]) for block in model.blocks}

    def _cost(self, block: BlockInfo, before: BlockCost) -> BlockCost:
        narrow = block.with_width(self._width_of(block))
        fewest, most = before.active
        return replace(
            before,
            width=narrow.intermediate_size,
            parameters=before.experts * narrow.expert_parameters,
            multiply_adds=(fewest * narrow.expert_multiply_adds, most * narrow.expert_multiply_adds),
        )
