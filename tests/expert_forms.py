"""Forms of experts for tests: some that reproduce the expert, and a lossy mixture of all kinds."""

from __future__ import annotations

import torch

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.factors import BlockFactors, ExpertFactors, MatrixFactors


def full_rank(matrix_OX: torch.Tensor) -> MatrixFactors:
    """All singular triples."""
    u_OR, s_R, v_RX = torch.linalg.svd(matrix_OX.double(), full_matrices=False)
    return MatrixFactors(u_RO=(u_OR * s_R).T.to(matrix_OX.dtype), v_RX=v_RX.to(matrix_OX.dtype))


def low_rank(matrix_OX: torch.Tensor, rank: int, num_rows: int = 0) -> MatrixFactors:
    """The leading singular triples, and the first rows of what is left."""
    full = full_rank(matrix_OX)
    u_RO, v_RX = full.u_RO[:rank], full.v_RX[:rank]
    if not num_rows:
        return MatrixFactors(u_RO=u_RO, v_RX=v_RX)
    residual_OX = matrix_OX - u_RO.T @ v_RX
    return MatrixFactors(None, u_RO, v_RX, torch.arange(num_rows), residual_OX[:num_rows])


def dense(matrix_OX: torch.Tensor) -> MatrixFactors:
    return MatrixFactors(dense_OX=matrix_OX.clone())


def every_row(matrix_OX: torch.Tensor) -> MatrixFactors:
    """Rank 8 and a sparse part that keeps every row."""
    return low_rank(matrix_OX, 8, len(matrix_OX))


def form(view: ExpertTensors, expert: int, make, neurons: torch.Tensor | None = None) -> ExpertFactors:
    """One expert with every matrix made by `make`, of some of its neurons."""

    def kept(matrix: torch.Tensor, axis: int) -> torch.Tensor:
        return matrix if neurons is None else matrix.index_select(axis, neurons)

    gate = None if view.gate is None else make(kept(view.gate[expert].detach(), 0))
    up, down = make(kept(view.up[expert].detach(), 0)), make(kept(view.down[expert].detach(), 1))
    return ExpertFactors(up, down, gate, neurons)


def lossless(view: ExpertTensors) -> BlockFactors:
    """Dense, full rank, every sparse row, and all neurons by index, in turn."""
    every = torch.arange(view.intermediate_size)
    kinds = [(dense, None), (full_rank, None), (every_row, None), (dense, every)]
    return BlockFactors(tuple(form(view, e, *kinds[e % 4]) for e in range(view.num_experts)))


def mixture(view: ExpertTensors) -> BlockFactors:
    """Dense, two ranks, sparse rows, fewer neurons, fewer neurons of a low rank, and empty."""
    few = torch.arange(0, view.intermediate_size, 3)[:8]
    none = torch.arange(0)
    narrower = (dense, few), (lambda m: low_rank(m, 4), few), (dense, none)
    if view.fixed_neurons:
        narrower = (dense, None), (lambda m: low_rank(m, 4), None), (lambda m: low_rank(m, 0), None)
    kinds = [
        (dense, None),
        (lambda m: low_rank(m, 8), None),
        (lambda m: low_rank(m, 8), None),
        (lambda m: low_rank(m, 16), None),
        (lambda m: low_rank(m, 8, 4), None),
        *narrower,
    ]
    return BlockFactors(tuple(form(view, e, *kinds[e % 8]) for e in range(view.num_experts)))


def joined(view: ExpertTensors, expert: int, rank: int) -> ExpertFactors:
    """One expert whose gate and up share their right factor."""
    gate_IH, up_IH = view.gate[expert].detach(), view.up[expert].detach()
    both = low_rank(torch.cat([gate_IH, up_IH]), rank)
    left_gate, left_up = (part.contiguous() for part in both.u_RO.split(len(up_IH), dim=1))
    gate, up = MatrixFactors(u_RO=left_gate, v_RX=both.v_RX), MatrixFactors(u_RO=left_up, v_RX=both.v_RX)
    return ExpertFactors(up, dense(view.down[expert].detach()), gate)


def joint(view: ExpertTensors) -> BlockFactors:
    """What a byte budget gives: gate and up of one right factor, dense, narrower and empty."""
    few, none = torch.arange(0, view.intermediate_size, 3)[:8], torch.arange(0)
    made = [joined(view, e, (8, 16, 16)[e % 3]) for e in range(view.num_experts)]
    made[1], made[4], made[6] = form(view, 1, dense), form(view, 4, dense, few), form(view, 6, dense, none)
    return BlockFactors(tuple(made))
