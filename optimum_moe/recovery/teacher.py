"""The teacher of a recovery: a model in memory, or its largest logits, stored once for many students."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_moe.algorithms.distillation import TopLogits, top_logits
from optimum_moe.checkpoint.destination import check_destination, owned, written_beside
from optimum_moe.evaluation.models import ModelOrPath, find_tokenizer, load_models
from optimum_moe.recovery.data import DataSettings, RecoveryData, read_data
from optimum_moe.recovery.objective import Inputs, Prediction, hidden_states, model_inputs
from optimum_moe.settings import check_count

RECORD_FILE = "teacher_logits.json"
TOP_K = 64
"""Default number of logits that are stored of each position."""


class Teacher(Protocol):
    """Predicts the batches of a recovery."""

    def predict(self, split: str, index: int, inputs: Inputs) -> Prediction:
        """What it says of a batch.

        Args:
            split: `"training"` or `"held_out"`.
            index: Number of the batch in its split.
            inputs: The batch, on the device of the student.
        """


class ModelTeacher:
    """A model in memory, run without gradients.

    Args:
        model: The original.
        with_hidden: Whether its hidden states are wanted.
    """

    def __init__(self, model: PreTrainedModel, with_hidden: bool = False) -> None:
        self.model, self._with_hidden = model.eval(), with_hidden

    @torch.no_grad()
    def predict(self, split: str, index: int, inputs: Inputs) -> Prediction:
        """See `Teacher.predict`."""
        output = self.model(**model_inputs(inputs), use_cache=False, output_hidden_states=self._with_hidden)
        if "logits" not in output:
            raise ValueError(
                f"{type(self.model).__name__} has no head, and what a student learns are predictions of tokens. "
                "Compress and train the model with its head, such as AutoModelForCausalLM (auto_class=)."
            )
        return Prediction(output.logits, hidden_states(output) if self._with_hidden else ())


class StoredTeacher:
    """The largest logits that `store_teacher_logits` wrote.

    Args:
        folder: Where it wrote them.
        data: The data of this run.
        temperature: At which the training compares distributions.

    Raises:
        ValueError: If they belong to other data or another temperature.
    """

    def __init__(self, folder: Path, data: RecoveryData, temperature: float) -> None:
        self._folder, self._record = folder, _record(folder)
        for name, batches in data.splits.items():
            if self._record["hashes"].get(name) != batches.hash:
                raise ValueError(
                    f"{folder} holds a teacher's logits for other tokens: the {name} data have sha256 "
                    f"{batches.hash[:12]} here and {str(self._record['hashes'].get(name))[:12]} there. Pass the data, "
                    "settings and seed that they were stored with, or store them again."
                )
        if self._record["temperature"] != temperature:
            raise ValueError(
                f"temperature={temperature}, but {folder} holds logits for {self._record['temperature']}: what the "
                "others add up to depends on it. Store them again with this temperature."
            )

    @property
    def vocabulary(self) -> int:
        """Size of the teacher's vocabulary."""
        return int(self._record["vocabulary"])

    def predict(self, split: str, index: int, inputs: Inputs) -> Prediction:
        """See `Teacher.predict`."""
        try:
            tensors = load_file(self._folder / f"{split}-{index:06d}.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self._folder} is incomplete ({error}). Store the teacher's logits again.") from error
        device = next(value for value in inputs.values() if isinstance(value, torch.Tensor)).device
        parts = {name: tensor.to(device) for name, tensor in tensors.items()}
        temperature = 1.0 if split == "held_out" else float(self._record["temperature"])
        return Prediction(TopLogits(parts["logits"], parts["tokens"], parts["rest"], temperature))


def is_stored(teacher: Any) -> bool:
    """Whether a teacher is a folder that `store_teacher_logits` wrote."""
    return isinstance(teacher, str | Path) and (Path(teacher) / RECORD_FILE).is_file()


def store_teacher_logits(
    teacher: ModelOrPath,
    data: Any,
    output_dir: str | Path,
    *,
    max_tokens: int = 300_000,
    k: int = TOP_K,
    temperature: float = 1.0,
    held_out: Any = None,
    held_out_share: float = 0.1,
    seed: int = 0,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Run the original once over the data of a recovery, and store its largest logits for any number of students.

    Of each position the K largest logits are stored in float32 with their tokens, and the logsumexp of all others, so
    that the divergence of these K + 1 outcomes is exact. A student is then trained by
    `recover(student, teacher=output_dir, data=...)` with the same data, `max_tokens`, `held_out` and `seed`.

    Args:
        teacher: The original: a folder, a Hub id, or a model in memory.
        data: As for `recover`.
        output_dir: A new folder, with one file for each batch.
        max_tokens: As for `recover`.
        k: Logits of each position, at most the size of the vocabulary; they take 8 bytes each.
        temperature: At which `recover` compares distributions.
        held_out: As for `recover`.
        held_out_share: As for `recover`.
        seed: As for `recover`.
        tokenizer: Tokenizer or its path; by default the teacher's.
        overwrite: Replace the content of the folder.
        progress: Show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: If a setting or the data are invalid.
    """
    check_count("k", k, 1)
    settings = DataSettings(max_tokens, held_out, held_out_share, seed)
    directory = check_destination(output_dir, overwrite)
    tokenizer = find_tokenizer(tokenizer, [teacher])
    (model,) = load_models([("teacher", teacher)])
    read = read_data(model, tokenizer, data, settings)
    running = ModelTeacher(model)
    with owned(directory, overwrite), written_beside(directory, overwrite) as beside:
        vocabulary = 0
        for name, batches in read.splits.items():
            for index, batch in enumerate(tqdm(batches, desc=f"teacher, {name}", disable=not progress)):
                inputs = {key: value.to(model.device) for key, value in batch.items()}
                logits = running.predict(name, index, inputs).logits
                assert isinstance(logits, torch.Tensor)
                vocabulary = logits.shape[-1]
                top = top_logits(logits, k, 1.0 if name == "held_out" else temperature)
                stored = {"logits": top.logits_TK, "tokens": top.tokens_TK.to(torch.int32), "rest": top.rest_T}
                save_file(
                    {key: value.contiguous().cpu() for key, value in stored.items()},
                    beside / f"{name}-{index:06d}.safetensors",
                )
        record = {
            "k": k,
            "temperature": temperature,
            "vocabulary": vocabulary,
            "hashes": {name: batches.hash for name, batches in read.splits.items()},
        }
        (beside / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return directory


def _record(folder: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / RECORD_FILE} cannot be read ({error}). Store the logits again.") from error
