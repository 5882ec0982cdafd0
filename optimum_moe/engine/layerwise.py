"""Observing layer by layer: all batches pass a unit before the next one, which is then cut, or only remembered."""

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
from optimum_moe.engine.cutting import BlockSource, Observed
from optimum_moe.engine.lockstep import Lockstep, Runner
from optimum_moe.engine.progress import Progress, UnitReport
from optimum_moe.engine.units import Unit, other_layers
from optimum_moe.statistics import BlockStatistics

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Arguments and output of one call of a block."""


Keep = Callable[[Any], Any]
"""Given the output of a layer, gives an equal one that may lie elsewhere."""


def as_it_is(output: Any) -> Any:
    """The output of a layer, kept where it is."""
    return output


class Handler(Protocol):
    """What becomes of the units while the model runs through them; a unit is loaded while it is handed over."""

    def observed(self, unit: Unit, statistics: Observed, report: UnitReport) -> None:
        """A unit was observed."""

    def passed(self, unit: Unit) -> None:
        """A unit that had nothing to observe is passed."""

    def unreached(self, statistics: Observed) -> None:
        """The pass is over; units that no batch reached follow, which these empty statistics are of."""


class LayerwiseRun:
    """One pass of all batches through a model.

    Args:
        source: Where the model's tensors come from.
        batches: Model inputs with their padding masks.
        config: Reservoir size and seed.
        handler: What becomes of the units.
        pending: Names of the units to observe.
        propagate: Observe each unit behind those that the handler changed.
        keep: What to do with the output of a layer while it waits.
    """

    def __init__(
        self,
        source: BlockSource,
        batches: CalibrationBatches,
        config: CalibrationConfig,
        handler: Handler,
        pending: Collection[str],
        propagate: bool = False,
        keep: Keep = as_it_is,
    ) -> None:
        self.source, self.batches, self.config, self.handler = source, batches, config, handler
        self.pending, self.propagate, self.keep = set(pending), propagate, keep
        self._units = {unit.name: unit for unit in source.units if not unit.tensors}
        self._in_text = text_blocks(source.model, source.blocks)
        self._seen: set[str] = set()

    def run(self, progress: Progress) -> None:
        """Observe; what no batch reaches is given to the handler at the end, with empty statistics.

        Raises:
            ValueError: If a mask does not fit, or a forward pass runs through a unit twice.
        """
        source = self.source
        # Layers of other towers go first, so that all batches meet at the units.
        layers = [name for name in self._units if not self._units[name].blocks]
        layers = [*other_layers(source.model, source.units), *layers]
        layers += [name for name in self._units if self._units[name].blocks]
        with source.running():
            inputs = [placed(batch, source.model) for batch in self.batches]
            calls = list(forward_calls(source.model, inputs))
            with Lockstep(source.model, layers, calls, self.keep) as lockstep:
                for name, runners in lockstep.turns():
                    numbers = {id(runner): number for number, runner in enumerate(lockstep.runners)}
                    rows = [inputs[numbers[id(runner)]] for runner in runners]
                    # What the way here needed must not stay beside a unit.
                    source.settle()
                    self._pass(lockstep, name, runners, rows, progress)
        left = [unit for unit in source.units if unit.name in self.pending - self._seen]
        nothing = {unit.name: _statistics(self._recorders(unit)) for unit in left}
        self.handler.unreached({name: block for observed in nothing.values() for name, block in observed.items()})
        for unit in left:
            with progress.unit(unit) as report, source.loaded(unit):
                self.handler.observed(unit, nothing[unit.name], report)

    def _pass(
        self, lockstep: Lockstep, name: str, runners: Sequence[Runner], rows: Sequence[Any], progress: Progress
    ) -> None:
        unit = self._units.get(name)
        if unit is None:
            for runner in runners:
                runner.advance()
            return
        if unit.blocks and name in self._seen:
            raise ValueError(
                f"A forward pass runs through {name} more than once, which layer by layer cannot be followed. "
                'Use engine="memory" without error propagation.'
            )
        self._seen.add(name)
        lockstep.last = None if self.pending - self._seen else name
        with progress.unit(unit) as report, self.source.loaded(unit):
            if self.propagate and unit.blocks:
                self._pass_twice(lockstep, unit, runners, rows, report)
                return
            recorders = self._recorders(unit)
            with self._watched(unit, recorders), _last_calls(self.source, unit) as calls:
                self._advance(unit, recorders, runners, rows)
            if name in self.pending:
                self.handler.observed(unit, _statistics(recorders), report)
                if progress.show:
                    report.error = _error(self.source, unit, calls)
            else:
                report.passed = True
                self.handler.passed(unit)

    def _pass_twice(
        self, lockstep: Lockstep, unit: Unit, runners: Sequence[Runner], rows: Sequence[Any], report: UnitReport
    ) -> None:
        """Observe the unit as it was, cut it, and go on behind the cut one."""
        if unit.name in self.pending:
            lockstep.rehearsed.add(unit.name)
            recorders = self._recorders(unit)
            with self._watched(unit, recorders):
                self._advance(unit, recorders, runners, rows)
            lockstep.rehearsed.discard(unit.name)
            self.handler.observed(unit, _statistics(recorders), report)
        else:
            report.passed = True
            self.handler.passed(unit)
        for runner in runners:
            runner.advance()

    def _advance(
        self, unit: Unit, recorders: Mapping[str, BlockRecorder], runners: Sequence[Runner], rows: Sequence[Any]
    ) -> None:
        for runner, inputs in zip(runners, rows, strict=True):
            for found in unit.blocks:
                mask_T = padding_mask(inputs, found.info, found.info.name in self._in_text)
                recorders[found.info.name].expect(mask_T)
            runner.advance()
            # Its thread would keep what it freed, beside what the next one takes.
            return_freed()

    def _recorders(self, unit: Unit) -> dict[str, BlockRecorder]:
        return {
            found.info.name: BlockRecorder(
                *(found.info.num_experts, found.info.intermediate_size, found.info.hidden_size),
                *(self.config.sampled_tokens, self.config.random_seed),
            )
            for found in unit.blocks
        }

    @contextmanager
    def _watched(self, unit: Unit, recorders: Mapping[str, BlockRecorder]) -> Iterator[None]:
        with ExitStack() as stack:
            for found in unit.blocks:
                watch = found.surgeon.watch(found.module(self.source.model), recorders[found.info.name])
                stack.enter_context(watch)
            yield


def _statistics(recorders: Mapping[str, BlockRecorder]) -> dict[str, BlockStatistics]:
    return {name: recorder.statistics() for name, recorder in recorders.items()}


@contextmanager
def _last_calls(source: BlockSource, unit: Unit) -> Iterator[dict[str, Call]]:
    """The last call of each block of a unit, by name."""
    calls: dict[str, Call] = {}

    def after(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] = args, kwargs, output

    with ExitStack() as stack:
        for found in unit.blocks:
            hook = partial(after, found.info.name)
            handle = found.module(source.model).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


@torch.no_grad()
def _error(source: BlockSource, unit: Unit, calls: Mapping[str, Call]) -> float | None:
    """Relative error of the blocks' outputs on the last batch, the largest of the unit."""
    errors = []
    for found in unit.blocks:
        if found.info.name in calls:
            args, kwargs, before = calls[found.info.name]
            after = found.module(source.model)(*args, **kwargs)
            old, new = (out[0] if isinstance(out, tuple) else out for out in (before, after))
            errors.append(float((new.float() - old.float()).norm() / old.float().norm().clamp(min=1e-30)))
    return max(errors, default=None)
