"""The text that a recovery trains on, and the documents of it that are held out to stop in time."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe.calibration import CalibrationBatches, CalibrationConfig, batches_for
from optimum_moe.calibration.documents import TextSource
from optimum_moe.calibration.inputs import ReadyInputs
from optimum_moe.calibration.sources import read_sources
from optimum_moe.evaluation.disjoint import THRESHOLD, shared_ngrams
from optimum_moe.recovery.objective import IGNORED, LABELS
from optimum_moe.recovery_settings import check_amount
from optimum_moe.settings import token_count

HELD_OUT_TOKENS = 8192
"""Maximum tokens that the divergence is measured on during training."""
_STREAMED = 16
"""Documents at the beginning of a stream that are held out."""
_ROWS = {"sequence_length": 512, "batch_size": 4}
"""Rows of a step: the most tokens of one, and their number. Smaller steps than those of a calibration, since there are
few tokens for all of them."""


@dataclass(frozen=True)
class DataSettings:
    """How much text is read, and what part of it is held out.

    Args:
        max_tokens: tokens that are trained on, such as 300_000 or "300k"; a text with fewer of them is read several
            times.
        held_out: text to measure the divergence on; None for whole documents of the training text.
        held_out_share: share of the documents that are held out, at least one.
        seed: seed of the choice and order of documents, unless the data have one of their own.
    """

    max_tokens: int
    held_out: Any = None
    held_out_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_tokens", token_count(self.max_tokens))
        check_amount(self.max_tokens, self.held_out_share)


@dataclass(frozen=True)
class RecoveryData:
    """Batches to train on, and batches of other documents to measure on."""

    training: CalibrationBatches
    held_out: CalibrationBatches

    @property
    def splits(self) -> dict[str, CalibrationBatches]:
        """Both by name."""
        return {"training": self.training, "held_out": self.held_out}


def read_data(model: PreTrainedModel, tokenizer: Any, data: Any, settings: DataSettings) -> RecoveryData:
    """Read, split and tokenize.

    Args:
        model: the model; may be on the meta device.
        tokenizer: its tokenizer or processor, None if it has none.
        data: whatever `calibration=` of `MoECompressor` takes; of a `CalibrationConfig` `max_tokens` is not used.
            Labels of model inputs are kept.
        settings: amount and split.

    Raises:
        ValueError: If there is too little text, if it cannot be split by documents, if held-out text was found in the
            training text, or labels fit no position.
    """
    config = _config(model, data, settings)
    if settings.held_out is None:
        training, held_out = _split(config, settings)
    else:
        given = CalibrationConfig.coerce(settings.held_out)
        training, held_out = config, replace(config, source=given.source, text_column=given.text_column)
    held_out = replace(held_out, max_tokens=max(HELD_OUT_TOKENS, held_out.sequence_length), num_samples=None)
    found = RecoveryData(_batches(model, training, tokenizer), _batches(model, held_out, tokenizer))
    if len({LABELS in batches[0] for batches in found.splits.values()}) > 1:
        raise ValueError("Training and held-out data have labels, or neither has: only one has here. Add or drop them.")
    _check_apart(found)
    return found


def _batches(model: PreTrainedModel, config: CalibrationConfig, tokenizer: Any) -> CalibrationBatches:
    """The batches for a model, with the labels that model inputs have."""
    config = replace(config, source=_readable_again(config.source))
    inputs = _with_labels(config)
    if inputs is None:
        return batches_for(model, config, tokenizer)
    batches = batches_for(model, replace(config, source=inputs), tokenizer)
    labeled, hashed = [], hashlib.sha256(batches.hash.encode())
    for number, (batch, given) in enumerate(zip(batches, inputs, strict=True)):
        labels_BS = _labels(number, batch, given.get(LABELS))
        hashed.update(labels_BS.to("cpu", torch.int64).contiguous().numpy().tobytes())
        labeled.append({**batch, LABELS: labels_BS})
    description = {**batches.description, "hash": hashed.hexdigest()}
    return replace(batches, batches=tuple(labeled), hash=hashed.hexdigest(), description=description)


def _readable_again(source: Any) -> Any:
    """A stream of model inputs with labels as a list, all else as it is."""
    if not isinstance(source, Iterator):
        return source
    first = list(islice(source, 1))
    labeled = any(isinstance(item, Mapping) and isinstance(item.get(LABELS), Tensor) for item in first)
    return [*first, *source] if labeled else chain(first, source)


def _with_labels(config: CalibrationConfig) -> list[Any] | None:
    """The model inputs, None if the source is something else or they have no labels."""
    if isinstance(config.source, str | Path | Mapping | Iterator):
        return None
    ready = read_sources(config.source, config.text_column)
    if not isinstance(ready, ReadyInputs):
        return None
    inputs = list(islice(ready.inputs, config.num_samples))
    return inputs if any(LABELS in given for given in inputs) else None


def _labels(number: int, batch: dict[str, Tensor], labels: Any) -> Tensor:
    name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    expected = tuple(batch[name].shape)
    if not isinstance(labels, Tensor) or tuple(labels.shape) != expected:
        said = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"The labels of item {number} are {said}, and its {name} have the shape {expected}: every position has a "
            f"label, {IGNORED} where none counts. Give all items labels of that shape, or none."
        )
    counted = labels if name == "decoder_input_ids" else labels[:, 1:]
    if not bool((counted != IGNORED).any()):
        raise ValueError(f"No label of item {number} counts, all are {IGNORED}. Leave the item out, or give it labels.")
    return labels


def _config(model: PreTrainedModel, data: Any, settings: DataSettings) -> CalibrationConfig:
    """The data with this run's amount and seed, in rows that suit a training unless the user chose their size."""
    config = CalibrationConfig.coerce(data)
    chosen = set(data) if CalibrationConfig.is_fields(data) else set(_ROWS) if config is data else set()
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _ROWS["sequence_length"]
    usual = {**_ROWS, "sequence_length": min(longest, _ROWS["sequence_length"], settings.max_tokens)}
    rows: dict[str, Any] = {name: value for name, value in usual.items() if name not in chosen}
    seed = settings.seed if config.seed is None else config.seed
    return replace(config, **rows, max_tokens=settings.max_tokens, seed=seed)


