"""What the selected experts of one block give in a forward pass of its model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from optimum_moe.surgeons import find_blocks


@torch.no_grad()
def output_of(model: PreTrainedModel, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(T, H) sum of the experts that a block selects."""
    seen: list[torch.Tensor] = []

    def after(module, args, output) -> None:
        summed = output[0] if isinstance(output, tuple) else output
        seen.append(summed.flatten(0, -2).clone())

    found = next(found for found in find_blocks(model) if found.info.name == name)
    handle = found.surgeon.summing_module(found.module(model)).register_forward_hook(after)
    model(**inputs)
    handle.remove()
    return seen[0]
