"""What every method shares: it sees tensors, never a model, and returns frozen data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.router_fit import RouterView
from optimum_moe.blocks import BlockInfo, ModelInfo
from optimum_moe.plan import BlockPlan, Routing
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
    """

    info: BlockInfo
    experts: ExpertTensors
    router: RouterView
    generator: torch.Generator
    statistics: BlockStatistics | None = None
    unseen: Unseen = "warn"

    def observed(self) -> BlockStatistics:
        """The statistics, which a method that needs them was given."""
        assert self.statistics is not None
        return self.statistics

    def rank(self, values_E: torch.Tensor) -> torch.Tensor:
        """(E,) values for ranking experts: `unseen="keep"` puts experts without tokens in front."""
        if self.statistics is None or self.unseen != "keep":
            return values_E
        return values_E.masked_fill(self.statistics.token_count_E == 0, 2 * float(values_E.abs().max()) + 1)


@dataclass(frozen=True)
class Method(ABC):
    """A way of deciding what remains of each block; subclasses are frozen dataclasses of their settings."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def needs_statistics(self) -> bool:
        """Whether calibration data are needed."""

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

    @abstractmethod
    def decide(self, context: BlockContext, count: int) -> BlockPlan:
        """The plan for one block of which `count` experts remain."""

    def settings(self) -> Mapping[str, Any]:
        """Name and settings, as they stand in a recipe."""
        return {"method": self.name, **asdict(self)}
