"""Forms of experts for tests: some that reproduce the expert, and a lossy mixture of all kinds."""

from __future__ import annotations

import torch

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.factors import MatrixFactors
from optimum_moe.formats import StoredExpert, StoredExperts, StoredMatrix
from optimum_moe.formats.low_rank import low_rank_matrix
from optimum_moe.formats.sparse_rows import sparse_rows_part
from optimum_moe.formats.stored import stored_matrix


def factors_of(matrix_OX: torch.Tensor, rank: int | None = None) -> MatrixFactors:
    """The leading singular triples."""
    u_OR, s_R, v_RX = torch.linalg.svd(matrix_OX.double(), full_matrices=False)
    u_RO, v_RX = (u_OR * s_R).T.to(matrix_OX.dtype), v_RX.to(matrix_OX.dtype)
    return MatrixFactors(u_RO=u_RO[:rank], v_RX=v_RX[:rank])


def full_rank(matrix_OX: torch.Tensor) -> StoredMatrix:
    """All singular triples."""
    return low_rank_matrix(factors_of(matrix_OX))


def low_rank(matrix_OX: torch.Tensor, rank: int, num_rows: int = 0) -> StoredMatrix:
    """The leading singular triples, and the first rows of what is left."""
    factors = factors_of(matrix_OX, rank)
    if not num_rows:
        return low_rank_matrix(factors)
    residual_OX = matrix_OX - factors.densified()
    return low_rank_matrix(factors, sparse_rows_part(torch.arange(num_rows), residual_OX[:num_rows]))


def dense(matrix_OX: torch.Tensor) -> StoredMatrix:
    return stored_matrix(matrix_OX.clone())


def every_row(matrix_OX: torch.Tensor) -> StoredMatrix:
    """Rank 8 and a sparse part that keeps every row."""
    return low_rank(matrix_OX, 8, len(matrix_OX))


def form(view: ExpertTensors, expert: int, make, neurons: torch.Tensor | None = None) -> StoredExpert:
    """One expert with every matrix made by `make`, of some of its neurons."""

    def kept(matrix: torch.Tensor, axis: int) -> torch.Tensor:
        return matrix if neurons is None else matrix.index_select(axis, neurons)

    gate = None if view.gate is None else make(kept(view.gate[expert].detach(), 0))
    up, down = make(kept(view.up[expert].detach(), 0)), make(kept(view.down[expert].detach(), 1))
    return StoredExpert(up, down, gate, neurons)


def lossless(view: ExpertTensors) -> StoredExperts:
    """Dense, full rank, every sparse row, and all neurons by index, in turn."""
    every = torch.arange(view.intermediate_size)
    kinds = [(dense, None), (full_rank, None), (every_row, None), (dense, every)]
    return StoredExperts(tuple(form(view, e, *kinds[e % 4]) for e in range(view.num_experts)))


def mixture(view: ExpertTensors) -> StoredExperts:
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
    return StoredExperts(tuple(form(view, e, *kinds[e % 8]) for e in range(view.num_experts)))


def joined(view: ExpertTensors, expert: int, rank: int) -> StoredExpert:
    """One expert whose gate and up share their right factor."""
    gate_IH, up_IH = view.gate[expert].detach(), view.up[expert].detach()
    both = factors_of(torch.cat([gate_IH, up_IH]), rank)
    lefts = (part.contiguous() for part in both.u_RO.split(len(up_IH), dim=1))
    gate, up = (low_rank_matrix(MatrixFactors(u_RO=left_RO, v_RX=both.v_RX)) for left_RO in lefts)
    return StoredExpert(up, dense(view.down[expert].detach()), gate)


def joint(view: ExpertTensors) -> StoredExperts:
    """What a byte budget gives: gate and up of one right factor, dense, narrower and empty."""
    few, none = torch.arange(0, view.intermediate_size, 3)[:8], torch.arange(0)
    made = [joined(view, e, (8, 16, 16)[e % 3]) for e in range(view.num_experts)]
    made[1], made[4], made[6] = form(view, 1, dense), form(view, 4, dense, few), form(view, 6, dense, none)
    return StoredExperts(tuple(made))
