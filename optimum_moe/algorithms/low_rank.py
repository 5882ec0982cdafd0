"""Low-rank factors of a matrix that lose the least on calibration tokens: plain or whitened truncated SVD.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), D = min(O, X), R rank, P tokens, S the shorter
and T the longer side of a matrix.

With A = sum x x^T of the inputs and B = sum g g^T of the loss gradients at the output (both regularized by their
ridge), a change dW costs tr(B dW A dW^T) = |B^1/2 dW A^1/2|^2, which a truncated SVD of B^1/2 W A^1/2 makes smallest
(SVD-LLM, arXiv 2403.07378, on the input side; Kronecker-factored curvature on both). Three facts make it cheap:

- any M with M M^T = B serves as well as the symmetric root, and A is needed in M^T W A W^T M only. One symmetric
  eigenproblem on the shorter side (here the output) gives the singular values and the left vectors U.
- W' = M^-T U_R U_R^T M^T W. Nothing is ever divided by A, the longer side's Gram: few tokens do no harm.
- all ranks share the decomposition; truncating is slicing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from optimum_moe.algorithms.factors import MatrixFactors
from optimum_moe.algorithms.neurons import gram, is_finite
from optimum_moe.algorithms.ranks import check_rank
from optimum_moe.memory_errors import ran_out

SVD_DAMPING = 1e-4
"""Default ridge of a whitened SVD as a share of a Gram's mean diagonal."""

