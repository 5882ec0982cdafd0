"""Observes layer by layer: all batches pass one layer, which is then recorded or cut, before the next layer.

If gradients are observed, a first pass goes forward through all layers, and each layer is recorded on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch

from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig
from optimum_moe.calibration.gradients import differentiable
from optimum_moe.calibration.layer_watch import LAYER_OBSERVATIONS, run_layer
from optimum_moe.calibration.masks import text_blocks
from optimum_moe.calibration.modalities import placeholders, with_modalities
from optimum_moe.calibration.observe import backward_calls, expect_tokens, forward_calls, placed, without_cache
from optimum_moe.calibration.recorder import BlockRecorder
from optimum_moe.calibration.residual import residual_before
from optimum_moe.checkpoint.system import return_freed
from optimum_moe.engine.layer_backward import Save
from optimum_moe.engine.layers import Layer, other_layers
from optimum_moe.engine.lockstep import Backward, Lockstep, Runner, Turn
from optimum_moe.engine.progress import LayerReport, Progress
from optimum_moe.engine.store import Observed, Store
from optimum_moe.statistics import STANDARD, BlockStatistics

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Arguments and output of one call of a block."""

NumberedBatch = tuple[int, Any]
"""Number of a batch and its inputs."""

Keep = Callable[[Any], Any]
"""Stores the output of a layer, and returns an equal one that may be backed by a file."""


def keep_in_memory(output: Any) -> Any:
    """Return the output of a layer itself, which remains in memory."""
    return output


class Handler(Protocol):
    """Receives each layer during the pass; the layer is loaded during the call."""

    def observed(self, layer: Layer, statistics: Observed, report: LayerReport) -> None:
        """Handle the statistics of an observed layer."""

    def passed(self, layer: Layer) -> None:
        """Handle a layer that had nothing to observe."""

    def unreached(self, statistics: Observed) -> None:
        """Handle the empty statistics of all layers that no batch reached; `observed` follows for each of them."""


