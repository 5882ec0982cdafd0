"""Held-out perplexity over windows that do not overlap.

Shape letters: B windows, S tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def predicted_positions(input_ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Which of positions 0..S-2 predict a real next token, (B, S-1) bool."""
    if mask_BS is None:
        return torch.ones_like(input_ids_BS[:, 1:], dtype=torch.bool)
    return (mask_BS[:, 1:] != 0) & (mask_BS[:, :-1] != 0)


def window_nll(logits_BSV: Tensor, input_ids_BS: Tensor, predicted_BS: Tensor) -> Tensor:
    """Sum over each window's predicted tokens of their negative log-likelihood in nats, (B,) float64 on the CPU.

    Args:
        logits_BSV: logits of all S positions, any float dtype; the softmax is taken in float32.
        input_ids_BS: the tokens; position s is predicted from the logits at s - 1.
        predicted_BS: (B, S-1), from `predicted_positions`.
    """
    sums = []
    # Row by row: a float32 copy of a whole batch's logits can be larger than the model.
    for logits_SV, ids_S, predicted_S in zip(logits_BSV, input_ids_BS, predicted_BS, strict=True):
        log_p_SV = logits_SV[:-1].float().log_softmax(-1)
        nll_S = -log_p_SV.gather(-1, ids_S[1:, None].to(log_p_SV.device))[:, 0].double()
        sums.append(nll_S[predicted_S.to(nll_S.device)].sum().cpu())
    return torch.stack(sums)