def _split(config: CalibrationConfig, settings: DataSettings) -> tuple[CalibrationConfig, CalibrationConfig]:
    sources = read_sources(config.source, config.text_column)
    if not isinstance(sources, list):
        raise ValueError(
            "Model inputs, images, audio and video are not split into training and held-out data by documents. Pass "
            "held_out=, in the same form."
        )
    pairs = [_split_source(source, settings.held_out_share, config.random_seed) for source in sources]
    return replace(config, source=[pair[0] for pair in pairs]), replace(config, source=[pair[1] for pair in pairs])


def _split_source(source: TextSource, share: float, seed: int) -> tuple[TextSource, TextSource]:
    """The documents that are trained on, and those that are not."""
    documents = source.documents
    if isinstance(documents, Iterator):
        first = list(islice(documents, _STREAMED))
        return replace(source, documents=documents), replace(source, documents=first)
    count = len(documents)
    if count < 2:
        raise ValueError(
            f"{source.name} has {count} document(s): one is trained on and another one held out, to see when training "
            "stops helping. Give more documents (in a .txt file empty lines separate them), or pass held_out=."
        )
    order = list(range(count))
    random.Random(seed).shuffle(order)
    # Of few documents some may be empty or shorter than a row, but one long one is enough.
    held = min(count - 1, math.ceil(share * count))
    return (
        source.selected(sorted(order[held:])),
        source.selected(sorted(order[:held])),
    )


def _check_apart(data: RecoveryData) -> None:
    """Refuse held-out text that is trained on."""
    texts = {name: list(_as_words(batches)) for name, batches in data.splits.items()}
    if not all(texts.values()):
        return
    if LABELS in data.training[0]:
        # Questions share their wording, so that only whole ones are compared.
        known = set(texts["training"])
        copies = sum(text in known for text in texts["held_out"])
        if copies > THRESHOLD * len(texts["held_out"]):
            raise ValueError(
                f"{copies} of the {len(texts['held_out'])} held-out inputs are trained on (at most {THRESHOLD:.0%} may "
                "be), so training would not be stopped in time. Give every input to one side."
            )
        return
    share, _ = shared_ngrams(texts["training"], texts["held_out"])
    if share > THRESHOLD:
        raise ValueError(
            f"{share:.1%} of the held-out text's sequences of 13 tokens are in the training text (at most "
            f"{THRESHOLD:.0%} may be), so training would not be stopped in time. Give every document once, or pass "
            "other text as held_out=."
        )


def _as_words(batches: CalibrationBatches) -> Iterator[str]:
    """Each row as its ids, which are compared like words; nothing for inputs without ids."""
    for batch in batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        for row in range(0 if ids is None else len(ids)):
            assert ids is not None
            real: Tensor = ids[row] if mask is None or mask.ndim != 2 else ids[row][mask[row] != 0]
            yield " ".join(map(str, real.tolist()))
