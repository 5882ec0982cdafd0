"""Tasks of the lm-evaluation-harness (`lm_eval`), in process and from local task files, so that no hub is needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from optimum_moe.calibration.documents import did_you_mean
from optimum_moe.evaluation.models import ModelOrPath, find_tokenizer, load_models, measuring
from optimum_moe.evaluation.result import EvaluationResult
from optimum_moe.evaluation.scores import CONFIDENCE, Score, UnitScores
from optimum_moe.settings import check_count

_DEVIATIONS = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""Standard errors on either side of an interval."""
_NEEDED = ("output_type", "doc_to_text", "doc_to_target")
_WHOLE = 1e-6


def evaluate_tasks(
    models: Mapping[str, ModelOrPath],
    tasks: Sequence[str],
    tasks_dir: str | Path | None = None,
    tokenizer: Any = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, EvaluationResult]:
    """Measure models on tasks of lm-eval (`pip install 'optimum-moe[eval]'`).

    Args:
        models: By name, decoder-only models or paths; all are in memory at once.
        tasks: Names of tasks.
        tasks_dir: Folder of task files (`.yaml`), the only ones that are then read; by default those of lm-eval, most
            of which need a hub. Python functions that a file names (`!function`) are run.
        tokenizer: Tokenizer or a path to one; by default the one saved at the first path among the models.
        limit: Documents of each task at most, from its beginning; None (default) for all.
        batch_size: Documents in a forward pass, default 8.
        seed: Seed of examples in the prompt and of the bootstrap.

    Returns:
        A result for each model with a score `task/metric` for each metric. Those that are means over documents have
        one unit for each document, so that `paired_difference` and `mcnemar` apply; others have the standard error of
        lm-eval as interval.

    Raises:
        ValueError: If lm-eval is not installed, a task is unknown or its file incomplete, or a metric gives no number.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("Tasks of lm-eval need the package lm-eval. Install it with: pip install 'optimum-moe[eval]'.")
    if not models or not tasks:
        raise ValueError(f"{len(models)} models and {len(tasks)} tasks were given. Pass at least one of each.")
    check_count("batch_size", batch_size, 1)
    if limit is not None:
        check_count("limit", limit, 1, ", or None")
    if tasks_dir is not None and not Path(tasks_dir).is_dir():
        raise ValueError(f"tasks_dir={tasks_dir} is no folder. Give one with the .yaml files of the tasks.")
    manager = _manager(tasks_dir)
    for task in tasks:
        _check_task(manager, task, tasks_dir)
    tokenizer = find_tokenizer(tokenizer, list(models.values()))
    loaded = load_models([(f"models[{name!r}]", model) for name, model in models.items()])
    # The original may be one of the models too, and is measured once.
    answered: dict[int, EvaluationResult] = {}
    with measuring(loaded):
        for model in loaded:
            if id(model) not in answered:
                answered[id(model)] = _evaluated(model, tokenizer, list(tasks), manager, limit, batch_size, seed)
    return {name: answered[id(model)] for name, model in zip(models, loaded, strict=True)}


def _manager(tasks_dir: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if tasks_dir is None:
        return TaskManager()
    return TaskManager(include_path=str(tasks_dir), include_defaults=False)


def _check_task(manager: Any, task: str, tasks_dir: str | Path | None) -> None:
    """Refuse an unknown name, and a file of tasks_dir that lacks a field, before a model is loaded."""
    names = sorted(manager.all_tasks)
    if task not in names:
        where = "lm-eval" if tasks_dir is None else str(tasks_dir)
        raise ValueError(f"{where} has no task {task!r}{did_you_mean(task, names) or f'. It has {names[:20]}.'}")
    entry = manager.task_index[task]
    config = entry.cfg or {}
    if tasks_dir is None or "include" in config or isinstance(config.get("task"), list) or "group" in config:
        return
    missing = [name for name in _NEEDED if name not in config]
    if config.get("output_type") == "multiple_choice" and "doc_to_choice" not in config:
        missing.append("doc_to_choice")
    if not {"test_split", "validation_split"} & set(config):
        missing.append("test_split")
    if missing:
        raise ValueError(
            f"The task file {entry.yaml_path} has no {', '.join(missing)}. lm-eval needs them to make questions and to "
            "tell which answers are right."
        )


def _evaluated(
    model: Any, tokenizer: Any, tasks: list[str], manager: Any, limit: int | None, batch_size: int, seed: int
) -> EvaluationResult:
    import lm_eval
    from jinja2 import UndefinedError
    from lm_eval.models.huggingface import HFLM

    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
    seeds = {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    try:
        found: Any = lm_eval.simple_evaluate(
            model=runner, tasks=tasks, task_manager=manager, limit=limit, log_samples=True, bootstrap_iters=100, **seeds
        )
    except UndefinedError as error:
        raise ValueError(
            f"A document of {', '.join(tasks)} lacks a field that its task file reads: {error}. Name the fields of the "
            "documents in doc_to_text, doc_to_target and doc_to_choice."
        ) from error
    scores: dict[str, Score] = {}
    units: dict[str, UnitScores] = {}
    digest, told = hashlib.sha256(), []
    for task, samples in sorted(found["samples"].items()):
        told.append({"name": f"{task} (lm-eval)", "documents": len({sample["doc_id"] for sample in samples})})
        digest.update("".join(f"{sample['doc_hash']}{sample['target_hash']}" for sample in samples).encode())
        for name, value in _metrics(found["results"][task]):
            metric, _, chosen = name.partition(",")
            title = f"{task}/{metric}" if chosen == "none" else f"{task}/{metric} ({chosen})"
            if not isinstance(value, float | int) or not math.isfinite(value):
                raise ValueError(
                    f"The metric {metric} of {task} cannot be computed: lm-eval gives {value!r}. Use another metric in "
                    "metric_list, or more documents."
                )
            each = [sample[metric] for sample in samples if sample["filter"] == chosen and metric in sample]
            if _are_numbers(each) and math.isclose(sum(each) / len(each), value, abs_tol=_WHOLE):
                units[title] = UnitScores.of(torch.tensor([float(unit) for unit in each]))
                scores[title] = units[title].summary(seed)
            else:
                scores[title] = _with_error(value, found["results"][task].get(f"{metric}_stderr,{chosen}"), len(each))
    data = {"hash": digest.hexdigest(), "seed": seed, "sources": told, "limit": limit, "lm_eval": lm_eval.__version__}
    return EvaluationResult(scores, units, data)


def _metrics(results: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((name, value) for name, value in results.items() if "," in name and "_stderr," not in name)


def _are_numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, bool | int | float) for value in values)


def _with_error(value: float, error: Any, count: int) -> Score:
    """A score whose interval is that of its standard error, which lm-eval does not always know."""
    half = _DEVIATIONS * error if isinstance(error, float | int) else math.inf
    return Score(float(value), float(value - half), float(value + half), count)
