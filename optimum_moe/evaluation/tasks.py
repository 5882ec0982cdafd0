"""The settings of an evaluation, and the run of its tasks over all models."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_moe.calibration.documents import did_you_mean
from optimum_moe.evaluation import choice, generation
from optimum_moe.evaluation.agreement import window_agreement
from optimum_moe.evaluation.heldout import HeldOut
from optimum_moe.evaluation.models import logits_of
from optimum_moe.evaluation.perplexity import predicted_positions, window_nll
from optimum_moe.evaluation.scores import UnitScores
from optimum_moe.settings import check_count, check_seed, make_plain, token_count

TASKS = ("perplexity", "agreement", "choice", "generation")

AllUnits: TypeAlias = dict[str, dict[str, UnitScores]]
"""Units by model name and score name."""


@dataclass(frozen=True)
class EvaluationSettings:
    """The tasks of an evaluation, and the amount of text.

    Args:
        max_tokens: maximum tokens of text, default 65,536; None for all.
        sequence_length: tokens per window, default 256.
        batch_size: windows per forward pass, default 8; other tasks run about as many tokens at once.
        num_questions: multiple-choice questions, default 200; fewer, with a warning, if the text is too short.
        num_prompts: prompts of the generation task, default 32; fewer likewise.
        new_tokens: length of the greedy continuations, default 32, at least 8.
        seed: seed of all random choices, default 0.
        tasks: which of "perplexity", "agreement", "choice", "generation" to run, default all ("agreement" only with a
            reference).

    Raises:
        ValueError: an unknown task or a number out of range (for settings of the text, when it is read).
    """

    max_tokens: int | None = 65536
    sequence_length: int = 256
    batch_size: int = 8
    num_questions: int = 200
    num_prompts: int = 32
    new_tokens: int = 32
    seed: int = 0
    tasks: Sequence[str] = TASKS

    def __post_init__(self) -> None:
        make_plain(self)
        object.__setattr__(self, "max_tokens", token_count(self.max_tokens))
        for name, least in (("num_questions", 1), ("num_prompts", 1), ("new_tokens", generation.LOOP_TAIL)):
            check_count(name, getattr(self, name), least)
        check_seed(self.seed)
        tasks = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"Unknown task {task!r}{did_you_mean(task, TASKS) or '.'} The tasks are {TASKS}.")
        if not tasks:
            raise ValueError(f"No task given. Pass some of {TASKS}.")
        object.__setattr__(self, "tasks", tasks)

    @classmethod
    def of(cls, values: Mapping[str, Any], with_reference: bool) -> EvaluationSettings:
        """Settings from keyword arguments; without a reference the default tasks are those that need none.

        Raises:
            ValueError: an unknown name, a value out of range, or "agreement" without a reference.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in fields:
                raise ValueError(f"Unknown setting {name!r}{did_you_mean(name, fields) or f', there are {fields}.'}")
        settings = cls(**values)
        if with_reference or "agreement" not in settings.tasks:
            return settings
        if settings.tasks != TASKS:
            raise ValueError("The task 'agreement' compares with the original model. Pass reference=.")
        return dataclasses.replace(settings, tasks=tuple(task for task in TASKS if task != "agreement"))


@dataclass(frozen=True)
class Run:
    """One evaluation: its models, text and settings.

    Args:
        models: by name.
        reference: the original model; may be one of `models`, and then runs once.
        held_out: the text.
        settings: tasks and amount of text.
        progress: show progress bars.
    """

    models: Mapping[str, PreTrainedModel]
    reference: PreTrainedModel | None
    held_out: HeldOut
    settings: EvaluationSettings
    progress: bool

    def all_tasks(self) -> AllUnits:
        """Run the tasks of the settings."""
        units: AllUnits = {name: {} for name in self.models}
        if {"perplexity", "agreement"} & set(self.settings.tasks):
            self._windows(units)
        if "choice" in self.settings.tasks:
            self._choice(units)
        if "generation" in self.settings.tasks:
            self._generation(units)
        return units

    def _slices(self, rows: int, tokens_per_row: int, label: str) -> Iterator[slice]:
        """Slices of rows with about as many tokens per forward pass as a batch of windows."""
        step = max(1, self.settings.batch_size * self.settings.sequence_length // tokens_per_row)
        for start in tqdm(range(0, rows, step), desc=label, disable=not self.progress):
            yield slice(start, start + step)

    def _windows(self, units: AllUnits) -> None:
        """Run every window once through the reference, and once through each model."""
        sums: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        counts: list[Tensor] = []
        compare = self.reference if "agreement" in self.settings.tasks else None
        for batch in tqdm(self.held_out.windows, desc="windows", disable=not self.progress):
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            predicted = predicted_positions(ids, mask)
            counts.append(predicted.sum(-1))
            expected = None if compare is None else logits_of(compare, ids, mask)
            for name, model in self.models.items():
                same = expected is not None and model is compare
                logits = expected if same and expected is not None else logits_of(model, ids, mask)
                nll = window_nll(logits, ids, predicted) if "perplexity" in self.settings.tasks else None
                if nll is not None:
                    sums[name, "perplexity"].append(nll)
                if expected is not None:
                    divergence, agreement = window_agreement(expected, logits, predicted)
                    sums[name, "kl"].append(divergence)
                    sums[name, "top1_agreement"].append(agreement)
                if nll is not None and expected is not None:
                    sums[name, "perplexity_ratio"].append(nll - (nll if same else window_nll(expected, ids, predicted)))
        weight = torch.cat(counts)
        for (name, score), parts in sums.items():
            units[name][score] = UnitScores.of(torch.cat(parts), weight, exponential=score.startswith("perplexity"))

    def _choice(self, units: AllUnits) -> None:
        questions = choice.make_questions(self.held_out, self.settings.num_questions, self.settings.seed)
        tokens = questions.rows[0].numel()
        for name, model in self.models.items():
            slices = self._slices(len(questions.answer), tokens, f"choice, {name}")
            right = torch.cat([choice.score_questions(model, questions, chosen) for chosen in slices])
            units[name]["choice_accuracy"] = UnitScores.of(right.double())

    def _generation(self, units: AllUnits) -> None:
        prompts = generation.make_prompts(self.held_out, self.settings.num_prompts, self.settings.seed)
        expected = None if self.reference is None else self._continue(self.reference, prompts, "reference")
        for name, model in self.models.items():
            is_reference = expected is not None and model is self.reference
            tokens = expected if is_reference and expected is not None else self._continue(model, prompts, name)
            if expected is not None:
                agreement = generation.share_of_agreement(expected, tokens)
                units[name]["generation_agreement"] = UnitScores.of(agreement)
                units[name]["prefix_agreement"] = UnitScores.of(generation.share_of_prefix(expected, tokens))
            units[name]["loop_rate"] = UnitScores.of(generation.is_loop(tokens))

    def _continue(self, model: PreTrainedModel, prompts: Tensor, name: str) -> Tensor:
        new_tokens = self.settings.new_tokens
        slices = self._slices(len(prompts), prompts.shape[1] + new_tokens, f"generation, {name}")
        return torch.cat([generation.continue_greedily(model, prompts[chosen], new_tokens) for chosen in slices])
