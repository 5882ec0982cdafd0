"""Block drop: remove whole layers, attention included, that change the residual stream least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from optimum_moe.algorithms.layer_similarity import importance_of_layer, importance_of_run
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan, keep_all
from optimum_moe.settings import check_count, exactly_one, product
from optimum_moe.stages.base import Stage, register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import check_share, selected_blocks
from optimum_moe.statistics import Statistics


@register_stage
@dataclass(frozen=True)
class BlockDrop(Stage):
    """Drop the layers (attention and MoE block) that change the residual stream least; a plain checkpoint results.

    Block drop of "Demystifying the Compression of Mixture-of-Experts Through a Unified Framework" (He et al., TMLR
    2025, arXiv:2406.02500): the importance of a layer is 1 minus the cosine of the residual stream before and after it,
    averaged over the calibration tokens. Only layers with an MoE block are dropped. It comes first in a recipe; stages
    after it observe the model that is left.

    Args:
        num_blocks: Number of layers to drop. Exactly one of this and `keep_ratio`.
        keep_ratio: Share of the layers with an MoE block that remain, in (0, 1] or as `"50%"`; rounds up.
        consecutive: Drop one run of neighboring layers, the one whose input and output are most similar (on a sample of
            tokens); else the least important layers anywhere.
        layers: Positions of the MoE blocks whose layers may be dropped, None for all.
        protect: Patterns of block names whose layers remain.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "block-drop"
    size_fields: ClassVar[tuple[str, ...]] = ("num_blocks", "keep_ratio")

    num_blocks: int | None = None
    keep_ratio: float | None = None
    consecutive: bool = False
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        exactly_one(num_blocks=self.num_blocks, keep_ratio=self.keep_ratio)
        if self.num_blocks is not None:
            check_count("num_blocks", self.num_blocks, 1)
        else:
            check_share("keep_ratio", self.keep_ratio)

    @property
    def needs(self) -> frozenset[str]:
        """The residual stream around each layer."""
        return frozenset({"residual_stream" if self.consecutive else "layer_similarity"})

    @property
    def sample_size(self) -> int:
        """Number of tokens to compare, for a run of layers."""
        return 1024

    @property
    def drops_layers(self) -> bool:
        """Always True, since whole layers go."""
        return True

    @property
    def reads_experts(self) -> bool:
        """Always False, since the residual stream decides."""
        return False

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`."""
        number, total, candidates = self.number_of_layers(model), len(_layers(model)), self.candidates(model)
        shown = next(f"{name}={value!r}" for name in self.size_fields if (value := getattr(self, name)) is not None)
        if number >= total:
            raise ValueError(f"{shown} drops all {total} layers with MoE blocks. Keep at least one.")
        if (self.consecutive and not candidates) or (not self.consecutive and number > len(candidates)):
            run = " neighboring" if self.consecutive else ""
            raise ValueError(
                f"{shown} drops {number}{run} layers with MoE blocks, but with layers={self.layers!r} and "
                f"protect={self.protect!r} there are not so many. Drop fewer, or leave out fewer."
            )

    def number_of_layers(self, model: ModelInfo) -> int:
        """How many layers are dropped."""
        total = len(_layers(model))
        if self.num_blocks is not None:
            return self.num_blocks
        assert self.keep_ratio is not None
        return total - math.ceil(product(self.keep_ratio, total))

    def candidates(self, model: ModelInfo) -> list[tuple[str, ...]]:
        """What can be dropped at once: single layers, or runs of as many neighboring layers as are dropped."""
        chosen = list(dict.fromkeys(block.layer for block in selected_blocks(model, self.layers, self.protect)))
        if not self.consecutive:
            return [(layer,) for layer in chosen]
        number = self.number_of_layers(model)
        runs = [tuple(chosen[start : start + number]) for start in range(len(chosen) - number + 1)]
        return [run for run in runs if number and _number(run[-1]) - _number(run[0]) == number - 1]

    def importance(self, model: ModelInfo, statistics: Statistics, candidate: Sequence[str]) -> float:
        """How much a candidate changes the residual stream: 1 minus the mean cosine of its input and output.

        Raises:
            ValueError: If no token reached one of its layers.
        """
        found = [next(b for b in model.blocks if b.layer == layer) for layer in (candidate[0], candidate[-1])]
        first, last = (statistics.blocks[block.name] for block in found)
        for layer, observed in zip((candidate[0], candidate[-1]), (first, last), strict=True):
            if observed.num_tokens == 0:
                raise ValueError(
                    f"No calibration token reached {layer}, so it is not known what it changes. Add data that "
                    f'reaches it, or leave it out with protect=["{found[0].name}"].'
                )
        if not self.consecutive:
            assert first.layer_cosine_sum is not None
            assert first.layer_tokens is not None
            return importance_of_layer(first.layer_cosine_sum, first.layer_tokens)
        assert first.residual_before_SH is not None
        assert last.residual_after_SH is not None
        return importance_of_run(first.residual_before_SH, last.residual_after_SH)

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """The blocks that remain are not changed."""
        return dict(before)

    def decide(self, context: BlockContext, allocated: Any) -> BlockPlan:
        """Keep the block: layers are dropped before the first block is decided."""
        return keep_all(context.info.name, context.info.num_experts)


def _layers(model: ModelInfo) -> list[str]:
    """The layers with MoE blocks, in order."""
    return list(dict.fromkeys(block.layer for block in model.blocks))


def _number(layer: str) -> int:
    return int(layer.rpartition(".")[2])
