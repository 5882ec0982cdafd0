"""LongCat-Flash: routed experts followed by zero experts, which return a token unchanged and are never compressed.

`gate_up_proj` has unused rows for the zero experts too, which are kept after those of the routed experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from optimum_moe.algorithms.expert_skipping import Skipping
from optimum_moe.formats.base import Opened
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


class MergedLongcatExperts(SwappedModule):
    """Runs a merged expert once per token; the stock loop would run it for every repeated id."""

    num_routed_experts: int

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the selected experts.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) groups in [0, G), zero experts from G on.
            top_k_weights: (T, K) routing weights.
        """
        groups = self.num_routed_experts
        index_TK = top_k_index.masked_fill(top_k_weights == 0, groups)
        routed_TH = run_routed(partial(_run_expert, self, opened={}), groups, hidden_states, index_TK, top_k_weights)
        identity_T1 = top_k_weights.masked_fill(top_k_index < groups, 0).sum(-1, keepdim=True)
        return routed_TH + (hidden_states * identity_T1).to(hidden_states.dtype)


class LongcatFlashSurgeon(StackedSurgeon):
    """N routed and Z zero experts behind one router of N + Z rows."""

    name = "longcat_flash"
    count_fields = ("n_routed_experts", "num_local_experts")
    remark = "zero experts are kept"
    tensors = (
        RouterTensor("classifier.weight", trailing=True),
        # transformers creates this bias if the config asks for it, but never adds it.
        RouterTensor("classifier.bias", trailing=True, optional=True, role="scale"),
        RouterTensor("e_score_correction_bias", trailing=True),
    )

    no_skipping = ""

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is the MoE block of a layer with routed experts, and not only zero experts."""
        block: Any = module
        return type(module).__name__ == "LongcatFlashMoE" and block.experts.num_routed_experts > 0

    def stacks(self, block: Block) -> tuple[ExpertStack, ...]:
        """The stacks of gate and up (E + Z, 2 I, H), and of down (E, H, I)."""
        return ExpertStack("experts.gate_up_proj", gate_up_of), ExpertStack("experts.down_proj", down_of)

    def num_experts(self, block: Block) -> int:
        """The number of routed experts, without zero experts."""
        return block.experts.num_routed_experts

    def top_k(self, block: Block) -> int:
        """The number of selected experts, which may include zero experts."""
        return block.router.top_k

    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """See `StackedSurgeon.install`."""
        router, experts = block.router, block.experts
        if routing == "map":
            self.add_map(block, num_groups, others=experts.zero_expert_num)
            router.__class__ = swapped_class(MappedRouter, type(router))
            run_merged(experts, MergedLongcatExperts)
        else:
            router.num_experts = num_groups
            router.n_routed_experts = router.classifier.out_features = num_groups + experts.zero_expert_num
        experts.num_routed_experts = num_groups
        experts.total_experts = num_groups + experts.zero_expert_num

    def activate(self, block: Block, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """See `Surgeon.activate`."""
        return _activate(block.experts, gate_PI, up_PI)

    def install_factors(self, block: Block, factors: FactorizedExperts) -> None:
        """See `Surgeon.install_factors`."""
        self.drop_stacks(block)
        block.experts.factors = factors
        run_merged(block.experts, MergedLongcatExperts)

    def install_skipping(self, block: Block, skipping: Skipping) -> None:
        """See `Surgeon.install_skipping`."""
        run_skipping(block.router, skipping)
        run_merged(block.experts, MergedLongcatExperts)

    def watch(self, block: Block, watcher: BlockWatcher) -> AbstractContextManager[None]:
        """See `watch_loop`."""
        experts = block.experts
        run = partial(_run_expert, experts)
        return watch_loop(block.router, experts, experts.act_fn, experts.num_routed_experts, run, watcher)


def _activate(experts: Any, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
    assert gate_PI is not None
    return experts.act_fn(gate_PI) * up_PI


def _run_expert(
    experts: Any, expert: int, input_PH: torch.Tensor, opened: Opened | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(experts, "factors"):
        return run_factorized(experts.factors, partial(_activate, experts), None, expert, input_PH, opened)
    hidden_PI = _activate(experts, *nn.functional.linear(input_PH, experts.gate_up_proj[expert]).chunk(2, dim=-1))
    return hidden_PI, nn.functional.linear(hidden_PI, experts.down_proj[expert])
