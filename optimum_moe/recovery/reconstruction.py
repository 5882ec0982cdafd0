"""Layer-wise reconstruction: each compressed MoE block is fitted to the outputs of the original's block.

Before a training end to end, every block learns on its own what the block that it replaces answers to the same inputs,
those of the original model. No gradient passes from one block to another, so a step costs about one forward pass of the
original, and all blocks learn at the same time.

Shape letters: T tokens (any leading axes), H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_moe.recovery.objective import Inputs, model_inputs
from optimum_moe.recovery.trainable import blocks_of

_WARMUP = 0.05


def reconstruct(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Inputs],
    groups: Sequence[dict[str, Any]],
    progress: bool = True,
) -> None:
    """Fit each MoE block of a student to the outputs of its teacher's, in place; parameters that train are changed.

    Args:
        student: The compressed model.
        teacher: The original, on the same device.
        batches: One step each.
        groups: Of the optimizer: the parameters with their learning rates.
        progress: Show a progress bar.

    Raises:
        ValueError: If the models have different blocks, or none has a parameter that trains.
    """
    pairs = _pairs(student, teacher)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, math.ceil(_WARMUP * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / len(batches)))),
    )
    with ExitStack() as stack:
        for own, original in pairs:
            stack.enter_context(_learning(own, original))
        for batch in tqdm(batches, desc="reconstruct", disable=not progress):
            inputs = {name: value.to(teacher.device) for name, value in batch.items()}
            optimizer.zero_grad()
            with torch.no_grad():
                teacher(**model_inputs(inputs), use_cache=False)
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()


def _pairs(student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """Blocks of the student that train, each with the teacher's."""
    own = [found.module(student) for found in blocks_of(student)]
    originals = [found.module(teacher) for found in blocks_of(teacher)]
    if len(own) != len(originals):
        raise ValueError(
            f"The teacher has {len(originals)} MoE blocks and the student {len(own)}, so that blocks cannot be fitted "
            "one to another. Pass reconstruct=0."
        )
    return [
        (block, original)
        for block, original in zip(own, originals, strict=True)
        if any(parameter.requires_grad for parameter in block.parameters())
    ]


@contextmanager
def _learning(own: nn.Module, original: nn.Module) -> Iterator[None]:
    """Context in which each forward pass of an original block adds to the gradients of the one that replaces it."""

    def learn(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        with torch.enable_grad():
            relative_error(_states(own(*given, **named)), _states(output)).backward()

    handle = original.register_forward_hook(learn, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def relative_error(output_TH: Tensor, target_TH: Tensor) -> Tensor:
    """Squared error over the target's squares, so that all blocks count alike."""
    target_TH = target_TH.detach().float()
    return (output_TH.float() - target_TH).square().mean() / target_TH.square().mean().clamp(min=1e-12)


def _states(output: Any) -> Tensor:
    """The hidden states among what a block returns, which may add router logits."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
