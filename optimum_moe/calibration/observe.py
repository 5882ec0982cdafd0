"""Run a model over calibration data and record what its MoE blocks do."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig
from optimum_moe.calibration.recorder import BlockRecorder
from optimum_moe.statistics import Statistics
from optimum_moe.surgeons import FoundBlock


def observe(
    model: PreTrainedModel,
    blocks: Sequence[FoundBlock],
    batches: CalibrationBatches,
    config: CalibrationConfig,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Statistics:
    """Forward every batch once, with a recorder behind every block.

    Args:
        model: The model, on any device; put in eval mode for the time of the call.
        blocks: Its MoE blocks.
        batches: Model inputs with their padding masks.
        config: Reservoir size, seed and the rule for unseen experts.
        source: Identity of the model, stored with the statistics.
        progress: Show a progress bar.

    Returns:
        Statistics of all blocks. Experts that no token reached are warned about (or raise, see `unseen`).

    Raises:
        ValueError: If a mask does not fit the tokens of a block, or `unseen="error"` and an expert got no token.
    """
    recorders = {
        found.info.name: BlockRecorder(
            found.info.num_experts,
            found.info.intermediate_size,
            found.info.hidden_size,
            config.reservoir_tokens,
            config.seed,
        )
        for found in blocks
    }
    was_training = model.training
    model.eval()
    extra = _cheap_forward_arguments(model)
    with ExitStack() as stack, torch.no_grad():
        for found in blocks:
            stack.enter_context(found.surgeon.watch(found.module(model), recorders[found.info.name]))
        stack.callback(model.train, was_training)
        for batch in tqdm(batches, desc="calibrate", disable=not progress):
            inputs = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            for found in blocks:
                recorders[found.info.name].expect(_mask(inputs, found.info.stack))
            model(**inputs, **extra)
    statistics = Statistics(
        {name: recorder.statistics() for name, recorder in recorders.items()},
        batches.description,
        source or {},
        config.unseen,
    )
    report = statistics.unseen_report()
    if report is not None:
        if config.unseen == "error":
            raise ValueError(report)
        if config.unseen == "warn":
            warnings.warn(report, stacklevel=2)
    return statistics


def _mask(inputs: Mapping[str, Any], stack: str) -> torch.Tensor | None:
    if stack == "decoder" and "decoder_input_ids" in inputs:
        return inputs.get("decoder_attention_mask")
    return inputs.get("attention_mask")


def _cheap_forward_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that spare what calibration does not need: the cache and the logits of all but one position."""
    accepted = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in accepted}
