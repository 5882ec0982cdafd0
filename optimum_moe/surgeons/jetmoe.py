"""JetMoE: feed-forward experts and attention experts; the router sorts its (token, expert) pairs by expert.

An attention expert is a pair of matrices before and after the attention that all experts share: the query and the
output projection. Its channels are multiplied with keys and values that all experts share, so they cannot be permuted.
If two selected experts are merged into one, its projections run once with the sum of both weights; the attention still
runs over K sets of queries, and the repeated one consists of zeros that are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_moe.formats.base import Opened
from optimum_moe.nn import FactorizedExperts, SwappedModule, map_routing, swapped_class
from optimum_moe.plan import Routing
from optimum_moe.surgeons.architecture import RouterTensor
from optimum_moe.surgeons.base import Block, BlockWatcher, hooked
from optimum_moe.surgeons.stacked import ExpertStack, Fields, StackedSurgeon, down_of, gate_up_of


class MappedJetMoeRouter(SwappedModule):
    """Maps the ids of the stock router to groups, and sorts the pairs again without repeats."""

    expert_map: torch.Tensor
    num_groups: int
    top_k: int

    def forward(self, hidden_states: torch.Tensor) -> tuple[Any, ...]:
        """(P,) slots (T * K numbered row by row), tokens and weights of all pairs, pairs of each group, logits."""
        *topology, logits_TN = super().forward(hidden_states)
        index_TK, weights_TK = _selection(topology, self.top_k)
        groups_TK, summed_TK = map_routing(index_TK, weights_TK, self.expert_map)
        # A compiled graph needs a fixed number of pairs, so there repeats run too, with weight 0.
        if torch.compiler.is_compiling():
            slot_P = torch.arange(summed_TK.numel(), device=summed_TK.device)
        else:
            slot_P = (summed_TK.flatten() != 0).nonzero()[:, 0]
        group_P, order_P = groups_TK.flatten()[slot_P].sort(stable=True)
        slot_P = slot_P[order_P]
        sizes = nn.functional.one_hot(group_P, self.num_groups).sum(0).tolist()
        return slot_P, slot_P // self.top_k, summed_TK.flatten()[slot_P], sizes, logits_TN


class FactorizedJetMoeInput(SwappedModule):
    """The first linear layer with factorized experts; missing neurons of narrower experts are zeros."""

    shared: tuple[FactorizedExperts, list[torch.Tensor]]
    output_size: int

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """(P, 2 I) gate and up of pairs sorted by expert, or (P, I) without a gate."""
        factors, entered = self.shared
        entered[:] = [inputs]
        width = self.output_size // (1 + factors.has_gate)
        outputs: list[torch.Tensor] = []
        opened: Opened = {}
        for expert, rows in enumerate(inputs.split(expert_size)):
            parts = [part for part in factors.project_in(expert, rows, opened) if part is not None]
            padded = [nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
            outputs.append(torch.cat(padded, dim=-1))
        return torch.cat(outputs)


class FactorizedJetMoeOutput(SwappedModule):
    """The second linear layer with factorized experts."""

    shared: tuple[FactorizedExperts, list[torch.Tensor]]

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """(P, H) outputs of pairs sorted by expert."""
        factors, entered = self.shared
        widths = factors.widths
        opened: Opened = {}
        # What stands in the place of an expert reads what the first linear layer got.
        rows = enumerate(zip(inputs.split(expert_size), entered.pop().split(expert_size), strict=True))
        return torch.cat([factors.project_out(e, hidden[:, : widths[e]], first, opened) for e, (hidden, first) in rows])


class JetMoeSurgeon(StackedSurgeon):
    """The feed-forward experts: `input_linear` is gate and up, `output_linear` down."""

    name = "jetmoe"
    count_fields = ("num_local_experts",)
    tensors = (RouterTensor("layer.weight"),)
    block = "JetMoeMoE"
    remark = "feed-forward experts"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` has the class of the block."""
        return type(module).__name__ == self.block

    def stacks(self, block: Block) -> tuple[ExpertStack, ...]:
        """The stacks of gate and up (E, 2 I, H), and of down (E, H, I)."""
        return ExpertStack("input_linear.weight", gate_up_of), ExpertStack("output_linear.weight", down_of)

    def num_experts(self, block: Block) -> int:
        """The count of its linear layers."""
        return block.input_linear.num_experts

    def top_k(self, block: Block) -> int:
        """The attribute of the router."""
        return block.router.top_k

    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """See `StackedSurgeon.install`."""
        router = block.router
        if routing == "map":
            self.add_map(block, num_groups)
            router.num_groups = num_groups
            router.__class__ = swapped_class(MappedJetMoeRouter, type(router))
        else:
            router.num_experts = router.layer.out_features = num_groups
        block.input_linear.num_experts = block.output_linear.num_experts = num_groups

    def activate(self, block: Block, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """The block's activation of the gate; attention experts have neither."""
        return up_PI if gate_PI is None else block.activation(gate_PI) * up_PI

    def install_factors(self, block: Block, factors: FactorizedExperts) -> None:
        """See `Surgeon.install_factors`."""
        self.drop_stacks(block)
        block.factors = factors
        entered: list[torch.Tensor] = []
        linears = (block.input_linear, FactorizedJetMoeInput), (block.output_linear, FactorizedJetMoeOutput)
        for linear, mixin in linears:
            # In a tuple, because a module that is the child of two would be saved twice.
            linear.shared = (factors, entered)
            linear.__class__ = swapped_class(mixin, type(linear))

    @contextmanager
    def watch(self, block: Block, watcher: BlockWatcher) -> Iterator[None]:
        """Watch with hooks on the router and on the second linear layer, whose inputs are the hidden neurons."""
        seen: dict[str, Any] = {}

        def after_router(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            *topology, logits_TE = output
            seen.update(input_TH=args[0], topology=topology)
            watcher.router(logits_TE, args[0])
            watcher.begin(args[0], *_selection(topology, self.top_k(block)))

        def after_experts(module: nn.Module, args: tuple[Any, ...], output_PH: torch.Tensor) -> None:
            hidden_PI, sizes = args
            _, token_P, weight_P, _ = seen["topology"]
            columns = [column.split(sizes) for column in (token_P, weight_P, hidden_PI, output_PH)]
            for expert, (token, weight, hidden, output) in enumerate(zip(*columns, strict=True)):
                if len(token):
                    watcher.expert(expert, token, weight, seen["input_TH"][token], hidden, output)

        handles = [
            block.router.register_forward_hook(after_router),
            block.output_linear.register_forward_hook(after_experts),
        ]
        with hooked(handles):
            yield


class JetMoeAttentionSurgeon(JetMoeSurgeon):
    """The attention experts: `input_linear` is the query projection, `output_linear` the output projection."""

    name = "jetmoe_attention"
    block = "JetMoeMoA"
    remark = "attention experts; their channels keep their order"
    fixed_neurons = True

    def stacks(self, block: Block) -> tuple[ExpertStack, ...]:
        """The stacks of queries (E, I, H) and outputs (E, H, I), with I query channels per expert."""
        return ExpertStack("input_linear.weight", _up), ExpertStack("output_linear.weight", down_of)

    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """See `StackedSurgeon.install`."""
        super().install(block, num_groups, routing)
        block.num_experts = num_groups


def _up(tensor_EIH: torch.Tensor) -> Fields:
    return {"up": tensor_EIH}


def _selection(topology: Sequence[Any], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) selected experts and weights from a stock router's sorted pairs, one for every slot."""
    slot_P, _, weight_P, sizes = topology
    sizes_E = torch.tensor(sizes, device=slot_P.device)
    expert_P = torch.arange(len(sizes), device=slot_P.device).repeat_interleave(sizes_E, output_size=len(slot_P))
    order_S = slot_P.argsort()
    return expert_P[order_S].view(-1, top_k), weight_P[order_S].view(-1, top_k)
