"""KL divergence and top-1 agreement of next-token distributions with the original model, on the same windows.

Shape letters: B windows, S tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_agreement(reference_BSV: Tensor, logits_BSV: Tensor, predicted_BS: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || model) and top-1 agreement, summed over each window's predicted positions.

    Args:
        reference_BSV: logits of the original model, all S positions.
        logits_BSV: logits of the compressed model.
        predicted_BS: (B, S-1) bool, positions to use, from `predicted_positions` as for the perplexity.

    Returns:
        KL sums in nats, (B,), and numbers of positions where both have the same most likely token, (B,); float64, CPU.

    Raises:
        ValueError: the vocabularies differ in size.
    """
    if reference_BSV.shape != logits_BSV.shape:
        raise ValueError(
            f"The reference has a vocabulary of {reference_BSV.shape[-1]} and the model one of {logits_BSV.shape[-1]}: "
            "their distributions cannot be compared. Pass the original of the compressed model."
        )
    divergences, agreements = [], []
    for reference_SV, logits_SV, predicted_S in zip(reference_BSV, logits_BSV, predicted_BS, strict=True):
        predicted_S = predicted_S.to(reference_SV.device)
        log_p_SV = reference_SV[:-1].float().log_softmax(-1)
        log_q_SV = logits_SV[:-1].to(reference_SV.device).float().log_softmax(-1)
        # Logits of -inf mask tokens in both models; 0 * (inf - inf) there must count as 0.
        terms_SV = (log_p_SV.exp() * (log_p_SV - log_q_SV)).masked_fill(log_p_SV == -torch.inf, 0.0)
        divergences.append(terms_SV.sum(-1).double()[predicted_S].sum().cpu())
        same_S = log_p_SV.argmax(-1) == log_q_SV.argmax(-1)
        agreements.append(same_S[predicted_S].sum().double().cpu())
    return torch.stack(divergences), torch.stack(agreements)
