"""Model inputs that the caller has prepared, for instance with a DataLoader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

LABELS = ("labels", "label", "label_ids")
"""Keys that a collator adds for the loss; calibration does not use them."""
_IGNORED = -100


@dataclass(frozen=True)
class ReadyInputs:
    """Prepared model inputs: dicts of tensors, which are used unchanged except for labels."""

    name: str
    inputs: Iterable[Mapping[str, Any]]


def ready_batches(ready: ReadyInputs, max_batches: int | None, decoder_start_token_id: int | None) -> Iterator[Any]:
    """The inputs without labels; missing decoder inputs are made from the labels.

    Args:
        ready: The inputs.
        max_batches: Maximum number of batches.
        decoder_start_token_id: First token of an encoder-decoder model's decoder, None for other models.

    Raises:
        ValueError: ids or a mask are not of shape (batch, tokens), or a decoder has no inputs.
    """
    for index, batch in enumerate(islice(ready.inputs, max_batches)):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"Model inputs are dicts of tensors, item {index} is a {type(batch).__name__}. Pass "
                '{"input_ids": ..., "attention_mask": ...}, for instance by the collate_fn of a DataLoader.'
            )
        for name in ("input_ids", "decoder_input_ids"):
            ids = batch.get(name)
            if ids is not None and not (isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()):
                raise ValueError(
                    f"Model inputs are dicts whose {name} are a tensor of shape (batch, tokens), item {index} is "
                    f"{type(batch).__name__} with {name} of {getattr(ids, 'shape', type(ids).__name__)}. Pass batches: "
                    'tokenizer(..., return_tensors="pt"), or a DataLoader with collate_fn=default_data_collator.'
                )
        mask = batch.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor | Mapping):
            raise ValueError(
                f"attention_mask of item {index} is a {type(mask).__name__}. Pass a tensor of the shape of input_ids."
            )
        inputs = batch
        if any(name in batch for name in LABELS):
            inputs = {name: value for name, value in batch.items() if name not in LABELS}
        if decoder_start_token_id is not None and "input_ids" in batch and not _has_decoder_inputs(batch):
            inputs = {**inputs, **_shifted(batch.get("labels"), decoder_start_token_id, index)}
        yield inputs


def _has_decoder_inputs(inputs: Mapping[str, Any]) -> bool:
    return any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))


def _shifted(labels: Any, start: int, index: int) -> dict[str, Tensor]:
    """Decoder inputs of teacher forcing: labels shifted right by one, with ignored positions masked."""
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"Item {index} has no decoder_input_ids, and the model has a decoder. Add them, or add labels, which are "
            "then used instead."
        )
    ids = labels.roll(1, dims=1)
    ids[:, 0] = start
    real = ids != _IGNORED
    return {"decoder_input_ids": ids.masked_fill(~real, start), "decoder_attention_mask": real.long()}
