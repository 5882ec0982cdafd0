"""Llama 4: every expert runs on every token, and the router's score scales the input of the expert.

Scores scale the input of an expert, E(s x), and an expert is not linear: two selected experts that are merged into one
give E(s1 x) + E(s2 x), which a single call cannot compute. So the mapped router has K columns for each group, one for
each selected expert, and a merged expert runs for each of them. Released models select one expert (K = 1), which gives
one column for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from optimum_moe.nn import FactorizedExperts, SwappedModule, swapped_class
from optimum_moe.nn.factorized_layer import run_factorized
from optimum_moe.nn.merged_experts import is_traced
from optimum_moe.plan import Routing
from optimum_moe.surgeons.architecture import RouterTensor
from optimum_moe.surgeons.base import Block, BlockWatcher, hooked
from optimum_moe.surgeons.stacked import ExpertStack, Fields, StackedSurgeon, at_first_activation


class MappedLlama4Router(SwappedModule):
    """Puts the score of a token's k-th expert into the k-th column of its group."""

    expert_map: torch.Tensor
    num_groups: int
    top_k: int

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, G * K) scores and (T, N) logits."""
        scores_TN, logits_TN = super().forward(hidden_states)
        # Scores of experts that are not selected are 0.
        scores_TK, index_TK = scores_TN.topk(self.top_k, dim=-1)
        slots_K = torch.arange(self.top_k, device=index_TK.device)
        columns_TK = self.expert_map[index_TK] * self.top_k + slots_K
        mapped = scores_TK.new_zeros(len(scores_TK), self.num_groups * self.top_k)
        return mapped.scatter(1, columns_TK, scores_TK), logits_TN


class FactorizedLlama4Experts(SwappedModule):
    """Runs each factorized expert only on the tokens that selected it; the inputs of other tokens are zeros."""

    factors: FactorizedExperts
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    hidden_size: int

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(E * T, H) outputs of scaled inputs sorted by expert."""
        inputs_ETH = hidden_states.view(self.factors.num_experts, -1, self.hidden_size)
        if is_traced():
            # The stock experts run on the zeros too.
            traced = partial(run_factorized, self.factors, partial(_activate, self), None)
            return torch.cat([traced(expert, input_TH)[1] for expert, input_TH in enumerate(inputs_ETH)])
        run = partial(run_factorized, self.factors, partial(_activate, self), None, opened={})
        outputs = []
        for expert, input_TH in enumerate(inputs_ETH):
            token_P = (input_TH != 0).any(-1).nonzero()[:, 0]
            _, output_PH = run(expert, input_TH[token_P])
            outputs.append(torch.zeros_like(input_TH).index_copy(0, token_P, output_PH))
        return torch.cat(outputs)


class Llama4Surgeon(StackedSurgeon):
    """Surgeon for the MoE layers of the text model."""

    name = "llama4"
    count_fields = ("num_local_experts",)
    scales_input = True
    remark = "scores scale the inputs of experts: with top-k above 1 a merged expert runs for each selected one"
    tensors = (RouterTensor("weight"),)

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is the feed-forward block of an MoE layer."""
        return type(module).__name__ == "Llama4TextMoe"

    def stacks(self, block: Block) -> tuple[ExpertStack, ...]:
        """The stacks of gate and up (E, H, 2 I), and of down (E, I, H)."""
        return ExpertStack("experts.gate_up_proj", _gate_up), ExpertStack("experts.down_proj", _down)

    def scores(self, block: Block, logits_SN: torch.Tensor) -> torch.Tensor:
        """Sigmoid scores (S, N)."""
        return logits_SN.sigmoid()

    def num_experts(self, block: Block) -> int:
        """The count of the experts module."""
        return block.experts.num_experts

    def top_k(self, block: Block) -> int:
        """The attribute of the block."""
        return block.top_k

    def install(self, block: Block, num_groups: int, routing: Routing) -> None:
        """See `StackedSurgeon.install`."""
        router = block.router
        if routing == "map":
            self.add_map(block, num_groups)
            router.num_groups = num_groups
            router.__class__ = swapped_class(MappedLlama4Router, type(router))
        else:
            router.num_experts = router.out_features = num_groups
        block.num_experts = block.experts.num_experts = num_groups

    def activate(self, block: Block, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """See `Surgeon.activate`."""
        return _activate(block.experts, gate_PI, up_PI)

    def install_factors(self, block: Block, factors: FactorizedExperts) -> None:
        """See `Surgeon.install_factors`."""
        self.drop_stacks(block)
        block.experts.factors = factors
        block.experts.__class__ = swapped_class(FactorizedLlama4Experts, type(block.experts))

    @contextmanager
    def watch(self, block: Block, watcher: BlockWatcher) -> Iterator[None]:
        """Report scores as weights, and E(s x) / s as output.

        So weight times output is the expert's contribution to the block's output, as in other architectures. Inputs
        and hidden neurons are reported with the scaling, as the matrices see them.
        """
        experts = block.experts
        seen: dict[str, torch.Tensor] = {}

        def after_router(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            scores_TE, logits_TE = output
            seen.update(scores_TE=scores_TE, input_TH=args[0])
            watcher.router(logits_TE, args[0])

        def report(routed_in: torch.Tensor) -> None:
            scores_TE, input_TH = seen["scores_TE"], seen["input_TH"]
            weights_TK, index_TK = scores_TE.topk(block.top_k, dim=-1)
            watcher.begin(input_TH, index_TK, weights_TK)
            for expert, inputs_TH in enumerate(routed_in.view(experts.num_experts, -1, experts.hidden_size)):
                token_P = (scores_TE[:, expert] != 0).nonzero()[:, 0]
                if len(token_P) == 0:
                    continue
                input_PH, weight_P = inputs_TH[token_P], scores_TE[token_P, expert]
                hidden_PI = _activate(experts, *(input_PH @ experts.gate_up_proj[expert]).chunk(2, dim=-1))
                output_PH = (hidden_PI @ experts.down_proj[expert]).float() / weight_P.float().unsqueeze(-1)
                watcher.expert(expert, token_P, weight_P, input_PH, hidden_PI, output_PH)

        handles = at_first_activation(experts, experts.act_fn, report)
        with hooked([block.router.register_forward_hook(after_router), *handles]):
            yield


def _activate(experts: Any, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
    assert gate_PI is not None
    return up_PI * experts.act_fn(gate_PI)


def _gate_up(tensor_EHI: torch.Tensor) -> Fields:
    gate_EHI, up_EHI = tensor_EHI.chunk(2, dim=-1)
    return {"gate": gate_EHI.transpose(1, 2), "up": up_EHI.transpose(1, 2)}


def _down(tensor_EIH: torch.Tensor) -> Fields:
    return {"down": tensor_EIH.transpose(1, 2)}
