"""Evaluation of models on held-out text, side by side with the original.

Perplexity alone hides damage and multiple choice overstates compressed models, so several scores are measured:
perplexity (exponential of the mean negative log-likelihood over windows without overlap); KL(reference || model) in
nats per token and top-1 agreement; accuracy of finding the true continuation among four; agreement of greedy
continuations with the reference's, and the share of them that end in a loop. Every score has a 95% bootstrap interval.
Text of several domains is measured domain by domain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimum_moe.evaluation.disjoint import check_disjoint
from optimum_moe.evaluation.domains import joined_description, joined_units
from optimum_moe.evaluation.heldout import prepare_domains, texts_of
from optimum_moe.evaluation.models import ModelOrPath, find_tokenizer, load_models, measuring
from optimum_moe.evaluation.result import EvaluationResult
from optimum_moe.evaluation.tasks import TASKS, EvaluationSettings, Run


def evaluate(
    model: ModelOrPath,
    text: Any,
    reference: ModelOrPath | None = None,
    tokenizer: Any = None,
    *,
    max_tokens: int | None = 65536,
    sequence_length: int = 256,
    batch_size: int = 8,
    num_questions: int = 200,
    num_prompts: int = 32,
    new_tokens: int = 32,
    calibration: Any = None,
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    progress: bool = True,
) -> EvaluationResult:
    """Measure one model: `evaluate_many` with the one model. The keywords are the fields of `EvaluationSettings`."""
    results = evaluate_many(
        {"model": model},
        text,
        reference,
        tokenizer,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        num_questions=num_questions,
        num_prompts=num_prompts,
        new_tokens=new_tokens,
        calibration=calibration,
        seed=seed,
        tasks=tasks,
        progress=progress,
    )
    return results["model"]


def evaluate_many(
    models: Mapping[str, ModelOrPath],
    text: Any,
    reference: ModelOrPath | None = None,
    tokenizer: Any = None,
    *,
    calibration: Any = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, EvaluationResult]:
    """Measure several models on the same held-out text; the reference runs once for all of them.

    Args:
        models: by name, decoder-only models or paths (loaded with the class that the config names); all are in memory
            at once.
        text: held-out text, any `CalibrationConfig.source`, or such a config (of which only the source and the text
            column are used). A stream is read to its end. Where it names domains, as {domain: path} or in a "domain"
            column, each is measured on its own, with as much text, questions and prompts as the settings say, and all
            of them together are the scores of the model. Streams name no domains in a column.
        reference: the original model, or its path. Without it there are no agreement scores.
        tokenizer: tokenizer or a path to one; by default the one saved at the first path among models and reference.
        calibration: calibration data of the models; if given, all of `text`, and not only the measured part, is checked
            for overlap with it.
        progress: show progress bars.
        settings: fields of `EvaluationSettings`.

    Returns:
        A result for each model, in order.

    Raises:
        ValueError: an unknown or invalid setting, "agreement" without a reference, an encoder-decoder model,
            no tokenizer, too little text, text of which only a part has a domain, or text that overlaps with the
            calibration data.
    """
    chosen = EvaluationSettings.of(settings, with_reference=reference is not None)
    if not models:
        raise ValueError("There is no model to evaluate. Pass at least one.")
    tokenizer = find_tokenizer(tokenizer, [*models.values(), reference])
    if isinstance(text, Iterator):
        # The text is read several times below, but a stream can only be read once.
        text = list(text)
    domains = prepare_domains(
        text,
        tokenizer,
        max_tokens=chosen.max_tokens,
        sequence_length=chosen.sequence_length,
        batch_size=chosen.batch_size,
        seed=chosen.seed,
    )
    overlap = None
    if calibration is not None:
        overlap = check_disjoint(texts_of(calibration, tokenizer), texts_of(text, tokenizer))
    labeled = [(f"models[{name!r}]", model) for name, model in models.items()]
    loaded = load_models(labeled if reference is None else [*labeled, ("reference", reference)])
    original = None if reference is None else loaded[-1]
    named = dict(zip(models, loaded, strict=False))
    with measuring(loaded):
        runs = {name: Run(named, original, own, chosen, progress).all_tasks() for name, own in domains.items()}
    described = joined_description([held_out.windows.description for held_out in domains.values()])
    data = {**described, **dataclasses.asdict(chosen), "calibration_overlap": overlap}
    results = {}
    for name in models:
        units = {domain: run[name] for domain, run in runs.items()}
        together = joined_units(list(units.values()))
        results[name] = EvaluationResult.of(together, data, chosen.seed, units if "" not in units else {})
    return results
