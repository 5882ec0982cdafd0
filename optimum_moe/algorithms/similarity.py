"""Similarity between experts, mapped to [0, 1].

Shape letters: E experts, D features.
"""

from __future__ import annotations

import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens, routed_output, single_expert
from optimum_moe.algorithms.experts import ExpertTensors


def gram_similarity(gram_EE: torch.Tensor) -> torch.Tensor:
    """Similarity of experts from the uncentered Gram matrix of their signals.

    With `gram_EE = sum_t l_t l_t^T` over router logits l_t this is the router-logit similarity of M-SMoE
    ("Merge, Then Compress", arXiv 2310.01334): (cosine + 1) / 2 between logit columns over the calibration tokens.

    Args:
        gram_EE: (E, E) symmetric Gram matrix, any float dtype.

    Returns:
        (E, E) float64 in [0, 1] with ones on the diagonal. An expert whose signal is zero has cosine 0 to the others.

    Raises:
        ValueError: if the matrix is not square or holds NaN or infinity.
    """
    if gram_EE.ndim != 2 or gram_EE.shape[0] != gram_EE.shape[1]:
        raise ValueError(f"A Gram matrix is square, got shape {tuple(gram_EE.shape)}. Pass sum_t l_t l_t^T, (E, E).")
    gram_EE = gram_EE.double()
    if not bool(gram_EE.isfinite().all()):
        raise ValueError("The Gram matrix holds NaN or infinity. Check the calibration data and the model's dtype.")
    norm_E = gram_EE.diagonal().clamp_min(0).sqrt()
    # Dividing one side at a time cannot underflow where the product of two tiny norms would.
    inverse_E = torch.where(norm_E > 0, norm_E.reciprocal(), torch.zeros_like(norm_E))
    cosine_EE = (gram_EE * inverse_E[:, None] * inverse_E).clamp(-1, 1)
    cosine_EE.fill_diagonal_(1)
    return (cosine_EE + 1) / 2


def vector_similarity(vectors_ED: torch.Tensor) -> torch.Tensor:
    """Similarity of experts from one vector each: router rows, mean outputs (HC-SMoE), flattened weights.

    Args:
        vectors_ED: (E, D), any float dtype.

    Returns:
        (E, E) float64, (cosine + 1) / 2, as `gram_similarity`.

    Raises:
        ValueError: if the input is not a matrix or holds NaN or infinity.
    """
    if vectors_ED.ndim != 2:
        raise ValueError(f"Expected one vector for each expert, got shape {tuple(vectors_ED.shape)}. Pass (E, D).")
    vectors_ED = vectors_ED.double()
    return gram_similarity(vectors_ED @ vectors_ED.T)


def distance_similarity(vectors_ED: torch.Tensor) -> torch.Tensor:
    """(E, E) float64 minus the Euclidean distance of each two experts' vectors, as HC-SMoE compares mean outputs.

    Args:
        vectors_ED: (E, D), any float dtype.
    """
    vectors_ED = vectors_ED.double()
    return -torch.cdist(vectors_ED, vectors_ED, compute_mode="donot_use_mm_for_euclid_dist")


def pair_correlation(one_EE: torch.Tensor, other_EE: torch.Tensor) -> float:
    """Pearson correlation of two similarities over all pairs of different experts.

    Args:
        one_EE: (E, E) symmetric similarities, as `other_EE`.
        other_EE: See there.

    Returns:
        A number in [-1, 1]; NaN for fewer than two pairs, or where all pairs are equally similar.
    """
    pairs = torch.ones_like(one_EE, dtype=torch.bool).triu(1)
    one_P, other_P = (values[pairs].double() - values[pairs].double().mean() for values in (one_EE, other_EE))
    return float((one_P @ other_P) / (one_P.norm() * other_P.norm()))


@torch.no_grad()
def mean_outputs(experts: ExpertTensors, sample: SampledTokens) -> torch.Tensor:
    """(E, H) float64 mean output of every expert over all sampled tokens, whether or not they were routed to it.

    Args:
        experts: the block's routed experts.
        sample: the block's sampled tokens; their routing weights do not count.
    """
    input_SH = sample.input_SH.float()
    found = []
    for e in range(experts.num_experts):
        single = single_expert(experts, e)
        # The mean over tokens goes through down, which is linear.
        hidden_I = single.activated(single.preactivations(input_SH)).mean(0, dtype=torch.float64)
        bias = 0.0 if experts.down_bias is None else experts.down_bias[e].double()
        found.append(single.down_HI.double() @ hidden_I + bias)
    return torch.stack(found).cpu()


@torch.no_grad()
def mean_gated_outputs(experts: ExpertTensors, sample: SampledTokens) -> torch.Tensor:
    """(E, H) float64 mean over all sampled tokens of what every expert adds to the block's output.

    An expert adds nothing to tokens that are not routed to it.

    Args:
        experts: the block's routed experts.
        sample: the block's sampled tokens.

    Raises:
        ValueError: if something outside of the expert takes part in its output, or it has no gate function.
    """
    found = []
    for e in range(experts.num_experts):
        token_P, slot_P = ((sample.index_SK == e) & (sample.weights_SK != 0)).nonzero(as_tuple=True)
        output_PH = routed_output(experts, e, sample.input_SH, token_P, sample.weights_SK[token_P, slot_P])
        found.append(output_PH.sum(0, dtype=torch.float64) / max(len(sample.input_SH), 1))
    return torch.stack(found).cpu()
