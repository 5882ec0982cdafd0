"""What every method shares: it sees tensors, never a model, and returns frozen data."""

from __future__ import annotations

import glob
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.router_fit import RouterView
from optimum_moe.blocks import BlockInfo, ModelInfo
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.settings import make_plain
from optimum_moe.statistics import BlockStatistics, Statistics, Unseen


@dataclass(frozen=True, eq=False)
class BlockContext:
    """Everything a method may look at to decide one block.

    Args:
        info: Sizes of the block.
        experts: Its routed experts.
        router: Its router.
        generator: Source of randomness, seeded for this block.
        statistics: Observed statistics, None for data-free methods.
        unseen: What to do about experts without tokens.
        num_blocks: MoE blocks of the model.
        surveyed: The statistics that a survey saw, where a budget was spent by one; those of `statistics` may come from
            a later pass, behind layers that are cut, in which tokens choose other experts.
    """

    info: BlockInfo
    experts: ExpertTensors
    router: RouterView
    generator: torch.Generator
    statistics: BlockStatistics | None = None
    unseen: Unseen = "warn"
    num_blocks: int = 1
    surveyed: BlockStatistics | None = None

    def observed(self) -> BlockStatistics:
        """The statistics, which a method that needs them was given."""
        assert self.statistics is not None
        return self.statistics

    def rank(self, values_E: torch.Tensor) -> torch.Tensor:
        """(E,) values for ranking experts: `unseen="keep"` puts experts without tokens in front."""
        if self.statistics is None or self.unseen != "keep":
            return values_E
        return values_E.masked_fill(self.statistics.token_count_E == 0, 2 * float(values_E.abs().max()) + 1)

    def sample(self) -> SampledTokens:
        """The sampled tokens of the block, on the device of its experts."""
        return self._sample(self.observed())

    def surveyed_sample(self) -> SampledTokens:
        """Those that a survey saw."""
        return self._sample(self.observed() if self.surveyed is None else self.surveyed)

    def _sample(self, observed: BlockStatistics) -> SampledTokens:
        experts, found = self.experts, observed.reservoir
        device = experts.up[0].device
        # Behind a norm of each expert's output the gradient at their sum is none of its own.
        gradient_SJH = found.gradient_SJH if experts.finish is None else None
        return SampledTokens(
            input_SH=found.experts_input_SH.to(device),
            index_SK=found.index_SK.to(device),
            weights_SK=found.weights_SK.to(device),
            gradient_SJH=None if gradient_SJH is None else gradient_SJH.to(device),
            scales_input=experts.scales_input,
            share=len(found.index_SK) / max(observed.num_tokens, 1) or 1.0,
        )


INDEX_BYTES = 4
"""Bytes of the index of a sparse row."""


@dataclass(frozen=True)
class ExpertCost:
    """What the routed experts of a block cost after a method, as far as config and headers tell.

    Args:
        parameters: Numbers that all of them store, biases included.
        multiply_adds: The fewest and the most that a token takes; they differ where selected experts may coincide.
        indices: Indices of sparse rows beside the parameters.
        stock: Whether the stock classes can hold them.
    """

    parameters: float
    multiply_adds: tuple[float, float]
    indices: float = 0.0
    stock: bool = True


@dataclass(frozen=True)
class Method(ABC):
    """A way of deciding what remains of each block; subclasses are frozen dataclasses of their settings.

    `size_fields` are the settings that say how much remains, of which exactly one is given; `share_fields` are shares,
    which may be given in percent.
    """

    name: ClassVar[str]
    size_fields: ClassVar[tuple[str, ...]] = ("num_experts", "keep_ratio", "target_size")
    share_fields: ClassVar[tuple[str, ...]] = ("keep_ratio",)

    def __post_init__(self) -> None:
        make_plain(self, self.share_fields)

    @property
    @abstractmethod
    def needs_statistics(self) -> bool:
        """Whether calibration data are needed."""

    @property
    def gradient_draws(self) -> int:
        """Backward passes over the calibration data that the method wants."""
        return 0

    @property
    def needs_sample(self) -> bool:
        """Whether it looks at sampled tokens, and not at sums over all of them only."""
        return False

    @property
    def sample_size(self) -> int:
        """Tokens of each block that the method wants to see as they are."""
        return 4096

    @property
    def is_adaptive(self) -> bool:
        """Whether counts are known only when all blocks were observed; so unless `allocate` is the stock one."""
        return type(self).allocate is not Method.allocate

    @property
    def knows_size(self) -> bool:
        """Whether `cost` says what will be stored, and not only what may be."""
        return True

    @property
    def needs_survey(self) -> bool:
        """Whether all blocks are looked at before the first one is decided."""
        return False

    @property
    def reads_experts(self) -> bool:
        """Whether `decide` looks at the weights of the experts."""
        return True

    @property
    @abstractmethod
    def block_routing(self) -> Routing:
        """How the router reaches what remains."""

    @abstractmethod
    def counts(self, model: ModelInfo) -> dict[str, int]:
        """Experts that remain in each block (on average, with an adaptive budget); checks all settings.

        Raises:
            ValueError: If a setting is impossible for this model.
        """

    def allocate(self, model: ModelInfo, statistics: Statistics | None) -> dict[str, int]:
        """Experts that remain in each block, once statistics are known."""
        return self.counts(model)

    def changed_by_data(self, model: ModelInfo, counts: Mapping[str, int]) -> set[str]:
        """Names of the blocks that change, with these counts, as what was observed of them says."""
        if not self.needs_statistics:
            return set()
        return {block.name for block in model.blocks if counts[block.name] < block.num_experts}

    def sparing(self, names: Collection[str]) -> Method:
        """The method that leaves these blocks as they are, too."""
        protect = [*(getattr(self, "protect", None) or ()), *map(glob.escape, names)]
        return replace(self, protect=protect)  # type: ignore[call-arg]

    @property
    def survey_key(self) -> str:
        """Of two methods with the same key a survey says the same."""
        return repr({name: value for name, value in self.settings().items() if name not in self.size_fields})

    def survey(self, context: BlockContext, count: int) -> Any:
        """What the budget has to know of a block of which `count` experts remain."""
        raise NotImplementedError(f"{self.name} makes no survey")

    def settled(self, model: ModelInfo, surveys: Mapping[str, Any]) -> Method:
        """The method that spends the budget as the surveys of all blocks suggest."""
        raise NotImplementedError(f"{self.name} makes no survey")

    @abstractmethod
    def decide(self, context: BlockContext, count: int) -> BlockPlan:
        """The plan for one block of which `count` experts remain."""

    def cost(self, model: ModelInfo, block: BlockInfo, count: int) -> ExpertCost:
        """What the `count` remaining experts of a block cost."""
        return ExpertCost(count * block.expert_parameters, self.active(block, count, block.expert_multiply_adds))

    def active(self, block: BlockInfo, count: int, each: float) -> tuple[float, float]:
        """The fewest and the most multiply-adds of a token where one of `count` experts takes `each`."""
        most = min(block.top_k, count)
        shared = self.block_routing == "map" and count < block.num_experts
        return (1 if shared else most) * each, most * each

    def settings(self) -> Mapping[str, Any]:
        """Name and settings, as they stand in a recipe."""
        return {"method": self.name, **{f.name: getattr(self, f.name) for f in fields(self) if f.init}}
