"""Which neurons of an expert can go, when the others take over what they can of their output.

Shape letters: P tokens, H hidden, I intermediate, N kept neurons, S size of what neurons are mapped to (H or I).

With A = sum q h h^T of the hidden activations and B the metric of the expert's output, a change dW of the down
projection costs tr(B dW A dW^T). Dropping the neurons outside of a set S and refitting the columns that remain,
W_S = W A_:S A_SS^-1, costs tr(M (A - A_:S A_SS^-1 A_S:)) with M = W^T B W: the output appears in M alone, so a whole
elimination needs two I x I matrices (optimal brain surgeon on columns that are removed whole).
"""

from __future__ import annotations

import torch

DAMPING = 1e-3
"""Default ridge as a share of a Gram's mean diagonal."""

# Neurons that go between two updates of the matrices.
_BLOCK = 32


def damped(gram_II: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """(I, I) float64 the Gram plus its ridge, `damping` times the mean diagonal; a Gram of zeros gives the identity.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    gram_II = gram_II.double()
    if not bool(gram_II.isfinite().all()):
        raise ValueError(
            "A Gram holds NaN or infinity. Check the checkpoint and the calibration data, and accumulate in float32 or "
            "better."
        )
    mean = float(gram_II.diagonal().mean()) if len(gram_II) else 0.0
    if mean <= 0.0:
        return torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    return gram_II + damping * mean * torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)


def elimination(
    gram_II: torch.Tensor, effect_II: torch.Tensor, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop neurons one by one, each time the one whose loss costs the least after the others are refitted.

    Costs of the order of I^3 for all of them. Ties go to the lower index.

    Args:
        gram_II: (I, I) A, sum of h h^T over (weighted) hidden activations.
        effect_II: (I, I) M = W^T B W.
        damping: ridge as a share of A's mean diagonal.

    Returns:
        (I,) int64 the neurons in the order in which they go, and (I + 1,) float64 the damage when the first k are gone.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    inner = len(gram_II)
    if not bool(effect_II.isfinite().all()):
        raise ValueError("effect_II holds NaN or infinity. Check the down projection and the loss gradients.")
    inverse_II = torch.linalg.inv(damped(gram_II, damping))
    effect_II = effect_II.double().clone()
    gone_I = torch.zeros(inner, dtype=torch.bool, device=gram_II.device)
    order: list[int] = []
    damage = [0.0]
    for start in range(0, inner, _BLOCK):
        count = min(_BLOCK, inner - start)
        _drop(inverse_II, effect_II, gone_I, count, order, damage)
    return torch.tensor(order, dtype=torch.int64), torch.tensor(damage, dtype=torch.float64)


def _drop(
    inverse_II: torch.Tensor,
    effect_II: torch.Tensor,
    gone_I: torch.Tensor,
    count: int,
    order: list[int],
    damage: list[float],
) -> None:
    """Drop `count` neurons; both matrices are brought up to date once, by matrix products, and not at every neuron.

    Dropping j changes the columns by T = 1 - e_j a^T with a = V_j / V_jj, V the inverse: V loses p p^T with
    p = V_j / V_jj^1/2, and M loses a b^T + b a^T with b = M_j - M_jj a / 2.
    """
    shares_CI, halves_CI, roots_CI = (inverse_II.new_zeros(count, len(inverse_II)) for _ in range(3))
    inverse_I, effect_I = inverse_II.diagonal().clone(), effect_II.diagonal().clone()
    for step in range(count):
        score_I = (effect_I.clamp(min=0) / inverse_I).masked_fill(gone_I, torch.inf)
        neuron = int(score_I.argmin())
        order.append(neuron)
        damage.append(damage[-1] + float(score_I[neuron]))
        gone_I[neuron] = True
        done = slice(0, step)
        row_I = inverse_II[neuron] - roots_CI[done, neuron] @ roots_CI[done]
        effect_row_I = effect_II[neuron] - shares_CI[done, neuron] @ halves_CI[done]
        effect_row_I -= halves_CI[done, neuron] @ shares_CI[done]
        shares_CI[step] = row_I / row_I[neuron]
        roots_CI[step] = row_I / row_I[neuron].sqrt()
        halves_CI[step] = effect_row_I - 0.5 * effect_row_I[neuron] * shares_CI[step]
        inverse_I -= roots_CI[step].square()
        effect_I -= 2 * shares_CI[step] * halves_CI[step]
    inverse_II.addmm_(roots_CI.T, roots_CI, alpha=-1)
    effect_II.addmm_(shares_CI.T, halves_CI, alpha=-1).addmm_(halves_CI.T, shares_CI, alpha=-1)


def narrowed(
    target_SI: torch.Tensor | None, gram_II: torch.Tensor, kept_N: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """(S, N) float64 what the kept neurons are mapped to, to do what all of them did.

    Args:
        target_SI: (S, I) what all neurons are mapped to, any float dtype, such as the down projection; None for
            themselves (S = I): times the down projection, the result is the same.
        gram_II: (I, I) A of `elimination`.
        kept_N: (N,) int64.
        damping: as in `elimination`.
    """
    if len(kept_N) == len(gram_II):
        whole_SI = torch.eye(len(gram_II), device=gram_II.device) if target_SI is None else target_SI
        return whole_SI.double()[:, kept_N]
    ridged_II = damped(gram_II, damping)
    columns_IN = ridged_II[:, kept_N]
    target_SN = columns_IN if target_SI is None else target_SI.double() @ columns_IN
    return torch.linalg.solve(columns_IN[kept_N], target_SN, left=False)


def refitted(
    cross_SN: torch.Tensor, gram_NN: torch.Tensor, prior_SN: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """(S, N) float64 what changed hidden activations are mapped to, to come nearest to a target.

    Minimizes sum_P |W h - y|^2 + ridge |W - prior|^2; no metric of the output changes the answer (MergeMoE's refit).

    Args:
        cross_SN: (H, N) sum of y h^T over (weighted) tokens.
        gram_NN: (N, N) sum of h h^T.
        prior_SN: (H, N) what it falls back to where the tokens say nothing.
        damping: as in `elimination`.
    """
    prior_SN = prior_SN.double()
    residual_SN = cross_SN.double() - prior_SN @ gram_NN.double()
    return prior_SN + torch.linalg.solve(damped(gram_NN, damping), residual_SN, left=False)
