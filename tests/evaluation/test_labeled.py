"""Labeled examples: what is read, what models are given, what counts as right, and the test of two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom

from optimum_moe.evaluation import EvaluationResult, LabeledExamples, check_splits, mcnemar, score_examples
from optimum_moe.evaluation.scores import UnitScores
from tests.evaluation.conftest import successor_model
from tests.tiny_models import build


class Letters:
    """A tokenizer of capital letters: A is 3, B is 4 and so on; 1 ends a text and is added to inputs, 0 is padding."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        rows = [[ord(letter) - ord("A") + 3 for letter in text] for text in texts]
        return {"input_ids": [[*row, 1] if add_special_tokens else row for row in rows]}

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(i - 3 + ord("A")) for i in row if i >= 3) for row in ids.tolist()]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_examples_are_read_by_field(tmp_path: Path) -> None:
    file = write(tmp_path / "task.jsonl", [{"q": "AB", "a": "C"}, "", {"q": "B", "a": "C", "more": 1}])
    examples = LabeledExamples.load(file, input_field="q", target_field="a")
    assert examples == LabeledExamples(("AB", "B"), ("C", "C"), "task.jsonl")
    assert len(examples) == 2
    assert examples.hash != LabeledExamples(("AB", "B"), ("C", "D")).hash


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([{"input": "A", "target": "B"}, {"input": "A", "label": "B"}], r"Line 2 of .* no 'target', only input, label"),
        ([{"input": "A", "target": "B"}, "{"], "Line 2 of .* is no JSON"),
        (["[1]"], "Line 1 of .* is a list"),
        ([], r"task.jsonl has 0 inputs and 0 targets"),
        ([{"input": "A", "target": " "}], "target of example 0 of task.jsonl is ' '"),
        ([{"input": "A", "target": 3}], "target of example 0 of task.jsonl is 3"),
    ],
)
def test_wrong_files_are_refused(lines: list[Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        LabeledExamples.load(write(tmp_path / "task.jsonl", lines))


def test_a_copy_in_two_splits_is_refused() -> None:
    train, dev = LabeledExamples(("Good film", "Bad"), ("1", "0")), LabeledExamples(("Fine",), ("1",))
    check_splits({"train": train, "dev": dev})
    with pytest.raises(ValueError, match="in 'train' and in 'test': ' good, FILM!'"):
        check_splits({"train": train, "dev": dev, "test": LabeledExamples((" good, FILM!",), ("1",))})


def test_batches_hold_labels_of_the_targets_alone() -> None:
    examples, letters = LabeledExamples(("ABC", "D"), ("E", "FG")), Letters()
    (batch,) = examples.batches(build("switch_transformers"), letters)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1], [6, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100], [8, 9, 1]]
    (batch,) = examples.batches(build("qwen3_moe"), letters)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 7, 1], [6, 8, 9, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 1], [-100, 8, 9, 1, -100]]
    assert len(examples.batches(build("qwen3_moe"), letters, batch_size=1)) == 2


def test_a_model_is_right_if_it_writes_the_target() -> None:
    """After A this model writes B, and then C."""
    examples = LabeledExamples(("A", "XYA", "AB", "K"), ("BC", "BC", "BC", "LM"))
    result = score_examples(successor_model(), Letters(), examples, batch_size=2, progress=False)
    # It never ends a text, so that it writes one letter more than the longest target, and nothing is right.
    assert result.units["exact_match"].total == (0.0, 0.0, 0.0, 0.0)
    model = successor_model()
    with torch.no_grad():
        # C and M end the text.
        model.lm_head.weight[1] = 2 * (torch.eye(64)[5] + torch.eye(64)[15])
    result = score_examples(model, Letters(), examples, batch_size=2, progress=False)
    assert result.units["exact_match"].total == (1.0, 1.0, 0.0, 1.0)
    assert result.scores["exact_match"].value == 0.75
    assert result.data["hash"] == examples.hash


def test_an_encoder_decoder_model_writes_too() -> None:
    examples = LabeledExamples(("AB", "CDE"), ("F", "F"))
    model = build("switch_transformers")
    model.generation_config.decoder_start_token_id = 0
    with torch.no_grad():
        ids = model.generate(**next(examples.prompts(model, Letters(), 2)), max_new_tokens=3, do_sample=False)
    written = Letters().batch_decode(ids, skip_special_tokens=True)
    told = LabeledExamples(examples.inputs, (written[0], "never"))
    result = score_examples(model, Letters(), told, progress=False)
    assert len(written[0]) == 3
    # It may write one token more than the longest target, which "never" has, and does not end.
    assert result.units["exact_match"].total == (0.0, 0.0)


def result_of(right: list[int], hash_: str = "x") -> EvaluationResult:
    return EvaluationResult.of({"exact_match": UnitScores.of(torch.tensor(right).double())}, {"hash": hash_}, 0)


def test_mcnemar_counts_the_questions_that_differ() -> None:
    a, b = result_of([1] * 10 + [1] * 9 + [0] * 2 + [0] * 5), result_of([1] * 10 + [0] * 9 + [1] * 2 + [0] * 5)
    assert mcnemar(a, b, "exact_match") == (9, 2, pytest.approx(2 * binom.cdf(2, 11, 0.5)))
    assert mcnemar(b, a, "exact_match")[:2] == (2, 9)
    assert mcnemar(a, a, "exact_match") == (0, 0, 1.0)


def test_mcnemar_refuses_what_is_not_right_or_wrong() -> None:
    half = result_of([1, 0])
    with pytest.raises(ValueError, match="differ in hash"):
        mcnemar(half, result_of([1, 0], "y"), "exact_match")
    with pytest.raises(ValueError, match="No score 'f1'"):
        mcnemar(half, half, "f1")
    other = EvaluationResult.of({"exact_match": UnitScores.of(torch.tensor([0.5, 1.0]).double())}, {"hash": "x"}, 0)
    with pytest.raises(ValueError, match="right and wrong answers"):
        mcnemar(other, half, "exact_match")
