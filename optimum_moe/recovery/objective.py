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
"""One batch of model inputs."""


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
        weights = {name: getattr(self, name) for name in ("alpha", "task_weight", "hidden_weight")}
        wrong = {name: value for name, value in weights.items() if not 0 <= value < float("inf")}
        if wrong or not any(weights.values()):
            said = ", ".join(f"{name}={value}" for name, value in (wrong or weights).items())
            raise ValueError(f"{said}: weights of a loss are at least 0, and one of them is more. Use alpha=1.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be positive. Use 1, or 2 as MC-SMoE does.")

    def loss(self, output: Any, teacher: Prediction, inputs: Inputs) -> Tensor:
        """The loss of a batch, a scalar."""
        counts_BS = counted(inputs)
        task = None
        if self.task_weight:
            task = self.task_weight * cross_entropy(output.logits[:, :-1], labels(inputs, counts_BS))
        divergence_BS = divergence(teacher, output.logits, self.temperature)
        total = distillation_loss(divergence_BS, counts_BS, task, self.alpha, self.temperature)
        if self.hidden_weight:
            cut = [tuple(state[:, :-1] for state in states) for states in (teacher.hidden, hidden_states(output))]
            total = total + self.hidden_weight * hidden_state_loss(cut[0], cut[1], counts_BS)
        return total


def divergence(teacher: Prediction, logits_BSV: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, S - 1) KL(teacher || student) at each position that has a next one."""
    student = logits_BSV[:, :-1]
    if isinstance(teacher.logits, TopLogits):
        return top_kl_divergence(teacher.logits, student)
    return kl_divergence(teacher.logits[:, :-1], student, temperature)


def mean_divergence(teacher: Prediction, logits_BSV: Tensor, inputs: Inputs) -> tuple[float, int]:
    """Sum of KL(teacher || student) in nats over the positions of a batch that count, and their number."""
    counts_BS = counted(inputs)
    number = int(counts_BS.sum())
    return float(mean_over(divergence(teacher, logits_BSV), counts_BS)) * number, number


def counted(inputs: Inputs) -> Tensor:
    """(B, S - 1) bool, the positions that predict a next token of the text and no padding."""
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    return predicted_positions(inputs[f"{prefix}input_ids"], inputs.get(f"{prefix}attention_mask"))


def labels(inputs: Inputs, counts_BS: Tensor) -> Tensor:
    """(B, S - 1) next tokens, `IGNORED` where none counts."""
    ids_BS = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"]
    return torch.where(counts_BS, ids_BS[:, 1:], IGNORED)


def hidden_states(output: Any) -> tuple[Tensor, ...]:
    """The hidden states of the layers that give the logits."""
    found = getattr(output, "decoder_hidden_states", None)
    return tuple(output.hidden_states if found is None else found)
