"""Step 3.7: the common contract, but with a loop over experts that has no other implementation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from optimum_moe.algorithms.expert_skipping import Skipping
from optimum_moe.formats.base import Opened
from optimum_moe.hf.compat import apply_gate
from optimum_moe.nn import FactorizedExperts, MappedRouter, SwappedModule, swapped_class
from optimum_moe.nn.factorized_layer import run_factorized
from optimum_moe.nn.merged_experts import run_routed
from optimum_moe.plan import Routing
from optimum_moe.surgeons.architecture import RouterTensor
from optimum_moe.surgeons.base import Block, BlockWatcher
from optimum_moe.surgeons.stacked import (
    ExpertStack,
    StackedSurgeon,
    down_of,
    gate_up_of,
    run_merged,
    run_skipping,
    watch_loop,
)


class MergedStep3p7Experts(SwappedModule):
    """Runs a merged expert once per token; the stock loop would run it for every repeated id."""

    num_experts: int

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) weighted sum of the selected experts."""
        index_TK = top_k_index.masked_fill(top_k_weights == 0, self.num_experts)
        return run_routed(
            partial(_run_expert, self, opened={}), self.num_experts, hidden_states, index_TK, top_k_weights
        )


class Step3p7Surgeon(StackedSurgeon):
    """Surgeon for Step 3.7; layers may clamp their hidden neurons, as the experts module does."""

    name = "step3p7"
    count_fields = ("n_routed_experts", "num_local_experts", "moe_num_experts")
    no_skipping = ""
    router_name = "gate"
    tensors = (RouterTensor("weight"), RouterTensor("e_score_correction_bias"))

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is the MoE block of a layer."""
        return type(module).__name__ == "Step3p7SparseMoeBlock"

    def stacks(self, block: Block) -> tuple[ExpertStack, ...]:
        """The stacks of gate and up (E, 2 I, H), and of down (E, H, I)."""
        return ExpertStack("experts.gate_up_proj", gate_up_of), ExpertStack("experts.down_proj", down_of)

    def scores(self, block: Block, logits_SN: torch.Tensor) -> torch.Tensor:
        """Sigmoid scores (S, N)."""
        return logits_SN.sigmoid()

    def num_experts(self, block: Block) -> int:
        """The count of the experts module."""
        return block.experts.num_experts

    def top_k(self, block: Block) -> int:
        """The attribute of the router."""
        return block.gate.top_k

    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """See `StackedSurgeon.install`."""
        if routing == "map":
            self.add_map(block, num_groups)
            block.gate.__class__ = swapped_class(MappedRouter, type(block.gate))
            run_merged(block.experts, MergedStep3p7Experts)
        else:
            block.gate.num_experts = num_groups
        block.experts.num_experts = num_groups

    def activate(self, block: Block, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """See `Surgeon.activate`."""
        return _activate(block.experts, gate_PI, up_PI)

    def install_factors(self, block: Block, factors: FactorizedExperts) -> None:
        """See `Surgeon.install_factors`."""
        self.drop_stacks(block)
        block.experts.factors = factors
        run_merged(block.experts, MergedStep3p7Experts)

    def install_skipping(self, block: Block, skipping: Skipping) -> None:
        """See `Surgeon.install_skipping`."""
        run_skipping(block.gate, skipping)
        run_merged(block.experts, MergedStep3p7Experts)

    def watch(self, block: Block, watcher: BlockWatcher) -> AbstractContextManager[None]:
        """See `watch_loop`."""
        experts = block.experts
        run = partial(_run_expert, experts)
        return watch_loop(block.gate, experts, experts.act_fn, experts.num_experts, run, watcher)


def _activate(experts: Any, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
    assert gate_PI is not None
    return apply_gate(experts, torch.cat([gate_PI, up_PI], dim=-1))


def _run_expert(
    experts: Any, expert: int, input_PH: torch.Tensor, opened: Opened | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(experts, "factors"):
        return run_factorized(experts.factors, partial(_activate, experts), None, expert, input_PH, opened)
    hidden_PI = apply_gate(experts, nn.functional.linear(input_PH, experts.gate_up_proj[expert]))
    return hidden_PI, nn.functional.linear(hidden_PI, experts.down_proj[expert])
