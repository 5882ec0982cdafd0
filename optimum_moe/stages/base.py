"""What every stage of a recipe shares: it sees tensors and sizes, never a model, and returns frozen data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.settings import check_free, make_plain
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.statistics import Statistics

GRAM_TOKENS = 32768
"""Tokens to sample for a stage that fits matrices of single experts: more of each expert than it has channels."""


@dataclass(frozen=True)
class Stage(ABC):
    """One step of a recipe, which decides what becomes of each MoE block; subclasses are frozen dataclasses.

    A run calls, in this order: `check` before any weight is read; `needs` for the observations to collect; `profile`
    for each block, if `needs_profile`; `allocate` once for all blocks; `decide` for each block. `costs` estimates
    at any time what will be stored.

    `size_fields` are the settings that fix the compressed size; exactly one of them is given. `share_fields` are
    shares, which may be given in percent.
    """

    name: ClassVar[str]
    size_fields: ClassVar[tuple[str, ...]] = ("num_experts", "keep_ratio", "target_size")
    share_fields: ClassVar[tuple[str, ...]] = ("keep_ratio",)

    def __post_init__(self) -> None:
        make_plain(self, self.share_fields)

    @abstractmethod
    def check(self, model: ModelInfo) -> None:
        """Check all settings against the model as it enters the stage.

        Raises:
            ValueError: If a setting is impossible for this model.
        """

    @property
    def needs(self) -> frozenset[str]:
        """Names of the observations that the stage reads, see `optimum_moe.statistics.OBSERVATIONS`."""
        return frozenset()

    @property
    def sample_size(self) -> int:
        """Number of tokens to sample at each block, for a stage that needs the `"sample"`."""
        return 4096

    @property
    def largest_sample(self) -> int:
        """Number of tokens that the sample grows to where as many are observed and memory allows it."""
        return self.sample_size

    @property
    def needs_profile(self) -> bool:
        """Whether all blocks are profiled before the first one is decided."""
        return False

    @property
    def is_adaptive(self) -> bool:
        """Whether blocks share a budget, so that all of them must be observed before the first one is decided."""
        return self.needs_profile

    @property
    def reads_experts(self) -> bool:
        """Whether `decide` reads the weights of the experts."""
        return True

    @property
    def knows_size(self) -> bool:
        """Whether `costs` is exact; otherwise it gives an upper bound."""
        return True

    @property
    def routing(self) -> Routing | None:
        """How the router reaches the experts that remain; None for a stage that keeps all of them."""
        return None

    @property
    def chooses_experts(self) -> bool:
        """Whether the stage chooses among the original experts, by statistics that were observed for them."""
        return self.routing is not None

    @property
    def averages_experts(self) -> bool:
        """Whether the matrices of merged experts are weighted means of those of their members."""
        return True

    @property
    def leaves_dense_experts(self) -> bool:
        """Whether every remaining expert is stored in dense matrices, so that another stage can follow."""
        return True

    @property
    def only_changes_values(self) -> str:
        """A sentence for previews on what it writes into experts that keep their size; empty if they become smaller."""
        return ""

    @property
    def stores_stock_experts(self) -> bool:
        """Whether experts that lose neurons are stored in the original's own tensors, which stock classes load."""
        return False

    @property
    def skips_experts(self) -> bool:
        """Whether tokens skip experts at run time, so that the experts cannot be merged or removed afterwards."""
        return False

    @property
    def drops_layers(self) -> bool:
        """Whether the stage drops layers, before the blocks of those that remain are observed and decided."""
        return False

    def number_of_layers(self, model: ModelInfo) -> int:
        """How many layers are dropped; only called if `drops_layers`."""
        return 0

    def candidates(self, model: ModelInfo) -> Sequence[tuple[str, ...]]:
        """The sets of layers that may be dropped, of which the least important ones are; only if `drops_layers`."""
        return ()

    def importance(self, model: ModelInfo, statistics: Statistics, candidate: Sequence[str]) -> float:
        """How much is lost with a set of layers; only called if `drops_layers`."""
        raise NotImplementedError(f"{self.name} drops no layers")

    @property
    def export_to(self) -> str:
        """Target of `optimum_moe.export` without which the intended runtime does not load the result; else empty."""
        return ""

    def check_order(self, before: Stage | None) -> None:
        """Check that this stage can follow another one in a recipe.

        Args:
            before: The stage right before this one; None for the first stage.

        Raises:
            ValueError: If this stage cannot follow it.
        """
        if before is None:
            return
        if self.drops_layers:
            raise ValueError(
                f"{self.name} cannot follow {before.name}: layers are dropped before blocks are changed. Put "
                f"{self.name} first, and only one such stage."
            )
        if not before.leaves_dense_experts:
            raise ValueError(
                f"{self.name} cannot follow {before.name}, which stores experts in other formats than dense matrices. "
                f"Put {before.name} last."
            )
        if self.chooses_experts and before.skips_experts:
            raise ValueError(
                f"{self.name} cannot follow {before.name}: what tokens skip was observed with all experts. Put "
                f"{self.name} in a run of its own, and {before.name} in one on its checkpoint."
            )
        if self.chooses_experts and before.chooses_experts:
            raise ValueError(
                f"{self.name} cannot follow {before.name}: the statistics were observed for the original experts, and "
                "these were merged or pruned already. Use only one stage that merges or prunes experts."
            )
        if self.chooses_experts and not before.drops_layers:
            raise ValueError(
                f"{self.name} cannot follow {before.name}: experts are merged or pruned before what remains of them is "
                f"changed. Put {before.name} after {self.name}."
            )

    def changed_by_data(self, model: ModelInfo, allocation: Mapping[str, Any]) -> frozenset[str]:
        """Names of the blocks that the stage changes based on observed statistics.

        Args:
            model: The model as it enters the stage.
            allocation: The result of `allocate`; empty before that.
        """
        return frozenset()

    def remaining(self, model: ModelInfo, block: BlockInfo, allocated: Any) -> int:
        """Number of experts that remain in a block with its share of the allocation."""
        return block.num_experts

    def width(self, model: ModelInfo, block: BlockInfo, allocated: Any) -> int:
        """Neurons of each remaining expert of a block, for a stage that leaves all of them dense and equally wide."""
        return block.intermediate_size

    def profile(self, context: BlockContext) -> Any:
        """Measurements of a block that `allocate` needs; only called if `needs_profile`."""
        raise NotImplementedError(f"{self.name} takes no profile of a block")

    def choices(self, model: ModelInfo) -> tuple[tuple[int, int], ...]:
        """The numbers of experts and their widths among which the data will choose; empty where none are chosen."""
        return ()

    @property
    def profile_key(self) -> str:
        """Key of the stage's profiles; stages with the same key share them, so one profile serves several sizes."""
        return repr({name: value for name, value in self.settings().items() if name not in self.size_fields})

    def allocate(
        self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Share the stage's budget among the blocks.

        Args:
            model: The model as it enters the stage.
            statistics: Observed statistics; None for a stage that needs none.
            profiles: Results of `profile` by block name; unchanged blocks have none.

        Returns:
            A value for each block, for example its number of experts, which is passed to `decide`.
        """
        return {block.name: None for block in model.blocks}

    def remarks(self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]) -> tuple[str, ...]:
        """Sentences for the user about what was decided; arguments as for `allocate`."""
        return ()

    def evidence(
        self,
        model: ModelInfo,
        statistics: Statistics | None,
        profiles: Mapping[str, Any],
        allocation: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        """Numbers behind the decision that reports draw, as JSON values by name.

        Args:
            model: As for `allocate`.
            statistics: As for `allocate`.
            profiles: As for `allocate`.
            allocation: What `allocate` returned.
        """
        return {}

    @abstractmethod
    def decide(self, context: BlockContext, allocated: Any) -> BlockPlan:
        """The plan for one block.

        Args:
            context: The block as it enters the stage.
            allocated: The block's value in the result of `allocate`.
        """

    def combine(self, before: BlockPlan, own: BlockPlan) -> BlockPlan:
        """Combine the plan of this stage with that of the stages before it.

        Args:
            before: Plan of the stages before this one.
            own: Plan of this stage.
        """
        return before.with_forms_of(own)

    @abstractmethod
    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> Mapping[str, BlockCost]:
        """Storage and compute cost of each block's routed experts after the stage.

        Args:
            model: The model as it enters the stage.
            before: Costs before the stage, by block.
        """

    def settings(self) -> Mapping[str, Any]:
        """The stage's name and all its settings, as written in a recipe."""
        return {"stage": self.name, **{f.name: getattr(self, f.name) for f in fields(self) if f.init}}

    def described(self) -> Mapping[str, Any]:
        """The stage's name and the settings that differ from their defaults."""
        own = [f for f in fields(self) if f.init]
        return {"stage": self.name, **{f.name: v for f in own if (v := getattr(self, f.name)) != f.default}}


_STAGES: dict[str, type[Stage]] = {}


def register_stage(stage: type[Stage]) -> type[Stage]:
    """Class decorator that makes a stage available in recipes by its `name`.

    Raises:
        ValueError: If the name is that of another stage.
    """
    check_free(f"stage {stage.name!r}", _STAGES.get(stage.name), stage)
    _STAGES[stage.name] = stage
    return stage


def registered_stages() -> Mapping[str, type[Stage]]:
    """All registered stages by name."""
    return dict(_STAGES)
