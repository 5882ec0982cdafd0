"""What merged experts are made of, beside weighted means, and the refit of their down projections.

Shape letters: E experts, G groups, S sampled tokens, P those of one group, H hidden, I intermediate, U neurons of
several experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens, single_expert
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.fisher_loss import weights_and_directions
from optimum_moe.algorithms.neuron_merge import choose_neurons, fit_down, in_turns
from optimum_moe.formats import StoredExpert, StoredExperts, refit_block
from optimum_moe.formats.stored import stored_matrix
from optimum_moe.plan import BlockPlan
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.plain_budget import bias_output, block_output

Refit = Literal["none", "group", "block"]

# Neurons that are chosen from at a time: the choice costs the third power of it.
_LARGEST = 4096


@dataclass(frozen=True, eq=False)
class GroupTokens:
    """The tokens of a group, scaled so that squared errors on them are changes of the loss in second order.

    Args:
        token_P: (P,) int64 which of the sampled tokens reach a member.
        input_PH: (P, H) inputs of the merged expert.
        scale_P1: (P, 1) routing weight of the merged expert times the root of the token's importance.
        target_PH: (P, H) what the members gave together, times that root.
        rows_QH: (Q, H) rows r with the metric sum r r^T of the output.
    """

    token_P: torch.Tensor
    input_PH: torch.Tensor
    scale_P1: torch.Tensor
    target_PH: torch.Tensor
    rows_QH: torch.Tensor


class MergedBlock:
    """A block whose experts are merged by a plan and reached through a routing map, on its sampled tokens.

    Args:
        context: The block before the merge.
        plan: Its plan, with labels.
    """

    def __init__(self, context: BlockContext, plan: BlockPlan) -> None:
        self.context, self.plan = context, plan
        self.experts, self.sample = context.experts, context.sample()
        self.root_S = self.sample.importance().sqrt()

    @cached_property
    def mapped(self) -> SampledTokens:
        """The sample as the groups see it: the weights of experts of one group are summed."""
        return self.context.mapped_sample(self.plan)

    def tokens(self, group: int, merged: ExpertTensors | None = None) -> GroupTokens:
        """The tokens of a group; with `merged`, what its down bias gives is not left to the down projection."""
        token_P, seen = self.mapped.routed(group)
        target_SH = torch.zeros_like(self.sample.input_SH, dtype=torch.float32)
        for expert in self.plan.members(group):
            own_P, own = self.sample.routed(expert)
            single = single_expert(self.experts, expert)
            hidden_PI = single.activated(single.preactivations(own.input_PH))
            output_PH = hidden_PI @ single.down_HI.T
            if self.experts.down_bias is not None:
                output_PH = output_PH + self.experts.down_bias[expert].float()
            target_SH.index_add_(0, own_P, output_PH * own.weight_P[:, None])
        root_P1 = self.root_S[token_P][:, None]
        target_PH = target_SH[token_P]
        if merged is not None and merged.down_bias is not None:
            target_PH -= seen.weight_P[:, None] * merged.down_bias[group].float()
        return GroupTokens(
            token_P=token_P,
            input_PH=seen.input_PH,
            scale_P1=seen.weight_P[:, None] * root_P1,
            target_PH=target_PH * root_P1,
            rows_QH=weights_and_directions(seen, torch.float32)[1],
        )

    def hidden(self, expert: int, tokens: GroupTokens) -> torch.Tensor:
        """(P, I) scaled hidden activations of a member on the tokens of its group."""
        single = single_expert(self.experts, expert)
        return single.activated(single.preactivations(tokens.input_PH)) * tokens.scale_P1

    def sources(self) -> torch.Tensor:
        """(G, I) the neurons that merged experts are made of, as in `BlockPlan.sources_GI`."""
        inner = self.experts.intermediate_size
        return torch.stack([self._sources(group, inner) for group in range(self.plan.num_groups)])

    def _sources(self, group: int, inner: int) -> torch.Tensor:
        first, *others = self.plan.members(group)
        counts_E = self.context.observed().token_count_E
        kept_I = first * inner + torch.arange(inner)
        if not others or not float(counts_E[[first, *others]].sum()):
            return kept_I
        # A group of many experts is chosen from in turns, the most frequent members first.
        members = [first, *sorted(others, key=lambda expert: -float(counts_E[expert]))]
        tokens = self.tokens(group)
        if not len(tokens.token_P):
            return kept_I
        kept_I, hidden_PU = kept_I[:0], tokens.target_PH[:, :0]
        for turn in in_turns(members, inner, _LARGEST):
            candidates_U = torch.cat([kept_I, *(expert * inner + torch.arange(inner) for expert in turn)])
            hidden_PU = torch.cat([hidden_PU, *(self.hidden(expert, tokens) for expert in turn)], dim=1)
            chosen_I = choose_neurons(hidden_PU, tokens.target_PH, tokens.rows_QH, inner)
            kept_I, hidden_PU = candidates_U[chosen_I.cpu()], hidden_PU[:, chosen_I]
        return kept_I.sort().values

    def refitted(self, merged: ExpertTensors, refit: Refit) -> StoredExperts:
        """The merged experts with refitted down projections.

        Args:
            merged: Experts of all groups as the plan merges them.
            refit: `"group"` fits each to its own members, `"block"` then all together to the output of the block.
        """
        singles = [single_expert(merged, group) for group in range(self.plan.num_groups)]
        stored = []
        for group, single in enumerate(singles):
            down_HI = single.down_HI
            if len(self.plan.members(group)) > 1:
                tokens = self.tokens(group, merged)
                if len(tokens.token_P):
                    hidden_PI = single.activated(single.preactivations(tokens.input_PH)) * tokens.scale_P1
                    down_HI = fit_down(hidden_PI, tokens.target_PH, down_HI)
            gate = None if merged.gate is None else stored_matrix(merged.gate[group])
            stored.append(StoredExpert(up=stored_matrix(merged.up[group]), down=stored_matrix(down_HI), gate=gate))
        if refit == "block":
            stored = refit_block(singles, stored, self.mapped, target_SH=self._output(merged))
        dtype = merged.down[0].dtype
        return StoredExperts(tuple(replace(e, down=stored_matrix(e.down.densified().to(dtype))) for e in stored))

    def _output(self, merged: ExpertTensors) -> torch.Tensor:
        """(S, H) what the block gave, without what the down biases of the merged experts give."""
        target_SH = block_output(self.experts, range(self.experts.num_experts), self.sample)
        if merged.down_bias is not None:
            target_SH -= bias_output(merged.down_bias, range(self.plan.num_groups), self.mapped)
        return target_SH
