"""The generic surgeon: every architecture whose experts are 3D tensors behind the common contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.blocks import BlockInfo
from optimum_moe.nn import MappedRouter, MergedExpertLayer, swapped_class
from optimum_moe.nn.merged_experts import eager_experts_forward
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.surgeons.architecture import Architecture
from optimum_moe.surgeons.base import Block, BlockWatcher, Surgeon, merge_group, merged_router_rows, replace_tensor

WATCHED = "optimum_moe_watched"
"""Name of the experts implementation that runs routed pairs once, for the model and for the statistics alike."""


class GenericSurgeon(Surgeon):
    """Driven by one `Architecture` row and the flags that transformers stamps on the experts module."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.name = architecture.name
        self.count_fields = architecture.count_fields

    def matches(self, module: nn.Module) -> bool:
        """Whether the class of `module` is the row's."""
        return type(module).__name__ == self.architecture.block

    def info(self, block: Block, name: str, index: int) -> BlockInfo:
        """Sizes from the modules, which transformers built from the config."""
        router, experts = self._router(block), self._experts(block)
        tensors = dict(experts.named_parameters(recurse=False))
        view = canonical_view(experts)
        groups_field = self.architecture.router_groups
        return BlockInfo(
            name=name,
            index=index,
            num_experts=experts.num_experts,
            top_k=getattr(router, self.architecture.top_k),
            router_groups=1 if groups_field is None else getattr(router, groups_field),
            intermediate_size=view.intermediate_size,
            hidden_size=view.hidden_size,
            expert_parameters=sum(tensor[0].numel() for tensor in tensors.values()),
            expert_multiply_adds=sum(tensor[0].numel() for tensor in tensors.values() if tensor.dim() == 3),
            router_parameters=sum(attribute(router, t)[0].numel() for t in self.architecture.router_tensors),
        )

    def experts(self, block: Block) -> ExpertTensors:
        """Views of the 3D tensors, whatever their layout."""
        return canonical_view(self._experts(block))

    def expert_parameters(self, block: Block) -> list[nn.Parameter]:
        """The 3D tensors and their biases."""
        return list(self._experts(block).parameters())

    def router_rows(self, block: Block) -> torch.Tensor:
        """The first tensor that the row names."""
        return attribute(self._router(block), self.architecture.router_tensors[0])

    @torch.no_grad()
    def cut(self, block: Block, plan: BlockPlan) -> None:
        """Replace tensor by tensor, so that at most one old and one new tensor of a block exist together."""
        router, experts = self._router(block), self._experts(block)
        for name, old in list(experts.named_parameters(recurse=False)):
            new = torch.empty((plan.num_groups, *old.shape[1:]), dtype=old.dtype, device=old.device)
            source, target = canonical_fields(experts, name, old), canonical_fields(experts, name, new)
            for group in range(plan.num_groups):
                merge_group(source, target, plan, group, group)
            replace_tensor(experts, name, new)
        if plan.routing == "reduce":
            for name in self.architecture.router_tensors:
                replace_tensor(router, name, merged_router_rows(attribute(router, name), plan))
        self._finish(block, plan.num_groups, plan.routing)
        if plan.routing == "map":
            router.expert_map.copy_(torch.tensor(plan.labels_E))

    def rebuild(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Empty tensors of the right size where the stock ones were."""
        router, experts = self._router(block), self._experts(block)
        for name, old in list(experts.named_parameters(recurse=False)):
            replace_tensor(experts, name, old.new_empty((num_groups, *old.shape[1:])))
        if routing == "reduce":
            for name in self.architecture.router_tensors:
                old = attribute(router, name)
                replace_tensor(router, name, old.new_empty((num_groups, *old.shape[1:])))
        self._finish(block, num_groups, routing)

    def _finish(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Counts and classes, once the tensors have their new sizes."""
        router, experts = self._router(block), self._experts(block)
        if routing == "reduce":
            router.num_experts = experts.num_experts = num_groups
            return
        weight = self.router_rows(block)
        experts.num_experts = num_groups
        # Stock implementations skip the sentinel ids of repeats only where they expect expert parallelism.
        experts._is_expert_parallel = True
        experts.eager_takes_sentinel = self.architecture.eager_takes_sentinel
        experts.__class__ = swapped_class(MergedExpertLayer, type(experts))
        router.register_buffer("expert_map", torch.zeros(len(weight), dtype=torch.int64, device=weight.device))
        router.__class__ = swapped_class(MappedRouter, type(router))

    @contextmanager
    def watch(self, block: Block, watcher: BlockWatcher) -> Iterator[None]:
        """Run the experts through the watched implementation; works below the hooks of accelerate."""
        router, experts = self._router(block), self._experts(block)
        config = experts.config
        previous = config._experts_implementation
        handle = router.register_forward_hook(
            lambda module, args, output: watcher.router(
                output[0].flatten(0, -2), args[0].reshape(-1, args[0].shape[-1])
            )
        )
        experts._optimum_moe_watcher = watcher
        config._experts_implementation = WATCHED
        try:
            yield
        finally:
            handle.remove()
            del experts._optimum_moe_watcher
            config._experts_implementation = previous

    def _router(self, block: Block) -> Any:
        return getattr(block, self.architecture.router)

    def _experts(self, block: Block) -> Any:
        return getattr(block, self.architecture.experts)


def attribute(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its dotted name."""
    *path, last = name.split(".")
    return getattr(module.get_submodule(".".join(path)), last)


def canonical_view(experts: Any) -> ExpertTensors:
    """See an experts module's parameters as gate, up (E, I, H), down (E, H, I) and biases; nothing is copied."""
    fields: dict[str, torch.Tensor] = {}
    for name, tensor in experts.named_parameters(recurse=False):
        fields |= canonical_fields(experts, name, tensor)
    return ExpertTensors(**fields)


def canonical_fields(experts: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The fields of `ExpertTensors` that one stock tensor (experts first) holds, as views."""
    suffix = "_bias" if name.endswith("_bias") else ""
    native = tensor if suffix or not experts.is_transposed else tensor.transpose(1, 2)
    if not name.startswith("gate_up_proj"):
        return {name.removesuffix("_bias").removesuffix("_proj") + suffix: native}
    half = native.shape[1] // 2
    if experts.is_concatenated:
        return {f"gate{suffix}": native[:, :half], f"up{suffix}": native[:, half:]}
    return {f"gate{suffix}": native[:, ::2], f"up{suffix}": native[:, 1::2]}


def _watched_forward(
    experts: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    watcher: BlockWatcher | None = getattr(experts, "_optimum_moe_watcher", None)
    if watcher is None:
        return eager_experts_forward(experts, hidden_TH, index_TK, weights_TK)
    watcher.begin(hidden_TH, index_TK, weights_TK)
    return eager_experts_forward(experts, hidden_TH, index_TK, weights_TK, watch=watcher.expert)


ALL_EXPERTS_FUNCTIONS.register(WATCHED, _watched_forward)
