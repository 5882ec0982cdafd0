"""Calibration batches for a given model, checked against its inputs, vocabulary and length."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_moe.calibration.config import CalibrationConfig
from optimum_moe.calibration.data import CalibrationBatches, build_batches
from optimum_moe.calibration.documents import did_you_mean
from optimum_moe.calibration.observe import running_part

_IDS = ("input_ids", "decoder_input_ids")


def batches_for(model: PreTrainedModel, config: CalibrationConfig, tokenizer: Any) -> CalibrationBatches:
    """The calibration batches for a model.

    Warns of rows that are longer than the model was trained on.

    Args:
        model: The model; may be on the meta device.
        config: Source and amount of the data.
        tokenizer: The model's tokenizer or processor, None if it has none.

    Raises:
        ValueError: See `build_batches`; also for inputs that the model does not take, token ids without an embedding,
            and rows that are longer than its table of position embeddings.
    """
    batches = build_batches(
        config,
        tokenizer,
        is_encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False)),
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    for batch in batches:
        _check_names(batch, model)
        _check_ids(batch, model, tokenizer)
    _check_length(batches, model)
    return batches


def _check_names(batch: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse inputs that the forward pass does not accept, or ignores because their name is misspelled."""
    parameters = inspect.signature(running_part(model).forward).parameters
    swallows = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in batch:
        near = did_you_mean(name, parameters, cutoff=0.9)
        if name not in parameters and (near or not swallows):
            raise ValueError(
                f"{type(model).__name__} takes no input {name!r}{near or '.'} It takes {', '.join(parameters)}. Leave "
                "it out of the model inputs."
            )


def _check_ids(batch: Mapping[str, Any], model: PreTrainedModel, tokenizer: Any) -> None:
    rows = _embedding_rows(model)
    if rows is None or any(isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 2 for v in batch.values()):
        # Placeholder ids of media are replaced before the embedding, and may exceed its size.
        return
    for name in _IDS:
        ids = batch.get(name)
        if ids is None or not ids.numel():
            continue
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= rows:
            known = f" The tokenizer knows {len(tokenizer)} tokens." if hasattr(tokenizer, "__len__") else ""
            raise ValueError(
                f"{name} holds token id {lowest if lowest < 0 else highest}, and the vocabulary of "
                f"{type(model).__name__} has the ids 0 to {rows - 1}.{known} Pass the tokenizer that the model was "
                "trained with, or resize its embeddings with resize_token_embeddings()."
            )


def _embedding_rows(model: PreTrainedModel) -> int | None:
    """Number of token ids in the embedding, None for a model without token ids."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    # The input embedding of an image model embeds patches.
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def _check_length(batches: CalibrationBatches, model: PreTrainedModel) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((_length(batch) for batch in batches), default=0)
    if not isinstance(limit, int) or longest <= limit:
        return
    said = f"Rows of {longest} tokens are longer than max_position_embeddings={limit} of {type(model).__name__}"
    remedy = f"Pass sequence_length={limit} or less, or shorter model inputs."
    tables = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in name}
    short = [name for name, table in tables.items() if limit <= table.num_embeddings < longest]
    if short:
        raise ValueError(f"{said}, whose positions are a table of that many ({short[0]}). {remedy}")
    warnings.warn(f"{said}: routing of the tokens beyond that may not be typical. {remedy}", stacklevel=3)


def _length(batch: Mapping[str, Any]) -> int:
    """Length of the longest row in positions; for packed rows, of the longest packed sequence."""
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.numel():
        return int(positions.max()) + 1
    return max((batch[name].shape[1] for name in (*_IDS, "inputs_embeds") if batch.get(name) is not None), default=0)
