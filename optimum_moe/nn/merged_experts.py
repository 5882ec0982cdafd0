"""`MergedExpertLayer`: experts that are fewer than the ids which the router chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import nn

from optimum_moe.hf.compat import apply_gate, experts_implementation
from optimum_moe.nn.class_swap import SwappedModule

RunExpert: TypeAlias = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From an expert and the (P, H) inputs of its tokens to its hidden neurons (P, I) and output (P, H)."""

FEW_PAIRS = 128
"""Pairs of a token and an expert up to which adding them up at once is faster than expert by expert."""


class MergedExpertLayer(SwappedModule):
    """Mixin put in front of an experts class, below its choice of implementation (eager, batched, grouped).

    The stock parameters keep their names and hold G rows instead of N. Slots with routing weight 0, which the
    routing map emits for repeats, are turned into the local sentinel `num_experts`, so that a merged expert runs
    once a token; `batched_mm` still computes them, with weight 0, on accelerators and in compiled graphs.
    """

    num_experts: int
    config: Any

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
        implementation = experts_implementation(self.config)
        # Not every stock loop takes the sentinel.
        if implementation in (None, "eager"):
            return eager_experts_forward(self, hidden_states, index_TK, top_k_weights)
        # On a CPU shapes may depend on data for free, so that repeats need no rows. Elsewhere that would wait for the
        # device, and the stock forwards carry the rows of repeats along.
        if hidden_states.device.type == "cpu" and not is_traced():
            if implementation == "grouped_mm":
                return grouped_experts_forward(self, hidden_states, index_TK, top_k_weights)
            if implementation == "batched_mm":
                return self._run_pairs(super().forward, hidden_states, index_TK, top_k_weights)
        return super().forward(hidden_states, index_TK, top_k_weights)

    def _run_pairs(
        self,
        run: Callable[..., torch.Tensor],
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Give `run` one row for each (token, expert) pair that is not a sentinel, as a token with one slot."""
        token_P, slot_P = (index_TK < self.num_experts).nonzero(as_tuple=True)
        if len(token_P) in (0, index_TK.numel()):
            return run(hidden_TH, index_TK, weights_TK)
        pair_P = token_P, slot_P
        output_PH = run(hidden_TH.index_select(0, token_P), index_TK[pair_P][:, None], weights_TK[pair_P][:, None])
        return accumulator(hidden_TH).index_add(0, token_P, wide(output_PH)).to(hidden_TH.dtype)


def eager_experts_forward(
    experts: Any,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    watch: Callable[..., None] | None = None,
) -> torch.Tensor:
    """Loop over the experts that are hit, for every layout that `use_experts_implementation` describes.

    Unlike some stock loops it accepts sentinel ids (>= `num_experts`) everywhere; it sums a token's experts in
    float32 and moves to the host once.

    Args:
        experts: An experts module with the flags `has_gate, has_bias, is_transposed`.
        hidden_TH: (T, H).
        index_TK: (T, K) expert ids.
        weights_TK: (T, K) routing weights.
        watch: Called with `(expert, token_P, weight_P, input_PH, hidden_PI, output_PH)` for each expert hit.

    Returns:
        (T, H) in the dtype of `hidden_TH`.
    """
    run = partial(run_expert, experts, expert_tensors(experts))
    return run_routed(run, experts.num_experts, hidden_TH, index_TK, weights_TK, watch)


def run_routed(
    run: RunExpert,
    num_experts: int,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    watch: Callable[..., None] | None = None,
) -> torch.Tensor:
    """`eager_experts_forward` for experts of any kind."""
    if len(hidden_TH) == 1 and watch is None:
        slots = [(slot, expert) for slot, expert in enumerate(index_TK.flatten().tolist()) if expert < num_experts]
        if slots:
            return _run_token(run, slots, hidden_TH, weights_TK)
    order_S, ends_G, _ = sort_pairs(index_TK, num_experts)
    counts = [end - start for start, end in pairwise([0, *ends_G.tolist()])]
    # A process of expert parallelism that gets no token still has to take part in the backward collectives.
    hit = [expert for expert, count in enumerate(counts) if count] or [0]
    counts = [counts[expert] for expert in hit]
    token_S = order_S // index_TK.shape[-1]
    weight_S1 = weights_TK.reshape(-1).index_select(0, order_S).unsqueeze(-1)
    # index_select copies whole rows, several times faster on a CPU than indexing.
    input_SH = hidden_TH.index_select(0, token_S)
    rows = zip(hit, token_S.split(counts), weight_S1.split(counts), input_SH.split(counts), strict=True)
    output_TH = accumulator(hidden_TH)
    if watch is None and len(order_S) <= FEW_PAIRS:
        output_SH = torch.cat([run(expert, input_PH)[1] for expert, _, _, input_PH in rows])
        return output_TH.index_add_(0, token_S, wide(output_SH * weight_S1)).to(hidden_TH.dtype)
    for expert, token_P, weight_P1, input_PH in rows:
        hidden_PI, output_PH = run(expert, input_PH)
        if watch is not None and len(token_P):
            watch(expert, token_P, weight_P1[:, 0], input_PH, hidden_PI, output_PH)
        output_TH.index_add_(0, token_P, wide(output_PH * weight_P1))
    return output_TH.to(hidden_TH.dtype)


def run_everywhere(
    run: RunExpert, num_experts: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`run_routed` for compiled and exported graphs, in which no size may depend on data.

    Every expert runs on every token, so that it takes E / K times the multiply-adds; what was not selected is dropped.
    """
    output_TH = accumulator(hidden_TH)
    for expert in range(num_experts):
        selected_TK = index_TK == expert
        weight_T1 = weights_TK.masked_fill(~selected_TK, 0).sum(-1, keepdim=True)
        given_TH = run(expert, hidden_TH)[1] * weight_T1
        # Tokens that an expert never sees may overflow in it, and infinity times 0 is NaN.
        output_TH = output_TH + wide(given_TH).masked_fill(~selected_TK.any(-1, keepdim=True), 0)
    return output_TH.to(hidden_TH.dtype)


def is_traced() -> bool:
    """Whether a graph is being made (compiled, exported or traced), which must not depend on the data that make it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _run_token(
    run: RunExpert, slots: list[tuple[int, int]], hidden_1H: torch.Tensor, weights_1K: torch.Tensor
) -> torch.Tensor:
    """One token through its experts, `(slot, expert)`: nothing to sort, and a third of the operations."""
    output_SH = torch.cat([run(expert, hidden_1H)[1] for _, expert in slots])
    weight_S = weights_1K[0]
    if len(slots) < len(weight_S):
        weight_S = weight_S[[slot for slot, _ in slots]]
    return wide(output_SH * weight_S.unsqueeze(-1)).sum(0, keepdim=True).to(hidden_1H.dtype)


def grouped_experts_forward(
    experts: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Grouped matmuls on the pairs that are routed, without rows for sentinel ids.

    The stock forward keeps one row for each slot through every elementwise step and masks them three times.

    Args:
        experts: An experts module with the flags `has_gate, has_bias, is_transposed`.
        hidden_TH: (T, H).
        index_TK: (T, K) expert ids, sentinels (>= `num_experts`) included.
        weights_TK: (T, K) routing weights.

    Returns:
        (T, H) in the dtype of `hidden_TH`.
    """
    order_P, ends_G, expert_P = sort_pairs(index_TK, experts.num_experts)
    # grouped_mm is new in torch 2.10, where it wants aligned weights (mapped files are not), and without rows it has no
    # gradient.
    aligned = all(parameter.data_ptr() % 16 == 0 for parameter in experts.parameters(recurse=False))
    if len(order_P) == 0 or not aligned or not hasattr(nn.functional, "grouped_mm"):
        return eager_experts_forward(experts, hidden_TH, index_TK, weights_TK)
    token_P = order_P // index_TK.shape[-1]

    def project(name: str, input_PX: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)
        weight_GXY = weight if experts.is_transposed else weight.transpose(-2, -1)
        output_PY = nn.functional.grouped_mm(input_PX.to(weight.dtype), weight_GXY, offs=ends_G)
        return output_PY + getattr(experts, f"{name}_bias")[expert_P] if experts.has_bias else output_PY

    projected = project("gate_up_proj" if experts.has_gate else "up_proj", hidden_TH.index_select(0, token_P))
    hidden_PI = apply_gate(experts, projected) if experts.has_gate else experts.act_fn(projected)
    output_PH = project("down_proj", hidden_PI)
    if getattr(experts, "has_post_expert_norm", False):
        output_PH = experts.post_expert_norm(output_PH)
    weight_P1 = weights_TK.reshape(-1).index_select(0, order_P).unsqueeze(-1)
    return accumulator(hidden_TH).index_add_(0, token_P, wide(output_PH * weight_P1)).to(hidden_TH.dtype)


def sort_pairs(index_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots that are no sentinels, by expert: (P,) slot numbers, (G,) int32 end of each expert's, (P,) experts."""
    expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
    every_G = torch.arange(num_experts, device=index_TK.device, dtype=expert_S.dtype)
    ends_G = torch.searchsorted(expert_S, every_G, right=True, out_int32=True)
    pairs = int(ends_G[-1])
    return order_S[:pairs], ends_G, expert_S[:pairs]


def expert_tensors(experts: Any) -> dict[str, Sequence[torch.Tensor]]:
    """The stacked tensors of an experts module by name, to be indexed by expert.

    The module's attributes are read once: a parametrized one (an adapter) is computed again at each access.
    """
    names = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names] if experts.has_bias else []
    stacked = {name: getattr(experts, name) for name in names}
    # The gradient of `unbind` is one stack, that of G selections G full-sized tensors.
    learning = torch.is_grad_enabled()
    return {name: t.unbind(0) if learning and t.requires_grad else t for name, t in stacked.items()}


def run_expert(
    experts: Any, tensors: dict[str, Sequence[torch.Tensor]], expert: int, input_PH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert on its tokens: (hidden neurons (P, I), output (P, H)), through the module's own gate function."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    projected = _project(experts, tensors, name, expert, input_PH)
    hidden_PI = apply_gate(experts, projected) if experts.has_gate else experts.act_fn(projected)
    output_PH = _project(experts, tensors, "down_proj", expert, hidden_PI)
    if getattr(experts, "has_post_expert_norm", False):
        output_PH = experts.post_expert_norm(output_PH)
    return hidden_PI, output_PH


def _project(
    experts: Any, tensors: dict[str, Sequence[torch.Tensor]], name: str, expert: int, input_PX: torch.Tensor
) -> torch.Tensor:
    weight = tensors[name][expert]
    bias = tensors[f"{name}_bias"][expert] if experts.has_bias else None
    if experts.is_transposed:
        output = input_PX @ weight
        return output if bias is None else output + bias
    return nn.functional.linear(input_PX, weight, bias)


def accumulator(hidden_TH: torch.Tensor) -> torch.Tensor:
    """(T, H) zeros to sum a token's experts in."""
    return torch.zeros_like(hidden_TH, dtype=torch.promote_types(hidden_TH.dtype, torch.float32))


def wide(output_PH: torch.Tensor) -> torch.Tensor:
    """In float32 or better."""
    return output_PH.to(torch.promote_types(output_PH.dtype, torch.float32))
