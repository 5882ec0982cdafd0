"""Experts in eight or four bits, all of them alike: the quantization of expert slimming, after whatever trims experts.

"Demystifying the Compression of Mixture-of-Experts Through a Unified Framework" (arXiv:2406.02500, section 3.2); with
calibration data the numbers are chosen as in GPTQ (arXiv:2210.17323).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.formats import StoredExperts
from optimum_moe.formats.base import get_format
from optimum_moe.formats.rounded import ROUNDED, Rounded
from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.stages.base import register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import selected_blocks
from optimum_moe.stages.formatting import FormattingStage


@register_stage
@dataclass(frozen=True)
class Rounding(FormattingStage):
    """Store every matrix of the experts in 8 or 4 bits; can follow a stage that merges or prunes (arXiv:2406.02500).

    Eight bits have a scale for 128 weights of a row, four bits for 64; scales have the dtype of the weights.

    Args:
        bits: 8 or 4.
        fitted: Choose the numbers of 4 bits so that outputs on calibration tokens stay (default); False takes the
            nearest number for each weight and needs no data. Eight bits are always the nearest.
        layers: Positions of the MoE blocks to round, None for all.
        protect: Patterns of block names to leave unchanged.

    Raises:
        ValueError: If the bits are others than these.
    """

    name: ClassVar[str] = "rounding"

    bits: int = 4
    fitted: bool = True
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in ROUNDED:
            raise ValueError(f"bits={self.bits!r} must be one of {sorted(ROUNDED)}.")

    @property
    def _form(self) -> Rounded:
        found: Rounded = get_format(ROUNDED[self.bits], Rounded)
        return found

    @property
    def _reads_tokens(self) -> bool:
        return self.fitted and self._form.is_fitted

    @property
    def needs(self) -> frozenset[str]:
        """Sampled tokens, if numbers are fitted to them; else nothing."""
        return frozenset({"frequency", "sample"} if self._reads_tokens else ())

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`; rows of all matrices have to fill whole words."""
        super().check(model)
        for block in selected_blocks(model, self.layers, self.protect):
            odd = [size for size in (block.hidden_size, block.intermediate_size) if not self._form.fits(1, 1, size)]
            if odd:
                raise ValueError(
                    f"{32 // self.bits} numbers of {self.bits} bits fill a word, which does not divide the {odd[0]} "
                    f"columns of a matrix of {block.name}. Leave the block out with protect, or use a byte budget."
                )

    def factors(self, context: BlockContext, allocated: Any) -> StoredExperts | None:
        """See `FormattingStage.factors`."""
        if not self.applies(context):
            return None
        sample = context.sample() if self._reads_tokens else None
        return StoredExperts(
            tuple(
                self._form.rounded(
                    single_expert(context.experts, index), None if sample is None else sample.of_expert(index)
                )
                for index in range(context.experts.num_experts)
            )
        )

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """See `Stage.costs`."""
        chosen = selected_blocks(model, self.layers, self.protect)
        return {**before, **{block.name: self._cost(block, before[block.name]) for block in chosen}}

    def _cost(self, block: BlockInfo, before: BlockCost) -> BlockCost:
        matrices = round(block.expert_multiply_adds / (block.intermediate_size * block.hidden_size))
        entering, leaving = (block.intermediate_size, block.hidden_size), (block.hidden_size, block.intermediate_size)
        specs = [
            spec for shape in [entering] * (matrices - 1) + [leaving] for spec in self._form.tensors(1, *shape).values()
        ]
        biases = block.expert_parameters - block.expert_multiply_adds
        words = [spec for spec in specs if spec.dtype is not None]
        return replace(
            before,
            parameters=before.experts * (sum(spec.numbers for spec in specs if spec.dtype is None) + biases),
            indices=before.experts * sum(spec.numbers for spec in words),
            index_bytes=before.experts * sum(spec.bytes(0) for spec in words),
            stock=False,
        )
