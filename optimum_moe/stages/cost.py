"""What the routed experts of a block cost, as far as config and headers tell, before and after each stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optimum_moe.model_info import BlockInfo
from optimum_moe.plan import Routing

INDEX_BYTES = 4
"""Bytes of the index of a sparse row."""


@dataclass(frozen=True)
class BlockCost:
    """The routed experts of a block at one point of a recipe.

    Args:
        original_experts: How many there were before the first stage.
        experts: How many there are.
        parameters: Numbers that all of them store, biases included.
        active: The fewest and the most of them that a token runs; fewer than the router selects where selected ones
            may have been merged into one.
        multiply_adds: The fewest and the most that a token takes.
        indices: Indices of sparse rows beside the parameters.
        routing: How the router reaches them; None as long as it is the original's.
        stock: Whether the stock classes can hold them.
    """

    original_experts: int
    experts: int
    parameters: float
    active: tuple[int, int]
    multiply_adds: tuple[float, float]
    indices: float = 0.0
    routing: Routing | None = None
    stock: bool = True

    @classmethod
    def of(cls, block: BlockInfo) -> BlockCost:
        """Of a block before the first stage."""
        each = block.top_k * block.expert_multiply_adds
        experts, parameters = block.num_experts, block.num_experts * block.expert_parameters
        return cls(experts, experts, parameters, (block.top_k, block.top_k), (each, each))

    def with_count(self, block: BlockInfo, count: int, routing: Routing) -> BlockCost:
        """Where `count` of the experts remain, each of which costs what it did."""
        if count == self.experts:
            return self
        most = min(self.active[1], count)
        fewest = 1 if "map" in (routing, self.routing) else min(self.active[0], count)
        return replace(
            self,
            experts=count,
            parameters=self.parameters * count / self.experts,
            active=(fewest, most),
            multiply_adds=(fewest * block.expert_multiply_adds, most * block.expert_multiply_adds),
            routing=routing,
        )

    def saved_bytes(self, block: BlockInfo) -> float:
        """Bytes that the experts of a block, and the rows of its router, lost since before the first stage.

        Args:
            block: The block before the first stage.
        """
        gone = self.original_experts - self.experts
        saved = block.bytes_of_experts(gone, self.removed_parameters(block)) - self.indices * INDEX_BYTES
        return saved + self.removed_router_parameters(block) * block.router_itemsize

    def removed_parameters(self, block: BlockInfo) -> float:
        """Parameters that the experts lost since before the first stage; negative where they gained some."""
        return self.original_experts * block.expert_parameters - self.parameters

    def removed_router_parameters(self, block: BlockInfo) -> int:
        """Parameters that the router lost with the rows of experts that are gone."""
        gone = self.original_experts - self.experts
        return gone * block.router_parameters if self.routing == "reduce" else 0
