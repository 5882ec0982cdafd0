"""A multiple-choice task from held-out text: the model must find the true continuation among four.

It needs no dataset and no license beyond those of the text. Models with the same tokenizer get the same questions.

Shape letters: Q questions, C choices, L tokens of a row, T tokens of a choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe.evaluation.heldout import HeldOut
from optimum_moe.evaluation.models import logits_of

PROMPT_TOKENS = 64
CHOICE_TOKENS = 16
CHOICES = 4

_ATTEMPTS = 100


@dataclass(frozen=True)
class ChoiceQuestions:
    """Questions with appended choices of equal length, so that sums of log-probabilities are comparable.

    Args:
        rows: int64 (Q, C, L), prefix + prompt + choice.
        answer: int64 (Q,), index of the true continuation, shuffled.
        choice_tokens: T, tokens at the end of a row that are the choice.
    """

    rows: Tensor
    answer: Tensor
    choice_tokens: int = CHOICE_TOKENS


def make_questions(held_out: HeldOut, num_questions: int, seed: int) -> ChoiceQuestions:
    """Draw questions: a prompt of 64 tokens, its true continuation of 16, and three continuations from elsewhere.

    Wrong continuations come from other documents if there are any, else from parts of the same document that do not
    overlap the question.

    Raises:
        ValueError: the held-out text is too short, or too repetitive for four different choices.
    """
    length = PROMPT_TOKENS + CHOICE_TOKENS
    rng = random.Random(seed)
    rows, answers = [], []
    for index, start in held_out.spans(length, num_questions, seed, "The multiple-choice task"):
        document = held_out.documents[index]
        prompt = document[start : start + PROMPT_TOKENS]
        true = document[start + PROMPT_TOKENS : start + length]
        choices = [true]
        for _ in range(_ATTEMPTS):
            wrong = _elsewhere(held_out.documents, index, start, rng)
            if wrong is not None and wrong not in choices:
                choices.append(wrong)
            if len(choices) == CHOICES:
                break
        else:
            raise ValueError(
                f"No {CHOICES} different continuations of {CHOICE_TOKENS} tokens in the held-out text of "
                f"{sum(map(len, held_out.documents))} tokens. Pass more text, or tasks=... without 'choice'."
            )
        rng.shuffle(choices)
        answers.append(choices.index(true))
        rows.append([[*held_out.prefix, *prompt, *choice] for choice in choices])
    return ChoiceQuestions(torch.tensor(rows), torch.tensor(answers))


def score_questions(model: PreTrainedModel, questions: ChoiceQuestions, picked_at_once: slice | None = None) -> Tensor:
    """Whether the model gives the true continuation the highest summed log-probability, (Q,) bool on the CPU.

    Args:
        model: a causal language model.
        questions: the questions; those of `picked_at_once` (default: all) go through one forward pass.
        picked_at_once: a slice of questions.
    """
    chosen = picked_at_once or slice(None)
    rows_QCL, answer_Q = questions.rows[chosen], questions.answer[chosen]
    ids_BL = rows_QCL.flatten(0, 1)
    tokens = questions.choice_tokens
    # The logits one position before each choice token predict it.
    logits_BTV = logits_of(model, ids_BL, None, last=tokens + 1)[:, :-1]
    targets_BT = ids_BL[:, -tokens:].to(logits_BTV.device)
    log_p_BT = logits_BTV.float().log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    score_QC = log_p_BT.double().sum(-1).view(rows_QCL.shape[:2]).cpu()
    return score_QC.argmax(-1) == answer_Q


def _elsewhere(
    documents: Sequence[tuple[int, ...]], index: int, start: int, rng: random.Random
) -> tuple[int, ...] | None:
    """A continuation from a random place of another document, or of the same one away from the question."""
    others = [other for other in range(len(documents)) if other != index and len(documents[other]) >= CHOICE_TOKENS]
    if others:
        document = documents[rng.choices(others, weights=[len(documents[other]) for other in others])[0]]
        at = rng.randrange(len(document) - CHOICE_TOKENS + 1)
        return document[at : at + CHOICE_TOKENS]
    document = documents[index]
    at = rng.randrange(len(document) - CHOICE_TOKENS + 1)
    if start - CHOICE_TOKENS < at < start + PROMPT_TOKENS + CHOICE_TOKENS:
        return None
    return document[at : at + CHOICE_TOKENS]
