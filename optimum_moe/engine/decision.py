"""Deciding the blocks of a model, one after the other, by the stages of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optimum_moe.engine.progress import Progress
from optimum_moe.engine.store import Observed, Store
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan, CompressionPlan, keep_all
from optimum_moe.recipe import Recipe
from optimum_moe.stages import BlockContext
from optimum_moe.statistics import Statistics, Unseen
from optimum_moe.surgeons import FoundBlock


class PlanReader:
    """Decides as a finished plan says.

    Args:
        store: The model.
        plan: The plan.

    Raises:
        ValueError: If the plan is for other blocks.
    """

    reads_experts = False

    def __init__(self, store: Store, plan: CompressionPlan) -> None:
        sizes = {found.info.name: found.info.num_experts for found in store.blocks}
        planned = {name: block.num_experts for name, block in plan.blocks.items()}
        if sizes != planned:
            name = next(name for name in {**sizes, **planned} if sizes.get(name) != planned.get(name))
            raise ValueError(
                f"The plan has {planned.get(name, 'no')} experts for {name}, the model "
                f"{sizes.get(name, 'no such block')}. Use the plan of this checkpoint."
            )
        self._plan = plan
        check_together(store.blocks, {name: block.num_groups for name, block in plan.blocks.items()})

    def admit(self, observed: Observed | None) -> None:
        """Nothing is observed."""

    def decide(self, found: FoundBlock, observed: Observed | None) -> BlockPlan:
        """What the plan says of a block."""
        return self._plan.blocks[found.info.name]


class Decider:
    """Decides by the stages of a recipe, after `allocate`.

    Args:
        store: The model.
        recipe: The recipe.
        info: Sizes of the model.
        seed: Of everything random.
        unseen: What to do about experts without tokens.
    """

    def __init__(self, store: Store, recipe: Recipe, info: ModelInfo, seed: int, unseen: Unseen = "warn") -> None:
        self.store, self.recipe, self.info, self.seed, self.unseen = store, recipe, info, seed, unseen
        self.reads_experts = recipe.reads_experts
        self._counts: Mapping[str, int] = {}
        self.spared: set[str] = set()
        """Blocks that stay as they are, because no token reached them and `unseen="keep"`."""
        self._allocations: list[Mapping[str, Any]] = []
        self._known: list[dict[str, BlockPlan]] = []
        """For each stage the plans that were made already, to take the profiles of a later stage."""
        self._profiled: Observed | None = None

    def allocate(self, statistics: Statistics | None, values: Sequence[str], progress: Progress) -> None:
        """Give every block its share, stage by stage; takes the profiles that stages need.

        Args:
            statistics: What was observed of all blocks; None where nothing was yet.
            values: Digests of the model's values, with which profiles are remembered.
            progress: Shows the layers.

        Raises:
            ValueError: If the statistics are broken, nothing reached the blocks to cut, or the architecture cannot hold
                the counts.
        """
        if statistics is not None:
            statistics.check_finite()
        model, counts = self.info, {block.name: block.num_experts for block in self.info.blocks}
        for number, stage in enumerate(self.recipe.stages):
            self._known.append({})
            profiles: Mapping[str, Any] = {}
            if stage.needs_profile:
                assert statistics is not None
                # Whether a block is reached does not hang on its share.
                self._spare(stage.changed_by_data(model, {}), statistics.blocks)
                profiles = self._profiles(number, statistics, values, progress)
            allocation = stage.allocate(model, statistics, profiles)
            if statistics is not None:
                self._spare(stage.changed_by_data(model, allocation), statistics.blocks)
            self._allocations.append(allocation)
            counts = {block.name: stage.remaining(model, block, allocation[block.name]) for block in model.blocks}
            model = model.with_experts(counts)
        self._counts = counts
        self._check_together()

    def admit(self, observed: Observed | None) -> None:
        """Apply `unseen` to what was observed of one layer, or of layers that no token reached.

        Raises:
            ValueError: If it is broken, or an expert without tokens is an error, or no token reached a block that is to
                be changed.
        """
        if not observed:
            return
        found = Statistics(observed, unseen=self.unseen)
        found.check_finite()
        unseen = found.unseen_report()
        if unseen is not None and self.unseen == "error":
            raise ValueError(unseen)
        self.spare_unreached(observed)

    def spare_unreached(self, observed: Observed) -> None:
        """Leave blocks as they are that no token reached, where `unseen="keep"` says so.

        Raises:
            ValueError: If no token reached a block that is to be changed, and `unseen` is another, or there are no
                others; or if the architecture cannot hold the counts that are left.
        """
        self._spare(self.changed_by_data(), observed)
        self._check_together()

    def _check_together(self) -> None:
        whole = {block.name: block.num_experts for block in self.info.blocks if block.name in self.spared}
        check_together(self.store.blocks, {**self._counts, **whole})

    def changed_by_data(self) -> frozenset[str]:
        """Blocks that change as what was observed of them says."""
        model, names = self.info, frozenset[str]()
        for stage, allocation in zip(self.recipe.stages, self._allocations, strict=True):
            names |= stage.changed_by_data(model, allocation)
            model = model.with_experts({b.name: stage.remaining(model, b, allocation[b.name]) for b in model.blocks})
        return names - self.spared

    def _spare(self, wanted: frozenset[str], observed: Observed) -> None:
        """Leave blocks as they are that calibration never reached, because of `unseen="keep"`.

        Another tower of an omni model, or the vision experts on text alone: nothing says what may be changed there.

        Raises:
            ValueError: If there are such blocks among those to change, and `unseen` is another, or there are no others.
        """
        wanted = wanted - self.spared
        unreached = [
            block.name
            for block in self.info.blocks
            if block.name in wanted and block.name in observed and observed[block.name].num_tokens == 0
        ]
        if not unreached:
            return
        if self.unseen != "keep" or len(unreached) == len(wanted):
            raise ValueError(unreached_report(unreached, len(wanted)))
        self.spared.update(unreached)

    def _profiles(
        self, number: int, statistics: Statistics, values: Sequence[str], progress: Progress
    ) -> Mapping[str, Any]:
        """The profiles of all blocks for a stage; statistics remember them, with the plans of the stages before."""
        stage, before = self.recipe.stages[number], self.recipe.stages[:number]
        made_from = [[earlier.settings() for earlier in before], self._allocations, sorted(self.spared), values]
        key = f"{stage.profile_key} {made_from} {self.seed} {self.unseen}"
        if key not in statistics.memo:
            profiles = self._take_profiles(number, statistics.blocks, progress)
            statistics.memo[key] = profiles, [dict(plans) for plans in self._known]
        profiles, known = statistics.memo[key]
        self._known, self._profiled = [dict(plans) for plans in known], statistics.blocks
        return profiles

    def _take_profiles(self, number: int, observed: Observed, progress: Progress) -> dict[str, Any]:
        stage, profiles = self.recipe.stages[number], {}
        for layer in self.store.layers:
            if not layer.blocks:
                progress.skip()
                continue
            with progress.layer(layer), self.store.loaded(layer), self.store.as_stored(layer), torch.no_grad():
                for found in layer.blocks:
                    if found.info.name not in self.spared:
                        profiles[found.info.name] = stage.profile(self._entering(number, found, observed))
        return profiles

    def _entering(self, number: int, found: FoundBlock, observed: Observed | None) -> BlockContext:
        """A block as it enters a stage; what the stages before it decide is remembered for `decide`."""
        name, context = found.info.name, self._context(found, observed)
        for earlier, stage in enumerate(self.recipe.stages[:number]):
            known = self._known[earlier]
            if name not in known:
                known[name] = stage.decide(context, self._allocations[earlier][name])
            context = context.after(known[name])
        return context

    def decide(self, found: FoundBlock, observed: Observed | None) -> BlockPlan:
        """The plan for a block of an open layer."""
        name, stages = found.info.name, self.recipe.stages
        if name in self.spared:
            return keep_all(name, found.info.num_experts, self.recipe.routing)
        plan: BlockPlan | None = None
        with torch.no_grad():
            context = self._context(found, observed)
            for number, stage in enumerate(stages):
                own = self._known[number].get(name)
                if own is None:
                    own = stage.decide(context, self._allocations[number][name])
                plan = own if plan is None else stage.combine(plan, own)
                if number + 1 < len(stages):
                    context = context.after(own)
        assert plan is not None
        return plan

    def _context(self, found: FoundBlock, observed: Observed | None) -> BlockContext:
        """What the first stage may see of a block of a loaded layer.

        It views the tensors, which must be free to go while the block is cut.
        """
        block = found.module(self.store.model)
        return BlockContext(
            info=found.info,
            experts=found.surgeon.experts(block),
            router=found.surgeon.router(block),
            generator=torch.Generator().manual_seed(self.seed * 100_003 + found.info.index),
            statistics=None if observed is None else observed[found.info.name],
            unseen=self.unseen,
            num_blocks=len(self.store.blocks),
            profiled=None if self._profiled is None else self._profiled[found.info.name],
        )


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
