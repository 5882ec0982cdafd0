"""Run a model over calibration data and collect statistics of its MoE blocks."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_moe.calibration.boundaries import bounded_layers
from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig
from optimum_moe.calibration.gradients import differentiable, gives_logits, sampled_loss
from optimum_moe.calibration.layer_watch import watch_layers
from optimum_moe.calibration.masks import padding_mask, rows_in_layer, text_blocks
from optimum_moe.calibration.modalities import Placeholders, placeholders, token_modalities, with_modalities
from optimum_moe.calibration.random_draws import generator_for
from optimum_moe.calibration.recorder import BlockRecorder, joined
from optimum_moe.calibration.residual import residual_before
from optimum_moe.memory_errors import explanation, ran_out
from optimum_moe.model_info import BlockInfo
from optimum_moe.ranks import SINGLE, Ranks
from optimum_moe.statistics import STANDARD, BlockStatistics, Statistics
from optimum_moe.surgeons import FoundBlock


def observe(
    model: PreTrainedModel,
    blocks: Sequence[FoundBlock],
    batches: CalibrationBatches,
    config: CalibrationConfig,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
    draws: int = 0,
    needs: Collection[str] = STANDARD,
    ranks: Ranks = SINGLE,
) -> Statistics:
    """Run the forward pass of every batch once, with a recorder at every block.

    Where memory runs out, rows of text are observed again in batches of half as many, with a warning.

    Args:
        model: The model, on any device; in eval mode during the call.
        blocks: Its MoE blocks.
        batches: Model inputs with their padding masks.
        config: Reservoir size, seed and the policy for unseen experts.
        source: Identity of the model, stored with the statistics.
        progress: Show a progress bar.
        draws: Number of backward passes per batch, each from a loss with labels sampled from the model's predictions;
            the gradients at the experts' outputs are sampled.
        needs: Names of the observations to collect, see `OBSERVATIONS`; default the standard ones. Those by modality
            are always collected where the data have media.
        ranks: Processes that share the batches; each of them gets the statistics of all batches.

    Returns:
        Statistics of all blocks. Experts that no token reached cause a warning or an error, see `unseen`.

    Raises:
        ValueError: If a mask does not fit the tokens of a block, an observed value is NaN or infinite, memory runs out
            on the smallest batches, or `unseen="error"` and no token was routed to an expert.
    """
    while True:
        failed, recorders = "", dict[str, BlockRecorder]()
        try:
            recorders = _recorded(model, blocks, batches, config, progress, draws, needs, ranks)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            doing, remedy = pass_advice(batches, model.device)
            failed = str(explanation(error, doing, remedy))
        # Outside of the handler: the traceback would keep the tensors of the failed attempt.
        failures = [said for said in ranks.gathered(failed) if said]
        if not failures:
            break
        smaller = batches.halved()
        if smaller is None:
            raise ValueError(failures[0])
        clear_device_cache(garbage_collection=True)
        warnings.warn(f"{failures[0]} All text is observed again with that.", stacklevel=2)
        batches = smaller
    blocks_seen = {name: joined(ranks.gathered(recorder.part())) for name, recorder in recorders.items()}
    statistics = Statistics(
        blocks_seen,
        {
            **batches.description,
            "tokens_by_block": reached_tokens(blocks_seen),
            "reservoir_tokens": config.sampled_tokens,
        },
        source or {},
        config.unseen,
    )
    check_observed(statistics, stacklevel=3)
    return statistics


def pass_advice(batches: CalibrationBatches, device: torch.device, spreads: bool = True) -> tuple[str, str]:
    """What a pass over calibration data is called where memory runs out, and what to do.

    Args:
        batches: The data.
        device: Where the model computes.
        spreads: Whether the model may be on several devices.
    """
    smaller, size = batches.halved(), batches.description["batch_size"]
    doing = f"Observing {'a batch' if size is None else f'batches of batch_size={size}'} on {device}"
    if smaller is not None:
        return doing, f"Pass batch_size={smaller.description['batch_size']}."
    remedy = "Give shorter inputs"
    if size is not None:
        remedy = f"Pass a sequence_length below {batches.description['sequence_length']}"
    more = ", or spread the model over more devices with device_map='auto'" if spreads else ""
    return doing, f"{remedy}{more}."


def _recorded(
    model: PreTrainedModel,
    blocks: Sequence[FoundBlock],
    batches: CalibrationBatches,
    config: CalibrationConfig,
    progress: bool,
    draws: int,
    needs: Collection[str],
    ranks: Ranks,
) -> dict[str, BlockRecorder]:
    """What the recorders of all blocks saw of this process' batches."""
    known = placeholders(model.config)
    needs = with_modalities(needs, batches, known)
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
    was_training = model.training
    model.eval()
    part = running_part(model)
    extra = _cheap_forward_arguments(part, needs_logits=draws > 0)
    in_text = text_blocks(model, blocks)
    with ExitStack() as stack:
        stack.enter_context(differentiable(part) if draws else torch.no_grad())
        stack.enter_context(without_cache(model))
        stack.enter_context(watch_layers(model, blocks, recorders))
        if draws:
            stack.enter_context(bounded_layers(model, blocks))
        for found in blocks:
            block, recorder = found.module(model), recorders[found.info.name]
            if "residual" in needs:
                recorder.residual_of = stack.enter_context(residual_before(model, found.info.name))
            stack.enter_context(found.surgeon.watch(block, recorder))
            if draws:
                stack.enter_context(found.surgeon.watch_gradient(block, recorder.gradient))
        stack.callback(model.train, was_training)
        going_back: bool | None = None
        numbered = ranks.share(list(enumerate(batches)))
        for number, batch in tqdm(numbered, desc="calibrate", disable=not (progress and ranks.writes)):
            inputs = placed(batch, model)
            for found in blocks:
                recorder, its_text = recorders[found.info.name], found.info.name in in_text
                expect_tokens(recorder, number, inputs, found.info, its_text, known)
            output = part(**inputs, **extra)
            if going_back is None:
                # Without gradients a stage measures output errors, and warns.
                going_back = draws > 0 and gives_logits(output, inputs)
            labels = generator_for("labels", config.random_seed, number)
            for draw in range(draws if going_back else 0):
                sampled_loss(part, output, inputs, labels).backward(retain_graph=draw + 1 < draws)
    return recorders


