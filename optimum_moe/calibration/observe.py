"""Run a model over calibration data and record what its MoE blocks do."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig
from optimum_moe.calibration.gradients import differentiable, gives_logits, sampled_loss
from optimum_moe.calibration.masks import padding_mask, text_blocks
from optimum_moe.calibration.recorder import BlockRecorder
from optimum_moe.statistics import OBSERVATIONS, BlockStatistics, Statistics
from optimum_moe.surgeons import FoundBlock


def observe(
    model: PreTrainedModel,
    blocks: Sequence[FoundBlock],
    batches: CalibrationBatches,
    config: CalibrationConfig,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
    draws: int = 0,
    needs: Collection[str] = tuple(OBSERVATIONS),
) -> Statistics:
    """Forward every batch once, with a recorder behind every block.

    Args:
        model: The model, on any device; put in eval mode for the time of the call.
        blocks: Its MoE blocks.
        batches: Model inputs with their padding masks.
        config: Reservoir size, seed and the rule for unseen experts.
        source: Identity of the model, stored with the statistics.
        progress: Show a progress bar.
        draws: Also go back so many times from the loss of every batch, with labels drawn from the model's predictions,
            and sample the gradients at the experts' outputs.
        needs: Names of what is to be observed, see `OBSERVATIONS`; default everything.

    Returns:
        Statistics of all blocks. Experts that no token reached are warned about (or raise, see `unseen`).

    Raises:
        ValueError: If a mask does not fit the tokens of a block, what was observed is NaN or infinite, or
            `unseen="error"` and an expert got no token.
    """
    recorders = {
        found.info.name: BlockRecorder(
            found.info.num_experts,
            found.info.intermediate_size,
            found.info.hidden_size,
            needs=needs,
            reservoir_tokens=config.sampled_tokens,
            seed=config.random_seed,
            draws=draws,
        )
        for found in blocks
    }
    generator = torch.Generator().manual_seed(config.random_seed)
    was_training = model.training
    model.eval()
    part = running_part(model)
    extra = _cheap_forward_arguments(part, needs_logits=draws > 0)
    in_text = text_blocks(model, blocks)
    with ExitStack() as stack:
        stack.enter_context(differentiable(part) if draws else torch.no_grad())
        for found in blocks:
            block, recorder = found.module(model), recorders[found.info.name]
            stack.enter_context(found.surgeon.watch(block, recorder))
            if draws:
                stack.enter_context(found.surgeon.watch_gradient(block, recorder.gradient))
        stack.callback(model.train, was_training)
        going_back: bool | None = None
        for batch in tqdm(batches, desc="calibrate", disable=not progress):
            inputs = placed(batch, model)
            for found in blocks:
                mask_T = padding_mask(inputs, found.info, found.info.name in in_text)
                recorders[found.info.name].expect(mask_T)
            output = part(**inputs, **extra)
            if going_back is None:
                # Without gradients a method measures output errors, and says so.
                going_back = draws > 0 and gives_logits(output, inputs)
            for draw in range(draws if going_back else 0):
                sampled_loss(part, output, inputs, generator).backward(retain_graph=draw + 1 < draws)
    statistics = Statistics(
        {name: recorder.statistics() for name, recorder in recorders.items()},
        {**batches.description, "tokens_by_block": reached_tokens(recorders)},
        source or {},
        config.unseen,
    )
    judge(statistics, stacklevel=3)
    return statistics


def judge(statistics: Statistics, stacklevel: int = 2) -> None:
    """Raise a `ValueError` or warn where statistics of a whole model are broken or lack experts; see `unseen`."""
    statistics.check_finite()
    unseen = statistics.unseen_report()
    if unseen is not None and statistics.unseen == "error":
        raise ValueError(unseen)
    for report in (statistics.silent_report(), unseen if statistics.unseen == "warn" else None):
        if report is not None:
            warnings.warn(report, stacklevel=stacklevel)


def reached_tokens(blocks: Mapping[str, BlockRecorder | BlockStatistics]) -> dict[str, int]:
    """Tokens that each kind of block saw, layer numbers as "*"; the fewest where layers differ."""
    reached: dict[str, int] = {}
    for name, block in blocks.items():
        pattern = re.sub(r"\b\d+\b", "*", name)
        reached[pattern] = min(reached.get(pattern, block.num_tokens), block.num_tokens)
    return reached


def running_part(model: PreTrainedModel) -> Any:
    """What runs in a forward pass: the model, or the thinker of an omni model, whose talker runs in generation only.

    Raises:
        ValueError: If the model can only generate.
    """
    if type(model).forward is not nn.Module.forward:
        return model
    if not hasattr(model, "thinker"):
        raise ValueError(
            f"{type(model).__name__} has no forward pass, so it cannot be calibrated. Compress its language model."
        )
    return model.thinker


def placed(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """A batch with tensors on the model's device, floating ones (pixels, audio features) in its dtype."""

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    return {name: place(value) for name, value in batch.items()}


def forward_calls(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Iterator[Callable[[], Any]]:
    """The forward pass of each batch, without a cache and needless logits."""
    part = running_part(model)
    for batch in batches:
        yield partial(part, **placed(batch, model), **_cheap_forward_arguments(part))


def _cheap_forward_arguments(model: nn.Module, needs_logits: bool = False) -> dict[str, Any]:
    """Arguments that spare what calibration does not need: the cache and the logits of all but one position."""
    accepted = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 0 if needs_logits else 1}
    return {name: value for name, value in wanted.items() if name in accepted}
