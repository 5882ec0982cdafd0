"""A low-rank affine map in the place of an expert: c + U V x, fitted to its outputs in closed form ("tilted novice").

The idea is that of arXiv:2610.41366: the form, and that it is a ridge regression over the expert's tokens. How it is
fitted was derived here: centered ridge regression, with the strength that generalized cross-validation picks (Golub,
Heath and Wahba 1979), and the best map of a rank under it (reduced-rank regression, Izenman 1975), which keeps the
leading singular directions of the fitted outputs, with the ridge as further rows.

Shape letters: P tokens of the expert, H hidden, R rank, D directions of the inputs (the smaller of P and H).
"""

from __future__ import annotations

import torch

from optimum_moe.algorithms.leading import leading_rows
from optimum_moe.algorithms.neurons import gram

# Strengths that are tried, as shares of the mean square of the centered inputs along their directions.
_RIDGES = tuple(10.0**power for power in range(-3, 4))


class AffineFit:
    """Fits of affine maps of any rank to the outputs of one expert.

    Args:
        input_PH: (P, H) inputs, of at least one token.
        output_PH: (P, H) outputs for them.
        rank: The largest rank that is wanted.
        weight_P: (P,) nonnegative weights of the squared errors; default 1 for all.
    """

    def __init__(
        self, input_PH: torch.Tensor, output_PH: torch.Tensor, rank: int, weight_P: torch.Tensor | None = None
    ) -> None:
        weight_P = torch.ones(len(input_PH), device=input_PH.device) if weight_P is None else weight_P
        total = float(weight_P.double().sum())
        share_P = weight_P.double() / total if total > 0 else torch.full_like(weight_P.double(), 1 / len(weight_P))
        self.input_H, self.output_H = share_P @ input_PH.double(), share_P @ output_PH.double()
        root_P1 = share_P.sqrt()[:, None]
        dtype = torch.promote_types(input_PH.dtype, torch.float32)
        rows_PH = ((input_PH - self.input_H) * root_P1).to(dtype)
        target_PH = ((output_PH - self.output_H) * root_P1).to(dtype)
        # By the smaller of the two Grams: x = q s w^T, of which the squares are the eigenvalues of either.
        is_wide = len(rows_PH) <= rows_PH.shape[1]
        # In float64: the errors of products in float32 reach the map where the ridge is small.
        square_D, vector = torch.linalg.eigh(gram((rows_PH.T if is_wide else rows_PH).double()))
        square_D, vector = square_D.clamp(min=0), vector.to(dtype)
        if is_wide:
            # The mean took one direction; next to small ridges its rounding would look like a part of a freedom.
            square_D[0] = 0.0
        # s w^T and q^T y, up to the same orthogonal factor.
        rows_DH = vector.T @ rows_PH if is_wide else (square_D.sqrt()[:, None] * vector.T).to(dtype)
        inverse_D = square_D.clamp(min=1e-300).rsqrt().where(square_D > torch.finfo(dtype).eps * square_D.max(), 0.0)
        along_DH = vector.T @ target_PH if is_wide else inverse_D.to(dtype)[:, None] * (rows_PH @ vector).T @ target_PH
        along_D = along_DH.double().square().sum(1)
        # As many directions as tokens leave nothing beside them, of which a difference would keep the rounding.
        beside = 0.0 if is_wide else max(float(target_PH.double().square().sum() - along_D.sum()), 0.0)
        self.ridge = _cross_validated(square_D, along_D, beside, len(rows_PH))
        damped_D = square_D + self.ridge
        fitted_DH = (square_D / damped_D.clamp(min=1e-300)).sqrt().to(dtype)[:, None] * along_DH
        self.left_RH = torch.nn.functional.pad(found := leading_rows(fitted_DH, rank), (0, 0, 0, rank - len(found)))
        """(R, H) U^T of the largest rank, in the dtype of the inputs; zeros follow fewer directions than that."""
        solved_DR = along_DH @ self.left_RH.T / damped_D.clamp(min=1e-300).to(dtype)[:, None]
        self.right_RH = solved_DR.T @ rows_DH
        """(R, H) V of the largest rank, likewise."""

    def at(self, rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """c (H,), U (R, H) and V (R, H) of the map c + U^T V x.

        Args:
            rank: R, at most that of the fit.
            dtype: Of the result; c makes up at the mean input for what the rounding of U and V changes.
        """
        left_RH, right_RH = self.left_RH[:rank].to(dtype), self.right_RH[:rank].to(dtype)
        bias_H = self.output_H - (right_RH.double() @ self.input_H) @ left_RH.double()
        return bias_H.to(dtype), left_RH, right_RH


def _cross_validated(square_D: torch.Tensor, along_D: torch.Tensor, beside: float, tokens: int) -> float:
    """The ridge with the least error by generalized cross-validation; the mean takes one degree of freedom.

    Args:
        square_D: Squares of the inputs along their directions.
        along_D: Squares of the targets along them.
        beside: Squares of the targets beside all of them.
        tokens: Number of tokens.
    """
    scale = float(square_D.mean())
    if scale == 0.0:
        return 1.0
    error, ridge = float("inf"), scale
    for share in _RIDGES:
        kept_D = square_D / (square_D + share * scale)
        left = beside + float(((1 - kept_D).square() * along_D).sum())
        freedom = max(tokens - 1 - float(kept_D.sum()), 1e-9)
        if left / freedom**2 < error:
            error, ridge = left / freedom**2, share * scale
    return ridge