# Columns of a Gram that are widened at a time.
_CHUNK = 1024
# Share of the mean diagonal that makes a singular Gram positive definite in float64, and the largest one tried.
_FIRST_RIDGE, _LAST_RIDGE = 1e-10, 1e-2

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """All ranks of one matrix: W at rank R is `left_OD[:, :R] @ right_DX[:R]`.

    Args:
        left_OD: (O, D) left factor of the full rank, columns of the norm of the rows of `right_DX`.
        right_DX: (D, X) right factor.
        singular_values: (D,) float64 descending, of the whitened matrix; squared they are damage.
        input_ridge: lambda that was added to the diagonal of the input Gram.
        output_ridge: the same of the output Gram.
        dtype: of the matrix, and of the factors that `truncated` gives.
    """

    left_OD: torch.Tensor
    right_DX: torch.Tensor
    singular_values: torch.Tensor
    input_ridge: float
    output_ridge: float
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(O, X)."""
        return int(self.left_OD.shape[0]), int(self.right_DX.shape[1])

    def truncated(self, rank: int) -> MatrixFactors:
        """The best factors of a rank, in memory of their own and the dtype of the matrix.

        Raises:
            ValueError: If the rank is negative or above min(O, X).
        """
        check_rank(self.shape, rank, lowest=0)
        u_RO, v_RX = self.left_OD[:, :rank].T, self.right_DX[:rank]
        return MatrixFactors(
            u_RO=torch.empty_like(u_RO, dtype=self.dtype, memory_format=torch.contiguous_format).copy_(u_RO),
            v_RX=torch.empty_like(v_RX, dtype=self.dtype, memory_format=torch.contiguous_format).copy_(v_RX),
        )

    def dropped_energy(self, rank: int) -> float:
        """Sum of the squares of the singular values beyond a rank.

        Without an output Gram it equals the squared output error on the calibration tokens plus
        `input_ridge` |dW|^2; with one, tr((B + output_ridge) dW (A + input_ridge) dW^T).
        """
        return float(self.singular_values[rank:].square().sum())


def decompose(
    matrix_OX: torch.Tensor,
    *,
    input_gram_XX: torch.Tensor | None = None,
    input_rows_PX: torch.Tensor | None = None,
    product_PO: torch.Tensor | None = None,
    output_gram_OO: torch.Tensor | None = None,
    damping: float = SVD_DAMPING,
    rank: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Spectrum:
    """Decompose a matrix once, to be truncated at any rank.

    Computed on the matrix's device; where that runs out of memory, on the CPU. A Gram of zeros (no token)
    counts as the identity for the factors, while all singular values are 0: nothing is known to be lost.

    Args:
        matrix_OX: (O, X) any float dtype.
        input_gram_XX: (X, X) sum of x x^T over (weighted) calibration inputs; without it and the next the SVD is plain.
        input_rows_PX: (P, X) the (weighted) inputs themselves in place of their Gram, smaller while P < X.
        product_PO: (P, O) their products with the matrix, where they are known: they save a matrix product if O <= X.
        output_gram_OO: (O, O) sum of g g^T over loss gradients at the output, the whitening of the other side.
        damping: ridge of each Gram as a share of its mean diagonal, default 1e-4. A Gram that is singular in spite of
            it gets the smallest ridge that mends it.
        rank: Largest rank that is wanted of the factors, default all.
        dtype: Of the matrix products, default float64. In float32 singular values below 1e-3 of the largest are
            rounding errors, which suits factors that are refitted and whose damage is measured. The eigenproblem and
            the roots of Grams are float64 always.

    Raises:
        ValueError: If shapes do not fit, a value is NaN or infinite, or a Gram has negative eigenvalues.
        MemoryError: If memory ran out on the CPU too.
    """
    _check(matrix_OX, input_gram_XX, input_rows_PX, output_gram_OO, damping)
    tokens = 0 if input_rows_PX is None else len(input_rows_PX)
    if product_PO is not None and product_PO.shape != (tokens, len(matrix_OX)):
        raise ValueError(
            f"product_PO has shape {tuple(product_PO.shape)}, but {tokens} inputs and {len(matrix_OX)} outputs are "
            "given. Pass the products of input_rows_PX with the matrix."
        )

    def run(device: torch.device) -> Spectrum:
        sides = _Sides.of(matrix_OX, input_gram_XX, input_rows_PX, product_PO, output_gram_OO, damping, device, dtype)
        # In float64 always: an eigenproblem in float32 cost the factors of high ranks up to 0.4% of their damage.
        values_S, vectors_SS = torch.linalg.eigh(sides.normal_SS().double())
        singular_S = sides.scaled_roots(values_S).flip(0)
        left_SD, right_DT = sides.factors(vectors_SS.flip(1)[:, :rank].to(dtype))
        left_OD, right_DX = (right_DT.T, left_SD.T) if sides.transposed else (left_SD, right_DT)
        storage = torch.promote_types(matrix_OX.dtype, torch.float32)
        home = matrix_OX.device
        return Spectrum(
            left_OD.to(home, storage),
            right_DX.to(home, storage),
            singular_S.to(home),
            *((sides.short.ridge, sides.long.ridge) if sides.transposed else (sides.long.ridge, sides.short.ridge)),
            matrix_OX.dtype,
        )

    return _with_fallback(run, matrix_OX)


def singular_values(
    matrix_OX: torch.Tensor,
    *,
    input_gram_XX: torch.Tensor | None = None,
    input_rows_PX: torch.Tensor | None = None,
    output_gram_OO: torch.Tensor | None = None,
    damping: float = SVD_DAMPING,
) -> torch.Tensor:
    """(D,) `decompose(...).singular_values` alone, in half the time and with nothing else to keep."""
    _check(matrix_OX, input_gram_XX, input_rows_PX, output_gram_OO, damping)

    def run(device: torch.device) -> torch.Tensor:
        sides = _Sides.of(matrix_OX, input_gram_XX, input_rows_PX, None, output_gram_OO, damping, device, torch.float64)
        return sides.scaled_roots(torch.linalg.eigvalsh(sides.normal_SS())).flip(0).to(matrix_OX.device)

    return _with_fallback(run, matrix_OX)


def stable_rank(matrix_OX: torch.Tensor) -> float:
    """|W|_F^2 / |W|_2^2, which merging lowers (MC-SMoE, arXiv 2310.01334); 0 for a matrix of zeros."""
    squared_D = singular_values(matrix_OX).square()
    return float(squared_D.sum() / squared_D[0]) if bool(squared_D[0] > 0) else 0.0


def estimated_stable_rank(matrix_OX: torch.Tensor, vectors: int = 8, rounds: int = 30) -> float:
    """`stable_rank` without an eigenproblem of the matrix's size: an upper bound, close but for flat spectra.

    Args:
        matrix_OX: (O, X) any float dtype.
        vectors: of the subspace that is iterated towards the largest singular values.
        rounds: of the iteration; what separates the first singular value from the ninth is raised to twice as many.
    """
    wide_OX = matrix_OX.detach().float()
    generator = torch.Generator().manual_seed(0)
    basis_XV = torch.randn(wide_OX.shape[1], min(vectors, *wide_OX.shape), generator=generator).to(wide_OX.device)
    for _ in range(rounds):
        basis_XV = torch.linalg.qr(wide_OX.T @ (wide_OX @ basis_XV)).Q
    largest = float(torch.linalg.matrix_norm(wide_OX @ basis_XV, 2))
    return float(wide_OX.double().square().sum()) / largest**2 if largest > 0 else 0.0


@dataclass(frozen=True, eq=False)
class _Metric:
    """A Gram plus ridge, as the Gram, the rows that it is the Gram of, or neither (identity). `scale` 0: no tokens."""

    gram: torch.Tensor | None
    rows: torch.Tensor | None
    ridge: float
    scale: float

    @classmethod
    def of(cls, gram: torch.Tensor | None, rows: torch.Tensor | None, damping: float) -> _Metric:
        if gram is not None:
            mean = float(gram.diagonal().double().mean())
        elif rows is not None:
            mean = float(rows.double().square().sum() / rows.shape[1])
        else:
            return cls(None, None, 0.0, 1.0)
        if mean == 0:
            return cls(None, None, 0.0, 0.0)
        return cls(gram, rows, damping * mean, 1.0)

    def sandwich(self, matrix_ST: torch.Tensor, product_PS: torch.Tensor | None) -> torch.Tensor:
        """(S, S) W (G + ridge) W^T of a matrix whose columns the metric belongs to, with its product with the rows."""
        if self.gram is None and self.rows is None:
            return gram(matrix_ST.T)
        total_SS = gram(matrix_ST.T).mul_(self.ridge)
        if self.rows is not None:
            seen_PS = self.rows.to(matrix_ST) @ matrix_ST.T if product_PS is None else product_PS.to(matrix_ST)
            return total_SS.add_(gram(seen_PS))
        assert self.gram is not None
        for start in range(0, matrix_ST.shape[1], _CHUNK):
            columns = slice(start, start + _CHUNK)
            total_SS.addmm_(matrix_ST @ self.gram[:, columns].to(matrix_ST), matrix_ST[:, columns].T)
        return total_SS

    def factor(self, like: torch.Tensor) -> tuple[_Metric, torch.Tensor | None]:
        """The metric with the ridge that it took, and lower triangular M, M M^T = G + ridge (None: identity)."""
        if self.gram is None and self.rows is None:
            return self, None
        if self.rows is not None:
            rows_PS = self.rows.to(like)
            ridge = max(self.ridge, _FIRST_RIDGE * float(rows_PS.square().sum()) / rows_PS.shape[1])
            eye_SS = torch.eye(rows_PS.shape[1], dtype=like.dtype, device=like.device)
            upper_SS = torch.linalg.qr(torch.cat([rows_PS, ridge**0.5 * eye_SS]), mode="r").R
            return _Metric(None, self.rows, ridge, self.scale), upper_SS.T
        assert self.gram is not None
        gram_SS = self.gram.to(like.device, torch.float64)
        mean, ridge = float(gram_SS.diagonal().mean()), self.ridge
        while True:
            damped_SS = gram_SS.clone()
            damped_SS.diagonal().add_(ridge)
            lower_SS, failed = torch.linalg.cholesky_ex(damped_SS)
            if not bool(failed):
                return _Metric(self.gram, None, ridge, self.scale), lower_SS.to(like)
            ridge = max(10 * ridge, _FIRST_RIDGE * mean)
            if ridge > max(_LAST_RIDGE, 10 * self.ridge / mean) * mean:
                raise ValueError(
                    f"A Gram of size {len(gram_SS)} (mean diagonal {mean:.3g}) has negative eigenvalues beyond "
                    "rounding: it is no sum of x x^T. Accumulate it in float32 or better."
                )


@dataclass(frozen=True, eq=False)
class _Sides:
    """A matrix with its shorter side first, the metric of each side and M of the shorter one's."""

    matrix_ST: torch.Tensor
    short: _Metric
    long: _Metric
    root_SS: torch.Tensor | None
    transposed: bool
    product_PS: torch.Tensor | None

    @classmethod
    def of(
        cls,
        matrix_OX: torch.Tensor,
        input_gram_XX: torch.Tensor | None,
        input_rows_PX: torch.Tensor | None,
        product_PO: torch.Tensor | None,
        output_gram_OO: torch.Tensor | None,
        damping: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> _Sides:
        matrix_OX = matrix_OX.detach().to(device, dtype)
        transposed = matrix_OX.shape[0] > matrix_OX.shape[1]
        product_PO = None if transposed else product_PO
        if (
            input_rows_PX is not None
            and product_PO is None
            and _is_larger(input_rows_PX, matrix_OX.shape[0], transposed)
        ):
            wide_PX = input_rows_PX.to(device, dtype)
            input_gram_XX, input_rows_PX = wide_PX.T @ wide_PX, None
        inputs = _Metric.of(input_gram_XX, input_rows_PX, damping)
        outputs = _Metric.of(output_gram_OO, None, damping)
        short, long = (inputs, outputs) if transposed else (outputs, inputs)
        short, root_SS = short.factor(matrix_OX)
        return cls(matrix_OX.T if transposed else matrix_OX, short, long, root_SS, transposed, product_PO)

    def normal_SS(self) -> torch.Tensor:
        """(S, S) the matrix whose eigenvalues are the squared singular values."""
        inner_SS = self.long.sandwich(self.matrix_ST, self.product_PS)
        return inner_SS if self.root_SS is None else self.root_SS.T @ inner_SS @ self.root_SS

    def scaled_roots(self, eigenvalues_S: torch.Tensor) -> torch.Tensor:
        """Singular values: zero where a side has seen no tokens."""
        return eigenvalues_S.clamp(min=0).sqrt() * (self.short.scale * self.long.scale)

    def factors(self, vectors_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, D), (D, T) factors of the full rank, balanced: equal norms lose the least when they are rounded."""
        if self.root_SS is None:
            left_SD, right_DT = vectors_SD, vectors_SD.T @ self.matrix_ST
        else:
            left_SD = torch.linalg.solve_triangular(self.root_SS.T, vectors_SD, upper=True)
            right_DT = (self.root_SS @ vectors_SD).T @ self.matrix_ST
        left_D, right_D = left_SD.norm(dim=0), right_DT.norm(dim=1)
        scale_D = (right_D / left_D).sqrt()
        # A row of zeros stays one; its column is then zero as well.
        inverse_D = torch.where(scale_D > 0, scale_D.reciprocal(), torch.zeros_like(scale_D))
        return left_SD * scale_D, right_DT * inverse_D[:, None]


def _is_larger(rows_PX: torch.Tensor, outputs: int, shorter: bool) -> bool:
    """Whether inputs are more numbers than their Gram, or more multiplications where theirs is not the shorter side."""
    tokens, inputs = rows_PX.shape
    product = outputs * (outputs + inputs)
    return tokens >= inputs if shorter else tokens * product > tokens * inputs**2 + inputs * product


def _check(
    matrix_OX: torch.Tensor,
    input_gram_XX: torch.Tensor | None,
    input_rows_PX: torch.Tensor | None,
    output_gram_OO: torch.Tensor | None,
    damping: float,
) -> None:
    if matrix_OX.ndim != 2 or 0 in matrix_OX.shape:
        raise ValueError(f"A matrix (O, X) with at least one number is needed, got shape {tuple(matrix_OX.shape)}.")
    if input_gram_XX is not None and input_rows_PX is not None:
        raise ValueError("Both the inputs and their Gram are given: one of them whitens. Pass one.")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping={damping} must be 0 or more: a share of the mean diagonal. Use {SVD_DAMPING}.")
    rows, columns = matrix_OX.shape
    for name, value, shape in (
        ("matrix_OX", matrix_OX, (rows, columns)),
        ("input_gram_XX", input_gram_XX, (columns, columns)),
        ("input_rows_PX", input_rows_PX, (-1, columns)),
        ("output_gram_OO", output_gram_OO, (rows, rows)),
    ):
        if value is None:
            continue
        if value.ndim != 2 or value.shape[1] != shape[1] or shape[0] not in (-1, value.shape[0]):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but a matrix of shape {(rows, columns)} asks for "
                f"{tuple('P' if size == -1 else size for size in shape)}. Pass the statistics of this matrix."
            )
        if not is_finite(value):
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"{name} holds NaN or infinity ({bad} of {value.numel()} values). "
                "Check the checkpoint and the calibration data, and accumulate in float32 or better."
            )


def _with_fallback(run: Callable[[torch.device], _Result], matrix_OX: torch.Tensor) -> _Result:
    """Run on the matrix's device, and where memory runs out on the CPU."""
    try:
        return run(matrix_OX.device)
    except RuntimeError as error:
        if not ran_out(error):
            raise
    # Outside of the handler: the traceback would keep the failed attempt's tensors alive.
    try:
        return run(torch.device("cpu"))
    except RuntimeError as error:
        if not ran_out(error):
            raise
        rows, columns = matrix_OX.shape
        size, wide = min(rows, columns), max(rows, columns)
        gigabytes = 8 * (4 * size * size + 3 * size * wide) / 2**30
        raise MemoryError(
            f"The SVD of a {rows} x {columns} matrix needs about {gigabytes:.2g} GiB and memory ran out on "
            f"{matrix_OX.device} and on the CPU. Free memory, or compress with engine='streaming' and fewer threads."
        ) from error
