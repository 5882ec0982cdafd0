"""What is minimized: the divergence from the teacher, with or without cross-entropy and hidden states.

Shape letters: B rows, S tokens, V vocabulary, L layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optimum_moe.algorithms.distillation import (
    IGNORED,
    TopLogits,
    cross_entropy,
    distillation_loss,
    hidden_state_loss,
    kl_divergence,
    mean_over,
    top_kl_divergence,
)
from optimum_moe.evaluation.perplexity import predicted_positions
from optimum_moe.recovery_settings import check_loss


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a teacher says of a batch.

    Args:
        logits: of all positions (B, S, V), or the largest of them.
        hidden: hidden states of its layers, where the objective compares them.
    """

    logits: Tensor | TopLogits
    hidden: tuple[Tensor, ...] = ()


Inputs: TypeAlias = Mapping[str, Any]
"""One batch of model inputs, with or without labels."""
LABELS = "labels"
"""Key of the labels of a batch."""


@dataclass(frozen=True)
class Objective:
    """The loss of a recovery: task_weight CE + alpha T^2 KL(teacher || student) + hidden_weight MSE.

    Args:
        alpha: weight of the divergence from the teacher.
        temperature: T, at which the distributions are compared.
        task_weight: weight of the cross-entropy of the text.
        hidden_weight: weight of the squared difference of the hidden states, 0 for none.

    Raises:
        ValueError: If a weight is negative, all are 0, or the temperature is not positive.
    """

    alpha: float = 1.0
    temperature: float = 1.0
    task_weight: float = 0.0
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        check_loss(self.alpha, self.temperature, self.task_weight, self.hidden_weight)

    def loss(self, output: Any, teacher: Prediction, inputs: Inputs) -> Tensor:
        """The loss of a batch, a scalar."""
        targets_BS = targets(inputs)
        counts_BS = targets_BS != IGNORED
        task = None
        if self.task_weight:
            task = self.task_weight * cross_entropy(output.logits, targets_BS)
        divergence_BS = divergence(teacher, output.logits, self.temperature)
        total = distillation_loss(divergence_BS, counts_BS, task, self.alpha, self.temperature)
        if self.hidden_weight:
            total = total + self.hidden_weight * hidden_state_loss(teacher.hidden, hidden_states(output), counts_BS)
        return total


def divergence(teacher: Prediction, logits_BSV: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, S) KL(teacher || student) at each position."""
    if isinstance(teacher.logits, TopLogits):
        return top_kl_divergence(teacher.logits, logits_BSV)
    return kl_divergence(teacher.logits, logits_BSV, temperature)


def mean_divergence(teacher: Prediction, logits_BSV: Tensor, inputs: Inputs) -> tuple[float, int]:
    """Sum of KL(teacher || student) in nats over the positions of a batch that count, and their number."""
    counts_BS = targets(inputs) != IGNORED
    number = int(counts_BS.sum())
    return float(mean_over(divergence(teacher, logits_BSV), counts_BS)) * number, number


def model_inputs(inputs: Inputs) -> dict[str, Any]:
    """What a model is given of a batch: all but the labels, with which it would compute a loss of its own."""
    return {name: value for name, value in inputs.items() if name != LABELS}


def targets(inputs: Inputs) -> Tensor:
    """(B, S) the token that each position has to predict, `IGNORED` where none counts.

    With labels these count alone: a decoder's stand where they are predicted, other models' one position later, as in
    the models of transformers. Without labels every next token of the text does.
    """
    labels_BS = inputs.get(LABELS)
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    if labels_BS is not None:
        return labels_BS if prefix else _shifted_left(labels_BS)
    ids_BS = inputs[f"{prefix}input_ids"]
    counts_BS = predicted_positions(ids_BS, inputs.get(f"{prefix}attention_mask"))
    next_BS = _shifted_left(ids_BS)
    next_BS[:, :-1].masked_fill_(~counts_BS, IGNORED)
    return next_BS


def _shifted_left(ids_BS: Tensor) -> Tensor:
    return torch.cat([ids_BS[:, 1:], torch.full_like(ids_BS[:, :1], IGNORED)], 1)


def hidden_states(output: Any) -> tuple[Tensor, ...]:
    """The hidden states of the layers that give the logits."""
    found = getattr(output, "decoder_hidden_states", None)
    return tuple(output.hidden_states if found is None else found)
