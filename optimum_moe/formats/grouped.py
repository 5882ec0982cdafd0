"""Products of many experts in one grouped matmul."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn


def grouped_product(input_QX: torch.Tensor, matrices_CXO: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """(Q, O) product of every expert's tokens with its own matrix.

    Args:
        input_QX: (Q, X) tokens, by expert; taken in the dtype of the matrices.
        matrices_CXO: (C, X, O).
        counts: Tokens of each of the C experts.
    """
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=input_QX.device)
    return nn.functional.grouped_mm(input_QX.to(matrices_CXO.dtype), matrices_CXO, offs=ends)
