"""Reports of the layers around MoE blocks: the residual stream before and after, with routed experts and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from optimum_moe.calibration.recorder import BlockRecorder
from optimum_moe.surgeons import FoundBlock

LAYER_OBSERVATIONS = frozenset({"layer_similarity", "residual_stream", "experts_similarity"})


@contextmanager
def watch_layers(
    model: nn.Module, blocks: Sequence[FoundBlock], recorders: Mapping[str, BlockRecorder]
) -> Iterator[None]:
    """Report each call of the layers around blocks, if the recorders of the blocks read something of them.

    Args:
        model: The model.
        blocks: The MoE blocks.
        recorders: A recorder for each of them, by its name.
    """
    by_layer: dict[str, list[FoundBlock]] = {}
    for found in blocks:
        if found.info.layer and recorders[found.info.name].needs & LAYER_OBSERVATIONS:
            by_layer.setdefault(found.info.layer, []).append(found)
    with ExitStack() as stack:
        for path, inside in by_layer.items():
            stack.enter_context(
                replaced_forward(model.get_submodule(path), partial(run_layer, model, inside, recorders))
            )
        yield


@contextmanager
def replaced_forward(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Context in which calls of a module go to `run(module, forward, args, kwargs)`, which may call `forward`."""
    before, forward = vars(module).get("forward"), module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(module, forward, args, kwargs)

    vars(module)["forward"] = call
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            # accelerate replaces the forward of a module instance.
            vars(module)["forward"] = before


def run_layer(
    model: nn.Module,
    inside: Sequence[FoundBlock],
    recorders: Mapping[str, BlockRecorder],
    layer: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a layer, and report the call to the recorders of the blocks in it; returns its output."""
    without = {}
    for found in inside:
        if "experts_similarity" in recorders[found.info.name].needs:
            silent = found.surgeon.silenced(found.module(model))
            with silent, paused(recorders[each.info.name] for each in inside), torch.no_grad():
                # The forward of the class: wrappers of the instance belong to the real call.
                output = type(layer).forward(layer, *map(_copied, args), **{k: _copied(v) for k, v in kwargs.items()})
            without[found.info.name] = _tokens(output)
    before_TH = _tokens(args[0] if args else kwargs["hidden_states"]).detach()
    # Some layers add to their input in place.
    before_TH = before_TH.clone()
    output = forward(*args, **kwargs)
    for found in inside:
        recorders[found.info.name].layer(before_TH, _tokens(output), without.get(found.info.name))
    return output


def _copied(value: Any) -> Any:
    """An argument for another call; a cache would be appended to twice."""
    return deepcopy(value) if isinstance(value, Cache) else value


def _tokens(output: Any) -> torch.Tensor:
    """The residual stream with one row for each token; several streams of a token are one row."""
    stream: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return stream if stream.dim() == 2 else stream.flatten(0, 1).flatten(1)


@contextmanager
def paused(recorders: Iterator[BlockRecorder]) -> Iterator[None]:
    """Context in which calls of blocks are not recorded."""
    stopped = list(recorders)
    for recorder in stopped:
        recorder.paused = True
    try:
        yield
    finally:
        for recorder in stopped:
            recorder.paused = False
