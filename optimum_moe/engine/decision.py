"""Plans the blocks of a model one after the other, with the stages of a recipe or from a finished plan."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from optimum_moe.engine.progress import Progress
from optimum_moe.engine.store import Observed, Store
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan, CompressionPlan, keep_all
from optimum_moe.ranks import SINGLE, Ranks
from optimum_moe.recipe import Recipe
from optimum_moe.stages import BlockContext, Stage
from optimum_moe.statistics import Statistics, Unseen
from optimum_moe.surgeons import FoundBlock


class PlanReader:
    """Reads the plans of blocks from a finished plan.

    Args:
        store: The model.
        plan: The plan.

    Raises:
        ValueError: If the plan's blocks or their expert counts differ from the model's.
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
        counts = {name: block.num_groups for name, block in plan.blocks.items()}
        formed = {name for name, block in plan.blocks.items() if block.sizes is not None and not block.is_stock}
        check_together(store.blocks, counts, formed)

    def admit(self, observed: Observed | None) -> None:
        """Do nothing, since a finished plan needs no statistics."""

    def decide(self, found: FoundBlock, observed: Observed | None) -> BlockPlan:
        """The plan of one block."""
        return self._plan.blocks[found.info.name]


class Decider:
    """Plans blocks with the stages of a recipe; call `allocate` first.

    Args:
        store: The model.
        recipe: The recipe.
        info: Sizes of the model.
        seed: Seed of all random choices.
        unseen: Policy for experts and blocks that no token was routed to.
        ranks: Processes that share the blocks.
    """

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        info: ModelInfo,
        seed: int,
        unseen: Unseen = "warn",
        ranks: Ranks = SINGLE,
    ) -> None:
        self.store, self.recipe, self.info, self.seed, self.unseen = store, recipe, info, seed, unseen
        self.ranks, self._own = ranks, frozenset(ranks.share([found.info.name for found in store.blocks]))
        self.reads_experts = recipe.reads_experts
        self._counts: Mapping[str, int] = {}
        self._formed = {name for name, cost in recipe.costs(info).items() if not cost.stock}
        self.unreached: set[str] = set()
        """Blocks that no token reached, which remain unchanged because of `unseen="keep"`."""
        self._allocations: list[Mapping[str, Any]] = []
        self._known: list[dict[str, BlockPlan]] = []
        """By stage: its own plans of blocks, which a later stage needs."""
        self._profiled: Observed | None = None
        self.remarks: tuple[str, ...] = ()
        """Sentences for the user about what was decided."""
        self.evidence: dict[str, Any] = {}
        """Numbers behind the decision, see `Stage.evidence`."""

    def allocate(self, statistics: Statistics | None, values: Sequence[str], progress: Progress) -> None:
        """Allocate the budgets of all stages in order, and take the profiles that they need.

        Args:
            statistics: Statistics of all blocks; None if nothing was observed yet.
            values: Digests of the model's values, part of the key of cached profiles.
            progress: Progress display over the layers.

        Raises:
            ValueError: If statistics are not finite, no token reached the blocks to compress, or the architecture does
                not support the expert counts.
        """
        if statistics is not None:
            statistics.check_finite()
        model, counts = self.info, {block.name: block.num_experts for block in self.info.blocks}
        for number, stage in enumerate(self.recipe.stages):
            self._known.append({})
            profiles: Mapping[str, Any] = {}
            if stage.needs_profile:
                assert statistics is not None
                # Whether tokens reach a block does not depend on its share.
                self._keep_unreached(stage.changed_by_data(model, {}), statistics.blocks)
                profiles = self._profiles(number, statistics, values, progress)
            allocation = stage.allocate(model, statistics, profiles)
            if statistics is not None:
                self._keep_unreached(stage.changed_by_data(model, allocation), statistics.blocks)
            self._allocations.append(allocation)
            self.remarks += stage.remarks(model, statistics, profiles)
            self.evidence |= stage.evidence(model, statistics, profiles, allocation)
            model = _leaving(model, stage, allocation)
            counts = {block.name: block.num_experts for block in model.blocks}
        self._counts = counts
        self._check_together()

    def admit(self, observed: Observed | None) -> None:
        """Check the statistics of one layer, and apply the policy `unseen` to them.

        Raises:
            ValueError: If they are not finite, `unseen="error"` and an expert has no tokens, or no token reached a
                block to compress.
        """
        if not observed:
            return
        found = Statistics(observed, unseen=self.unseen)
        found.check_finite()
        unseen = found.unseen_report()
        if unseen is not None and self.unseen == "error":
            raise ValueError(unseen)
        self.keep_unreached(observed)

    def keep_unreached(self, observed: Observed) -> None:
        """With `unseen="keep"`, leave blocks unchanged that no token reached.

        Raises:
            ValueError: If no token reached a block to compress and `unseen` is not `"keep"`, if no token reached any of
                them, or if the architecture does not support the remaining counts.
        """
        self._keep_unreached(self.changed_by_data(), observed)
        self._check_together()

    def _check_together(self) -> None:
        whole = {block.name: block.num_experts for block in self.info.blocks if block.name in self.unreached}
        check_together(self.store.blocks, {**self._counts, **whole}, self._formed - self.unreached)

    def changed_by_data(self) -> frozenset[str]:
        """Names of the blocks that are changed based on observed statistics."""
        model, names = self.info, frozenset[str]()
        for stage, allocation in zip(self.recipe.stages, self._allocations, strict=True):
            names |= stage.changed_by_data(model, allocation)
            model = _leaving(model, stage, allocation)
        return names - self.unreached

    def _keep_unreached(self, wanted: frozenset[str], observed: Observed) -> None:
        """With `unseen="keep"`, leave blocks unchanged that no calibration token reached.

        Examples are another tower of an omni model, and vision experts on text-only data.

        Raises:
            ValueError: If such a block is to be compressed and `unseen` is not `"keep"`, or if all of them are such.
        """
        wanted = wanted - self.unreached
        unreached = [
            block.name
            for block in self.info.blocks
            if block.name in wanted and block.name in observed and observed[block.name].num_tokens == 0
        ]
        if not unreached:
            return
        if self.unseen != "keep" or len(unreached) == len(wanted):
            raise ValueError(unreached_report(unreached, len(wanted)))
        self.unreached.update(unreached)

    def _profiles(
        self, number: int, statistics: Statistics, values: Sequence[str], progress: Progress
    ) -> Mapping[str, Any]:
        """Profiles of all blocks for a stage, cached in the statistics with the plans of the stages before it."""
        stage, before = self.recipe.stages[number], self.recipe.stages[:number]
        made_from = [[earlier.settings() for earlier in before], self._allocations, sorted(self.unreached), values]
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
                    if found.info.name in self._own - self.unreached:
                        profiles[found.info.name] = stage.profile(self._entering(number, found, observed))
        everywhere = ChainMap(*self.ranks.gathered(profiles, self.store.model.device))
        return {
            found.info.name: everywhere[found.info.name] for found in self.store.blocks if found.info.name in everywhere
        }

    def _entering(self, number: int, found: FoundBlock, observed: Observed | None) -> BlockContext:
        """The context of a block as it enters a stage; each earlier stage decides it once."""
        name, context = found.info.name, self._context(found, observed)
        for earlier, stage in enumerate(self.recipe.stages[:number]):
            known = self._known[earlier]
            if name not in known:
                known[name] = stage.decide(context, self._allocations[earlier][name])
            context = context.after(known[name])
        return context

    def decide(self, found: FoundBlock, observed: Observed | None) -> BlockPlan:
        """The plan of a block of an open layer, with all stages combined."""
        name, last = found.info.name, len(self.recipe.stages) - 1
        if name in self.unreached:
            return keep_all(name, found.info.num_experts, self.recipe.routing)
        with torch.no_grad():
            context = self._entering(last, found, observed)
            own = self.recipe.stages[last].decide(context, self._allocations[last][name])
        # Plans may hold whole experts, which nothing needs again.
        plans = [*(known.pop(name) for known in self._known[:last]), own]
        combined = plans[0]
        for stage, plan in zip(self.recipe.stages[1:], plans[1:], strict=True):
            combined = stage.combine(combined, plan)
        return combined

    def _context(self, found: FoundBlock, observed: Observed | None) -> BlockContext:
        """The context of the first stage for a block of a loaded layer.

        It holds views of the tensors, so drop it before the block is cut to free their memory.
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


class SharedPlans:
    """Plans of blocks that several processes have decided, each its share of the blocks.

    Args:
        decider: Decides the blocks of this process.
        observed: Statistics of all blocks; None if nothing was observed.
    """

    reads_experts = False

    def __init__(self, decider: Decider, observed: Observed | None) -> None:
        self._ranks, self._device, store = decider.ranks, decider.store.model.device, decider.store
        names = [found.info.name for found in store.blocks]
        self._owners = {name: self._ranks.owner(number) for number, name in enumerate(names)}
        self._plans: dict[str, BlockPlan] = {}
        for layer in store.layers:
            with store.loaded(layer), store.as_stored(layer):
                for found in layer.blocks:
                    if self._owners[found.info.name] == self._ranks.rank:
                        self._plans[found.info.name] = decider.decide(found, observed)

    def admit(self, observed: Observed | None) -> None:
        """Do nothing, since all blocks are decided."""

    def decide(self, found: FoundBlock, observed: Observed | None) -> BlockPlan:
        """The plan of one block, from the process that decided it."""
        name = found.info.name
        return self._ranks.sent(self._plans.pop(name, None), self._owners[name], self._device)


def _leaving(model: ModelInfo, stage: Stage, allocation: Mapping[str, Any]) -> ModelInfo:
    """The model as it leaves a stage."""
    return model.with_experts(
        {block.name: stage.remaining(model, block, allocation[block.name]) for block in model.blocks},
        {block.name: stage.width(model, block, allocation[block.name]) for block in model.blocks},
    )


def unreached_report(names: Sequence[str], wanted: int) -> str:
    """Error message for blocks that no token reached, out of `wanted` blocks to compress."""
    keep = ', or set unseen="keep"' if len(names) < wanted else ""
    return (
        f"No calibration token reached {len(names)} of the blocks to compress ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}), so there are no statistics of their experts. Add data that "
        f'reaches them, leave them out with protect=["{names[0]}", ...] or layers={keep}.'
    )


def check_together(blocks: Sequence[FoundBlock], counts: Mapping[str, int], formed: Collection[str]) -> None:
    """Raise a `ValueError` if a checkpoint of the architecture cannot hold these blocks together.

    Args:
        blocks: All blocks.
        counts: Experts of each that remain, by its name.
        formed: Names of those whose experts are stored in forms that stock classes do not have.
    """
    for surgeon in {found.surgeon.name: found.surgeon for found in blocks}.values():
        objection = surgeon.objection(counts, formed)
        if objection is not None:
            raise ValueError(objection)
