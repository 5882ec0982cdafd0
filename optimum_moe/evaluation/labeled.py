"""Labeled examples: an input and the target that a model has to write, for training, calibration and a score.

Shape letters: B examples, S tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_moe.evaluation.models import measuring
from optimum_moe.evaluation.result import EvaluationResult
from optimum_moe.evaluation.scores import UnitScores
from optimum_moe.settings import check_count

EXACT_MATCH = "exact_match"
"""The score of `score_examples`."""
IGNORED = -100
"""Label of a position that does not count, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class LabeledExamples:
    """Inputs and the targets that a model has to write.

    Args:
        inputs: Texts that a model is given.
        targets: As many texts that it has to write, such as the name of a class.
        name: What errors and results call them.

    Raises:
        ValueError: If there are none, not as many inputs as targets, or an empty text.
    """

    inputs: tuple[str, ...] = field(repr=False)
    targets: tuple[str, ...] = field(repr=False)
    name: str = "examples"

    def __post_init__(self) -> None:
        if not self.inputs or len(self.inputs) != len(self.targets):
            raise ValueError(
                f"{self.name} has {len(self.inputs)} inputs and {len(self.targets)} targets: a split needs at least "
                "one, and a target for each. Pass other examples."
            )
        for number, texts in enumerate(zip(self.inputs, self.targets, strict=True)):
            for what, text in zip(("input", "target"), texts, strict=True):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"The {what} of example {number} of {self.name} is {text!r}. It has to be a text.")

    @classmethod
    def load(cls, path: str | Path, input_field: str = "input", target_field: str = "target") -> LabeledExamples:
        """Read a `.jsonl` file with one example a line.

        Args:
            path: The file.
            input_field: Field of the input.
            target_field: Field of the target.

        Raises:
            ValueError: If a line is no JSON object or lacks a field, or the file is empty; with the line's number.
        """
        inputs, targets = [], []
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = _record(line, f"Line {number} of {path}")
                missing = [name for name in (input_field, target_field) if name not in record]
                if missing:
                    raise ValueError(
                        f"Line {number} of {path} has no {missing[0]!r}, only {', '.join(record) or 'nothing'}. Every "
                        "line needs an input and a target: name them with input_field= and target_field=."
                    )
                inputs.append(record[input_field])
                targets.append(record[target_field])
        return cls(tuple(inputs), tuple(targets), Path(path).name)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def hash(self) -> str:
        """sha256 (hex) over all texts in order."""
        return hashlib.sha256(json.dumps([self.inputs, self.targets]).encode()).hexdigest()

    def batches(self, model: PreTrainedModel, tokenizer: Any, batch_size: int = 32) -> list[dict[str, Tensor]]:
        """Model inputs with labels, for `recover`, `calibration=` or a training; nothing is truncated.

        An encoder-decoder model reads the input and gets the target with its end as labels; a decoder-only model reads
        both, one after the other, and the labels of the input are ignored.

        Args:
            model: The model, of which the config is read.
            tokenizer: Its tokenizer.
            batch_size: Examples in a batch, default 32, padded on the right.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 (B, S).

        Raises:
            ValueError: If the tokenizer has no EOS token.
        """
        check_count("batch_size", batch_size, 1)
        pairs = list(zip(self._input_ids(model, tokenizer), self._target_ids(tokenizer), strict=True))
        found = []
        for start in range(0, len(pairs), batch_size):
            chosen = pairs[start : start + batch_size]
            if model.config.is_encoder_decoder:
                rows, labels = [given for given, _ in chosen], [target for _, target in chosen]
            else:
                rows = [given + target for given, target in chosen]
                labels = [[IGNORED] * len(given) + target for given, target in chosen]
            ids_BS, mask_BS = _padded(rows, _padding(tokenizer))
            labels_BS, _ = _padded(labels, IGNORED)
            found.append({"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS})
        return found

    def prompts(self, model: PreTrainedModel, tokenizer: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """What a model is given to write the targets, padded on the left for a decoder-only model."""
        rows = self._input_ids(model, tokenizer)
        for start in range(0, len(rows), batch_size):
            left = not model.config.is_encoder_decoder
            ids_BS, mask_BS = _padded(rows[start : start + batch_size], _padding(tokenizer), left)
            yield {"input_ids": ids_BS, "attention_mask": mask_BS}

    def _input_ids(self, model: PreTrainedModel, tokenizer: Any) -> list[list[int]]:
        rows: list[list[int]] = tokenizer(list(self.inputs))["input_ids"]
        if model.config.is_encoder_decoder:
            return rows
        # An EOS token behind the input would end it before its target.
        return [row[:-1] if row[-1] == tokenizer.eos_token_id else row for row in rows]

    def _target_ids(self, tokenizer: Any) -> list[list[int]]:
        if tokenizer.eos_token_id is None:
            raise ValueError("Targets end with the EOS token, and this tokenizer has none. Set tokenizer.eos_token.")
        rows = tokenizer(list(self.targets), add_special_tokens=False)["input_ids"]
        return [[*row, tokenizer.eos_token_id] for row in rows]


def check_splits(splits: Mapping[str, LabeledExamples]) -> None:
    """Check that no input is in two splits.

    Case, punctuation and spaces do not hide a copy.

    Args:
        splits: By name, such as train, dev and test.

    Raises:
        ValueError: If one is; with an example.
    """
    owners: dict[tuple[str, ...], str] = {}
    for name, examples in splits.items():
        for text in examples.inputs:
            words = tuple("".join(c if c.isalnum() else " " for c in text.lower()).split())
            if owners.setdefault(words, name) != name:
                raise ValueError(
                    f"An input is in {owners[words]!r} and in {name!r}: {text[:80]!r}. A score on what was trained on "
                    "is too good: give every input to one split."
                )


def score_examples(
    model: PreTrainedModel, tokenizer: Any, examples: LabeledExamples, batch_size: int = 64, progress: bool = True
) -> EvaluationResult:
    """The share of examples of which the model writes exactly the target, by greedy generation.

    It is given the input alone, and writes until its EOS token or one token more than the longest target has.

    Args:
        model: An encoder-decoder or a decoder-only model.
        tokenizer: Its tokenizer.
        examples: What to write.
        batch_size: Inputs in a forward pass, default 64.
        progress: Show a progress bar.

    Returns:
        The score `exact_match`, with a 95% bootstrap interval and one unit for each example.

    Raises:
        ValueError: If `batch_size` is no positive number.
    """
    check_count("batch_size", batch_size, 1)
    longest = max(map(len, examples._target_ids(tokenizer)))
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": longest + 1}
    settings |= {"pad_token_id": _padding(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    written: list[str] = []
    generator: Any = model
    batches = examples.prompts(model, tokenizer, batch_size)
    with measuring([model]):
        for batch in tqdm(batches, total=-(-len(examples) // batch_size), desc=examples.name, disable=not progress):
            given = {name: tensor.to(model.device) for name, tensor in batch.items()}
            ids_BS = generator.generate(**given, **settings)
            start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
            written += tokenizer.batch_decode(ids_BS[:, start:], skip_special_tokens=True)
    right = [said.strip() == target.strip() for said, target in zip(written, examples.targets, strict=True)]
    units = {EXACT_MATCH: UnitScores.of(torch.tensor(right).double())}
    data = {"hash": examples.hash, "sources": [{"name": examples.name, "examples": len(examples)}]}
    return EvaluationResult.of(units, data, seed=0)


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}). Write one object a line.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}. Write one object a line, with an input and a target.")
    return record


def _padding(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


def _padded(rows: Sequence[Sequence[int]], filler: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """(B, S) ids and mask."""
    width = max(map(len, rows))
    ids_BS, mask_BS = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BS[index, place] = torch.tensor(row)
        mask_BS[index, place] = 1
    return ids_BS, mask_BS
