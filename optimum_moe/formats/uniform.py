"""Every matrix of an expert as low rank + structured sparse, at sizes that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.low_rank import Spectrum, decompose
from optimum_moe.algorithms.structured_sparse import add_rows, residual, row_energy
from optimum_moe.formats.low_rank import low_rank_matrix
from optimum_moe.formats.shared_base import shared_base_part
from optimum_moe.formats.sparse_rows import sparse_rows_part
from optimum_moe.formats.stored import StoredExpert, StoredMatrix, stored_matrix

RankOf = Callable[[Spectrum], int | None]
"""The rank of a decomposed matrix, None to keep it dense."""


def factorize_expert(
    expert: Expert,
    tokens: ExpertTokens | None,
    rank_of: RankOf,
    density_rows: Callable[[int], int],
    base: tuple[int, Mapping[str, torch.Tensor]] | None = None,
    neurons: torch.Tensor | None = None,
) -> StoredExpert:
    """Factorize gate, up and down, whitened by what each of them sees on the expert's tokens.

    The error that is made smallest is sum_t g_t^2 |dW x_t|^2 with the routing weight g: the matrix's share in the
    block's output, but for what follows it.

    Args:
        expert: The expert.
        tokens: Its tokens; None for the plain SVD. An expert that no token reached gets the plain SVD too.
        rank_of: The rank of each matrix.
        density_rows: From the rows of a matrix to those that its sparse part keeps; the ones of the highest energy.
        base: Number of the expert's group, and by projection the (O, X) matrix that the group shares, so that only what
            is left over is factorized.
        neurons: (I,) order of the neurons here, where it is not the model's.

    Returns:
        The expert in float32.
    """
    stored: dict[str, StoredMatrix] = {}
    rows_PX, gram_XX = None, None
    matrices = {"gate": expert.gate_IH, "up": expert.up_IH, "down": expert.down_HI}
    for name, matrix_OX in matrices.items():
        if matrix_OX is None:
            continue
        added = []
        if base is not None:
            group, shared = base
            matrix_OX = matrix_OX - shared[name].to(matrix_OX.dtype)
            added = [shared_base_part(group, shared[name])]
        if name != "up" or not stored:
            rows_PX, gram_XX = _seen(expert, tokens, name)
        spectrum = decompose(matrix_OX, input_rows_PX=rows_PX, input_gram_XX=gram_XX)
        rank = rank_of(spectrum)
        if rank is None:
            stored[name] = stored_matrix(matrix_OX, *added)
            continue
        low_rank, num_rows = spectrum.truncated(rank), density_rows(len(matrix_OX))
        if num_rows:
            left_OX = residual(matrix_OX, low_rank)
            energy_O = row_energy(left_OX, gram_XX, rows_PX, ridge=spectrum.input_ridge)
            low_rank = add_rows(matrix_OX, low_rank, energy_O, num_rows)
            assert low_rank.row_index_M is not None
            assert low_rank.rows_MX is not None
            added = [sparse_rows_part(low_rank.row_index_M, low_rank.rows_MX), *added]
        stored[name] = low_rank_matrix(low_rank, *added)
    return StoredExpert(up=stored["up"], down=stored["down"], gate=stored.get("gate"), neurons=neurons)


def _seen(expert: Expert, tokens: ExpertTokens | None, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What whitens a projection: its inputs, or their Gram where that is smaller. Gate and up see the same."""
    rows_PX = None if tokens is None else weighted_inputs(expert, tokens, name)
    if rows_PX is None or len(rows_PX) < rows_PX.shape[1]:
        return rows_PX, None
    return None, rows_PX.T @ rows_PX


def weighted_inputs(expert: Expert, tokens: ExpertTokens, name: str) -> torch.Tensor | None:
    """(P, X) routing weight times input of a projection on the expert's tokens; None without any."""
    if len(tokens.input_PH) == 0:
        return None
    inputs_PX = expert.activated(expert.preactivations(tokens.input_PH)) if name == "down" else tokens.input_PH
    return inputs_PX * tokens.weight_P[:, None]
