"""`FactorizedExpertLayer`: an experts class that runs experts in the formats that they are stored in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from optimum_moe.algorithms.experts import Activate
from optimum_moe.formats.base import Opened
from optimum_moe.hf.compat import apply_gate, experts_implementation, has_default_gate
from optimum_moe.nn.factorized_experts import ExpertsWithoutNeurons, FactorizedExperts, WidthClass
from optimum_moe.nn.merged_experts import (
    MergedExpertLayer,
    accumulator,
    is_traced,
    run_everywhere,
    run_routed,
    sort_pairs,
    wide,
)
from optimum_moe.nn.ragged_launches import ragged_launches
from optimum_moe.nn.shared_bases import run_shared


class FactorizedExpertLayer(MergedExpertLayer):
    """Mixin put in front of an experts class whose stock parameters gave way to `factors`.

    Like merged experts these run once a token: slots with routing weight 0 are left out.
    """

    factors: FactorizedExperts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the selected experts.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) experts in [0, G); ids beyond are sentinels.
            top_k_weights: (T, K) routing weights.

        Returns:
            (T, H) in the dtype of `hidden_states`.
        """
        index_TK = top_k_index.masked_fill(top_k_weights == 0, self.num_experts)
        activate = partial(native_activation, self)
        if is_traced():
            traced = partial(run_factorized, self.factors, activate, native_finish(self))
            return run_everywhere(traced, self.num_experts, hidden_states, index_TK, top_k_weights)
        if self.factors.shares_tensors and native_finish(self) is None:
            return run_shared(self, activate, hidden_states, index_TK, top_k_weights)
        if experts_implementation(self.config) != "eager":
            launches = ragged_launches(self.factors, hidden_states)
            if launches is not None:
                return launches(activate, native_finish(self), hidden_states, index_TK, top_k_weights)
        # Grouped matmuls save launches, of which a CPU has none; there one expert after the other is faster.
        grouped = experts_implementation(self.config) == "grouped_mm" and hidden_states.device.type != "cpu"
        if grouped and hasattr(nn.functional, "grouped_mm"):
            return run_grouped(self, activate, hidden_states, index_TK, top_k_weights)
        run = partial(run_factorized, self.factors, activate, native_finish(self), opened={})
        return run_routed(run, self.num_experts, hidden_states, index_TK, top_k_weights)


def run_factorized(
    factors: FactorizedExperts,
    activate: Activate,
    finish: Callable[[torch.Tensor], torch.Tensor] | None,
    expert: int,
    input_PH: torch.Tensor,
    opened: Opened | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert on its tokens: (hidden neurons (P, n), output (P, H)).

    Args:
        factors: Of all experts.
        activate: Their gate function.
        finish: What is done to the output, None for nothing.
        expert: Its number.
        input_PH: (P, H).
        opened: One dictionary for all experts of a forward pass, empty at its start: makes training several times
            faster.
    """
    is_first = opened is not None and not opened
    hidden_Pn = activate(*factors.project_in(expert, input_PH, opened))
    output_PH = factors.project_out(expert, hidden_Pn, input_PH, opened)
    output_PH = factors.in_step(output_PH) if is_first else output_PH
    return hidden_Pn, output_PH if finish is None else finish(output_PH)


def run_grouped(
    experts: Any, activate: Activate, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """All experts in grouped matmuls, one for each stack of matrices; moves to the host once.

    Args:
        experts: A module with `factors`.
        activate: Its gate function.
        hidden_TH: (T, H).
        index_TK: (T, K) expert ids, sentinels (>= G) included.
        weights_TK: (T, K) routing weights.

    Returns:
        (T, H) in the dtype of `hidden_TH`.
    """
    factors: FactorizedExperts = experts.factors
    finish = native_finish(experts)
    order_P, ends_G, _ = sort_pairs(index_TK, factors.num_experts)
    ends = ends_G.tolist()
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    token_P = order_P // index_TK.shape[-1]
    weight_P1 = weights_TK.reshape(-1).index_select(0, order_P).unsqueeze(-1)
    tokens, weights = token_P.split(counts), weight_P1.split(counts)
    output_TH = accumulator(hidden_TH)

    def add(members: tuple[int, ...], run: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> None:
        token_Q, weight_Q1 = torch.cat([tokens[e] for e in members]), torch.cat([weights[e] for e in members])
        if len(token_Q):
            output_QH = run(hidden_TH.index_select(0, token_Q), [counts[e] for e in members])
            output_QH = output_QH if finish is None else finish(output_QH)
            output_TH.index_add_(0, token_Q, wide(output_QH * weight_Q1))

    for module in factors.classes:
        assert isinstance(module, WidthClass)
        add(module.members, partial(_grouped_class, module, activate))
    for found in factors.without_neurons:
        for expert in found.members:
            add((expert,), partial(_without_neurons, found, expert))
    return factors.in_step(output_TH.to(hidden_TH.dtype))


def _grouped_class(found: WidthClass, activate: Activate, input_QH: torch.Tensor, counts: list[int]) -> torch.Tensor:
    if hasattr(found, "gate_up_stacks"):
        gate_Qn, up_Qn = found.projection("gate_up")(input_QH, counts_C=counts).chunk(2, dim=-1)
    else:
        gate_Qn = found.projection("gate")(input_QH, counts_C=counts) if hasattr(found, "gate_stacks") else None
        up_Qn = found.projection("up")(input_QH, counts_C=counts)
    hidden_Qn = activate(gate_Qn, up_Qn)
    return found.projection("down")(hidden_Qn, counts_C=counts)


def _without_neurons(
    found: ExpertsWithoutNeurons, expert: int, input_QH: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    return found(expert, input_QH).expand(len(input_QH), -1)


def native_activation(experts: Any, gate_Pn: torch.Tensor | None, up_Pn: torch.Tensor) -> torch.Tensor:
    """The gate function of an experts module, which wants gate and up in one tensor of its own layout."""
    if gate_Pn is None:
        return experts.act_fn(up_Pn)
    if has_default_gate(experts):
        # No need to copy both into one tensor for it.
        return experts.act_fn(gate_Pn) * up_Pn
    if experts.is_concatenated:
        return apply_gate(experts, torch.cat([gate_Pn, up_Pn], dim=-1))
    return apply_gate(experts, torch.stack([gate_Pn, up_Pn], dim=-1).flatten(-2))


def native_finish(experts: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What an experts module does to the output of an expert."""
    return experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
