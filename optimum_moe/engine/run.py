"""One run over any store, layer by layer: observe if a stage needs it, decide, cut and write."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig
from optimum_moe.calibration.observe import check_observed, forward_calls, observe, pass_advice, reached_tokens
from optimum_moe.engine.decision import Decider, PlanReader, SharedPlans, unreached_report
from optimum_moe.engine.layer_backward import Save
from optimum_moe.engine.layers import Layer
from optimum_moe.engine.layerwise import Keep, LayerwiseRun, keep_in_memory
from optimum_moe.engine.progress import LayerReport, Progress
from optimum_moe.engine.starving import starving_remarks
from optimum_moe.engine.store import Observed, Store
from optimum_moe.memory_errors import explained
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan, CompressionPlan
from optimum_moe.ranks import SINGLE, Ranks
from optimum_moe.recipe import Recipe
from optimum_moe.statistics import BlockStatistics, Statistics
from optimum_moe.surgeons import FoundBlock, guarded, stock_block, stock_settings
from optimum_moe.surgeons.base import hooked


class KeptStatistics(Mapping[str, BlockStatistics]):
    """Statistics by block; with a working folder, only those of one layer are in memory.

    Args:
        store: Store of the observed layers.
        kind: `"layer"` for statistics stored with a finished layer, `"statistics"` for those of a separate pass.
    """

    def __init__(self, store: Store, kind: str) -> None:
        self._kind, self._folder = kind, store.folder
        self._layers = {
            found.info.name: (number, layer) for number, layer in enumerate(store.layers) for found in layer.blocks
        }
        self._order = [found.info.name for found in store.blocks]
        self._last: tuple[str, Observed] = "", {}
        self._in_memory: dict[str, BlockStatistics] = {}

    def has(self, layer: Layer) -> bool:
        """Whether a layer was observed in a separate pass."""
        return self._folder is not None and f"statistics of {layer.name}" in self._folder.finished

    def put(self, layer: Layer, observed: Observed) -> None:
        """Store the statistics of a layer, on disk if there is a working folder."""
        if self._folder is None:
            self._in_memory |= observed
        elif self._kind == "statistics":
            record = self._folder.write_record(self._name(layer), None, observed)
            self._folder.add(f"statistics of {layer.name}", shard=None, size=0, record=record, weights={})

    def __getitem__(self, name: str) -> BlockStatistics:
        if name in self._in_memory:
            return self._in_memory[name]
        if name not in self._layers or self._folder is None:
            raise KeyError(name)
        folder = self._name(self._layers[name][1])
        if self._last[0] != folder:
            self._last = folder, self._folder.observed(folder)
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def _name(self, layer: Layer) -> str:
        return f"{self._kind}-{self._layers[layer.blocks[0].info.name][0]:05d}"


class PlanSource(Protocol):
    """Source of the plans of a model's blocks."""

    reads_experts: bool

    def admit(self, observed: Observed | None) -> None:
        """Check the statistics of a layer before its blocks are decided."""

    def decide(self, found: FoundBlock, observed: Observed | None) -> BlockPlan:
        """The plan for a block of an open layer."""