def expect_tokens(
    recorder: BlockRecorder,
    number: int,
    inputs: Mapping[str, Any],
    block: BlockInfo,
    in_text: bool,
    known: Placeholders,
) -> None:
    """Tell the recorder of a block what the tokens of the next forward pass are.

    Args:
        recorder: The recorder.
        number: Number of the batch.
        inputs: The batch.
        block: The block.
        in_text: Whether it is one of the `text_blocks`.
        known: The model's placeholders.
    """
    recorder.expect(
        number,
        padding_mask(inputs, block, in_text),
        token_modalities(inputs, block, in_text, known) if "modalities" in recorder.needs else None,
        rows_in_layer(inputs, block),
    )


def check_observed(statistics: Statistics, stacklevel: int = 2) -> None:
    """Check the statistics of a whole model: refuse NaN, and apply the policy `unseen` to experts without tokens."""
    statistics.check_finite()
    unseen = statistics.unseen_report()
    if unseen is not None and statistics.unseen == "error":
        raise ValueError(unseen)
    for report in (statistics.silent_report(), unseen if statistics.unseen == "warn" else None):
        if report is not None:
            warnings.warn(report, stacklevel=stacklevel)


def reached_tokens(blocks: Mapping[str, BlockStatistics]) -> dict[str, int]:
    """Number of tokens by block name with layer numbers as "*"; the minimum if layers differ."""
    reached: dict[str, int] = {}
    for name, block in blocks.items():
        pattern = re.sub(r"\b\d+\b", "*", name)
        reached[pattern] = min(reached.get(pattern, block.num_tokens), block.num_tokens)
    return reached


def running_part(model: PreTrainedModel) -> Any:
    """The module that a forward pass runs: the model, or the thinker of an omni model, whose talker only generates.

    Raises:
        ValueError: If the model has no forward pass.
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


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Context in which forward passes keep no keys and values, also where that is a setting of the config alone."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in found if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def forward_calls(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Iterator[Callable[[], Any]]:
    """The forward pass of each batch, without a cache and with logits of the last position only."""
    part = running_part(model)
    for batch in batches:
        yield partial(part, **placed(batch, model), **_cheap_forward_arguments(part))


def backward_calls(
    model: PreTrainedModel, inputs: Iterable[Mapping[str, Any]], config: CalibrationConfig
) -> Iterator[Callable[[], None]]:
    """The forward pass of each batch and, if it gives logits, the backward pass of `sampled_loss`.

    Each call drops its logits and its graph as it goes back.

    Args:
        model: The model, whose parameters take no gradients.
        inputs: Inputs of each batch, on the model's device.
        config: The seed of the labels.
    """
    part = running_part(model)
    extra = _cheap_forward_arguments(part, needs_logits=True)
    for number, batch in enumerate(inputs):
        labels = generator_for("labels", config.random_seed, number)
        yield partial(_go_there_and_back, part, {**batch, **extra}, labels)


def _go_there_and_back(part: Any, inputs: Mapping[str, Any], labels: torch.Generator) -> None:
    # Without the threads that autograd has for each device, backward passes can wait for each other.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        loss = _loss(part, inputs, labels)
        if loss is not None:
            loss.backward()


def _loss(part: Any, inputs: Mapping[str, Any], labels: torch.Generator) -> torch.Tensor | None:
    output = part(**inputs)
    return sampled_loss(part, output, inputs, labels) if gives_logits(output, inputs) else None


def _cheap_forward_arguments(model: nn.Module, needs_logits: bool = False) -> dict[str, Any]:
    """Arguments that turn off what calibration does not need: the cache, and the logits of all but one position."""
    accepted = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 0 if needs_logits else 1}
    return {name: value for name, value in wanted.items() if name in accepted}
