"""DBRX: three parameters stack the matrices of all experts by rows, and the block itself turns logits into ids."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from optimum_moe.formats.base import Opened
from optimum_moe.nn import FactorizedExperts, SwappedModule, map_routing, swapped_class
from optimum_moe.nn.factorized_layer import run_factorized
from optimum_moe.nn.merged_experts import run_routed
from optimum_moe.plan import Routing
from optimum_moe.surgeons.architecture import RouterTensor
from optimum_moe.surgeons.base import Block, BlockWatcher
from optimum_moe.surgeons.stacked import ExpertStack, Fields, StackedSurgeon, run_merged, watch_loop


class MappedDbrxBlock(SwappedModule):
    """Maps expert ids to groups after the block's selection; the router keeps its N logits."""

    router: Any

    def route_tokens_to_experts(self, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, K) weights and groups."""
        weights_TK, index_TK = super().route_tokens_to_experts(router_logits)  # type: ignore[misc]
        groups_TK, summed_TK = map_routing(index_TK, weights_TK, self.router.expert_map)
        return summed_TK, groups_TK


class MergedDbrxExperts(SwappedModule):
    """Runs a merged expert once per token; the stock loop would run it for every repeated id."""

    num_experts: int
    hidden_size: int

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the selected experts, in the shape of `hidden_states`."""
        index_TK = top_k_index.masked_fill(top_k_weights == 0, self.num_experts)
        hidden_TH = hidden_states.reshape(-1, self.hidden_size)
        run = partial(_run_expert, self, opened={})
        return run_routed(run, self.num_experts, hidden_TH, index_TK, top_k_weights).view(hidden_states.shape)


class DbrxSurgeon(StackedSurgeon):
    """One flat parameter each for gate (`w1`), up (`v1`) and the transpose of down (`w2`)."""

    name = "dbrx"
    count_fields = ("moe_num_experts",)
    count_config = "ffn_config"
    tensors = (RouterTensor("layer.weight"),)

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is the feed-forward block of a layer."""
        return type(module).__name__ == "DbrxFFN"

    def stacks(self, block: Block) -> tuple[ExpertStack, ...]:
        """The stacks of gate, up and down, each (E * I, H)."""
        return (
            ExpertStack("experts.mlp.w1", _gate, flat=True),
            ExpertStack("experts.mlp.v1", _up, flat=True),
            ExpertStack("experts.mlp.w2", _down, flat=True),
        )

    def num_experts(self, block: Block) -> int:
        """The count of the experts module."""
        return block.experts.num_experts

    def top_k(self, block: Block) -> int:
        """The attribute of the block."""
        return block.top_k

    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """See `StackedSurgeon.install`."""
        if routing == "map":
            self.add_map(block, num_groups)
            block.__class__ = swapped_class(MappedDbrxBlock, type(block))
            run_merged(block.experts, MergedDbrxExperts)
        else:
            block.router.layer.out_features = num_groups
        block.experts.num_experts = block.experts.mlp.moe_num_experts = num_groups

    def activate(self, block: Block, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """See `Surgeon.activate`."""
        return _activate(block.experts, gate_PI, up_PI)

    def install_factors(self, block: Block, factors: FactorizedExperts) -> None:
        """See `Surgeon.install_factors`."""
        self.drop_stacks(block)
        block.experts.factors = factors
        run_merged(block.experts, MergedDbrxExperts)

    def watch(self, block: Block, watcher: BlockWatcher) -> AbstractContextManager[None]:
        """See `watch_loop`."""
        experts = block.experts
        run = partial(_run_expert, experts)
        return watch_loop(block.router, experts, experts.mlp.activation_fn, experts.num_experts, run, watcher)


def _gate(tensor_EIH: torch.Tensor) -> Fields:
    return {"gate": tensor_EIH}


def _up(tensor_EIH: torch.Tensor) -> Fields:
    return {"up": tensor_EIH}


def _down(tensor_EIH: torch.Tensor) -> Fields:
    return {"down": tensor_EIH.transpose(1, 2)}


def _activate(experts: Any, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
    return experts.mlp.activation_fn(gate_PI) * up_PI


def _run_expert(
    experts: Any, expert: int, input_PH: torch.Tensor, opened: Opened | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(experts, "factors"):
        return run_factorized(experts.factors, partial(_activate, experts), None, expert, input_PH, opened)
    mlp = experts.mlp
    w1, v1, w2 = (
        tensor.view(experts.num_experts, -1, experts.hidden_size)[expert] for tensor in (mlp.w1, mlp.v1, mlp.w2)
    )
    hidden_PI = _activate(experts, input_PH @ w1.T, input_PH @ v1.T)
    return hidden_PI, hidden_PI @ w2
