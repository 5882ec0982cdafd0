"""Matrices as whole numbers of few bits, with a scale for each group of weights beside each other in a row.

The numbers lie as in the `pack-quantized` layout of compressed-tensors: unsigned, the first one in the lowest bits of
an int32 word, each row in words of its own.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), G groups of a row, W words of a row, P tokens.
"""

from __future__ import annotations

import torch

# Shares of the largest number beyond which weights are cut off, so that all others are rounded finer.
_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_BLOCK = 128
_DAMPING = 0.01


def num_groups(columns: int, group: int) -> int:
    """Groups of a row; the last one may be shorter."""
    return -(-columns // group)


def group_scales(matrix_OX: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """(O, G) the scales of least squared rounding error among some, as a dtype can hold them.

    Args:
        matrix_OX: (O, X) in float32.
        bits: Of a number.
        group: Weights that have a scale in common.
        dtype: Of the scales.
    """
    groups = num_groups(matrix_OX.shape[1], group)
    padded = torch.nn.functional.pad(matrix_OX, (0, groups * group - matrix_OX.shape[1])).unflatten(1, (groups, group))
    top = 2 ** (bits - 1)
    largest_OG = padded.abs().amax(-1)
    best_OG, least_OG = largest_OG, torch.full_like(largest_OG, torch.inf)
    # The first two are exact for a matrix that is rounded already.
    for steps in (top - 1, top, *((top - 0.5) / cut for cut in _CUTS)):
        scale_OG = (largest_OG / steps).to(dtype).float().clamp(min=torch.finfo(dtype).tiny)
        rounded = _rounded(padded / scale_OG[..., None], bits) * scale_OG[..., None]
        error_OG = (rounded - padded).square().sum(-1)
        is_better = error_OG < least_OG
        best_OG, least_OG = torch.where(is_better, scale_OG, best_OG), torch.where(is_better, error_OG, least_OG)
    return best_OG.to(dtype)


def _rounded(value: torch.Tensor, bits: int) -> torch.Tensor:
    top = 2 ** (bits - 1)
    return value.round().clamp(-top, top - 1)


def nearest(matrix_OX: torch.Tensor, scale_OG: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """(O, X) whole numbers, each the nearest one."""
    return _rounded(matrix_OX.float() / by_column(scale_OG, matrix_OX.shape[1], group).float(), bits)


def fitted(
    matrix_OX: torch.Tensor, scale_OG: torch.Tensor, bits: int, group: int, gram_XX: torch.Tensor
) -> torch.Tensor:
    """(O, X) whole numbers that together give the outputs of the matrix on some inputs (GPTQ, arXiv:2210.17323).

    Column after column is rounded, and the columns that are left take over its error.

    Args:
        matrix_OX: (O, X).
        scale_OG: (O, G).
        bits: Of a number.
        group: Weights that have a scale in common.
        gram_XX: (X, X) of the inputs.
    """
    columns = matrix_OX.shape[1]
    gram_XX = gram_XX.double()
    mean = gram_XX.diagonal().mean()
    if not mean > 0:
        return nearest(matrix_OX, scale_OG, bits, group)
    # Columns of large inputs first: those that follow can take over what they lose.
    order_X = gram_XX.diagonal().argsort(descending=True, stable=True)
    damped = gram_XX[order_X][:, order_X] + _DAMPING * mean * torch.eye(
        columns, dtype=torch.float64, device=gram_XX.device
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper_XX = torch.linalg.cholesky(inverse, upper=True).float()
    left_OX = matrix_OX.float()[:, order_X].clone()
    scale_OX = by_column(scale_OG, columns, group).float()[:, order_X]
    number_OX = torch.empty_like(left_OX)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        error_OB = torch.empty_like(left_OX[:, start:stop])
        for column in range(start, stop):
            number_OX[:, column] = _rounded(left_OX[:, column] / scale_OX[:, column], bits)
            error_O = (left_OX[:, column] - number_OX[:, column] * scale_OX[:, column]) / upper_XX[column, column]
            left_OX[:, column:stop].addr_(error_O, upper_XX[column, column:stop], alpha=-1)
            error_OB[:, column - start] = error_O
        left_OX[:, stop:].addmm_(error_OB, upper_XX[start:stop, stop:], alpha=-1)
    found_OX = torch.empty_like(number_OX)
    found_OX[:, order_X] = number_OX
    return found_OX


def by_column(scale_OG: torch.Tensor, columns: int, group: int) -> torch.Tensor:
    """(O, X) the scale of each weight."""
    return scale_OG.repeat_interleave(group, dim=1)[:, :columns]


def packed(number_OX: torch.Tensor, bits: int) -> torch.Tensor:
    """(O, W) int32 words of (O, X) whole numbers; X is a multiple of the numbers of a word."""
    unsigned = (number_OX.long() + 2 ** (bits - 1)).unflatten(1, (-1, 32 // bits))
    word_OW = (unsigned << torch.arange(0, 32, bits, device=unsigned.device)).sum(-1)
    return torch.where(word_OW >= 2**31, word_OW - 2**32, word_OW).to(torch.int32)


def unpacked(word_OW: torch.Tensor, bits: int) -> torch.Tensor:
    """(O, X) int32 numbers of words."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=word_OW.device)
    number = (word_OW[..., None] >> shifts) & (2**bits - 1)
    return number.flatten(1) - 2 ** (bits - 1)