@dataclass
class Run:
    """One compression run.

    Args:
        store: Source of the tensors.
        info: Sizes of the model.
        recipe: The recipe.
        seed: Seed of all random choices.
        identity: Identity of the model.
        batches: Calibration data; None if nothing is observed.
        config: Calibration settings.
        propagate: Error propagation: observe each layer on the outputs of the compressed layers before it.
        progress: Show progress bars.
        lines: Print one line per layer also in passes that observe or profile; layers that are cut always have one.
        keep: Stores the output of a layer while its forward pass waits.
        save: Stores what enters a layer until its backward pass, if the store does not hold all layers.
        ranks: Processes that share batches and blocks; several of them need a store that holds all layers.
    """

    store: Store
    info: ModelInfo
    recipe: Recipe
    seed: int
    identity: Mapping[str, Any]
    batches: CalibrationBatches | None = None
    config: CalibrationConfig | None = None
    propagate: bool = False
    progress: bool = True
    lines: bool = True
    keep: Keep = keep_in_memory
    save: Save | None = None
    ranks: Ranks = SINGLE
    has_cut: bool = field(default=False, init=False)
    """Whether any block was cut, so that the model is no longer the original."""

    def observe(self, needs: Collection[str]) -> Statistics:
        """Only observe: with whole passes if the store holds all layers, else layer by layer.

        With error propagation no gradients are observed, since those of later layers are not known when one is cut.

        Args:
            needs: Names of the observations to collect, see `OBSERVATIONS`.
        """
        assert self.batches is not None
        assert self.config is not None
        if self.store.holds_all and not self.propagate:
            return observe(
                self.store.model,
                self.store.blocks,
                self.batches,
                self.config,
                source=self.identity,
                progress=self.progress,
                draws=self.recipe.gradient_draws,
                needs=needs,
                ranks=self.ranks,
            )
        kept = KeptStatistics(self.store, "statistics")
        pending = {layer.name for layer in self.store.layers if layer.blocks and not kept.has(layer)}
        if pending:
            self._pass(_Remember(kept), pending, "calibrate", needs)
        return self._finished(kept)

    def decide(
        self, statistics: Statistics | None = None, plan: CompressionPlan | None = None
    ) -> tuple[CompressionPlan, Statistics | None]:
        """Decide, cut and write; if statistics are needed and not given, observe before or in the same pass.

        Args:
            statistics: Statistics of an earlier observation.
            plan: Finished plan to carry out instead of deciding.

        Returns:
            The plan that was carried out, and the statistics.

        Raises:
            ValueError: If statistics are not finite or lack tokens of an expert although `unseen="error"`, if the
                architecture does not support the expert counts, or if the plan does not fit the model's blocks.
        """
        if plan is not None:
            self._cut_all(PlanReader(self.store, plan), None, "plan")
            return plan, None
        observing = statistics is None and bool(self.recipe.needs)
        # A store that holds all layers observes them in one pass; others cut each layer in the same pass if possible.
        if observing and (self.recipe.is_adaptive or self.goes_back or (self.store.holds_all and not self.propagate)):
            statistics = self.observe(self.recipe.needs)
        on_the_way = observing and (self.propagate or statistics is None)
        unseen = self.config.unseen if observing and self.config is not None else "warn"
        unseen = unseen if statistics is None else statistics.unseen
        decider = Decider(self.store, self.recipe, self.info, self.seed, unseen, self.ranks)
        profiles = Progress(len(self.store.layers), "profile", self._shows_profiles, self.lines)
        with profiles as shown, self._explained("Choosing what experts become"):
            decider.allocate(statistics, self.identity["values"], shown)
        if not on_the_way:
            together = self.ranks.size > 1
            source = SharedPlans(decider, None if statistics is None else statistics.blocks) if together else decider
            self._cut_all(source, statistics, self.recipe.name)
            return self._plan(statistics, decider), statistics
        if self.propagate and self.store.holds_all and statistics is None and unseen != "keep":
            # The original on disk does not change during the pass, and a second pass would read all of it again.
            self._check_reach(decider.changed_by_data())
        kept = KeptStatistics(self.store, "layer")
        pending = {layer.name for layer in self.store.layers if layer.blocks and not self.store.is_finished(layer)}
        if pending:
            self._pass(_Cut(self, decider, kept), pending, self.recipe.name, self.recipe.needs)
        self._cut_all(decider, None, "write", show=False)
        statistics = self._finished(kept)
        return self._plan(statistics, decider), statistics

    @property
    def goes_back(self) -> bool:
        """Whether gradients of the loss are observed, with a backward pass."""
        return self.recipe.gradient_draws > 0 and not self.propagate

    @property
    def _shows_profiles(self) -> bool:
        return self.progress and any(stage.needs_profile for stage in self.recipe.stages)

    def _plan(self, statistics: Statistics | None, decider: Decider) -> CompressionPlan:
        plans = self.store.plans()
        starving = () if statistics is None else starving_remarks(plans, statistics.blocks)
        for remark in starving:
            warnings.warn(remark, stacklevel=2)
        plan = CompressionPlan(
            blocks=plans,
            stages=self.recipe.settings(),
            source=self.identity,
            calibration=None if statistics is None else statistics.calibration,
            seed=self.seed,
            remarks=(*decider.remarks, *starving),
            evidence=decider.evidence,
        )
        return replace(plan, settings=stock_settings(self.store.model, self.store.blocks, plan))

    def _cut_all(self, source: PlanSource, statistics: Statistics | None, what: str, show: bool = True) -> None:
        """Cut every layer that is not finished, without forward passes."""
        store = self.store
        with Progress(len(store.layers), what, self.progress and show, lines=True) as shown:
            for layer in store.layers:
                if store.is_finished(layer):
                    shown.skip()
                    continue
                with shown.layer(layer) as report, store.opened(layer):
                    own = (
                        None
                        if statistics is None
                        else {f.info.name: statistics.blocks[f.info.name] for f in layer.blocks}
                    )
                    self.cut(source, layer, own, report)

    def cut(self, source: PlanSource, layer: Layer, observed: Observed | None, report: LayerReport) -> None:
        """Decide, cut and write one open layer; a block is cut only after its plan is complete."""
        store = self.store
        with store.as_stored(layer), self._explained(f"Compressing {layer.name}"):
            for found in layer.blocks:
                store.provide(found, experts=source.reads_experts)
                plan = source.decide(found, observed)
                store.provide(found, experts=not (plan.is_identity or plan.keeps_experts))
                stock = stock_block(store.model, store.blocks, plan)
                self.has_cut = True
                with guarded(store.model, found, plan.needs_guard):
                    report.plans[found.info.name] = found.surgeon.carry_out(found.module(store.model), plan, stock)
            store.finish(layer, report.plans, observed)

    def _explained(self, doing: str) -> AbstractContextManager[None]:
        """Context that says what to do where memory runs out without any text to observe."""
        sample = f", sample fewer tokens than {self.config.sampled_tokens} (reservoir_tokens=)" if self.config else ""
        return explained(
            f"{doing} on {self.store.device}", f"Free memory there{sample}, or choose another device (device_map=)."
        )

    def _check_reach(self, wanted: Collection[str]) -> None:
        """Raise a `ValueError` if no batch runs through one of these blocks; stops once all of them are reached."""
        assert self.batches is not None
        model = self.store.model
        blocks = {found.info.name: found.module(model) for found in self.store.blocks}
        missing = [name for name in blocks if name in wanted]
        called: set[str] = set()

        def before(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(isinstance(value, torch.Tensor) and value.numel() for value in (*args, *kwargs.values())):
                called.add(name)

        # Of attention experts only parts are called, since the attention stands between them.
        handles = [
            part.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            for name in missing
            for part in blocks[name].modules()
        ]
        with hooked(handles), torch.no_grad():
            for call in forward_calls(model, self.batches):
                call()
                missing = [name for name in missing if name not in called]
                if not missing:
                    return
        raise ValueError(unreached_report(missing, len(wanted)))

    def _pass(self, handler: _Remember | _Cut, pending: set[str], what: str, needs: Collection[str]) -> None:
        assert self.batches is not None
        assert self.config is not None
        layers = [layer for layer in self.store.layers if not layer.tensors]
        run = LayerwiseRun(
            self.store,
            self.batches,
            self.config,
            handler,
            pending,
            propagate=self.propagate and isinstance(handler, _Cut),
            keep=self.keep,
            needs=needs,
            save=self.save if self.goes_back else None,
        )
        doing, remedy = pass_advice(self.batches, self.store.device, spreads=self.store.holds_all)
        progress = Progress(len(layers) * (1 + self.goes_back), what, self.progress, self.lines)
        with progress as shown, explained(doing, remedy):
            run.run(shown)

    def _finished(self, kept: KeptStatistics) -> Statistics:
        assert self.batches is not None
        assert self.config is not None
        record = {
            **self.batches.description,
            "tokens_by_block": reached_tokens(kept),
            "reservoir_tokens": self.config.sampled_tokens,
        }
        statistics = Statistics(kept, record, self.identity, self.config.unseen)
        check_observed(statistics)
        return statistics


class _Remember:
    """Stores the statistics of each layer."""

    def __init__(self, kept: KeptStatistics) -> None:
        self.kept = kept

    def observed(self, layer: Layer, statistics: Observed, report: LayerReport) -> None:
        self.kept.put(layer, statistics)

    def passed(self, layer: Layer) -> None:
        """Do nothing, since the layer is not changed."""

    def unreached(self, statistics: Observed) -> None:
        """Do nothing, since `observed` stores these statistics too."""


class _Cut:
    """Cuts each layer after it is observed."""

    def __init__(self, run: Run, decider: Decider, kept: KeptStatistics) -> None:
        self.run, self.decider, self.kept = run, decider, kept

    def observed(self, layer: Layer, statistics: Observed, report: LayerReport) -> None:
        self.decider.admit(statistics)
        self.kept.put(layer, statistics)
        self.run.cut(self.decider, layer, statistics, report)

    def unreached(self, statistics: Observed) -> None:
        self.decider.keep_unreached(statistics)

    def passed(self, layer: Layer) -> None:
        store = self.run.store
        with store.as_stored(layer):
            if not store.is_finished(layer):
                store.finish(layer, {}, None)
            elif self.run.propagate and layer.blocks:
                store.restore(layer)