class LayerwiseRun:
    """One pass of all batches through a model.

    Args:
        store: Source of the model's tensors.
        batches: Model inputs with their padding masks.
        config: Reservoir size and seed.
        handler: Receives the observed layers.
        pending: Names of the layers to observe.
        propagate: Error propagation: observe each layer on the outputs of the compressed layers before it.
        keep: Stores the output of a layer while its forward pass waits.
        needs: Names of the observations to collect, see `OBSERVATIONS`; default the standard ones.
        save: Stores what enters a layer until the backward pass, in which the layers are then observed with gradients
            of the loss; None for forward passes alone. Not with `propagate`.
    """

    def __init__(
        self,
        store: Store,
        batches: CalibrationBatches,
        config: CalibrationConfig,
        handler: Handler,
        pending: Collection[str],
        propagate: bool = False,
        keep: Keep = keep_in_memory,
        needs: Collection[str] = STANDARD,
        save: Save | None = None,
    ) -> None:
        self.store, self.batches, self.config, self.handler = store, batches, config, handler
        self.pending, self.propagate, self.keep, self.save = set(pending), propagate, keep, save
        self._placeholders = placeholders(store.model.config)
        self.needs = with_modalities(needs, batches, self._placeholders)
        self._layers = {layer.name: layer for layer in store.layers if not layer.tensors}
        self._in_text = text_blocks(store.model, store.blocks)
        self._entered: dict[Turn, int] = {}
        self._seen: set[str] = set()

    def run(self, progress: Progress) -> None:
        """Run the pass; layers that no batch reaches are handled at the end, with empty statistics.

        Raises:
            ValueError: If a mask does not fit its batch, or a forward pass runs through a layer twice.
        """
        store = self.store
        # Layers of other towers go first, so that all batches meet at those with MoE blocks.
        names = [name for name in self._layers if not self._layers[name].blocks]
        names = [*other_layers(store.model, store.layers), *names]
        names += [name for name in self._layers if self._layers[name].blocks]
        backward = None
        if self.save is not None:
            backward = Backward({layer.name for layer in store.layers if layer.blocks}, self.save)
        differentiated = differentiable(store.model) if backward else nullcontext()
        with without_cache(store.model), differentiated, store.running():
            inputs = [placed(batch, store.model) for batch in self.batches]
            made = backward_calls(store.model, inputs, self.config) if backward else forward_calls(store.model, inputs)
            with Lockstep(store.model, names, list(made), self.keep, backward) as lockstep:
                for turn, runners in lockstep.turns():
                    batches = {id(runner): (number, inputs[number]) for number, runner in enumerate(lockstep.runners)}
                    rows = [batches[id(runner)] for runner in runners]
                    # Free the modules between the layers before the next layer is loaded.
                    store.free_between_layers()
                    self._pass(lockstep, turn, runners, rows, progress)
                    if turn.back and not self.pending - self._seen:
                        break
        self._finish(progress)

    def _finish(self, progress: Progress) -> None:
        """Handle the layers that were not observed."""
        left = [layer for layer in self.store.layers if layer.name in self.pending - self._seen]
        if self.save is not None and any(Turn(layer.name) in self._entered for layer in left):
            # The loss does not depend on these layers, or the model gives no logits.
            self.pending, self.save = {layer.name for layer in left}, None
            self._entered.clear()
            self.run(progress)
            return
        nothing = {layer.name: _statistics(self._recorders(layer)) for layer in left}
        self.handler.unreached({name: block for observed in nothing.values() for name, block in observed.items()})
        for layer in left:
            with progress.layer(layer) as report, self.store.loaded(layer):
                self.handler.observed(layer, nothing[layer.name], report)

    def _pass(
        self,
        lockstep: Lockstep,
        turn: Turn,
        runners: Sequence[Runner],
        rows: Sequence[NumberedBatch],
        progress: Progress,
    ) -> None:
        layer = self._layers.get(turn.layer)
        if layer is None:
            for runner in runners:
                runner.advance()
            return
        if layer.blocks and turn in self._entered:
            raise ValueError(
                f"A forward pass runs through {layer.name} more than once, which a layerwise pass does not support. "
                'Use engine="memory" without error propagation.'
            )
        self._entered[turn] = len(runners)
        forward = self._entered[Turn(layer.name)]
        if layer.blocks and len(runners) < forward:
            raise ValueError(
                f"The loss depends on {layer.name} for {len(runners)} of the {forward} batches that run through it. "
                "Give batches with logits for all of their tokens, or choose a recipe that reads no gradients."
            )
        goes_on = self.save is not None and not turn.back
        if not goes_on:
            self._seen.add(layer.name)
        lockstep.last = layer.name if self.save is None and not self.pending - self._seen else None
        with progress.layer(layer) as report, self.store.loaded(layer):
            if self.propagate and layer.blocks:
                self._pass_twice(lockstep, layer, runners, rows, report)
                return
            observes = not goes_on and layer.name in self.pending
            recorders = self._recorders(layer)
            for recorder in recorders.values():
                # The layer runs with the same kernels, whether it is recorded or not.
                recorder.paused = not observes
            if observes and LAYER_OBSERVATIONS.intersection(self.needs):
                module = self.store.model.get_submodule(layer.name)
                lockstep.run = partial(run_layer, self.store.model, layer.blocks, recorders, module)
            measures = observes and progress.show and self.save is None
            with ExitStack() as stack:
                stack.enter_context(self._watched(layer, recorders))
                calls = stack.enter_context(_last_calls(self.store, layer)) if measures else {}
                self._advance(layer, recorders, runners, rows)
            lockstep.run = None
            if observes:
                self.handler.observed(layer, _statistics(recorders), report)
                if measures:
                    report.error = _error(self.store, layer, calls)
            elif goes_on:
                report.done = "passed"
            else:
                report.done = "finished before"
                self.handler.passed(layer)

    def _pass_twice(
        self,
        lockstep: Lockstep,
        layer: Layer,
        runners: Sequence[Runner],
        rows: Sequence[NumberedBatch],
        report: LayerReport,
    ) -> None:
        """Observe the original layer, cut it, and continue with the outputs of the cut one."""
        if layer.name in self.pending:
            lockstep.rehearsed.add(layer.name)
            recorders = self._recorders(layer)
            with self._watched(layer, recorders):
                self._advance(layer, recorders, runners, rows)
            lockstep.rehearsed.discard(layer.name)
            self.handler.observed(layer, _statistics(recorders), report)
        else:
            report.done = "finished before"
            self.handler.passed(layer)
        for runner in runners:
            runner.advance()

    def _advance(
        self,
        layer: Layer,
        recorders: Mapping[str, BlockRecorder],
        runners: Sequence[Runner],
        rows: Sequence[NumberedBatch],
    ) -> None:
        for runner, (number, inputs) in zip(runners, rows, strict=True):
            for found in layer.blocks:
                block = found.info
                in_text = block.name in self._in_text
                expect_tokens(recorders[block.name], number, inputs, block, in_text, self._placeholders)
            runner.advance()
            # The allocator keeps freed memory per thread, so return it before the next thread runs.
            return_freed()

    def _recorders(self, layer: Layer) -> dict[str, BlockRecorder]:
        return {
            found.info.name: BlockRecorder(
                found.info.num_experts,
                found.info.intermediate_size,
                found.info.hidden_size,
                needs=self.needs,
                reservoir_tokens=self.config.sampled_tokens,
                seed=self.config.random_seed,
                draws=int(self.save is not None),
            )
            for found in layer.blocks
        }

    @contextmanager
    def _watched(self, layer: Layer, recorders: Mapping[str, BlockRecorder]) -> Iterator[None]:
        with ExitStack() as stack:
            for found in layer.blocks:
                recorder = recorders[found.info.name]
                if "residual" in self.needs:
                    recorder.residual_of = stack.enter_context(residual_before(self.store.model, found.info.name))
                block = found.module(self.store.model)
                stack.enter_context(found.surgeon.watch(block, recorder))
                if self.save is not None:
                    stack.enter_context(found.surgeon.watch_gradient(block, recorder.gradient))
            yield


def _statistics(recorders: Mapping[str, BlockRecorder]) -> dict[str, BlockStatistics]:
    return {name: recorder.statistics() for name, recorder in recorders.items()}


@contextmanager
def _last_calls(store: Store, layer: Layer) -> Iterator[dict[str, Call]]:
    """Record the last call of each block of a layer, by block name."""
    calls: dict[str, Call] = {}

    def after(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] = args, kwargs, output

    with ExitStack() as stack:
        for found in layer.blocks:
            hook = partial(after, found.info.name)
            handle = found.module(store.model).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


@torch.no_grad()
def _error(store: Store, layer: Layer, calls: Mapping[str, Call]) -> float | None:
    """Largest relative output error among the blocks of a layer, on the last batch."""
    errors = []
    for found in layer.blocks:
        if found.info.name in calls:
            args, kwargs, before = calls[found.info.name]
            after = found.module(store.model)(*args, **kwargs)
            old, new = (out[0] if isinstance(out, tuple) else out for out in (before, after))
            errors.append(float((new.float() - old.float()).norm() / old.float().norm().clamp(min=1e-30)))
    return max(errors, default=None)
