"""Layer drop: remove all routed experts of the MoE blocks that change the residual stream least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.algorithms.layer_similarity import importance_of_layer
from optimum_moe.formats import StoredExperts
from optimum_moe.formats.stored import without_neurons
from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.settings import check_count, exactly_one, product
from optimum_moe.stages.base import register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import check_share, selected_blocks
from optimum_moe.stages.formatting import FormattingStage
from optimum_moe.statistics import Statistics


@register_stage
@dataclass(frozen=True)
class LayerDrop(FormattingStage):
    """Drop the routed experts of the MoE blocks that change the residual stream least; attention stays.

    Layer drop of "Demystifying the Compression of Mixture-of-Experts Through a Unified Framework" (He et al., TMLR
    2025, arXiv:2406.02500): the importance of a block is 1 minus the cosine of the residual stream after its layer with
    the routed experts and without them, averaged over the calibration tokens. The paper removes the norm and shared
    experts too. Here these stay, as does the router, whose logits some models put into their loss; an expert that has a
    bias of its down projection keeps that. No stock class has a layer without experts, so that loading needs this
    package.

    Args:
        num_layers: Number of blocks whose experts are dropped. Exactly one of this and `keep_ratio`.
        keep_ratio: Share of the MoE blocks that keep their experts, in (0, 1] or as `"50%"`; rounds up.
        layers: Positions of the MoE blocks that may be dropped, None for all.
        protect: Patterns of block names that keep their experts.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "layer-drop"
    size_fields: ClassVar[tuple[str, ...]] = ("num_layers", "keep_ratio")

    num_layers: int | None = None
    keep_ratio: float | None = None
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        exactly_one(num_layers=self.num_layers, keep_ratio=self.keep_ratio)
        if self.num_layers is not None:
            check_count("num_layers", self.num_layers, 1)
        else:
            check_share("keep_ratio", self.keep_ratio)

    @property
    def needs(self) -> frozenset[str]:
        """The residual stream with and without the routed experts of each block."""
        return frozenset({"experts_similarity"})

    @property
    def is_adaptive(self) -> bool:
        """Always True: all blocks are observed before the least important ones are known."""
        return True

    @property
    def knows_size(self) -> bool:
        """Always False: blocks may differ in size."""
        return False

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`."""
        super().check(model)
        number, chosen = self._number(model), selected_blocks(model, self.layers, self.protect)
        if number > len(chosen):
            raise ValueError(
                f"{self.name} drops the experts of {number} blocks, but layers={self.layers!r} and "
                f"protect={self.protect!r} leave {len(chosen)}. Drop fewer, or leave out fewer."
            )
        loose = next((block.name for block in chosen if not block.layer), None)
        if loose is not None:
            raise ValueError(
                f"{loose} is in no list of layers, so that it is not known what it adds to. Leave it out with "
                f'protect=["{loose}"].'
            )

    def _number(self, model: ModelInfo) -> int:
        if self.num_layers is not None:
            return self.num_layers
        assert self.keep_ratio is not None
        return len(model.blocks) - math.ceil(product(self.keep_ratio, len(model.blocks)))

    def allocate(self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]) -> dict[str, bool]:
        """Whether each block loses its experts: the least important ones do, earlier ones first if they tie."""
        assert statistics is not None
        importance: dict[str, float] = {}
        for block in selected_blocks(model, self.layers, self.protect):
            observed = statistics.blocks[block.name]
            assert observed.experts_cosine_sum is not None
            assert observed.layer_tokens is not None
            if observed.num_tokens:
                importance[block.name] = importance_of_layer(observed.experts_cosine_sum, observed.layer_tokens)
        dropped = sorted(importance, key=importance.__getitem__)[: self._number(model)]
        return {block.name: block.name in dropped for block in model.blocks}

    def changed_by_data(self, model: ModelInfo, allocation: Mapping[str, bool]) -> frozenset[str]:
        """All selected blocks before the allocation, and those that lose their experts after it."""
        if not allocation:
            return super().changed_by_data(model, allocation)
        return frozenset(name for name, is_dropped in allocation.items() if is_dropped)

    def factors(self, context: BlockContext, allocated: bool) -> StoredExperts | None:
        """Experts without neurons; None for a block that keeps its own."""
        if not allocated:
            return None
        experts = (single_expert(context.experts, e) for e in range(context.info.num_experts))
        return StoredExperts(tuple(without_neurons(expert) for expert in experts))

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """See `Stage.costs`; an upper bound, with the smallest blocks dropped."""
        chosen = sorted(selected_blocks(model, self.layers, self.protect), key=_size)[: self._number(model)]
        return {**before, **{block.name: _emptied(block, before[block.name]) for block in chosen}}


def _size(block: BlockInfo) -> int:
    return block.num_experts * block.expert_parameters


def _emptied(block: BlockInfo, before: BlockCost) -> BlockCost:
    """The cost of a block whose experts are empty: their down biases."""
    biases = block.expert_parameters - block.expert_multiply_adds
    # Gate and up have a bias for each neuron, down has one for each output.
    down = block.hidden_size if biases else 0
    return replace(before, parameters=before.experts * down, multiply_adds=(0.0, 0.0), stock=False)
