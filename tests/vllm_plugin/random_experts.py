"""Random experts in every format that the vLLM plugin runs, and what they give in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from optimum_moe.formats import JOINT, ExpertsSpec
from optimum_moe.vllm_plugin.activations import Activation
from optimum_moe.vllm_plugin.packed_experts import PackedExperts, Shard

HIDDEN = 40
SPECS = {
    "joint": ExpertsSpec(
        (24, 16, 0, 8, 24, 40), ("gate_up", "down"), {"low_rank": {"gate_up": (8, None, None, 3, 16, 0)}}
    ),
    "apart": ExpertsSpec(
        (24, 16, 24, 8, 24, 40),
        ("gate", "up", "down"),
        {
            "low_rank": {
                "gate": (8, None, None, 3, 16, 0),
                "up": (8, 4, None, 3, 16, 0),
                "down": (None, 5, 8, None, 8, 1),
            },
            "sparse_rows": {"gate": (0, 0, 0, 2, 0, 3), "up": (7, 0, 0, 0, 0, 0), "down": (0, 3, 0, 0, 0, 0)},
        },
    ),
    "narrow": ExpertsSpec((8, 40, 0, 16), ("gate", "up", "down")),
    "without a gate": ExpertsSpec((24, 16, 0, 8), ("up", "down"), {"low_rank": {"up": (8, None, None, 3)}}),
}

WHOLE = Shard()
Tensors = dict[tuple[int, str, str], torch.Tensor]


def random_tensors(packed: PackedExperts) -> Tensors:
    """What a checkpoint could hold of these experts."""
    found: Tensors = {}
    for expert, projection, tensor, shape, _ in packed.tensors():
        if tensor == "weight_row_index":
            rows = packed.spec.widths[expert] * (2 if projection == JOINT else 1)
            rows = HIDDEN if projection == "down" else rows
            found[expert, projection, tensor] = torch.randperm(rows)[: shape[0]].sort().values.int()
        else:
            found[expert, projection, tensor] = torch.randn(shape) * 0.3
    return found


def packed(
    spec: ExpertsSpec, activation: Activation, biases: tuple[str, ...] = (), shard: Shard = WHOLE
) -> PackedExperts:
    constants = [expert for expert, width in enumerate(spec.widths) if not width]
    return PackedExperts(spec, HIDDEN, biases, constants, activation, shard, torch.float32)


def load(experts: PackedExperts, tensors: Tensors) -> PackedExperts:
    taken = {(expert, projection, tensor): take for expert, projection, tensor, _, take in experts.tensors()}
    assert set(taken) == set(tensors)
    for key, tensor in tensors.items():
        taken[key](tensor)
    return experts


def routed(num_experts: int, tokens: int = 7, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, weights and experts."""
    index_TK = torch.rand(tokens, num_experts).argsort(-1)[:, :top_k]
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, top_k), index_TK


def expected(
    spec: ExpertsSpec,
    tensors: Tensors,
    activation: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor],
    input_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    index_TK: torch.Tensor,
) -> torch.Tensor:
    """(T, H) from the definitions of the formats, in float64."""
    output_TH = torch.zeros_like(input_TH, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(*map(torch.arange, index_TK.shape)).tolist():
        expert = int(index_TK[token, slot])
        own = {(p, t): value.double() for (e, p, t), value in tensors.items() if e == expert}
        x_H = input_TH[token].double()
        if not spec.widths[expert]:
            y_H = own.get(("approx_value", ""), own.get(("down", "bias"), torch.zeros(HIDDEN)))
        else:
            made = {p: _matrix(spec, own, p, expert) for p in spec.projections}
            biases = {p: own.get((p, "bias"), torch.zeros(len(made[p]))).double() for p in made}
            entering = [made[p] @ x_H + biases[p] for p in spec.projections[:-1]]
            if spec.is_joint:
                entering = list(entering[0].chunk(2))
            hidden_n = activation(entering[0] if len(entering) == 2 else None, entering[-1])
            y_H = made["down"] @ hidden_n + biases["down"]
        output_TH[token] += weights_TK[token, slot].double() * y_H
    return output_TH


def _matrix(spec: ExpertsSpec, own: dict[tuple[str, str], torch.Tensor], projection: str, expert: int) -> torch.Tensor:
    if (projection, "weight") in own:
        return own[projection, "weight"]
    width = spec.widths[expert]
    shape = (HIDDEN, width) if projection == "down" else (width * (2 if projection == JOINT else 1), HIDDEN)
    matrix_OX = torch.zeros(shape, dtype=torch.float64)
    if (projection, "weight_u") in own:
        matrix_OX = own[projection, "weight_u"].T @ own[projection, "weight_v"]
    if (projection, "weight_rows") in own:
        index_M = own[projection, "weight_row_index"].long()
        matrix_OX = matrix_OX.index_add(0, index_M, own[projection, "weight_rows"])
    return matrix_OX
