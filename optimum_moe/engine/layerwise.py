"""Observing layer by layer: all batches pass a layer before the next one; it is then cut, or only remembered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch

from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig
from optimum_moe.calibration.masks import padding_mask, text_blocks
from optimum_moe.calibration.observe import forward_calls, placed
from optimum_moe.calibration.recorder import BlockRecorder
from optimum_moe.checkpoint.system import return_freed
from optimum_moe.engine.layers import Layer, other_layers
from optimum_moe.engine.lockstep import Lockstep, Runner
from optimum_moe.engine.progress import LayerReport, Progress
from optimum_moe.engine.store import Observed, Store
from optimum_moe.statistics import OBSERVATIONS, BlockStatistics

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Arguments and output of one call of a block."""


Keep = Callable[[Any], Any]
"""Given the output of a layer, gives an equal one that may lie elsewhere."""


def as_it_is(output: Any) -> Any:
    """The output of a layer, kept where it is."""
    return output


class Handler(Protocol):
    """What becomes of the layers while the model runs through them; a layer is loaded while it is handed over."""

    def observed(self, layer: Layer, statistics: Observed, report: LayerReport) -> None:
        """A layer was observed."""

    def passed(self, layer: Layer) -> None:
        """A layer that had nothing to observe is passed."""

    def unreached(self, statistics: Observed) -> None:
        """The pass is over; layers that no batch reached follow, which these empty statistics are of."""


class LayerwiseRun:
    """One pass of all batches through a model.

    Args:
        store: Where the model's tensors come from.
        batches: Model inputs with their padding masks.
        config: Reservoir size and seed.
        handler: What becomes of the layers.
        pending: Names of the layers to observe.
        propagate: Observe each layer behind those that the handler changed.
        keep: What to do with the output of a layer while it waits.
        needs: Names of what is to be observed, see `OBSERVATIONS`; default everything.
    """

    def __init__(
        self,
        store: Store,
        batches: CalibrationBatches,
        config: CalibrationConfig,
        handler: Handler,
        pending: Collection[str],
        propagate: bool = False,
        keep: Keep = as_it_is,
        needs: Collection[str] = tuple(OBSERVATIONS),
    ) -> None:
        self.store, self.batches, self.config, self.handler = store, batches, config, handler
        self.pending, self.propagate, self.keep, self.needs = set(pending), propagate, keep, needs
        self._layers = {layer.name: layer for layer in store.layers if not layer.tensors}
        self._in_text = text_blocks(store.model, store.blocks)
        self._seen: set[str] = set()

    def run(self, progress: Progress) -> None:
        """Observe; what no batch reaches is given to the handler at the end, with empty statistics.

        Raises:
            ValueError: If a mask does not fit, or a forward pass runs through a layer twice.
        """
        store = self.store
        # Layers of other towers go first, so that all batches meet at those with MoE blocks.
        names = [name for name in self._layers if not self._layers[name].blocks]
        names = [*other_layers(store.model, store.layers), *names]
        names += [name for name in self._layers if self._layers[name].blocks]
        with store.running():
            inputs = [placed(batch, store.model) for batch in self.batches]
            calls = list(forward_calls(store.model, inputs))
            with Lockstep(store.model, names, calls, self.keep) as lockstep:
                for name, runners in lockstep.turns():
                    numbers = {id(runner): number for number, runner in enumerate(lockstep.runners)}
                    rows = [inputs[numbers[id(runner)]] for runner in runners]
                    # What the way here needed must not stay beside a layer.
                    store.settle()
                    self._pass(lockstep, name, runners, rows, progress)
        left = [layer for layer in store.layers if layer.name in self.pending - self._seen]
        nothing = {layer.name: _statistics(self._recorders(layer)) for layer in left}
        self.handler.unreached({name: block for observed in nothing.values() for name, block in observed.items()})
        for layer in left:
            with progress.layer(layer) as report, store.loaded(layer):
                self.handler.observed(layer, nothing[layer.name], report)

    def _pass(
        self, lockstep: Lockstep, name: str, runners: Sequence[Runner], rows: Sequence[Any], progress: Progress
    ) -> None:
        layer = self._layers.get(name)
        if layer is None:
            for runner in runners:
                runner.advance()
            return
        if layer.blocks and name in self._seen:
            raise ValueError(
                f"A forward pass runs through {name} more than once, which layer by layer cannot be followed. "
                'Use engine="memory" without error propagation.'
            )
        self._seen.add(name)
        lockstep.last = None if self.pending - self._seen else name
        with progress.layer(layer) as report, self.store.loaded(layer):
            if self.propagate and layer.blocks:
                self._pass_twice(lockstep, layer, runners, rows, report)
                return
            recorders = self._recorders(layer)
            with self._watched(layer, recorders), _last_calls(self.store, layer) as calls:
                self._advance(layer, recorders, runners, rows)
            if name in self.pending:
                self.handler.observed(layer, _statistics(recorders), report)
                if progress.show:
                    report.error = _error(self.store, layer, calls)
            else:
                report.passed = True
                self.handler.passed(layer)

    def _pass_twice(
        self, lockstep: Lockstep, layer: Layer, runners: Sequence[Runner], rows: Sequence[Any], report: LayerReport
    ) -> None:
        """Observe the layer as it was, cut it, and go on behind the cut one."""
        if layer.name in self.pending:
            lockstep.rehearsed.add(layer.name)
            recorders = self._recorders(layer)
            with self._watched(layer, recorders):
                self._advance(layer, recorders, runners, rows)
            lockstep.rehearsed.discard(layer.name)
            self.handler.observed(layer, _statistics(recorders), report)
        else:
            report.passed = True
            self.handler.passed(layer)
        for runner in runners:
            runner.advance()

    def _advance(
        self, layer: Layer, recorders: Mapping[str, BlockRecorder], runners: Sequence[Runner], rows: Sequence[Any]
    ) -> None:
        for runner, inputs in zip(runners, rows, strict=True):
            for found in layer.blocks:
                mask_T = padding_mask(inputs, found.info, found.info.name in self._in_text)
                recorders[found.info.name].expect(mask_T)
            runner.advance()
            # Its thread would keep what it freed, beside what the next one takes.
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
            )
            for found in layer.blocks
        }

    @contextmanager
    def _watched(self, layer: Layer, recorders: Mapping[str, BlockRecorder]) -> Iterator[None]:
        with ExitStack() as stack:
            for found in layer.blocks:
                watch = found.surgeon.watch(found.module(self.store.model), recorders[found.info.name])
                stack.enter_context(watch)
            yield


def _statistics(recorders: Mapping[str, BlockRecorder]) -> dict[str, BlockStatistics]:
    return {name: recorder.statistics() for name, recorder in recorders.items()}


@contextmanager
def _last_calls(store: Store, layer: Layer) -> Iterator[dict[str, Call]]:
    """The last call of each block of a layer, by name."""
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
    """Relative error of the blocks' outputs on the last batch, the largest of the layer."""
    errors = []
    for found in layer.blocks:
        if found.info.name in calls:
            args, kwargs, before = calls[found.info.name]
            after = found.module(store.model)(*args, **kwargs)
            old, new = (out[0] if isinstance(out, tuple) else out for out in (before, after))
            errors.append(float((new.float() - old.float()).norm() / old.float().norm().clamp(min=1e-30)))
    return max(errors, default=None)
