"""Tasks of lm-eval from local files: scores, units, the comparison with the original, and what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from optimum_moe.evaluation import EvaluationResult, compare_results, evaluate_tasks, mcnemar
from optimum_moe.evaluation.scores import UnitScores
from tests.evaluation.conftest import constant_model, tiny_model

INSTALLED = find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: pip install 'optimum-moe[eval]'")


@pytest.fixture
def tasks_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    documents = [{"question": f"abc {n}", "choices": ["k", "l", "m"], "right": n % 3} for n in range(9)]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{right}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    lacking = {name: value for name, value in common.items() if name not in ("doc_to_target", "test_split")}
    for name, fields in {
        "letters": common,
        "lacking": lacking,
        "misnamed": {**common, "doc_to_text": "{{query}}"},
    }.items():
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **fields}), encoding="utf-8")
    return folder


@needs_lm_eval
def test_models_are_scored_document_by_document(tasks_dir: Path, tokenizer: Any) -> None:
    models = {"constant": constant_model(len(tokenizer)), "tiny": tiny_model(len(tokenizer))}
    found = evaluate_tasks(models, ["letters"], tasks_dir, tokenizer)
    # All tokens are equally likely and choices equally long, so that the first one is taken each time.
    assert found["constant"].units["letters/acc"].total == (1.0, 0.0, 0.0) * 3
    assert found["constant"].scores["letters/acc"].value == pytest.approx(1 / 3)
    assert found["constant"].data["sources"] == [{"name": "letters (lm-eval)", "documents": 9}]
    only_constant, only_tiny, _ = mcnemar(found["constant"], found["tiny"], "letters/acc")
    assert only_constant - only_tiny == 3 - sum(found["tiny"].units["letters/acc"].total)
    (limited,) = evaluate_tasks({"a": models["constant"]}, ["letters"], tasks_dir, tokenizer, limit=2).values()
    assert limited.scores["letters/acc"].count == 2


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "match"),
    [
        ("leters", "no task 'leters'; did you mean 'letters'"),
        ("lacking", "lacking.yaml has no doc_to_target, test_split"),
        ("misnamed", "lacks a field that its task file reads: 'query' is undefined"),
    ],
)
def test_wrong_tasks_are_refused(task: str, match: str, tasks_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate_tasks({"a": constant_model(len(tokenizer))}, [task], tasks_dir, tokenizer)


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_the_error_names_the_extra() -> None:
    with pytest.raises(ValueError, match=r"pip install 'optimum-moe\[eval\]'"):
        evaluate_tasks({"a": constant_model()}, ["letters"])


def result_of(right: list[float], joined: bool = False) -> EvaluationResult:
    units = {"letters/acc": UnitScores.of(torch.tensor(right))}
    tasks = EvaluationResult.of(units, {"hash": "tasks", "seed": 0}, 0)
    text = EvaluationResult.of({"loop_rate": UnitScores.of(torch.zeros(3))}, {"hash": "text", "seed": 1}, 0)
    return text.joined(tasks) if joined else tasks


@pytest.mark.parametrize("joined", [False, True])
def test_the_comparison_pairs_documents(joined: bool) -> None:
    said = compare_results({"small": result_of([1, 0, 0, 1], joined)}, result_of([1, 1, 1, 0]))
    assert said.startswith("small, letters/acc: -0.2500 [")
    assert "2 answers lost, 1 won, p = 1 (McNemar)" in said


def test_other_scores_are_not_compared() -> None:
    assert compare_results({"small": result_of([0.5, 1.0])}, result_of([0.5, 1.0])) == ""
