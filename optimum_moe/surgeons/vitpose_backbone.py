"""ViTPose: there is no router; the index of an image's data set selects its expert.

An expert is one linear layer after a hidden layer that all experts share. It computes the last channels of the block's
output, and its neurons cannot be permuted. Statistics use one-hot logits of the data set index.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.router_fit import RouterView
from optimum_moe.model_info import BlockInfo
from optimum_moe.nn import SwappedModule, swapped_class
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.surgeons.base import Block, BlockWatcher, Surgeon, hooked, merge_group

_NO_ROUTER = "the index of a data set selects the expert, and data sets keep their numbers"


class MappedVitPoseExperts(SwappedModule):
    """Maps the index of a data set to the group of its expert."""

    expert_map: torch.Tensor

    def forward(self, hidden_state: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The (B, S, O) output of each image's expert.

        Args:
            hidden_state: (B, S, I).
            indices: (B, 1, 1) data set of each image.
        """
        return super().forward(hidden_state, self.expert_map[indices])


class VitPoseBackboneSurgeon(Surgeon):
    """Surgeon for ViTPose, whose experts can be merged but not pruned, since every data set needs one."""

    name = "vitpose_backbone"
    count_fields = ("num_experts",)
    fixed_router = _NO_ROUTER
    no_factors = "each of its experts is one linear layer after a hidden layer that all share"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is an MoE block of the backbone."""
        return type(module).__name__ == "VitPoseBackboneMoeMLP"

    def info(self, block: Block, name: str, index: int) -> BlockInfo:
        """Sizes of the block; all tokens of an image use one expert."""
        view, first = self.experts(block), block.experts[0]
        return BlockInfo(
            name=name,
            index=index,
            num_experts=view.num_experts,
            top_k=1,
            router_groups=1,
            intermediate_size=view.intermediate_size,
            hidden_size=view.hidden_size,
            expert_parameters=first.weight.numel() + first.bias.numel(),
            expert_multiply_adds=first.weight.numel(),
            router_parameters=0,
            fixed_router=self.fixed_router,
            no_factors=self.no_factors,
        )

    def experts(self, block: Block) -> ExpertTensors:
        """The experts, each with the shared hidden layer and its own linear layer."""
        modules, shared = list(block.experts), block.fc1
        return ExpertTensors(
            up=[shared.weight] * len(modules),
            up_bias=[shared.bias] * len(modules),
            down=[module.weight for module in modules],
            down_bias=[module.bias for module in modules],
            fixed_neurons=True,
        )

    def expert_parameters(self, block: Block) -> list[nn.Parameter]:
        """Parameters of the experts' linear layers, without the shared hidden layer."""
        return list(block.experts.parameters())

    def router_rows(self, block: Block) -> torch.Tensor:
        """One-hot rows: data set e selects expert e."""
        weight = block.fc1.weight
        return torch.eye(len(block.experts), dtype=weight.dtype, device=weight.device)

    def router(self, block: Block) -> RouterView:
        """A router view of one-hot rows."""
        return RouterView(self.router_rows(block), len(block.experts), partial(self.scores, block))

    @torch.no_grad()
    def cut(self, block: Block, plan: BlockPlan) -> None:
        """Overwrite each group's dominant expert with the merged expert.

        Raises:
            ValueError: If the plan shrinks the router, since there is none; the block is then unchanged.
        """
        if plan.routing == "reduce":
            raise ValueError(f'{plan.name} of {self.name} has no router: {_NO_ROUTER}. Merge with routing="map".')
        view = self.experts(block)
        matrices = {"down": view.down, "down_bias": view.down_bias or []}
        for group, dominant in enumerate(plan.references_G):
            merge_group(matrices, matrices, plan, group, slot=dominant)
        self._install(block, [block.experts[dominant] for dominant in plan.references_G])
        block.experts.expert_map.copy_(torch.tensor(plan.labels_E))

    def rebuild(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Keep the first G experts, whose tensors are empty."""
        self._install(block, list(block.experts)[:num_groups])

    def _install(self, block: Block, kept: list[nn.Module]) -> None:
        experts, num_experts = block.experts, len(block.experts)
        del experts[:]
        experts.extend(kept)
        experts.num_experts = block.num_experts = len(kept)
        device = block.fc1.weight.device
        experts.register_buffer("expert_map", torch.zeros(num_experts, dtype=torch.int64, device=device))
        experts.__class__ = swapped_class(MappedVitPoseExperts, type(experts))

    @contextmanager
    def watch(self, block: Block, watcher: BlockWatcher) -> Iterator[None]:
        """Watch with hooks on the experts, which the block runs on all images."""
        seen: dict[str, torch.Tensor] = {}

        def before_block(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            hidden_BSH, index_B = args[0], kwargs["indices"].flatten()
            index_T = index_B.repeat_interleave(hidden_BSH.shape[1])
            input_TH = hidden_BSH.flatten(0, 1)
            weights_T1 = torch.ones_like(input_TH[:, :1])
            seen.update(input_TH=input_TH, index_T=index_T)
            logits_TE = nn.functional.one_hot(index_T, len(block.experts)).to(input_TH.dtype)
            watcher.router(logits_TE, input_TH)
            watcher.begin(input_TH, index_T.unsqueeze(-1), weights_T1)

        def after_expert(expert: int, module: nn.Module, args: tuple[Any, ...], output_BSO: torch.Tensor) -> None:
            token_P = (seen["index_T"] == expert).nonzero()[:, 0]
            hidden_PI, output_PO = args[0].flatten(0, 1)[token_P], output_BSO.flatten(0, 1)[token_P]
            if len(token_P):
                input_PH = seen["input_TH"][token_P]
                watcher.expert(expert, token_P, torch.ones_like(input_PH[:, 0]), input_PH, hidden_PI, output_PO)

        handles = [
            block.register_forward_pre_hook(before_block, with_kwargs=True),
            *(module.register_forward_hook(partial(after_expert, e)) for e, module in enumerate(block.experts)),
        ]
        with hooked(handles):
            yield
