"""Switch Transformers: experts in a ModuleDict, and a top-1 router with capacity that returns a one-hot mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.model_info import BlockInfo
from optimum_moe.nn import FactorizedExperts, SwappedModule, swapped_class
from optimum_moe.nn.factorized_layer import run_factorized
from optimum_moe.nn.merged_experts import run_routed
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.surgeons.architecture import RouterTensor
from optimum_moe.surgeons.base import (
    Block,
    BlockWatcher,
    Surgeon,
    hooked,
    merge_group,
    merged_router_rows,
    probed,
    replace_tensor,
)

_ROUTER_TENSORS = (RouterTensor("classifier.weight"), RouterTensor("classifier.bias"))


class MappedSwitchRouter(SwappedModule):
    """Moves each token's one in the one-hot mask from its expert to its group.

    The mask keeps its N columns, of which G are used, because the block reshapes it by the router's count. Capacity
    applies to each original expert, as in training.
    """

    expert_map: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns mask (B, S, N), probability (B, S, 1) and logits (B, S, N)."""
        mask, probability, logits = super().forward(*args, **kwargs)
        mapped = torch.zeros_like(mask).index_add_(-1, self.expert_map, mask)
        return mapped, probability, logits


class FactorizedSwitchExperts(SwappedModule):
    """Runs factorized experts; `act` is the activation of the stock ones."""

    factors: FactorizedExperts
    act: nn.Module
    dropout: nn.Module

    def forward(
        self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H) outputs times probability; zeros for tokens beyond an expert's capacity.

        Args:
            hidden_states: (T, H).
            selected_experts: (T, 1, N) one-hot mask.
            routing_weights: (T, 1) probability of the selected expert.
        """
        dropped_T = selected_experts.sum((1, 2)) == 0
        index_T1 = selected_experts.argmax(-1).masked_fill(dropped_T.unsqueeze(-1), self.factors.num_experts)
        run = partial(run_factorized, self.factors, self._activate, None, opened={})
        return run_routed(run, self.factors.num_experts, hidden_states, index_T1, routing_weights)

    def _activate(self, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.act(up_PI))


class SwitchTransformersSurgeon(Surgeon):
    """Surgeon for the model of the M-SMoE paper (Li et al. 2024)."""

    name = "switch_transformers"
    count_fields = ("num_experts",)
    no_factors = ""
    remark = "encoder and decoder; capacity applies to each original expert"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a sparse feed-forward block of the encoder or decoder."""
        return type(module).__name__ == "SwitchTransformersSparseMLP"

    def info(self, block: Block, name: str, index: int) -> BlockInfo:
        """Sizes of the block, whose top-k is 1."""
        view = self.experts(block)
        classifier = block.router.classifier
        return BlockInfo(
            name=name,
            index=index,
            num_experts=view.num_experts,
            top_k=1,
            router_groups=1,
            intermediate_size=view.intermediate_size,
            hidden_size=view.hidden_size,
            expert_parameters=view.up[0].numel() + view.down[0].numel(),
            expert_multiply_adds=view.up[0].numel() + view.down[0].numel(),
            router_parameters=classifier.in_features + (classifier.bias is not None),
            stack="encoder" if name.split(".")[0] == "encoder" or ".encoder." in name else "decoder",
        )

    def experts(self, block: Block) -> ExpertTensors:
        """The weights of `wi` and `wo` of each expert."""
        modules = list(block.experts.values())
        return ExpertTensors(
            up=[m.wi.weight for m in modules],
            down=[m.wo.weight for m in modules],
            activate=partial(self.activate, block),
        )

    def probe(self, block: Block) -> dict[str, torch.Tensor]:
        """See `Surgeon.probe`."""
        layers = {"wi": "up", "wo": "down"}
        return {
            f"experts.expert_{expert}.{layer}.weight": torch.full((2, 2), probed(projection, expert), device="cpu")
            for expert in range(2)
            for layer, projection in layers.items()
        }

    def expert_parameters(self, block: Block) -> list[nn.Parameter]:
        """The weights of all expert modules."""
        return list(block.experts.parameters())

    def router_parameters(self, block: Block) -> list[nn.Parameter]:
        """Weight and, if present, bias of the classifier."""
        return list(block.router.parameters())

    def router_rows(self, block: Block) -> torch.Tensor:
        """(E, H) rows of the classifier."""
        return block.router.classifier.weight

    def router_tensors(self, block: Block, holds_ids: bool = False) -> list[tuple[RouterTensor, torch.Tensor]]:
        """Rows and, if present, bias of the classifier."""
        named = dict(block.router.named_parameters())
        return [(row, named[row.path]) for row in _ROUTER_TENSORS if row.path in named and not holds_ids]

    @torch.no_grad()
    def cut(self, block: Block, plan: BlockPlan) -> None:
        """Overwrite each group's dominant expert with the merged expert, in the dominant's neuron order."""
        view = self.experts(block)
        matrices = {"up": view.up, "down": view.down}
        for group, dominant in enumerate(plan.references_G):
            merge_group(matrices, matrices, plan, group, slot=dominant)
        self._install(block, [block.experts[f"expert_{d}"] for d in plan.references_G], plan.routing)
        if plan.routing == "map":
            block.router.expert_map.copy_(torch.tensor(plan.labels_E))
            return
        for row, old in self.router_tensors(block):
            replace_tensor(block.router, row.path, merged_router_rows(old, plan, row.role))

    def rebuild(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Keep the first G expert modules, whose tensors are empty."""
        self._install(block, list(block.experts.values())[:num_groups], routing)
        if routing == "reduce":
            for row, old in self.router_tensors(block):
                replace_tensor(block.router, row.path, old.new_empty((num_groups, *old.shape[1:])))

    def _install(self, block: Block, kept: list[nn.Module], routing: Routing) -> None:
        router = block.router
        block.experts.clear()
        block.experts.update({f"expert_{slot}": module for slot, module in enumerate(kept)})
        block.experts.num_experts = len(kept)
        if routing == "reduce":
            router.num_experts = router.classifier.out_features = len(kept)
            return
        weight = router.classifier.weight
        router.register_buffer("expert_map", torch.zeros(len(weight), dtype=torch.int64, device=weight.device))
        router.__class__ = swapped_class(MappedSwitchRouter, type(router))

    def activate(self, block: Block, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """The activation of all experts."""
        return next(iter(block.experts.values())).act(up_PI)

    def install_factors(self, block: Block, factors: FactorizedExperts) -> None:
        """See `Surgeon.install_factors`."""
        experts = block.experts
        first = next(iter(experts.values()))
        experts.clear()
        experts.factors, experts.act, experts.dropout = factors, first.act, first.dropout
        experts.__class__ = swapped_class(FactorizedSwitchExperts, type(experts))

    @contextmanager
    def watch(self, block: Block, watcher: BlockWatcher) -> Iterator[None]:
        """Watch with hooks on the router, the experts and each expert; the block runs its own loop."""
        selected: dict[str, torch.Tensor] = {}

        def before_experts(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            hidden_TH, mask_T1N, weights_T1 = args
            # Tokens beyond an expert's capacity have an all-zero mask: the id N means no expert.
            dropped_T = mask_T1N.sum((1, 2)) == 0
            index_T1 = mask_T1N.argmax(-1).masked_fill(dropped_T.unsqueeze(-1), mask_T1N.shape[-1])
            selected.update(index_T1=index_T1, weights_T1=weights_T1)
            watcher.begin(hidden_TH, index_T1, weights_T1)

        def after_expert(expert: int, module: Any, args: tuple[torch.Tensor, ...], output_PH: torch.Tensor) -> None:
            token_P = (selected["index_T1"][:, 0] == expert).nonzero()[:, 0]
            weight_P = selected["weights_T1"][token_P, 0]
            hidden_PI = module.act(module.wi(args[0]))
            watcher.expert(expert, token_P, weight_P, args[0], hidden_PI, output_PH)

        def after_router(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            watcher.router(output[2].flatten(0, -2), args[0].flatten(0, -2))

        handles = [
            block.router.register_forward_hook(after_router),
            block.experts.register_forward_pre_hook(before_experts),
            *(
                module.register_forward_hook(partial(after_expert, expert))
                for expert, module in enumerate(block.experts.values())
            ),
        ]
        with hooked(handles):
            yield
