"""Base of surgeons whose experts are stacked in tensors with an expert axis: reading, cutting and rebuilding them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from optimum_moe.algorithms.expert_skipping import Skipping
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.formats import PROJECTIONS
from optimum_moe.hf.compat import mark_initialized
from optimum_moe.model_info import BlockInfo
from optimum_moe.nn import SwappedModule, swapped_class
from optimum_moe.nn.merged_experts import RunExpert, run_routed
from optimum_moe.nn.skipping import SkippingRouter
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.surgeons.architecture import RouterTensor
from optimum_moe.surgeons.base import (
    Block,
    BlockWatcher,
    ExpertAxis,
    Surgeon,
    attribute,
    hooked,
    merge_group,
    merged_router_rows,
    probed,
    replace_tensor,
)

Fields = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ExpertStack:
    """A parameter that holds one matrix (or several side by side) of every routed expert.

    Args:
        path: Dotted path from the block.
        fields: Function from a tensor of that layout, experts first, to the fields of `ExpertTensors`, as views.
        flat: Whether the rows of all experts are stacked in two dimensions, (E * rows, columns).
    """

    path: str
    fields: Callable[[torch.Tensor], Fields]
    flat: bool = False


def gate_up_of(tensor_EIH: torch.Tensor) -> Fields:
    """The fields of a stack with gate before up, (E, 2 I, H)."""
    gate_EIH, up_EIH = tensor_EIH.chunk(2, dim=1)
    return {"gate": gate_EIH, "up": up_EIH}


def down_of(tensor_EHI: torch.Tensor) -> Fields:
    """The field of a stack of down projections, (E, H, I)."""
    return {"down": tensor_EHI}


def run_skipping(router: Any, skipping: Skipping) -> None:
    """Have a router that returns `(logits, weights, index, ...)` skip experts."""
    router.skipping = skipping
    if not isinstance(router, SkippingRouter):
        router.__class__ = swapped_class(SkippingRouter, type(router))


def run_merged(experts: Any, mixin: type[SwappedModule]) -> None:
    """Add `mixin` to the class of the experts, unless it has it."""
    if not isinstance(experts, mixin):
        experts.__class__ = swapped_class(mixin, type(experts))


class StackedSurgeon(Surgeon):
    """Cuts tensor by tensor; subclasses define the tensors, and the classes and counts that change.

    `router_name` is the attribute of the block that holds the router; `tensors` are those with an expert axis, the rows
    of the last linear layer first; `fixed_neurons` and `scales_input` as in `ExpertTensors`. Rows of a stack after the
    routed experts are kept.
    """

    router_name: str = "router"
    tensors: tuple[RouterTensor, ...]
    fixed_neurons: bool = False
    scales_input: bool = False
    no_factors: str = ""
    no_resize: str = ""

    @abstractmethod
    def stacks(self, block: Block) -> Sequence[ExpertStack]:
        """The tensors that hold the experts."""

    @abstractmethod
    def num_experts(self, block: Block) -> int:
        """Number of routed experts that the block has now."""

    @abstractmethod
    def top_k(self, block: Block) -> int:
        """Number of experts that the router selects for a token."""

    @abstractmethod
    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Set counts and classes after the tensors have their new sizes."""

    def router_groups(self, block: Block) -> tuple[int, int]:
        """Number of router groups, and how many of them a token may use."""
        return 1, 1

    def check(self, block: Block, plan: BlockPlan) -> None:
        """Raise a `ValueError` if the architecture cannot express the plan."""

    def info(self, block: Block, name: str, index: int) -> BlockInfo:
        """Sizes of the block, read from its modules."""
        view = self.experts(block)
        each = [self._experts_first(block, stack)[0] for stack in self.stacks(block)]
        groups, used = self.router_groups(block)
        return BlockInfo(
            name=name,
            index=index,
            num_experts=self.num_experts(block),
            top_k=self.top_k(block),
            router_groups=groups,
            router_groups_used=used,
            intermediate_size=view.intermediate_size,
            hidden_size=view.hidden_size,
            expert_parameters=sum(tensor.numel() for tensor in each),
            expert_multiply_adds=sum(tensor.numel() for tensor in each if tensor.dim() == 2),
            router_parameters=sum(t.numel() // t.shape[row.axis] for row, t in self.router_tensors(block)),
            no_factors=self.no_factors,
        )

    def experts(self, block: Block) -> ExpertTensors:
        """The experts as views of the stacks in any layout."""
        fields: dict[str, Any] = {}
        for stack in self.stacks(block):
            fields |= stack.fields(self._experts_first(block, stack))
        return ExpertTensors(
            **fields,
            fixed_neurons=self.fixed_neurons,
            activate=partial(self.activate, block),
            finish=self.finish(block),
            scales_input=self.scales_input,
        )

    def finish(self, block: Block) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Function that the experts module applies to each expert's output, None if there is none."""
        return None

    def expert_parameters(self, block: Block) -> list[nn.Parameter]:
        """Parameters of the stacks, or of the factorized experts that replaced them."""
        factors = self.factors(block)
        if factors is not None:
            return list(factors.parameters())
        return [attribute(block, stack.path) for stack in self.stacks(block)]

    def router_parameters(self, block: Block) -> list[nn.Parameter]:
        """Parameters of the router module, and those of `tensors` that lie beside it."""
        inside = list(getattr(block, self.router_name).parameters())
        beside = [tensor for row, tensor in self.router_tensors(block) if row.on_block]
        return inside + [tensor for tensor in beside if isinstance(tensor, nn.Parameter)]

    def probe(self, block: Block) -> dict[str, torch.Tensor]:
        """See `Surgeon.probe`; flat stacks are saved as they are."""
        found = {stack.path: torch.zeros(2, 2, 2, device="cpu") for stack in self.stacks(block) if not stack.flat}
        for stack in (stack for stack in self.stacks(block) if not stack.flat):
            for name, pair in stack.fields(found[stack.path]).items():
                for expert, matrix in enumerate(pair) if name in PROJECTIONS else ():
                    matrix.fill_(probed(name, expert))
        return found

    def router_rows(self, block: Block) -> torch.Tensor:
        """The first of `tensors`, without entries after the routed experts."""
        rows = attribute(block, self.path(self.tensors[0]))
        return rows[: self.num_experts(block)] if self.tensors[0].trailing else rows

    def router_tensors(self, block: Block, holds_ids: bool = False) -> list[tuple[RouterTensor, torch.Tensor]]:
        """See `Surgeon.router_tensors`."""
        rows = [row for row in self.tensors if row.holds_ids == holds_ids]
        return [(row, attribute(block, self.path(row))) for row in rows if not row.optional or self._has(block, row)]

    def expert_axes(self, block: Block) -> dict[str, ExpertAxis]:
        """Expert axes of the stacks and of the router's tensors."""
        num_experts, axes = self.num_experts(block), {}
        for stack in self.stacks(block):
            tensor = attribute(block, stack.path)
            entries = len(tensor) // num_experts if stack.flat else 1
            axes[stack.path] = ExpertAxis(0, num_experts, stack.flat or tensor.dim() > 2, entries)
        for row, _ in self.router_tensors(block):
            axes[self.path(row)] = ExpertAxis(row.axis, num_experts, row.role == "rows")
        return axes

    @torch.no_grad()
    def cut(self, block: Block, plan: BlockPlan) -> None:
        """Replace tensor by tensor, so that at most one old and one new tensor of a block exist together.

        Raises:
            ValueError: If the architecture cannot express the plan; the block is then unchanged.
        """
        self.check(block, plan)
        if plan.routing == "reduce":
            self._reduce_router(block, plan)
        for stack in self.stacks(block):
            old, new = attribute(block, stack.path), self._resized(block, stack, plan.num_groups)
            source = stack.fields(self._experts_first(block, stack))
            target = stack.fields(new.view(-1, *self._experts_first(block, stack).shape[1:])[: plan.num_groups])
            for group in range(plan.num_groups):
                merge_group(source, target, plan, group, group)
            trailing = len(old) - plan.num_experts
            if not stack.flat and trailing:
                new[-trailing:] = old[-trailing:]
            replace_tensor(block, stack.path, new)
        self.install(block, plan.num_groups, plan.routing)
        if plan.routing == "map":
            getattr(block, self.router_name).expert_map[: plan.num_experts] = torch.tensor(plan.labels_E)

    def rebuild(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Replace the stock tensors by empty ones of the compressed sizes."""
        removed = self.num_experts(block) - num_groups
        if routing == "reduce":
            for row, old in self.router_tensors(block):
                shape = list(old.shape)
                shape[row.axis] -= removed
                replace_tensor(block, self.path(row), old.new_empty(shape))
        for stack in self.stacks(block):
            replace_tensor(block, stack.path, self._resized(block, stack, num_groups))
        self.install(block, num_groups, routing)

    def resize(self, block: Block, stock: nn.Module) -> None:
        """See `Surgeon.resize`."""
        for stack in self.stacks(block):
            old, like = attribute(block, stack.path), attribute(stock, stack.path)
            replace_tensor(block, stack.path, torch.empty(like.shape, dtype=old.dtype, device=old.device))
            owner = stack.path
            while owner := owner.rpartition(".")[0]:
                # Sizes that the modules around the tensor keep beside it.
                mine = block.get_submodule(owner)
                for name, value in vars(stock.get_submodule(owner)).items():
                    if type(value) is int and type(vars(mine).get(name)) is int:
                        setattr(mine, name, value)

    def path(self, row: RouterTensor) -> str:
        """Dotted path of a router tensor from the block."""
        return row.path if row.on_block else f"{self.router_name}.{row.path}"

    def add_map(self, block: Block, num_groups: int, others: int = 0) -> None:
        """Add the router's buffer `expert_map`; the ids of `others` after the routed experts follow the groups."""
        ids_N = torch.zeros(self.num_experts(block) + others, dtype=torch.int64, device=self.router_rows(block).device)
        ids_N[self.num_experts(block) :] = torch.arange(num_groups, num_groups + others)
        getattr(block, self.router_name).register_buffer("expert_map", ids_N)

    def drop_stacks(self, block: Block) -> None:
        """Remove the stock tensors of the experts from the block."""
        for stack in self.stacks(block):
            *path, last = stack.path.split(".")
            owner: Any = block.get_submodule(".".join(path))
            delattr(owner, last)
            # transformers accesses the tensor to initialize it.
            mark_initialized(owner)

    def _experts_first(self, block: Block, stack: ExpertStack) -> torch.Tensor:
        tensor, num_experts = attribute(block, stack.path), self.num_experts(block)
        return tensor.view(num_experts, -1, *tensor.shape[1:]) if stack.flat else tensor[:num_experts]

    def _resized(self, block: Block, stack: ExpertStack, num_groups: int) -> torch.Tensor:
        """An empty tensor of a stack for `num_groups` experts, on the same device."""
        old, num_experts = attribute(block, stack.path), self.num_experts(block)
        rows = len(old) // num_experts * num_groups if stack.flat else len(old) - num_experts + num_groups
        return torch.empty((rows, *old.shape[1:]), dtype=old.dtype, device=old.device)

    def _reduce_router(self, block: Block, plan: BlockPlan) -> None:
        """Replace the router's entries of experts by one entry per group."""
        for row, old in self.router_tensors(block):
            rows_EX = old.movedim(row.axis, 0)
            parts = [merged_router_rows(rows_EX[: plan.num_experts], plan, row.role), rows_EX[plan.num_experts :]]
            replace_tensor(block, self.path(row), torch.cat(parts).movedim(0, row.axis).contiguous())
        for row, ids in self.router_tensors(block, holds_ids=True):
            labels_E = torch.tensor(plan.labels_E, dtype=ids.dtype, device=ids.device)
            replace_tensor(block, self.path(row), labels_E[ids.long()])

    def _has(self, block: Block, row: RouterTensor) -> bool:
        *path, last = self.path(row).split(".")
        return getattr(block.get_submodule(".".join(path)), last, None) is not None


def at_first_activation(
    experts: nn.Module, activation: nn.Module, report: Callable[..., None]
) -> list[RemovableHandle]:
    """Hooks that call `report` with the arguments of each call of `experts`, when its weights can be read.

    Offloaded weights are only available while the module runs, and the first submodule with hooks is the activation
    function of an expert. A call that reaches no expert is reported at its end.
    """
    waiting: list[tuple[Any, ...]] = []

    def before_experts(module: nn.Module, args: tuple[Any, ...]) -> None:
        waiting.append(args)

    def report_once(*called: Any) -> None:
        if waiting:
            report(*waiting.pop())

    return [
        experts.register_forward_pre_hook(before_experts),
        activation.register_forward_pre_hook(report_once),
        experts.register_forward_hook(report_once),
    ]


@contextmanager
def watch_loop(
    router: nn.Module,
    experts: nn.Module,
    activation: nn.Module,
    num_experts: int,
    run: RunExpert,
    watcher: BlockWatcher,
) -> Iterator[None]:
    """Watch experts that are called with `(hidden, index, weights)` and have their own loop.

    The experts run a second time on their tokens, only for the watcher.
    """

    def after_router(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        logits_TN = output[0] if isinstance(output, tuple) else output
        watcher.router(logits_TN[:, :num_experts], args[0].reshape(len(logits_TN), -1))

    def report(hidden: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        routed = hidden.reshape(-1, hidden.shape[-1]), index_TK, weights_TK
        watcher.begin(*routed)
        run_routed(run, num_experts, *routed, watch=watcher.expert)

    handles = at_first_activation(experts, activation, report)
    with hooked([router.register_forward_hook(after_router), *handles]):
        yield
