"""Ernie 4.5 VL: each layer has a pool of experts for text tokens and one for vision tokens, each with its router."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from optimum_moe.nn import SwappedModule, swapped_class
from optimum_moe.plan import Routing
from optimum_moe.surgeons.architecture import Architecture, RouterTensor
from optimum_moe.surgeons.base import Block
from optimum_moe.surgeons.generic import GenericSurgeon
from optimum_moe.surgeons.scoring import softmax

_ROW = Architecture(
    "ernie4_5_vl_moe",
    "Ernie4_5_VLMoeSparseMoeBlock",
    ("moe_num_experts", "num_experts"),
    router_tensors=("weight", RouterTensor("moe_statics.e_score_correction_bias", axis=1)),
    scoring=softmax,
    block_counts=("num_experts",),
)


class PaddedPool(SwappedModule):
    """Mixin of a pool with fewer experts than its layer was built with.

    The layer writes the logits of both pools into one tensor of the original width; entries of removed experts are the
    lowest value of the dtype.
    """

    logits_width: int
    num_experts: int

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pool's output and its logits, both flat."""
        output, logits = super().forward(hidden_states)
        missing, lowest = self.logits_width - self.num_experts, torch.finfo(logits.dtype).min
        return output, nn.functional.pad(logits.view(-1, self.num_experts), (0, missing), value=lowest).flatten()


class Ernie45VLSurgeon(GenericSurgeon):
    """The generic surgeon for one pool, whose number of experts may differ from that of the layer's other pool."""

    def __init__(self) -> None:
        super().__init__(_ROW)

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a pool, padded or not."""
        return any(cls.__name__ == _ROW.block for cls in type(module).__mro__)

    def objection(self, counts: Mapping[str, int], formed: Collection[str]) -> str | None:
        """See `Surgeon.objection`: transformers cuts the list of a layer's experts into halves on loading."""
        for name, count in counts.items():
            other = f"{name.removesuffix('.text_moe')}.vision_moe"
            # The text model by itself is saved tensor by tensor.
            if not name.endswith(".text_moe") or "language_model." not in name or other not in counts:
                continue
            halves = "A checkpoint of Ernie 4.5 VL stores text and vision experts of a layer in two equal halves, but"
            if counts[other] != count:
                return (
                    f"{halves} {name} would keep {count} and {other} {counts[other]}. Keep the same number in both: "
                    "calibrate with images, select both or neither with layers= and protect=, and use "
                    'allocation="uniform".'
                )
            if (name in formed) != (other in formed):
                changed, whole = (name, other) if name in formed else (other, name)
                return (
                    f"{halves} the experts of {changed} would take another form and those of {whole} stay as they are. "
                    "Change both or neither: calibrate with images, and select both with layers= and protect=."
                )
        return None

    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """See `StackedSurgeon.install`; a shorter router has its logits padded."""
        width = self.num_experts(block)
        super().install(block, num_groups, routing)
        if routing == "reduce":
            block.__class__ = swapped_class(PaddedPool, type(block))
            block.logits_width = width
