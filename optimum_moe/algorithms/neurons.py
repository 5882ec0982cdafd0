"""Which neurons of an expert can go, when the others take over what they can of their output.

Shape letters: P tokens, H hidden, I intermediate, N kept neurons, S size of what neurons are mapped to (H or I).

With A = sum q h h^T of the hidden activations and B the metric of the expert's output, a change dW of the down
projection costs tr(B dW A dW^T). Dropping the neurons outside of a set S and refitting the columns that remain,
W_S = W A_:S A_SS^-1, costs tr(M (A - A_:S A_SS^-1 A_S:)) with M = W^T B W: the output appears in M alone, so a whole
elimination needs two I x I matrices (optimal brain surgeon on columns that are removed whole).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

DAMPING = 1e-3
"""Default ridge as a share of a Gram's mean diagonal."""

# Neurons that go between two updates of the matrices.
_BLOCK = 32
# Matrices shrink when one in so many of their neurons is gone.
_COMPACTED = 3
# Columns of a Gram that are computed at a time: what lies above the diagonal is not computed again below it.
_COLUMNS = 256
# The least ridge, as a share of the mean diagonal, of a Gram that is not positive definite with the one asked for.
_FIRST_RIDGE = 1e-10


def is_finite(value: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite: the sum tells at a third of the cost, but when it overflows."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def gram(rows_PI: torch.Tensor) -> torch.Tensor:
    """(I, I) R^T R, exactly symmetric, at little more than half the multiplications of the product."""
    inner = rows_PI.shape[1]
    gram_II = rows_PI.new_empty(inner, inner)
    for start in range(0, inner, _COLUMNS):
        stop = min(start + _COLUMNS, inner)
        block_IC = rows_PI[:, start:].T @ rows_PI[:, start:stop]
        gram_II[start:, start:stop] = block_IC
        gram_II[start:stop, stop:] = block_IC[stop - start :].T
        # Not every processor's matrix product sums both halves of a symmetric result in the same order.
        corner_CC = block_IC[: stop - start].tril()
        gram_II[start:stop, start:stop] = corner_CC + corner_CC.tril(-1).T
    return gram_II


def times_triangular(rows_PI: torch.Tensor, factor_II: torch.Tensor, upper: bool) -> torch.Tensor:
    """(P, I) R T of a triangular matrix T, at little more than half the multiplications of the product."""
    product_PI = rows_PI.new_empty(rows_PI.shape)
    for start in range(0, len(factor_II), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        used = slice(0, columns.stop) if upper else slice(start, None)
        product_PI[:, columns] = rows_PI[:, used] @ factor_II[used, columns]
    return product_PI


def principal_submatrix(gram_II: torch.Tensor, kept_N: torch.Tensor) -> torch.Tensor:
    """(N, N) some rows and the same columns, in their order."""
    return gram_II.index_select(0, kept_N).index_select(1, kept_N)


def damped(gram_II: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """(I, I) float64 the Gram plus its ridge, `damping` times the mean diagonal; a Gram of zeros gives the identity.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    gram_II = gram_II.double()
    if not is_finite(gram_II):
        raise ValueError(
            "A Gram holds NaN or infinity. Check the checkpoint and the calibration data, and accumulate in float32 or "
            "better."
        )
    mean = float(gram_II.diagonal().mean()) if len(gram_II) else 0.0
    if mean <= 0.0:
        return torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    ridged_II = gram_II.clone()
    ridged_II.diagonal().add_(damping * mean)
    return ridged_II


@dataclass(frozen=True, eq=False)
class Elimination:
    """What `elimination` found.

    Args:
        order_D: (D,) int64 the neurons in the order in which they go.
        damage_K: (D + 1,) float64 the damage when the first k are gone.
        root_DI: (D, I) float64 R, the root in this order of the inverse of the Gram and its ridge: R^T R if all go.
    """

    order_D: torch.Tensor
    damage_K: torch.Tensor
    root_DI: torch.Tensor


def elimination(
    gram_II: torch.Tensor, effect_II: torch.Tensor, damping: float = DAMPING, drop: int | None = None
) -> Elimination:
    """Drop neurons one by one, each time the one whose loss costs the least after the others are refitted.

    Costs of the order of I^3 for all of them. Ties go to the lower index.

    Args:
        gram_II: (I, I) A, sum of h h^T over (weighted) hidden activations.
        effect_II: (I, I) M = W^T B W.
        damping: ridge as a share of A's mean diagonal.
        drop: D, how many neurons go, default all.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if not bool(effect_II.isfinite().all()):
        raise ValueError("effect_II holds NaN or infinity. Check the down projection and the loss gradients.")
    # One neuron after the other is a matter of short vectors, for which NumPy is the fastest, also beside a GPU.
    inverse_II = torch.cholesky_inverse(root(gram_II, damping)).cpu()
    effect_II = effect_II.double().to("cpu", copy=True)
    name_I = torch.arange(len(gram_II))
    gone_I = torch.zeros_like(name_I, dtype=torch.bool)
    drop = len(gram_II) if drop is None else drop
    orders: list[torch.Tensor] = []
    costs: list[float] = []
    root_DI = inverse_II.new_zeros(drop, len(gram_II))
    for start in range(0, drop, _BLOCK):
        neuron_C, cost_C, root_CI = _drop(inverse_II, effect_II, gone_I, min(_BLOCK, drop - start))
        orders.append(name_I[neuron_C])
        costs += cost_C
        root_DI[start : start + len(root_CI)].index_copy_(1, name_I, root_CI)
        if int(gone_I.sum()) * _COMPACTED >= len(gone_I):
            # What is gone need not be brought up to date any more.
            left_N = gone_I.logical_not().nonzero().flatten()
            inverse_II, effect_II = principal_submatrix(inverse_II, left_N), principal_submatrix(effect_II, left_N)
            name_I, gone_I = name_I[left_N], gone_I[left_N]
    damage_K = torch.tensor([0.0, *costs], dtype=torch.float64).cumsum(0)
    return Elimination(torch.cat([name_I[:0], *orders]), damage_K, root_DI)


def _drop(
    inverse_II: torch.Tensor, effect_II: torch.Tensor, gone_I: torch.Tensor, count: int
) -> tuple[list[int], list[float], torch.Tensor]:
    """Drop `count` neurons; both matrices are brought up to date once, by matrix products, and not at every neuron.

    Dropping j changes the columns by T = 1 - e_j a^T with a = V_j / V_jj, V the inverse: V loses p p^T with
    p = V_j / V_jj^1/2, and M loses a b^T + b a^T with b = M_j - M_jj a / 2.

    Returns:
        Their numbers, which are marked in `gone_I`, what each of them costs, and the p of each.
    """
    shares_CI, halves_CI, roots_CI = (inverse_II.new_zeros(count, len(inverse_II)) for _ in range(3))
    inverse, effect, gone = inverse_II.numpy(), effect_II.numpy(), gone_I.numpy()
    shares, halves, roots = shares_CI.numpy(), halves_CI.numpy(), roots_CI.numpy()
    inverse_I, effect_I = inverse.diagonal().copy(), effect.diagonal().copy()
    order: list[int] = []
    costs: list[float] = []
    for step in range(count):
        score_I = np.divide(np.maximum(effect_I, 0.0), inverse_I, out=np.full_like(effect_I, np.inf), where=~gone)
        neuron = int(score_I.argmin())
        order.append(neuron)
        costs.append(float(score_I[neuron]))
        gone[neuron] = True
        row_I = inverse[neuron] - roots[:step, neuron] @ roots[:step]
        effect_row_I = effect[neuron] - shares[:step, neuron] @ halves[:step] - halves[:step, neuron] @ shares[:step]
        shares[step] = row_I / row_I[neuron]
        roots[step] = row_I / row_I[neuron] ** 0.5
        halves[step] = effect_row_I - 0.5 * effect_row_I[neuron] * shares[step]
        inverse_I -= roots[step] ** 2
        effect_I -= 2 * shares[step] * halves[step]
    inverse_II.addmm_(roots_CI.T, roots_CI, alpha=-1)
    effect_II.addmm_(shares_CI.T, halves_CI, alpha=-1).addmm_(halves_CI.T, shares_CI, alpha=-1)
    return order, costs, roots_CI


def root(gram_II: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """(I, I) float64 lower triangular L with L L^T the Gram plus its ridge.

    A Gram that rounding leaves negative in spite of its ridge gets a larger one.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    while True:
        lower_II, failed = torch.linalg.cholesky_ex(damped(gram_II, damping))
        if not bool(failed):
            return lower_II
        damping = max(10 * damping, _FIRST_RIDGE)


def taken_over(lower_II: torch.Tensor, neurons: int) -> torch.Tensor:
    """(I - N, N) float64 how the first N neurons give all others, to do what all of them did.

    One root serves all numbers of neurons: its first rows and columns are the root of their Gram.

    Args:
        lower_II: `root` of the Gram, the neurons in the order in which they stay.
        neurons: N.
    """
    kept_NN, lower_DN = lower_II[:neurons, :neurons], lower_II[neurons:, :neurons]
    return torch.linalg.solve_triangular(kept_NN, lower_DN, upper=False, left=False)


def refitted(
    cross_SN: torch.Tensor, gram_NN: torch.Tensor, prior_SN: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """(S, N) what changed hidden activations are mapped to, to come nearest to a target, in the dtype of `cross_SN`.

    Minimizes sum_P |W h - y|^2 + ridge |W - prior|^2; no metric of the output changes the answer (MergeMoE's refit).

    Args:
        cross_SN: (H, N) sum of y h^T over (weighted) tokens.
        gram_NN: (N, N) sum of h h^T; its root is taken in float64.
        prior_SN: (H, N) what it falls back to where the tokens say nothing.
        damping: as in `elimination`.
    """
    prior_SN = prior_SN.to(cross_SN)
    residual_SN = torch.addmm(cross_SN, prior_SN, gram_NN.to(cross_SN), alpha=-1)
    return prior_SN + torch.cholesky_solve(residual_SN.T, root(gram_NN, damping).to(cross_SN)).T
