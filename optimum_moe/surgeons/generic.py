"""The generic surgeon for every architecture with 3D expert tensors that follows the common contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from optimum_moe.algorithms.expert_skipping import Skipping
from optimum_moe.hf.compat import (
    ALL_EXPERTS_FUNCTIONS,
    accept_sentinels,
    experts_implementation,
    set_experts_implementation,
)
from optimum_moe.nn import (
    FactorizedExpertLayer,
    FactorizedExperts,
    MappedRouter,
    MergedExpertLayer,
    SwappedModule,
    swapped_class,
)
from optimum_moe.nn.factorized_layer import native_activation, native_finish
from optimum_moe.nn.merged_experts import eager_experts_forward
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.surgeons.architecture import Architecture
from optimum_moe.surgeons.base import Block, BlockWatcher
from optimum_moe.surgeons.stacked import ExpertStack, StackedSurgeon, run_skipping

WATCHED = "optimum_moe_watched_"
"""Prefix of experts implementations that run the stock one named after it, and report each expert to a watcher."""


class GenericSurgeon(StackedSurgeon):
    """Surgeon for one `Architecture` row; also uses the flags that transformers sets on the experts module."""

    no_skipping = ""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.name = architecture.name
        self.count_fields = architecture.count_fields
        self.router_name = architecture.router
        self.tensors = architecture.tensors
        self.selects_by = architecture.selects_by
        self.remark = architecture.remark

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` has the row's class, and is not a dense layer of that class."""
        return type(module).__name__ == self.architecture.block and hasattr(module, self.architecture.experts)

    def stacks(self, block: Block) -> list[ExpertStack]:
        """The 3D tensors of the experts and their biases."""
        experts = self._experts(block)
        return [
            ExpertStack(f"{self.architecture.experts}.{name}", partial(canonical_fields, experts, name))
            for name, _ in experts.named_parameters(recurse=False)
        ]

    def scores(self, block: Block, logits_SN: torch.Tensor) -> torch.Tensor:
        """The scores by the row's scoring."""
        return self.architecture.scores(self._router(block), logits_SN)

    def num_experts(self, block: Block) -> int:
        """The count of the experts module."""
        return self._experts(block).num_experts

    def top_k(self, block: Block) -> int:
        """The attribute that the row names."""
        return attrgetter(self.architecture.top_k)(self._router(block))

    def router_groups(self, block: Block) -> tuple[int, int]:
        """The attributes that the row names."""
        router, groups_field = self._router(block), self.architecture.router_groups
        # Some configs have None if there are no groups.
        groups = 1 if groups_field is None else getattr(router, groups_field) or 1
        return groups, getattr(router, self.architecture.router_groups_used, None) or groups

    def check(self, block: Block, plan: BlockPlan) -> None:
        """Raise a `ValueError` if a table of token ids would lose an expert, or the block would become dense."""
        if plan.routing == "map":
            return
        if self.router_tensors(block, holds_ids=True) and -1 in plan.labels_E:
            raise ValueError(
                f"{plan.name} of {self.name} selects experts by a table of token ids, so tokens of a pruned expert "
                f'cannot be rerouted. Exclude this block with protect=["{plan.name}"], or merge experts.'
            )
        if plan.num_groups < self.architecture.least_experts:
            raise ValueError(
                f"transformers builds a dense layer if {self.name} has {plan.num_groups} experts. "
                f"Keep at least {self.architecture.least_experts}."
            )

    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """See `StackedSurgeon.install`."""
        router, experts = self._router(block), self._experts(block)
        if routing == "reduce":
            removed = experts.num_experts - num_groups
            experts.num_experts = num_groups
            for name in self.architecture.router_counts:
                lower_count(router, name, removed)
            for name in self.architecture.block_counts:
                lower_count(block, name, removed)
            return
        self.add_map(block, num_groups)
        experts.num_experts = num_groups
        # Repeated groups get sentinel ids.
        accept_sentinels(experts)
        experts.__class__ = swapped_class(MergedExpertLayer, type(experts))
        router.__class__ = swapped_class(MappedRouter, type(router))
        if getattr(type(block), "kernel_layer_name", None) is not None:
            # A hub kernel for the whole block would call neither router nor experts.
            block.__class__ = swapped_class(SwappedModule, type(block))

    def activate(self, block: Block, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """The activation of the experts module."""
        return native_activation(self._experts(block), gate_PI, up_PI)

    def finish(self, block: Block) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The norm that the experts module applies to each output."""
        return native_finish(self._experts(block))

    def install_factors(self, block: Block, factors: FactorizedExperts) -> None:
        """See `Surgeon.install_factors`."""
        experts = self._experts(block)
        self.drop_stacks(block)
        experts.factors = factors
        # This class also replaces the mixin of merged experts.
        stock = experts.original_class if isinstance(experts, MergedExpertLayer) else type(experts)
        experts.__class__ = swapped_class(FactorizedExpertLayer, stock)
        if getattr(type(block), "kernel_layer_name", None) is not None:
            block.__class__ = swapped_class(SwappedModule, type(block))

    def install_skipping(self, block: Block, skipping: Skipping) -> None:
        """See `Surgeon.install_skipping`."""
        experts = self._experts(block)
        run_skipping(self._router(block), skipping)
        if not isinstance(experts, MergedExpertLayer | FactorizedExpertLayer):
            accept_sentinels(experts)
            experts.__class__ = swapped_class(MergedExpertLayer, type(experts))
        if getattr(type(block), "kernel_layer_name", None) is not None:
            # A hub kernel for the whole block would call neither router nor experts.
            block.__class__ = swapped_class(SwappedModule, type(block))

    def summing_module(self, block: Block) -> nn.Module:
        """The experts module, since blocks add or scale its output in different ways."""
        return self._experts(block)

    @contextmanager
    def watch(self, block: Block, watcher: BlockWatcher) -> Iterator[None]:
        """Run the experts with the watched implementation; works with the hooks of accelerate."""
        router, experts = self._router(block), self._experts(block)
        path = self.architecture.logits

        def after_router(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            logits = output[0] if path is None else output
            logits_TE = logits.flatten(0, -2)[:, : experts.num_experts]
            watcher.router(logits_TE, args[0].reshape(-1, args[0].shape[-1]))

        handle = router.get_submodule(path or "").register_forward_hook(after_router)
        experts.optimum_moe_watcher = watcher
        try:
            with implementation_of(experts, watched_implementation(experts_implementation(experts.config))):
                yield
        finally:
            handle.remove()
            del experts.optimum_moe_watcher

    def _router(self, block: Block) -> Any:
        return getattr(block, self.architecture.router)

    def _experts(self, block: Block) -> Any:
        return getattr(block, self.architecture.experts)


def lower_count(owner: Any, name: str, removed: int) -> None:
    """Subtract `removed` from an integer attribute; `name` may be dotted."""
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


@contextmanager
def implementation_of(experts: Any, name: str | None) -> Iterator[None]:
    """Context in which experts that share this config use the experts implementation `name`."""
    config = experts.config
    previous = experts_implementation(config)
    set_experts_implementation(config, name)
    try:
        yield
    finally:
        set_experts_implementation(config, previous)


def watched_implementation(name: str | None) -> str:
    """Name of the watched variant of an experts implementation; a watched one is returned unchanged."""
    stock = name or "eager"
    if stock.startswith(WATCHED):
        return stock
    ALL_EXPERTS_FUNCTIONS.register(WATCHED + stock, partial(_watched_forward, stock))
    return WATCHED + stock


def _watched_forward(
    stock: str, experts: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The output of the stock implementation, bit for bit; the outputs of single experts are computed in addition.

    Implementations round differently in bfloat16, so with another one the routers of later layers would select other
    experts for some tokens than without a watcher.
    """
    watcher: BlockWatcher | None = getattr(experts, "optimum_moe_watcher", None)
    if watcher is not None:
        watcher.begin(hidden_TH, index_TK, weights_TK)
        with torch.no_grad():
            eager_experts_forward(experts, hidden_TH, index_TK, weights_TK, watch=watcher.expert)
    with implementation_of(experts, stock):
        # Call the forward of the class, since accelerate's hooks on the instance already wrap this call.
        return type(experts).forward(experts, hidden_TH, index_TK, weights_TK)
