"""One run over any source: observe where a method needs it, decide, cut."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optimum_moe.blocks import ModelInfo
from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig
from optimum_moe.calibration.observe import _reached, forward_calls, judge
from optimum_moe.engine.cutting import (
    BlockSource,
    Cutter,
    Observed,
    check_together,
    counts_for,
    cut_units,
    spare_unreached,
    unreached_report,
)
from optimum_moe.engine.layerwise import Handler, Keep, LayerwiseRun, as_it_is
from optimum_moe.engine.memory import MemorySource, carry_out, decide_and_cut
from optimum_moe.engine.progress import Progress, UnitReport
from optimum_moe.engine.units import Unit
from optimum_moe.methods import Method
from optimum_moe.plan import CompressionPlan
from optimum_moe.statistics import BlockStatistics, Statistics
from optimum_moe.surgeons.base import hooked


class StatisticsStore(Mapping[str, BlockStatistics]):
    """Statistics by block, of which one unit's are in memory.

    Args:
        source: Whose units they are of.
        kind: `"unit"` for those that were kept with a finished unit, `"statistics"` for those of a pass of its own.
    """

    def __init__(self, source: BlockSource, kind: str) -> None:
        self._kind = kind
        self._folder: Any = getattr(source, "folder", None)
        self._units = {
            found.info.name: (number, unit) for number, unit in enumerate(source.units) for found in unit.blocks
        }
        self._order = [found.info.name for found in source.blocks]
        self._last: tuple[str, Observed] = "", {}
        self._in_memory: dict[str, BlockStatistics] = {}

    def has(self, unit: Unit) -> bool:
        """Whether a unit was observed in a pass of its own."""
        return self._folder is not None and f"statistics of {unit.name}" in self._folder.finished

    def put(self, unit: Unit, observed: Observed) -> None:
        """Keep the statistics of a unit, on disk where there is a working folder."""
        if self._folder is None:
            self._in_memory |= observed
        elif self._kind == "statistics":
            record = self._folder.write_record(self._name(unit), None, observed)
            self._folder.add(f"statistics of {unit.name}", shard=None, size=0, record=record, weights={})

    def __getitem__(self, name: str) -> BlockStatistics:
        if name in self._in_memory:
            return self._in_memory[name]
        if name not in self._units or self._folder is None:
            raise KeyError(name)
        folder = self._name(self._units[name][1])
        if self._last[0] != folder:
            self._last = folder, self._folder.observed(folder)
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def _name(self, unit: Unit) -> str:
        return f"{self._kind}-{self._units[unit.blocks[0].info.name][0]:05d}"


@dataclass
class Run:
    """What is to be done.

    Args:
        source: Where the tensors are.
        info: Sizes of the model.
        method: What decides.
        seed: Of everything random.
        identity: Of the model.
        batches: Calibration data, None where nothing is observed.
        config: Settings of the observation.
        propagate: Observe each unit behind those that are cut already.
        progress: Show bars.
        lines: Say a line a unit.
        keep: What to do with the output of a layer while it waits.
    """

    source: BlockSource
    info: ModelInfo
    method: Method
    seed: int
    identity: Mapping[str, Any]
    batches: CalibrationBatches | None = None
    config: CalibrationConfig | None = None
    propagate: bool = False
    progress: bool = True
    lines: bool = True
    keep: Keep = as_it_is

    def observe(self) -> Statistics:
        """Only observe, unit by unit."""
        store = StatisticsStore(self.source, "statistics")
        pending = {unit.name for unit in self.source.units if unit.blocks and not store.has(unit)}
        if pending:
            self._pass(_Remember(store), pending, "calibrate")
        return self._finished(store)

    def observe_and_cut(self) -> tuple[CompressionPlan, Statistics]:
        """Observe, decide and cut; a budget that is shared by all units needs a pass of its own before.

        Raises:
            ValueError: As `counts_for`, and with `unseen="error"` for experts that no token reached.
        """
        assert self.config is not None
        statistics, method = None, self.method
        if not self._by_unit:
            statistics = self.observe()
            if not self.propagate:
                return self._decide_all(statistics), statistics
            method, counts = counts_for(self.source.blocks, self.info, method, statistics)
        else:
            counts = self.method.counts(self.info)
            check_together(self.source.blocks, counts)
            if self.propagate and self.config.unseen != "keep" and isinstance(self.source, MemorySource):
                # On disk nothing of the original changes while the pass goes on, and a pass more would read all of it.
                self._check_reach(self.method.changed_by_data(self.info, counts))
        cutter = Cutter(self.source, method, self.seed, counts, self.config.unseen)
        if self.method.needs_survey:
            with Progress(len(self.source.units), "survey", self.progress, self.lines) as shown:
                assert statistics is not None
                cutter = cutter.settled(self.info, statistics, self.identity["values"], shown)
        store = StatisticsStore(self.source, "unit")
        handler = _Cut(self, cutter, store)
        pending = {unit.name for unit in self.source.units if unit.blocks and not self.source.is_finished(unit)}
        if pending:
            self._pass(handler, pending, self.method.name)
        with Progress(len(self.source.units), "write", False) as shown:
            cut_units(self.source, cutter, None, shown)
        statistics = self._finished(store)
        made_from = self.method.settings(), self.identity, statistics.calibration, self.seed
        return CompressionPlan(self.source.plans(), *made_from), statistics

    def decide(self, statistics: Statistics | None) -> tuple[CompressionPlan, Statistics | None]:
        """Decide and cut; observe first where the method needs statistics and there are none."""
        if statistics is None and self.method.needs_statistics:
            return self.observe_and_cut()
        return self._decide_all(statistics), statistics

    def carry_out(self, plan: CompressionPlan) -> tuple[CompressionPlan, None]:
        """Cut as a finished plan says."""
        carry_out(self.source, plan, self.progress, self.lines)
        return plan, None

    def _decide_all(self, statistics: Statistics | None) -> CompressionPlan:
        args = self.source, self.info, self.method, statistics, self.seed, self.identity, self.progress
        return decide_and_cut(*args, lines=self.lines)

    def _check_reach(self, wanted: Collection[str]) -> None:
        """Raise a `ValueError` if no batch runs through one of these blocks; mostly the first runs through all."""
        assert self.batches is not None
        model = self.source.model
        blocks = {found.info.name: found.module(model) for found in self.source.blocks}
        missing = [name for name in blocks if name in wanted]
        called: set[int] = set()

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(isinstance(value, torch.Tensor) and value.numel() for value in (*args, *kwargs.values())):
                called.add(id(module))

        handles = [blocks[name].register_forward_pre_hook(before, with_kwargs=True) for name in missing]
        with hooked(handles), torch.no_grad():
            for call in forward_calls(model, self.batches):
                call()
                missing = [name for name in missing if id(blocks[name]) not in called]
                if not missing:
                    return
        raise ValueError(unreached_report(missing, len(wanted)))

    @property
    def _by_unit(self) -> bool:
        """Whether a unit can be decided before the others are observed."""
        return not self.method.is_adaptive and not self.method.needs_survey

    def _pass(self, handler: Handler, pending: set[str], what: str) -> None:
        assert self.batches is not None
        assert self.config is not None
        layers = [unit for unit in self.source.units if not unit.tensors]
        propagates = self.propagate and isinstance(handler, _Cut)
        run = LayerwiseRun(self.source, self.batches, self.config, handler, pending, propagates, self.keep)
        with Progress(len(layers), what, self.progress, self.lines) as shown:
            run.run(shown)

    def _finished(self, store: StatisticsStore) -> Statistics:
        assert self.batches is not None
        assert self.config is not None
        record = {**self.batches.description, "tokens_by_block": _reached(store)}  # type: ignore[arg-type]
        statistics = Statistics(store, record, self.identity, self.config.unseen)
        judge(statistics)
        return statistics


class _Remember:
    """Keeps what was observed."""

    def __init__(self, store: StatisticsStore) -> None:
        self.store = store

    def observed(self, unit: Unit, statistics: Observed, report: UnitReport) -> None:
        self.store.put(unit, statistics)

    def passed(self, unit: Unit) -> None:
        """It stays as it is."""

    def unreached(self, statistics: Observed) -> None:
        """That is remembered, too."""


class _Cut:
    """Cuts what was observed."""

    def __init__(self, run: Run, cutter: Cutter, store: StatisticsStore) -> None:
        self.run, self.cutter, self.store = run, cutter, store

    def observed(self, unit: Unit, statistics: Observed, report: UnitReport) -> None:
        cutter, found = self.cutter, Statistics(statistics, unseen=self.cutter.unseen)
        found.check_finite()
        unseen = found.unseen_report()
        if unseen is not None and cutter.unseen == "error":
            raise ValueError(unseen)
        self.unreached(statistics)
        check_together(self.run.source.blocks, cutter.counts)
        with self.run.source.as_stored(unit):
            report.plans = cutter.cut(unit, statistics)
            self.store.put(unit, statistics)
            self.run.source.finish(unit, report.plans, statistics)

    def unreached(self, statistics: Observed) -> None:
        cutter, found = self.cutter, Statistics(statistics, unseen=self.cutter.unseen)
        assert cutter.method is not None
        cutter.method, cutter.counts = spare_unreached(self.run.info, cutter.method, cutter.counts, found)

    def passed(self, unit: Unit) -> None:
        source = self.run.source
        with source.as_stored(unit):
            if not source.is_finished(unit):
                source.finish(unit, {}, None)
            elif self.run.propagate and unit.blocks:
                source.restore(unit)
