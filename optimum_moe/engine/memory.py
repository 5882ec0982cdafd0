"""A model in memory as a source, and the loops over any source that need no forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers import PreTrainedModel

from optimum_moe.blocks import ModelInfo
from optimum_moe.checkpoint.stored import StoredModel
from optimum_moe.engine.cutting import BlockSource, Cutter, Observed, check_together, counts_for, cut_units
from optimum_moe.engine.progress import Progress
from optimum_moe.engine.units import Unit, find_units
from optimum_moe.methods import Method
from optimum_moe.plan import BlockPlan, CompressionPlan
from optimum_moe.statistics import Statistics
from optimum_moe.surgeons import FoundBlock


class MemorySource:
    """The blocks of a model in memory.

    Args:
        model: The model.
        blocks: Its MoE blocks.
        stored: What its tensors were before they were loaded; None where they are the same.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[FoundBlock], stored: StoredModel | None = None) -> None:
        self.model = model
        self._stored = stored
        self.blocks = blocks
        self.units: Sequence[Unit] = find_units(model, blocks)
        self._plans: dict[str, BlockPlan] = {}
        self._finished: set[str] = set()

    @contextmanager
    def loaded(self, unit: Unit) -> Iterator[None]:
        """It always is."""
        yield

    def opened(self, unit: Unit) -> AbstractContextManager[None]:
        """It always is."""
        return self.loaded(unit)

    def as_stored(self, unit: Unit) -> AbstractContextManager[None]:
        """See `BlockSource.as_stored`."""
        return self.loaded(unit) if self._stored is None else self._stored.as_stored(unit.name)

    def provide(self, found: FoundBlock, experts: bool) -> None:
        """It has everything."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """It always can."""
        yield

    def settle(self) -> None:
        """Nothing goes."""

    def is_finished(self, unit: Unit) -> bool:
        """Whether it was cut."""
        return unit.name in self._finished

    def finish(self, unit: Unit, plans: Mapping[str, BlockPlan], observed: Observed | None) -> None:
        """Remember the plans."""
        self._finished.add(unit.name)
        self._plans |= plans
        if self._stored is not None:
            self._stored.settle(plans)

    def restore(self, unit: Unit) -> None:
        """It is what was made of it."""

    def plans(self) -> dict[str, BlockPlan]:
        """See `BlockSource.plans`."""
        order = [found.info.name for found in self.blocks]
        return {name: self._plans[name] for name in order if name in self._plans}


def decide_and_cut(
    source: BlockSource,
    info: ModelInfo,
    method: Method,
    statistics: Statistics | None,
    seed: int,
    identity: Mapping[str, Any],
    progress: bool = True,
    lines: bool = False,
) -> CompressionPlan:
    """Decide and cut unit by unit.

    Every plan is decided on the block's original weights, and a block is cut only when its plan is complete.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: If no calibration token reached a block that is to be changed, unless `unseen="keep"`, or the
            architecture cannot hold the counts.
    """
    sparing, counts = counts_for(source.blocks, info, method, statistics)
    unseen = "warn" if statistics is None else statistics.unseen
    observed = None if statistics is None else statistics.blocks
    cutter = Cutter(source, sparing, seed, counts, unseen)
    if method.needs_survey:
        assert statistics is not None
        with Progress(len(source.units), "survey", progress, lines) as shown:
            cutter = cutter.settled(info, statistics, identity["values"], shown)
    with Progress(len(source.units), method.name, progress, lines) as shown:
        cut_units(source, cutter, observed, shown)
    calibration = None if statistics is None else statistics.calibration
    return CompressionPlan(source.plans(), method.settings(), identity, calibration, seed)


def carry_out(source: BlockSource, plan: CompressionPlan, progress: bool = False, lines: bool = False) -> None:
    """Cut the blocks of a source as a finished plan says.

    Raises:
        ValueError: If the plan is for other blocks; nothing was cut then.
    """
    sizes = {found.info.name: found.info.num_experts for found in source.blocks}
    planned = {name: block.num_experts for name, block in plan.blocks.items()}
    if sizes != planned:
        name = next(name for name in {**sizes, **planned} if sizes.get(name) != planned.get(name))
        raise ValueError(
            f"The plan has {planned.get(name, 'no')} experts for {name}, the model {sizes.get(name, 'no such block')}. "
            "Use the plan of this checkpoint."
        )
    counts = {name: block.num_groups for name, block in plan.blocks.items()}
    check_together(source.blocks, counts)
    cutter = Cutter(source, None, plan.seed, counts, plan=plan)
    with Progress(len(source.units), "plan", progress, lines) as shown:
        cut_units(source, cutter, None, shown)
