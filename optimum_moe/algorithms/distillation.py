"""Losses that train a student on its teacher's predictions: distillation of logits, of their top k, of hidden states.

Hinton et al. (arXiv:1503.02531), as MC-SMoE uses it (Li et al., arXiv:2310.01334). The hidden-state term is that of
patient distillation (arXiv:1908.09355) without its normalization.

Shape letters: T tokens (any number of leading axes), V vocabulary, K stored logits, H hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ALPHA = 0.2
"""Weight of the divergence beside the cross-entropy in MC-SMoE."""
TEMPERATURE = 2.0
"""Temperature of MC-SMoE."""
IGNORED = -100
"""Label of a position that does not count, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The largest logits of a teacher, and what all others add up to.

    The K + 1 outcomes "token i" for each of the top K and "any other token" have exactly the teacher's probabilities at
    the temperature that `rest` was computed at.

    Args:
        logits_TK: the K largest logits, in any order.
        tokens_TK: their tokens, integers.
        rest_T: logsumexp of all other logits over the temperature; -inf if K = V.
        temperature: that temperature.
    """

    logits_TK: Tensor
    tokens_TK: Tensor
    rest_T: Tensor
    temperature: float = 1.0


def top_logits(logits_TV: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """The K largest logits of each position, in float32; K is at most V."""
    wide_TV = logits_TV.float()
    values_TK, tokens_TK = wide_TV.topk(min(k, wide_TV.shape[-1]), dim=-1)
    rest_TV = (wide_TV / temperature).scatter(-1, tokens_TK, -torch.inf)
    return TopLogits(values_TK, tokens_TK, rest_TV.logsumexp(-1), temperature)


def kl_divergence(teacher_TV: Tensor, student_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """(T,) KL(teacher || student) in nats of the distributions at a temperature, in float32.

    Args:
        teacher_TV: logits; -inf where the teacher excludes a token, which then adds nothing.
        student_TV: logits.
        temperature: both are divided by it first.
    """
    log_p_TV = (teacher_TV.float() / temperature).log_softmax(-1)
    log_q_TV = (student_TV.float() / temperature).log_softmax(-1)
    # 0 * (-inf) must count as 0, in the gradient too.
    return _divergence(log_p_TV, log_q_TV)


def top_kl_divergence(teacher: TopLogits, student_TV: Tensor) -> Tensor:
    """(T,) KL(teacher || student) in nats of the K + 1 outcomes that `TopLogits` describes, in float32.

    It never exceeds the divergence of the whole vocabulary, and is equal to it if K = V.
    """
    scaled_TK = teacher.logits_TK.float() / teacher.temperature
    rest_T1 = teacher.rest_T.float().unsqueeze(-1)
    log_p_TK = torch.cat([scaled_TK, rest_T1], -1).log_softmax(-1)
    tokens_TK = teacher.tokens_TK.long()
    log_q_TV = (student_TV.float() / teacher.temperature).log_softmax(-1)
    log_q_TK = log_q_TV.gather(-1, tokens_TK)
    if tokens_TK.shape[-1] == student_TV.shape[-1]:
        return _divergence(log_p_TK[..., :-1], log_q_TK)
    other_T1 = log_q_TV.scatter(-1, tokens_TK, -torch.inf).logsumexp(-1, keepdim=True)
    return _divergence(log_p_TK, torch.cat([log_q_TK, other_T1], -1))


def _divergence(log_p_TX: Tensor, log_q_TX: Tensor) -> Tensor:
    excluded_TX = log_p_TX == -torch.inf
    difference_TX = log_p_TX.masked_fill(excluded_TX, 0) - log_q_TX.masked_fill(excluded_TX, 0)
    return (log_p_TX.exp() * difference_TX).sum(-1)


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of the labels that are not `IGNORED`; 0 if all of them are."""
    total = functional.cross_entropy(
        logits_TV.float().flatten(0, -2), labels_T.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels_T != IGNORED).sum().clamp(min=1)


def mean_over(values_T: Tensor, counts_T: Tensor) -> Tensor:
    """Mean of the values where `counts_T` is True; 0 where it never is."""
    return values_T.masked_fill(~counts_T, 0).sum() / counts_T.sum().clamp(min=1)


def hidden_state_loss(teacher_LTH: Sequence[Tensor], student_LTH: Sequence[Tensor], counts_T: Tensor) -> Tensor:
    """Mean squared difference of hidden states over layers, positions that count and channels.

    Raises:
        ValueError: If the numbers of layers or their widths differ.
    """
    shapes = [[tuple(state.shape) for state in states] for states in (teacher_LTH, student_LTH)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The teacher has {len(shapes[0])} hidden states of shape {shapes[0][-1:]} and the student "
            f"{len(shapes[1])} of {shapes[1][-1:]}, so they cannot be compared. Pass hidden_weight=0."
        )
    layers = [
        mean_over((a.float() - b.float()).square().mean(-1), counts_T)
        for a, b in zip(teacher_LTH, student_LTH, strict=True)
    ]
    return torch.stack(layers).mean()


def distillation_loss(
    divergence_T: Tensor,
    counts_T: Tensor,
    task: Tensor | None = None,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    scale_by_temperature: bool = True,
) -> Tensor:
    """task + alpha T^2 KL, the divergence as its mean over the positions that count.

    T^2 keeps the size of the divergence's gradient when T changes (arXiv:1503.02531, section 2); the public code of
    MC-SMoE leaves it out, and sums over the tokens of a sequence.

    Args:
        divergence_T: KL of each position, at this temperature.
        counts_T: bool, False for padding and other positions that do not count.
        task: the loss on labels, None for the divergence alone.
        alpha: weight of the divergence.
        temperature: T.
        scale_by_temperature: False for the paper's form without T^2.
    """
    scale = temperature**2 if scale_by_temperature else 1.0
    distilled = alpha * scale * mean_over(divergence_T, counts_T)
    return distilled if task is None else task + distilled
