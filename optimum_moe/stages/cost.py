"""Storage and compute cost of a block's routed experts around each stage, computed from config and headers only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optimum_moe.model_info import BlockInfo
from optimum_moe.plan import Routing


@dataclass(frozen=True)
class BlockCost:
    """The routed experts of a block at one point of a recipe.

    Args:
        original_experts: Number of experts before the first stage.
        experts: Number of experts now.
        width: Neurons of each of them, while all are dense.
        parameters: Parameters that all of them store, biases included.
        active: Minimum and maximum number of experts that a token runs; fewer than the router selects if selected
            experts may have been merged into one.
        multiply_adds: Minimum and maximum number of multiply-adds per token.
        indices: Number of sparse row indices, which are not among the parameters.
        index_bytes: Bytes of these indices.
        routing: How the router reaches the experts; None while the routing is the original one.
        stock: Whether stock transformers classes can store them.
    """

    original_experts: int
    experts: int
    width: int
    parameters: float
    active: tuple[int, int]
    multiply_adds: tuple[float, float]
    indices: float = 0.0
    index_bytes: float = 0.0
    routing: Routing | None = None
    stock: bool = True

    @classmethod
    def of(cls, block: BlockInfo) -> BlockCost:
        """The cost of a block before the first stage."""
        each = block.top_k * block.expert_multiply_adds
        experts, parameters = block.num_experts, block.num_experts * block.expert_parameters
        return cls(experts, experts, block.intermediate_size, parameters, (block.top_k, block.top_k), (each, each))

    def with_count(self, block: BlockInfo, count: int, routing: Routing) -> BlockCost:
        """The cost if `count` of the experts remain, at an unchanged cost per expert."""
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
        """Bytes saved in the experts and router rows of a block, compared with the original block.

        Args:
            block: The block before the first stage.
        """
        gone = self.original_experts - self.experts
        saved = block.bytes_of_experts(gone, self.removed_parameters(block)) - self.index_bytes
        return saved + self.removed_router_parameters(block) * block.router_itemsize

    def removed_parameters(self, block: BlockInfo) -> float:
        """Number of expert parameters removed from the original block; negative if some were added."""
        return self.original_experts * block.expert_parameters - self.parameters

    def removed_router_parameters(self, block: BlockInfo) -> int:
        """Number of router parameters removed with the rows of removed experts."""
        gone = self.original_experts - self.experts
        return gone * block.router_parameters if self.routing == "reduce" else 0
