"""The generic surgeon: every architecture whose experts are 3D tensors behind the common contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.blocks import BlockInfo
from optimum_moe.nn import MappedRouter, MergedExpertLayer, SwappedModule, swapped_class
from optimum_moe.nn.merged_experts import eager_experts_forward
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.surgeons.architecture import Architecture, RouterTensor
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
        """Whether the class of `module` is the row's, and this one is no dense layer of that class."""
        return type(module).__name__ == self.architecture.block and hasattr(module, self.architecture.experts)

    def info(self, block: Block, name: str, index: int) -> BlockInfo:
        """Sizes from the modules, which transformers built from the config."""
        router, experts = self._router(block), self._experts(block)
        tensors = dict(experts.named_parameters(recurse=False))
        view = canonical_view(experts)
        # Some configs say None for no groups.
        groups_field = self.architecture.router_groups
        groups = 1 if groups_field is None else getattr(router, groups_field) or 1
        return BlockInfo(
            name=name,
            index=index,
            num_experts=experts.num_experts,
            top_k=attrgetter(self.architecture.top_k)(router),
            router_groups=groups,
            router_groups_used=getattr(router, self.architecture.router_groups_used, None) or groups,
            intermediate_size=view.intermediate_size,
            hidden_size=view.hidden_size,
            expert_parameters=sum(tensor[0].numel() for tensor in tensors.values()),
            expert_multiply_adds=sum(tensor[0].numel() for tensor in tensors.values() if tensor.dim() == 3),
            router_parameters=sum(t.numel() // t.shape[row.axis] for row, t in self.router_tensors(block)),
        )

    def experts(self, block: Block) -> ExpertTensors:
        """Views of the 3D tensors, whatever their layout."""
        return canonical_view(self._experts(block))

    def expert_parameters(self, block: Block) -> list[nn.Parameter]:
        """The 3D tensors and their biases."""
        return list(self._experts(block).parameters(recurse=False))

    def router_rows(self, block: Block) -> torch.Tensor:
        """The first tensor that the row names, without what trails the experts."""
        rows = attribute(block, self._path(self.architecture.tensors[0]))
        return rows[: self._experts(block).num_experts] if self.architecture.tensors[0].trailing else rows

    def router_tensors(self, block: Block, holds_ids: bool = False) -> list[tuple[RouterTensor, torch.Tensor]]:
        """The tensors with an expert axis that this block has, or those that hold expert ids."""
        rows = [row for row in self.architecture.tensors if row.holds_ids == holds_ids]
        return [(row, attribute(block, self._path(row))) for row in rows if not row.optional or self._has(block, row)]

    @torch.no_grad()
    def cut(self, block: Block, plan: BlockPlan) -> None:
        """Replace tensor by tensor, so that at most one old and one new tensor of a block exist together.

        Raises:
            ValueError: If the architecture cannot express the plan; nothing was changed then.
        """
        self._check(block, plan)
        router, experts = self._router(block), self._experts(block)
        if plan.routing == "reduce":
            self._reduce_router(block, plan)
        for name, old in list(experts.named_parameters(recurse=False)):
            new = torch.empty((plan.num_groups, *old.shape[1:]), dtype=old.dtype, device=old.device)
            source, target = canonical_fields(experts, name, old), canonical_fields(experts, name, new)
            for group in range(plan.num_groups):
                merge_group(source, target, plan, group, group)
            replace_tensor(experts, name, new)
        self._finish(block, plan.num_groups, plan.routing)
        if plan.routing == "map":
            router.expert_map.copy_(torch.tensor(plan.labels_E))

    def rebuild(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Empty tensors of the right size where the stock ones were."""
        experts = self._experts(block)
        if routing == "reduce":
            for row, old in self.router_tensors(block):
                shape = list(old.shape)
                shape[row.axis] -= experts.num_experts - num_groups
                replace_tensor(block, self._path(row), old.new_empty(shape))
        for name, old in list(experts.named_parameters(recurse=False)):
            replace_tensor(experts, name, old.new_empty((num_groups, *old.shape[1:])))
        self._finish(block, num_groups, routing)

    def _check(self, block: Block, plan: BlockPlan) -> None:
        if plan.routing == "map":
            return
        if self.router_tensors(block, holds_ids=True) and -1 in plan.labels_E:
            raise ValueError(
                f"{plan.name} of {self.name} chooses experts by a table of token ids, so that the tokens of a pruned "
                f'expert have nowhere to go. Exclude this block with protect=["{plan.name}"], or merge experts.'
            )
        if plan.num_groups < self.architecture.least_experts:
            raise ValueError(
                f"transformers builds a dense layer where {self.name} has {plan.num_groups} experts. "
                f"Keep at least {self.architecture.least_experts}."
            )

    def _reduce_router(self, block: Block, plan: BlockPlan) -> None:
        """Give the router one entry for each group wherever it has one for each expert."""
        for row, old in self.router_tensors(block):
            rows_EX = old.movedim(row.axis, 0)
            parts = [merged_router_rows(rows_EX[: plan.num_experts], plan), rows_EX[plan.num_experts :]]
            merged = torch.cat(parts).movedim(0, row.axis).contiguous()
            replace_tensor(block, self._path(row), merged)
        for row, ids in self.router_tensors(block, holds_ids=True):
            labels_E = torch.tensor(plan.labels_E, dtype=ids.dtype, device=ids.device)
            replace_tensor(block, self._path(row), labels_E[ids.long()])

    def _finish(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Counts and classes, once the tensors have their new sizes."""
        router, experts = self._router(block), self._experts(block)
        if routing == "reduce":
            removed = experts.num_experts - num_groups
            experts.num_experts = num_groups
            for name in self.architecture.router_counts:
                lower_count(router, name, removed)
            for name in self.architecture.block_counts:
                lower_count(block, name, removed)
            return
        num_experts, device = experts.num_experts, self.router_rows(block).device
        experts.num_experts = num_groups
        # Stock implementations skip the sentinel ids of repeats only where they expect expert parallelism.
        experts._is_expert_parallel = True
        experts.__class__ = swapped_class(MergedExpertLayer, type(experts))
        router.register_buffer("expert_map", torch.zeros(num_experts, dtype=torch.int64, device=device))
        router.__class__ = swapped_class(MappedRouter, type(router))
        if getattr(type(block), "kernel_layer_name", None) is not None:
            # A hub kernel for the whole block would call neither of the two.
            block.__class__ = swapped_class(SwappedModule, type(block))

    @contextmanager
    def watch(self, block: Block, watcher: BlockWatcher) -> Iterator[None]:
        """Run the experts through the watched implementation; works below the hooks of accelerate."""
        router, experts = self._router(block), self._experts(block)
        config = experts.config
        previous = config._experts_implementation
        path = self.architecture.logits

        def after_router(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            logits = output[0] if path is None else output
            logits_TE = logits.flatten(0, -2)[:, : experts.num_experts]
            watcher.router(logits_TE, args[0].reshape(-1, args[0].shape[-1]))

        handle = router.get_submodule(path or "").register_forward_hook(after_router)
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

    def _path(self, row: RouterTensor) -> str:
        return row.path if row.on_block else f"{self.architecture.router}.{row.path}"

    def _has(self, block: Block, row: RouterTensor) -> bool:
        *path, last = self._path(row).split(".")
        return hasattr(block.get_submodule(".".join(path)), last)


def lower_count(owner: Any, name: str, removed: int) -> None:
    """Take `removed` off an integer attribute; `name` may be dotted."""
    first, _, rest = name.partition(".")
    if not rest:
        setattr(owner, first, getattr(owner, first) - removed)
        return
    child = getattr(owner, first)
    if isinstance(child, PreTrainedConfig):
        # All blocks share the config, and may keep different numbers of experts.
        child = copy(child)
        setattr(owner, first, child)
    lower_count(child, rest, removed)


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
