"""`MergedExpertLayer`: experts that are fewer than the ids which the router chooses from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optimum_moe.nn.class_swap import SwappedModule


class MergedExpertLayer(SwappedModule):
    """Mixin put in front of an experts class, below its choice of implementation (eager, batched, grouped).

    The stock parameters keep their names and hold G rows instead of N. Slots with routing weight 0, which the
    routing map emits for repeats, are turned into the local sentinel `num_experts`, so that a merged expert runs
    once a token; `batched_mm` still computes them, with weight 0.
    """

    num_experts: int
    eager_takes_sentinel: bool = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the selected experts.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) groups in [0, G); ids beyond are sentinels of expert parallelism.
            top_k_weights: (T, K) routing weights.

        Returns:
            (T, H) in the dtype of `hidden_states`.
        """
        index_TK = top_k_index.masked_fill(top_k_weights == 0, self.num_experts)
        if not self.eager_takes_sentinel and self.config._experts_implementation == "eager":
            return eager_experts_forward(self, hidden_states, index_TK, top_k_weights)
        return super().forward(hidden_states, index_TK, top_k_weights)


def eager_experts_forward(
    experts: Any,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    watch: Callable[..., None] | None = None,
) -> torch.Tensor:
    """Loop over the experts that are hit, for every layout that `use_experts_implementation` describes.

    Unlike some stock loops it accepts sentinel ids (>= `num_experts`) everywhere.

    Args:
        experts: An experts module with the flags `has_gate, has_bias, is_transposed`.
        hidden_TH: (T, H).
        index_TK: (T, K) expert ids.
        weights_TK: (T, K) routing weights.
        watch: Called with `(expert, token_P, weight_P, input_PH, hidden_PI, output_PH)` for each expert hit.

    Returns:
        (T, H) in the dtype of `hidden_TH`.
    """
    output_TH = torch.zeros_like(hidden_TH)
    slots = index_TK.reshape(-1)
    order = torch.argsort(slots, stable=True)
    counts = torch.bincount(slots.clamp(max=experts.num_experts), minlength=experts.num_experts + 1).tolist()
    start = 0
    for expert, count in enumerate(counts[: experts.num_experts]):
        if count == 0:
            continue
        slot_P = order[start : start + count]
        start += count
        token_P = slot_P // index_TK.shape[-1]
        weight_P = weights_TK.reshape(-1)[slot_P]
        input_PH = hidden_TH[token_P]
        hidden_PI, output_PH = run_expert(experts, expert, input_PH)
        if watch is not None:
            watch(expert, token_P, weight_P, input_PH, hidden_PI, output_PH)
        output_TH.index_add_(0, token_P, (output_PH * weight_P.unsqueeze(-1)).to(output_TH.dtype))
    return output_TH


def run_expert(experts: Any, expert: int, input_PH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert on its tokens: (hidden neurons (P, I), output (P, H)), through the module's own gate function."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    projected = _project(experts, name, expert, input_PH)
    hidden_PI = experts._apply_gate(projected) if experts.has_gate else experts.act_fn(projected)
    output_PH = _project(experts, "down_proj", expert, hidden_PI)
    if getattr(experts, "has_post_expert_norm", False):
        output_PH = experts.post_expert_norm(output_PH)
    return hidden_PI, output_PH


def _project(experts: Any, name: str, expert: int, input_PX: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    if experts.is_transposed:
        output = input_PX @ weight
        return output if bias is None else output + bias
    return nn.functional.linear(input_PX, weight, bias)
