"""The structured sparse part of W ~ U V + S: whole rows (output neurons) of what the low rank leaves over.

After LoSparse (arXiv 2306.11222), which MC-SMoE (arXiv 2310.01334) applies to merged experts. Rows are chosen once by
their energy on calibration inputs, or while training by a moving average of |S grad S|.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), M kept rows, P tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from optimum_moe.algorithms.factors import MatrixFactors

BETA = 0.85
"""Share of the past in the moving average of the importance."""


def row_energy(
    residual_OX: torch.Tensor,
    input_gram_XX: torch.Tensor | None = None,
    input_rows_PX: torch.Tensor | None = None,
    output_gram_OO: torch.Tensor | None = None,
    ridge: float = 0.0,
) -> torch.Tensor:
    """Squared output of each row of S on the calibration inputs: diag(S (A + ridge) S^T), A = sum x x^T.

    Args:
        residual_OX: (O, X) W - U V, any float dtype.
        input_gram_XX: (X, X) A; without it and the next the identity, so that the energy is the squared norm.
        input_rows_PX: (P, X) the inputs in place of their Gram.
        output_gram_OO: (O, O) sum of g g^T over loss gradients at the output; its diagonal turns a row's energy into
            the loss that dropping this row alone would cost.
        ridge: what the whitening of U and V added to the diagonal of A. Where they reproduce all tokens (no more than
            their rank) the rows differ by rounding alone without it.

    Returns:
        (O,) float64.

    Raises:
        ValueError: If the Gram and the inputs are both given, or a value is NaN or infinite.
    """
    if input_gram_XX is not None and input_rows_PX is not None:
        raise ValueError("Both the inputs and their Gram are given: one of them weighs. Pass one.")
    wide_OX = residual_OX.detach().double()
    if input_rows_PX is not None:
        energy_O = (wide_OX @ input_rows_PX.to(wide_OX).T).square().sum(1)
    elif input_gram_XX is not None:
        energy_O = ((wide_OX @ input_gram_XX.to(wide_OX)) * wide_OX).sum(1)
    else:
        energy_O = wide_OX.square().sum(1)
    if ridge:
        energy_O = energy_O + ridge * wide_OX.square().sum(1)
    if output_gram_OO is not None:
        energy_O = energy_O * output_gram_OO.diagonal().to(energy_O)
    if not bool(energy_O.isfinite().all()):
        bad = int((~energy_O.isfinite()).sum())
        raise ValueError(
            f"The energy of {bad} of {len(energy_O)} rows is not finite. Check the matrix and the calibration data."
        )
    return energy_O


def rows_from_density(num_outputs: int, density: float) -> int:
    """Number of rows that a density keeps, rounded to the nearest.

    Args:
        num_outputs: rows O of the matrix.
        density: in (0, 1].

    Raises:
        ValueError: If the density is outside (0, 1] or keeps no row.
    """
    if not 0 <= density <= 1 or round(density * num_outputs) == 0:
        raise ValueError(
            f"density={density} of {num_outputs} rows keeps {max(0, round(density * num_outputs))}: it must be in "
            f"(0, 1] and keep at least one. Use {1 / num_outputs:.2g} or more, or None for no sparse part."
        )
    return round(density * num_outputs)


def add_rows(matrix_OX: torch.Tensor, factors: MatrixFactors, energy_O: torch.Tensor, num_rows: int) -> MatrixFactors:
    """Complete low-rank factors by the rows of W - U V with the highest energy; of equal ones the first.

    Args:
        matrix_OX: (O, X) W.
        factors: U and V of it, without a sparse part.
        energy_O: (O,) see `row_energy`.
        num_rows: rows M to keep, in 0..O; all of them reproduce W.

    Raises:
        ValueError: If the factors have a sparse part already, or the number is out of range.
    """
    if factors.num_rows:
        raise ValueError(
            "Sparse rows complete a matrix with a low rank and no rows yet. Pass what `Spectrum.truncated` gives."
        )
    if not 0 <= num_rows <= len(matrix_OX):
        raise ValueError(f"num_rows={num_rows} must be in 0..{len(matrix_OX)}, the rows of the matrix.")
    index_M = energy_O.sort(descending=True, stable=True).indices[:num_rows].sort().values.to(matrix_OX.device)
    rows_MX = residual(matrix_OX, factors).index_select(0, index_M)
    return replace(factors, row_index_M=index_M, rows_MX=rows_MX)


def residual(matrix_OX: torch.Tensor, factors: MatrixFactors) -> torch.Tensor:
    """(O, X) W - U V in the dtype of W, subtracted in float32 or better."""
    wide = torch.promote_types(matrix_OX.dtype, torch.float32)
    left_OX = matrix_OX.detach().to(wide) - factors.u_RO.to(wide).T @ factors.v_RX.to(wide)
    return left_OX.to(matrix_OX.dtype)


@dataclass(frozen=True)
class CubicSchedule:
    """Remaining ratio of S over the training steps (LoSparse, arXiv 2306.11222).

    Args:
        total_steps: steps of the training.
        warmup_steps: unit of the next two.
        initial_warmups: warm-ups in the beginning during which nothing is masked.
        final_warmups: warm-ups at the end during which the ratio stays at its final value.
        initial_ratio: ratio in the beginning, default 1.0.
        final_ratio: ratio at the end, the paper's 0.10 by default.

    Raises:
        ValueError: If the ratios do not fall within (0, 1], or the warm-ups leave no step between them.
    """

    total_steps: int
    warmup_steps: int
    initial_warmups: int = 1
    final_warmups: int = 4
    initial_ratio: float = 1.0
    final_ratio: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.final_ratio <= self.initial_ratio <= 1:
            raise ValueError(
                f"The remaining ratio falls from {self.initial_ratio} to {self.final_ratio}: both must be in (0, 1], "
                "and the final one not above the initial one. A density that keeps nothing leaves no sparse part."
            )
        if min(self.warmup_steps, self.initial_warmups, self.final_warmups) < 0 or self._falling_steps < 1:
            raise ValueError(
                f"Of total_steps={self.total_steps} the warm-ups ({self.initial_warmups} + {self.final_warmups}) x "
                f"warmup_steps={self.warmup_steps} leave {self._falling_steps} steps to prune in. "
                "Train for more steps or take fewer for the warm-ups."
            )

    @property
    def _falling_steps(self) -> int:
        return self.total_steps - (self.initial_warmups + self.final_warmups) * self.warmup_steps

    def at(self, step: int) -> tuple[float, bool]:
        """The remaining ratio after a step, counted from 0, and whether rows are masked."""
        begin = self.initial_warmups * self.warmup_steps
        if step <= begin:
            return self.initial_ratio, False
        if step > self.total_steps - self.final_warmups * self.warmup_steps:
            return self.final_ratio, True
        left = 1 - (step - begin) / self._falling_steps
        return self.final_ratio + (self.initial_ratio - self.final_ratio) * left**3, True


@dataclass(frozen=True, eq=False)
class RowImportance:
    """Moving average of |S grad S|, averaged per row, which lags one step as in LoSparse.

    The mean over a row commutes with the moving average, so one number a row is kept and not one a weight.

    Args:
        average: (..., M) float32, what rows are ranked by.
        latest: (..., M) float32, what enters the average at the next step.
    """

    average: torch.Tensor
    latest: torch.Tensor

    @classmethod
    def start(cls, rows: torch.Tensor) -> RowImportance:
        """Zeros for the rows (..., M, X) of one parameter."""
        zeros = torch.zeros(rows.shape[:-1], dtype=torch.float32, device=rows.device)
        return cls(zeros, zeros)

    def advanced(self, rows: torch.Tensor, gradient: torch.Tensor | None, beta: float = BETA) -> RowImportance:
        """The importance after a step.

        Args:
            rows: (..., M, X) rows of S after the step.
            gradient: (..., M, X) their gradient in it, None where none reached them (an expert without tokens).
            beta: share of the past.
        """
        average = beta * self.average + (1 - beta) * self.latest
        if gradient is None:
            return RowImportance(average, torch.zeros_like(self.latest))
        return RowImportance(average, (rows.detach().float() * gradient.float()).abs().mean(-1))


def global_masks(
    importances: Sequence[torch.Tensor], widths: Sequence[int], ratio: float, absent: int = 0
) -> tuple[list[torch.Tensor], float]:
    """Which rows of all matrices stay, by one threshold: the importance below which a share of all numbers lies.

    Rows strictly below the threshold go. So the rows that stay hold at least `ratio` of the numbers, and less without
    the row of the lowest importance among them. Of equal rows the last ones go first, so that a tie cannot keep more.

    Args:
        importances: (..., M) for each matrix or stack of matrices.
        widths: numbers X of a row, for each of them.
        ratio: share of all numbers that remains, in (0, 1].
        absent: numbers that are not stored any more and count as gone.

    Returns:
        (..., M) bool for each, True where a row stays; and the threshold, -inf where all stay.
    """
    flat = torch.cat([importance.detach().flatten().float().cpu() for importance in importances])
    width = torch.cat(
        [torch.full((importance.numel(),), size) for importance, size in zip(importances, widths, strict=True)]
    )
    gone = int((int(width.sum()) + absent) * (1 - ratio)) - absent
    # Sorting the reverse descending and reading it backwards leaves equal rows with the last one first.
    order = flat.sort(descending=True, stable=True).indices.flip(0)
    dropped = order[width[order].cumsum(0) < gone]
    stays = torch.ones(len(flat), dtype=torch.bool)
    stays[dropped] = False
    masks = [
        part.view(importance.shape).to(importance.device)
        for part, importance in zip(stays.split([i.numel() for i in importances]), importances, strict=True)
    ]
    return masks, float(flat[order[len(dropped)]]) if gone > 0 else float("-inf")
