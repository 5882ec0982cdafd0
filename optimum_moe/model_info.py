"""What is known of an MoE block before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class BlockInfo:
    """One MoE block.

    Args:
        name: Module path, for example `model.layers.3.mlp`.
        index: Position among the MoE blocks of the model, from 0.
        num_experts: Routed experts (E).
        top_k: Experts that the router selects for a token (K).
        router_groups: Router groups that the experts are divided into (1 where there is no such limit).
        intermediate_size: Neurons of one expert (I).
        hidden_size: Width of the residual stream (H).
        expert_parameters: Parameters of one routed expert.
        expert_multiply_adds: Multiply-adds of one routed expert on one token.
        router_parameters: Parameters that the router holds for one expert.
        router_groups_used: Router groups that one token may choose experts from.
        stack: Which input's padding mask belongs to the tokens of this block.
        fixed_router: Why the block cannot choose from fewer ids than it does; empty where it can.
        no_factors: Why its experts cannot be kept in factors; empty where they can.
        expert_itemsize: Bytes of one number of a matrix of a routed expert, as stored; of the smallest expert where
            they differ.
        bias_itemsize: Bytes of one number of its biases, likewise.
        router_itemsize: Bytes of one number of the router, as stored.
    """

    name: str
    index: int
    num_experts: int
    top_k: int
    router_groups: int
    intermediate_size: int
    hidden_size: int
    expert_parameters: int
    expert_multiply_adds: int
    router_parameters: int
    router_groups_used: int = 1
    stack: Literal["encoder", "decoder"] = "decoder"
    fixed_router: str = ""
    no_factors: str = ""
    expert_itemsize: float = 0.0
    bias_itemsize: float = 0.0
    router_itemsize: float = 0.0

    def bytes_of_experts(self, number: float, parameters: float) -> float:
        """Bytes that a number of experts take whose matrices and biases store so many parameters."""
        biases = number * (self.expert_parameters - self.expert_multiply_adds)
        return (parameters - biases) * self.expert_itemsize + biases * self.bias_itemsize


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before any weight is read.

    Args:
        blocks: Its MoE blocks.
        parameters: Parameters of the whole model, tied ones once.
        bytes: Bytes of the whole checkpoint.
        header_bytes: What the headers of its files take at most, however they are cut into shards.
        before: The model before the first stage of a recipe; None for that one itself.
    """

    blocks: tuple[BlockInfo, ...]
    parameters: int
    bytes: int
    header_bytes: int = 0
    before: ModelInfo | None = None

    @property
    def original(self) -> ModelInfo:
        """The model before the first stage of a recipe."""
        return self.before or self

    def with_experts(self, counts: Mapping[str, int], removed_bytes: float = 0.0) -> ModelInfo:
        """The model whose blocks have these numbers of experts, `removed_bytes` smaller than the original."""
        blocks = tuple(replace(block, num_experts=counts[block.name]) for block in self.blocks)
        original = self.original
        return replace(self, blocks=blocks, bytes=int(original.bytes - removed_bytes), before=original)
