"""The surgeon of an architecture: it reads and replaces experts and routers, and contains no algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from optimum_moe.algorithms.expert_skipping import Skipping
from optimum_moe.algorithms.experts import NEURON_AXIS, ExpertTensors, PerExpert
from optimum_moe.algorithms.merging import gather_neurons, merge_matrices
from optimum_moe.algorithms.router_fit import RouterView
from optimum_moe.formats import PROJECTIONS, ExpertsSpec, StoredExperts
from optimum_moe.model_info import BlockInfo
from optimum_moe.nn import FactorizedExperts
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.records import digest
from optimum_moe.surgeons.architecture import Role, RouterTensor

Block: TypeAlias = Any
"""An MoE block: a module whose attributes depend on the architecture."""

_FITTED = {"rows": "rows_GX", "bias": "bias_G", "correction": "correction_G"}


@dataclass(frozen=True)
class ExpertAxis:
    """The position of the experts in a tensor.

    Args:
        axis: Axis along which the experts follow each other; entries after them belong to no expert.
        num_experts: Number of experts.
        is_matrix: Whether the tensor is multiplied with tokens; else it is a bias or a correction.
        entries: Entries along the axis that belong to one expert.
    """

    axis: int
    num_experts: int
    is_matrix: bool
    entries: int = 1


class BlockWatcher(Protocol):
    """Receives reports of a surgeon while a block runs on calibration data; all calls see the same T tokens."""

    def router(self, logits_TE: torch.Tensor, input_TH: torch.Tensor) -> None:
        """Receive the router's logits before any scoring, and its input."""

    def begin(self, input_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """Receive the inputs of the experts and the routing that the model uses."""

    def expert(
        self,
        expert: int,
        token_P: torch.Tensor,
        weight_P: torch.Tensor,
        input_PH: torch.Tensor,
        hidden_PI: torch.Tensor,
        output_PH: torch.Tensor,
    ) -> None:
        """Receive the call of one expert on its P routed tokens."""


class Surgeon(ABC):
    """Finds, reads, observes, cuts and rebuilds the MoE blocks of one architecture.

    A surgeon has no state of a model; one instance serves all. `count_config` is the sub-config that holds
    `count_fields`, if that is not the config of the model around the block. `fixed_router` is the reason why router
    entries cannot be removed, `no_factors` why experts cannot be factorized, `no_resize` why stock experts cannot be
    given another width, and `no_skipping` why selected experts cannot be skipped; they are empty if they can. `remark`
    describes limitations for users.
    """

    name: str
    count_fields: tuple[str, ...]
    count_config: str = ""
    selects_by: Literal["scores", "logits"] = "scores"
    fixed_router: str = ""
    no_factors: str = "its surgeon has no `install_factors`"
    no_resize: str = "its surgeon has no `resize`"
    no_skipping: str = "its surgeon has no `install_skipping`"
    remark: str = ""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is an MoE block of this architecture."""

    @abstractmethod
    def info(self, block: Block, name: str, index: int) -> BlockInfo:
        """The sizes of a block; works on the meta device."""

    @abstractmethod
    def experts(self, block: Block) -> ExpertTensors:
        """The routed experts in the canonical layout, as views without copies."""

    @abstractmethod
    def expert_parameters(self, block: Block) -> list[nn.Parameter]:
        """All parameters of the routed experts."""

    def router_parameters(self, block: Block) -> list[nn.Parameter]:
        """All parameters of the router, which training it may change; none if experts are selected without one."""
        return []

    @abstractmethod
    def router_rows(self, block: Block) -> torch.Tensor:
        """(E, H) rows of the router's last linear layer."""

    def router_tensors(self, block: Block, holds_ids: bool = False) -> list[tuple[RouterTensor, torch.Tensor]]:
        """The router tensors of this block with an expert axis, or with `holds_ids` those of expert ids."""
        return []

    def probe(self, block: Block) -> dict[str, torch.Tensor]:
        """Small tensors by the dotted paths of two stock experts, in their layout, every matrix full of `probed`.

        Saving them shows under which names the checkpoints of the architecture store an expert.
        """
        return {}

    def expert_axes(self, block: Block) -> dict[str, ExpertAxis]:
        """The tensors that stack all experts, by dotted path; none if experts are modules."""
        return {}

    def scores(self, block: Block, logits_SN: torch.Tensor) -> torch.Tensor:
        """(S, N) scores of a router's (S, N) logits; a softmax unless the architecture uses another function."""
        return logits_SN.softmax(-1)

    def router(self, block: Block) -> RouterView:
        """The router's last linear layer, with its bias, correction and scoring."""
        found = {row.role: t.detach().movedim(row.axis, 0) for row, t in self.router_tensors(block)}
        num_experts, correction = len(self.router_rows(block)), found.get("correction")
        return RouterView(
            rows_NX=found["rows"],
            num_experts=num_experts,
            scores=partial(self.scores, block),
            bias_N=found.get("bias"),
            correction_E=None if correction is None else correction.flatten()[:num_experts],
            selects_by=self.selects_by,
        )

    def objection(self, counts: Mapping[str, int], formed: Collection[str]) -> str | None:
        """The reason why one checkpoint cannot hold these blocks together; None if it can.

        Args:
            counts: Experts of each block that remain, by its name.
            formed: Names of the blocks whose experts are stored in forms that stock classes do not have.
        """
        return None

    @abstractmethod
    def cut(self, block: Block, plan: BlockPlan) -> None:
        """Merge or remove experts in place by the plan; the block can run afterwards."""

    @abstractmethod
    def rebuild(self, block: Block, num_groups: int, routing: Routing) -> None:
        """Give an uncompressed block the structure that `cut` leaves, with empty tensors."""

    @abstractmethod
    def watch(self, block: Block, watcher: BlockWatcher) -> AbstractContextManager[None]:
        """Report every call of the block to `watcher`, without a change of its output."""

    def watch_gradient(self, block: Block, report: Callable[[torch.Tensor], None]) -> AbstractContextManager[None]:
        """Report the (T, H) gradient with respect to the weighted sum of the selected experts in backward passes."""

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            summed = output[0] if isinstance(output, tuple) else output
            if not torch.is_grad_enabled():
                return output
            if not summed.requires_grad:
                # Gradients end at the first block. In-place operations may follow, so its output must not be a leaf.
                summed = summed.detach().requires_grad_().clone()
                output = (summed, *output[1:]) if isinstance(output, tuple) else summed
            summed.register_hook(lambda gradient: report(gradient.reshape(-1, gradient.shape[-1])))
            return output

        return hooked([self.summing_module(block).register_forward_hook(after)])

    def summing_module(self, block: Block) -> nn.Module:
        """The module whose output has the same gradient as the sum of the selected experts."""
        return block

    @contextmanager
    def silenced(self, block: Block) -> Iterator[None]:
        """Context in which the routed experts of the block give zeros, and everything else is as it was."""
        view = self.experts(block)
        tensors = [tensor for values in (view.down, view.down_bias) if values is not None for tensor in values]
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        held = [(p, p.data) for p in self.expert_parameters(block) if p.untyped_storage().data_ptr() in places]
        for parameter, values in held:
            parameter.data = torch.zeros_like(values)
        try:
            yield
        finally:
            for parameter, values in held:
                parameter.data = values

    def activate(self, block: Block, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """The experts' activation: hidden neurons from gate and up, elementwise."""
        raise NotImplementedError(f"{type(self).__name__} does not give the gate function of its experts")

    def install_factors(self, block: Block, factors: FactorizedExperts) -> None:
        """Replace the stock experts by factorized ones, which the block then runs."""
        raise NotImplementedError(f"{type(self).__name__} has no `install_factors`; give the reason in `no_factors`")

    def install_skipping(self, block: Block, skipping: Skipping) -> None:
        """Have the router of a block give weight 0 to skipped experts, and its experts not run for them."""
        raise NotImplementedError(f"{type(self).__name__} has no `install_skipping`; give the reason in `no_skipping`")

    def resize(self, block: Block, stock: nn.Module) -> None:
        """Give the stock experts of a block the sizes of another block of its class, with empty tensors."""
        raise NotImplementedError(f"{type(self).__name__} has no `resize`; give the reason in `no_resize`")

    def factors(self, block: Block) -> FactorizedExperts | None:
        """The factorized experts of the block; None if it has stock experts."""
        return next((m for m in block.modules() if isinstance(m, FactorizedExperts)), None)

    def carry_out(self, block: Block, plan: BlockPlan, stock: nn.Module | None = None) -> BlockPlan:
        """Apply a plan to a block; returns the plan without the factors, which the block now holds.

        Args:
            block: The block.
            plan: Its plan.
            stock: A block of its class with the sizes of the plan, on the meta device; for plans of stock experts of
                another width.

        Raises:
            ValueError: If the plan was read from a checkpoint and so lacks its factors, or if the architecture cannot
                express it.
        """
        if plan.sizes is not None and plan.factors is None:
            raise ValueError(
                f"The plan for {plan.name} has the sizes of its factors, but the factors themselves are in the "
                "checkpoint that it was made for. Load that checkpoint, or pass statistics= to decide again."
            )
        if not plan.keeps_all:
            self.cut(block, plan)
        plan = self._store(block, plan, stock)
        if plan.skipping is not None:
            self.install_skipping(block, plan.skipping)
        return plan

    def _store(self, block: Block, plan: BlockPlan, stock: nn.Module | None) -> BlockPlan:
        """Put the experts of a plan into a block; returns the plan without them."""
        if plan.factors is None:
            return plan
        view = self.experts(block)
        if plan.is_stock:
            if stock is not None:
                self.resize(block, stock)
            _fill(self.experts(block), view, plan.factors)
            return replace(plan, factors=None, digest=self.digest(block))
        held = _empty_factors(view, plan.factors.spec)
        held.fill(plan.factors, {name: values for name, values in _biases(view).items() if values is not None})
        self.install_factors(block, held)
        return replace(plan, factors=None, digest=self.digest(block))

    def is_stock(self, block: Block, plan: BlockPlan) -> bool:
        """Whether a block is still as it was before the plan was carried out."""
        info = self.info(block, "", 0) if self.factors(block) is None else None
        return (
            info is not None and info.num_experts == plan.num_experts and plan.width in (None, info.intermediate_size)
        )

    def build_structure(
        self,
        block: Block,
        num_groups: int,
        routing: Routing,
        sizes: ExpertsSpec | None = None,
        stock: nn.Module | None = None,
        skipping: Skipping | None = None,
    ) -> None:
        """Give an uncompressed block the structure that `carry_out` leaves, with empty tensors.

        Args:
            block: The block.
            num_groups: Number of its experts.
            routing: How the router reaches them.
            sizes: Their formats; None for stock experts.
            stock: As in `carry_out`.
            skipping: Which selected experts are skipped; None for none.
        """
        if num_groups < self.info(block, "", 0).num_experts:
            self.rebuild(block, num_groups, routing)
        if stock is not None:
            self.resize(block, stock)
        elif sizes is not None:
            self.install_factors(block, _empty_factors(self.experts(block), sizes))
        if skipping is not None:
            self.install_skipping(block, skipping)

    def written_experts(self, block: Block) -> dict[str, torch.Tensor]:
        """The tensors of a block's compressed experts, by dotted path."""
        held = self.factors(block)
        if held is not None:
            prefix = next(path for path, module in block.named_modules() if module is held)
            return dict(held.state_dict(prefix=f"{prefix}."))
        own = {id(parameter) for parameter in self.expert_parameters(block)}
        return {path: p.detach() for path, p in block.named_parameters() if id(p) in own}

    def digest(self, block: Block) -> dict[str, str]:
        """SHA-256 of each tensor of a block's compressed experts, by dotted path."""
        return {path: digest({}, {path: tensor}) for path, tensor in self.written_experts(block).items()}


def probed(projection: str, expert: int) -> float:
    """The value of a projection (gate, up or down) of expert 0 or 1 in `Surgeon.probe`."""
    return float(1 + PROJECTIONS.index(projection) + len(PROJECTIONS) * expert)


def _fill(target: ExpertTensors, source: ExpertTensors, experts: StoredExperts) -> None:
    """Write dense experts and the biases of their neurons into resized stock tensors."""
    with torch.no_grad():
        for slot, expert in enumerate(experts.experts):
            for name, matrix in expert.matrices.items():
                getattr(target, name)[slot].copy_(matrix.densified())
            for name, axis in NEURON_AXIS.items():
                values = getattr(source, name) if name.endswith("_bias") else None
                if values is not None:
                    kept = expert.neurons if axis is not None else None
                    bias = values[slot] if kept is None else values[slot][kept.to(values[slot].device)]
                    getattr(target, name)[slot].copy_(bias)


def _empty_factors(view: ExpertTensors, sizes: ExpertsSpec) -> FactorizedExperts:
    first = view.up[0]
    biases = [name for name, values in _biases(view).items() if values is not None]
    factors = FactorizedExperts(sizes, view.hidden_size, biases, device=first.device, dtype=first.dtype)
    widths = {values[0].dtype for values in _biases(view).values() if values is not None}
    for name, parameter in factors.named_parameters():
        if name.endswith("bias"):
            # Biases are not factorized, and may be stored in another dtype than the matrices.
            parameter.data = parameter.data.to(reduce(torch.promote_types, widths))
    return factors.requires_grad_(first.requires_grad)


def _biases(view: ExpertTensors) -> dict[str, PerExpert | None]:
    return {"gate": view.gate_bias, "up": view.up_bias, "down": view.down_bias}


def merge_group(
    source: Mapping[str, PerExpert], target: Mapping[str, PerExpert], plan: BlockPlan, group: int, slot: int
) -> None:
    """Write the merged expert of `group` into position `slot` of `target`.

    Args:
        source: Fields of `ExpertTensors` with all experts.
        target: The same fields with the tensors to fill.
        plan: The block's plan.
        group: The group to merge.
        slot: Position of the merged expert in `target`.
    """
    members = plan.members(group)
    weights = [float(plan.merge_weights_E[e]) for e in members]
    order = [None if plan.permutations_EI is None else plan.permutations_EI[e] for e in members]
    taken = plan.sources(group)
    for name, matrices in source.items():
        axis = NEURON_AXIS[name]
        if taken is not None and axis is not None:
            gather_neurons(matrices, taken[0], taken[1], axis, target[name][slot])
            continue
        merge_matrices([matrices[e] for e in members], weights, order, axis, target[name][slot])


def merged_router_rows(rows_EX: torch.Tensor, plan: BlockPlan, role: Role = "rows") -> torch.Tensor:
    """(G, ...) entries of the reduced router: fitted ones, else the weighted mean with `router_weights_E`."""
    fitted = None if plan.router_fit is None else getattr(plan.router_fit, _FITTED.get(role, ""), None)
    if fitted is not None:
        return fitted.to(rows_EX).reshape(-1, *rows_EX.shape[1:])
    assert plan.router_weights_E is not None
    merged = torch.empty((plan.num_groups, *rows_EX.shape[1:]), dtype=rows_EX.dtype, device=rows_EX.device)
    # A bias has one element per expert, and merge_matrices needs another axis.
    flat_EX, flat_GX = rows_EX.reshape(plan.num_experts, -1), merged.view(plan.num_groups, -1)
    for group in range(plan.num_groups):
        members = plan.members(group)
        weights = [float(plan.router_weights_E[e]) for e in members]
        merge_matrices([flat_EX[e] for e in members], weights, [None] * len(members), None, flat_GX[group])
    return merged


def replace_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer with the dotted name `name`."""
    *path, last = name.split(".")
    owner: Any = module.get_submodule(".".join(path))
    old = getattr(owner, last)
    setattr(owner, last, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)


def attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module by its dotted name."""
    *path, last = name.split(".")
    return getattr(module.get_submodule(".".join(path)), last)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks on exit."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
