"""What every source shares: deciding the blocks of a unit and cutting them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from optimum_moe.blocks import ModelInfo
from optimum_moe.engine.progress import Progress
from optimum_moe.engine.units import Unit
from optimum_moe.methods import BlockContext, Method
from optimum_moe.plan import BlockPlan, CompressionPlan
from optimum_moe.statistics import BlockStatistics, Statistics, Unseen
from optimum_moe.surgeons import FoundBlock, guarded

Observed = Mapping[str, BlockStatistics]


class BlockSource(Protocol):
    """Where the tensors of a model come from, and where they go once a unit is cut."""

    model: PreTrainedModel
    blocks: Sequence[FoundBlock]
    units: Sequence[Unit]

    def loaded(self, unit: Unit) -> AbstractContextManager[None]:
        """While it is open the unit has its tensors."""

    def opened(self, unit: Unit) -> AbstractContextManager[None]:
        """While it is open the unit can be cut, though it cannot run: it has what `provide` is asked for."""

    def as_stored(self, unit: Unit) -> AbstractContextManager[None]:
        """While it is open the tensors of an open unit have the dtypes and bits of the checkpoint: to decide and cut it
        and to finish it. Around it the unit has the dtypes that the model runs in."""

    def provide(self, found: FoundBlock, experts: bool) -> None:
        """Have what a block of an open unit is cut by, and its experts if they are wanted.

        Experts that are not wanted may be on the meta device, where those that remain keep their order.
        """

    def running(self) -> AbstractContextManager[None]:
        """While it is open the model runs."""

    def settle(self) -> None:
        """Let go of what the model needed between two units."""

    def is_finished(self, unit: Unit) -> bool:
        """Whether an earlier run finished the unit."""

    def finish(self, unit: Unit, plans: Mapping[str, BlockPlan], observed: Observed | None) -> None:
        """Take a unit that was cut, while it is loaded."""

    def restore(self, unit: Unit) -> None:
        """Make of a loaded unit what an earlier run made of it."""

    def plans(self) -> dict[str, BlockPlan]:
        """What was carried out so far, by block, in the order of the model."""


@dataclass
class Cutter:
    """Decides and cuts the blocks of one unit after the other.

    Args:
        source: Where they are.
        method: What decides; None where a plan is carried out.
        seed: Of everything random.
        counts: Experts that remain in each block.
        unseen: What to do about experts without tokens.
        plan: Carry out this plan instead of deciding one.
        surveyed: What the method was settled on.
    """

    source: BlockSource
    method: Method | None
    seed: int
    counts: Mapping[str, int]
    unseen: Unseen = "warn"
    plan: CompressionPlan | None = None
    surveyed: Observed | None = None

    def cut(self, unit: Unit, observed: Observed | None = None) -> dict[str, BlockPlan]:
        """Cut the blocks of a loaded unit, each when its plan is complete; returns the plans."""
        plans = {}
        for found in unit.blocks:
            decides = self.method if self.plan is None else None
            self.source.provide(found, experts=decides is not None and decides.reads_experts)
            plan = self._plan(found, observed)
            self.source.provide(found, experts=not (plan.is_identity or plan.keeps_experts))
            with guarded(self.source.model, found, plan.needs_guard):
                plans[found.info.name] = found.surgeon.carry_out(found.module(self.source.model), plan)
        return plans

    def _plan(self, found: FoundBlock, observed: Observed | None) -> BlockPlan:
        name = found.info.name
        if self.plan is not None:
            return self.plan.blocks[name]
        assert self.method is not None
        with torch.no_grad():
            return self.method.decide(self.context(found, observed), self.counts[name])

    def context(self, found: FoundBlock, observed: Observed | None) -> BlockContext:
        """What a method may see of a block of a loaded unit.

        It views the tensors, which must be free to go while the block is cut.
        """
        block = found.module(self.source.model)
        return BlockContext(
            info=found.info,
            experts=found.surgeon.experts(block),
            router=found.surgeon.router(block),
            generator=torch.Generator().manual_seed(self.seed * 100_003 + found.info.index),
            statistics=None if observed is None else observed[found.info.name],
            unseen=self.unseen,
            num_blocks=len(self.source.blocks),
            surveyed=None if self.surveyed is None else self.surveyed[found.info.name],
        )

    def settled(self, info: ModelInfo, statistics: Statistics, values: Sequence[str], progress: Progress) -> Cutter:
        """With a method that knows what it can spend on each block, which takes a look at all of them.

        Args:
            info: Sizes of the model.
            statistics: What was observed; remembers what the method saw.
            values: Digests of the model's values, which it was seen with.
            progress: Shows the units.
        """
        assert self.method is not None
        key = f"{self.method.survey_key} {sorted(self.counts.items())} {self.seed} {self.unseen} {values}"
        surveys = statistics.memo.get(key)
        if surveys is None:
            surveys = statistics.memo[key] = self._surveys(statistics.blocks, progress)
        return replace(self, method=self.method.settled(info, surveys), surveyed=statistics.blocks)

    def _surveys(self, observed: Observed, progress: Progress) -> dict[str, Any]:
        assert self.method is not None
        surveys = {}
        for unit in self.source.units:
            if not unit.blocks:
                progress.skip()
                continue
            with progress.unit(unit), self.source.loaded(unit), self.source.as_stored(unit), torch.no_grad():
                for found in unit.blocks:
                    name = found.info.name
                    surveys[name] = self.method.survey(self.context(found, observed), self.counts[name])
        return surveys


def cut_units(source: BlockSource, cutter: Cutter, observed: Observed | None, progress: Progress) -> None:
    """Cut every unit of a source that is not finished."""
    for unit in source.units:
        if source.is_finished(unit):
            progress.skip()
            continue
        with progress.unit(unit) as report, source.opened(unit), source.as_stored(unit):
            own = None if observed is None else {f.info.name: observed[f.info.name] for f in unit.blocks}
            report.plans = cutter.cut(unit, own)
            source.finish(unit, report.plans, own)


def counts_for(
    blocks: Sequence[FoundBlock], info: ModelInfo, method: Method, statistics: Statistics | None
) -> tuple[Method, dict[str, int]]:
    """The method without blocks that it has to spare, and the experts that remain in each block.

    Raises:
        ValueError: If the statistics are broken, or as `spare_unreached` and `check_together`.
    """
    if statistics is not None:
        statistics.check_finite()
    counts = method.allocate(info, statistics)
    if statistics is not None:
        method, counts = spare_unreached(info, method, counts, statistics)
    check_together(blocks, counts)
    return method, counts


def spare_unreached(
    info: ModelInfo, method: Method, counts: Mapping[str, int], statistics: Statistics
) -> tuple[Method, dict[str, int]]:
    """Leave blocks as they are that calibration never reached, because of `unseen="keep"`.

    Another tower of an omni model, or the vision experts on text alone: nothing says what may be changed there.

    Args:
        info: The model.
        method: What decides.
        counts: Experts that remain in each block.
        statistics: Of all blocks or some.

    Returns:
        The method that spares such blocks, and the counts with all of their experts.

    Raises:
        ValueError: If there are such blocks among those to change, and `unseen` is another, or there are no others.
    """
    wanted = method.changed_by_data(info, counts)
    unreached = [
        block
        for block in info.blocks
        if block.name in wanted and block.name in statistics.blocks and statistics.blocks[block.name].num_tokens == 0
    ]
    if not unreached:
        return method, dict(counts)
    if statistics.unseen != "keep" or len(unreached) == len(wanted):
        raise ValueError(unreached_report([block.name for block in unreached], len(wanted)))
    spared = {block.name: block.num_experts for block in unreached}
    return method.sparing(spared), {**counts, **spared}


def unreached_report(names: Sequence[str], wanted: int) -> str:
    """What to say of blocks that no token reached, of so many that are to be changed."""
    keep = ', or set unseen="keep"' if len(names) < wanted else ""
    return (
        f"No calibration token reached {len(names)} of the blocks to cut ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}), so nothing says which of their experts matter. Add data that "
        f'reaches them, leave them out with protect=["{names[0]}", ...] or layers={keep}.'
    )


def check_together(blocks: Sequence[FoundBlock], counts: Mapping[str, int]) -> None:
    """Raise a `ValueError` if a surgeon knows that its blocks cannot keep these counts together."""
    for surgeon in {found.surgeon.name: found.surgeon for found in blocks}.values():
        objection = surgeon.objection(counts)
        if objection is not None:
            raise ValueError(objection)
