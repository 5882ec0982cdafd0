"""Sizes of a model and its MoE blocks, from config and headers, before any weight is read."""

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
        router_groups: Number of router groups (1 if there are none).
        intermediate_size: Neurons of one expert (I).
        hidden_size: Width of the residual stream (H).
        expert_parameters: Parameters of one routed expert.
        expert_multiply_adds: Multiply-adds of one routed expert on one token.
        router_parameters: Parameters of the router per expert.
        router_groups_used: Number of router groups from which a token may select experts.
        stack: Whether the block sees tokens of the encoder or the decoder, and so its padding mask.
        fixed_router: Reason why ids cannot be removed from the router; empty if they can.
        no_factors: Reason why its experts cannot be factorized; empty if they can.
        no_refit: Reason why down projections of merged experts cannot be fitted; empty if they can.
        fixed_width: Reason why stock classes cannot have narrower experts; empty if they can.
        width_divides: What the width of narrower experts has to divide, 0 for nothing: shared experts whose width is a
            multiple of it keep their own.
        expert_itemsize: Stored bytes per element of a routed expert's matrices; of the smallest expert if they differ.
        bias_itemsize: Stored bytes per element of a routed expert's biases, likewise.
        router_itemsize: Stored bytes per element of the router.
        no_skipping: Reason why tokens cannot skip its selected experts; empty if they can.
        layer: Module path of the layer that holds the block, for example `model.layers.3`; empty if there is none.
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
    no_refit: str = ""
    fixed_width: str = ""
    width_divides: int = 0
    expert_itemsize: float = 0.0
    bias_itemsize: float = 0.0
    router_itemsize: float = 0.0
    no_skipping: str = ""
    layer: str = ""

    def with_width(self, width: int) -> BlockInfo:
        """The block with experts of `width` neurons, which gate, up and down have alike; down keeps its bias."""
        whole, hidden = self.intermediate_size, self.hidden_size
        biases = self.expert_parameters - self.expert_multiply_adds
        # Gate and up have a bias for each neuron, down has one for each output.
        fixed = hidden if biases - hidden in (0, whole, 2 * whole) else 0
        multiply_adds = self.expert_multiply_adds // whole * width
        return replace(
            self,
            intermediate_size=width,
            expert_multiply_adds=multiply_adds,
            expert_parameters=multiply_adds + fixed + (biases - fixed) // whole * width,
        )

    def bytes_of_experts(self, number: float, parameters: float) -> float:
        """Bytes of `number` experts whose matrices and biases have `parameters` parameters in total."""
        biases = number * (self.expert_parameters - self.expert_multiply_adds)
        return (parameters - biases) * self.expert_itemsize + biases * self.bias_itemsize


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of a model, known before any weight is read.

    Args:
        blocks: Its MoE blocks.
        parameters: Parameters of the whole model, tied ones once.
        bytes: Bytes of the whole checkpoint.
        header_bytes: Maximum bytes of the headers of its files, for any number of shards.
        before: The model before the first stage of a recipe; None if this is that model.
        model_type: The field of that name in `config.json`.
    """

    blocks: tuple[BlockInfo, ...]
    parameters: int
    bytes: int
    header_bytes: int = 0
    before: ModelInfo | None = None
    model_type: str = ""

    @property
    def original(self) -> ModelInfo:
        """The model before the first stage of a recipe."""
        return self.before or self

    def with_experts(
        self, counts: Mapping[str, int], widths: Mapping[str, int], removed_bytes: float = 0.0
    ) -> ModelInfo:
        """The model with these numbers of experts and of their neurons, `removed_bytes` smaller than the original."""
        blocks = tuple(
            replace(block.with_width(widths[block.name]), num_experts=counts[block.name]) for block in self.blocks
        )
        original = self.original
        return replace(self, blocks=blocks, bytes=int(original.bytes - removed_bytes), before=original)
