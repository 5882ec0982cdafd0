"""Calibration data: the batches that models are run on.

Shape letters: B rows of a batch, S tokens of a row.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from transformers import ProcessorMixin

from optimum_moe.calibration.config import CalibrationConfig
from optimum_moe.calibration.documents import TextSource
from optimum_moe.calibration.inputs import ready_batches
from optimum_moe.calibration.media import MediaSource, check_processor, model_inputs
from optimum_moe.calibration.sampling import (
    Affixes,
    Draw,
    TokenIds,
    document_rows,
    find_affixes,
    mix,
    ordered,
    packed_rows,
    repeated_share,
    tokenized,
)
from optimum_moe.calibration.sources import ReadyInputs, read_sources

logger = logging.getLogger(__name__)

Batch: TypeAlias = dict[str, Tensor]

# Length of the parts of a long document, in characters per token of a row: about four rows of English text.
_CHARS_PER_ROW_TOKEN = 16
# Fewer tokens are a trial; more of them are not looked at.
_CHECKED = range(8192, 2**18)
# Text of one source has 0.00 to 0.02, all licenses of a system, which quote each other, 0.37.
_REPEATED = 0.5
_TEXT_SETTINGS = ("seed", "max_tokens", "sequence_length", "batch_size", "packing")


@dataclass(frozen=True, eq=False)
class CalibrationBatches(Sequence[Batch]):
    """A sequence of batches of model inputs, which can be read any number of times.

    Args:
        batches: dicts with input_ids (B, S) and attention_mask (B, S), int64, on the CPU; for encoder-decoder models
            also decoder_input_ids (B, S) and decoder_attention_mask (B, S). Model inputs of the user are unchanged.
        num_tokens: number of input_ids, padding excluded; 0 for inputs without tokens (images).
        hash: sha256 (hex) over the token ids of every row, padding excluded, and over pixels and audio features.
        description: record of the data as JSON values: sources, counts, hash, seed, lengths.
    """

    batches: tuple[Batch, ...]
    num_tokens: int
    hash: str
    description: dict[str, Any]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self.batches[index]

    def halved(self) -> CalibrationBatches | None:
        """The same rows in batches of half as many; None for single rows, and for model inputs of the user."""
        size = self.description["batch_size"]
        if size is None or size == 1:
            return None
        size = (size + 1) // 2
        batches = tuple(
            {name: rows[start : start + size] for name, rows in batch.items()}
            for batch in self.batches
            for start in range(0, len(batch["input_ids"]), size)
        )
        described = {**self.description, "num_batches": len(batches), "batch_size": size}
        return replace(self, batches=batches, description=described)


def build_batches(
    config: CalibrationConfig,
    tokenizer: Any = None,
    pad_token_id: int | None = None,
    is_encoder_decoder: bool = False,
    decoder_start_token_id: int | None = None,
) -> CalibrationBatches:
    """Read, sample, tokenize and batch the calibration data.

    Args:
        config: source and amount of the data.
        tokenizer: the model's tokenizer or processor; not needed for model inputs and token ids.
        pad_token_id: id of padding, which is masked; by default the tokenizer's pad token, else 0.
        is_encoder_decoder: add decoder inputs: the same row shifted right, with the same mask as the encoder's.
        decoder_start_token_id: first decoder token, needed for encoder-decoder models.

    Raises:
        ValueError: empty or too little data, an unknown type, a missing column, tokenizer, EOS token, chat template or
            decoder start token.
    """
    sources = read_sources(config.source, config.text_column)
    if isinstance(sources, ReadyInputs):
        batches = list(
            ready_batches(sources, config.num_samples, decoder_start_token_id if is_encoder_decoder else None)
        )
        return _finish(batches, config, [{"name": sources.name, "batches": len(batches)}])
    if isinstance(sources, MediaSource):
        return _media_batches(sources, config, tokenizer)
    tokenizer = _text_tokenizer(tokenizer, sources)
    if is_encoder_decoder and decoder_start_token_id is None:
        raise ValueError("An encoder-decoder model needs decoder_start_token_id. Pass config.decoder_start_token_id.")
    if is_encoder_decoder and any(source.has_labels and source.is_tokenized for source in sources):
        raise ValueError(
            "Rows of token ids with labels are inputs and targets of an encoder-decoder model. Pass a DataLoader "
            "with DataCollatorForSeq2Seq, or rows without labels."
        )
    if pad_token_id is None:
        pad_token_id = int(getattr(tokenizer, "pad_token_id", None) or 0)
    rows, draws = _draw_rows(config, sources, tokenizer)
    _warn_of_repeats(rows)
    batches = []
    for start in range(0, len(rows), config.batch_size):
        batch = _pad(rows[start : start + config.batch_size], pad_token_id)
        if is_encoder_decoder and decoder_start_token_id is not None:
            shifted = batch["input_ids"].roll(1, dims=1)
            shifted[:, 0] = decoder_start_token_id
            batch["decoder_input_ids"] = shifted
            batch["decoder_attention_mask"] = batch["attention_mask"].clone()
        batches.append(batch)
    return _finish(batches, config, [_describe(draw) for draw in draws], _TEXT_SETTINGS)


def draw_documents(config: CalibrationConfig, tokenizer: Any) -> list[TokenIds]:
    """The documents that `build_batches` would draw, as token ids without special tokens, before they become rows.

    Long documents are split into parts. Returns at most `config.max_tokens` tokens and `config.num_samples` documents.

    Raises:
        ValueError: as for `build_batches`, and for model inputs, which have no documents.
    """
    sources = read_sources(config.source, config.text_column)
    if not isinstance(sources, list):
        raise ValueError("Model inputs, images, audio and video have no documents. Pass text.")
    tokenizer = _text_tokenizer(tokenizer, sources)
    draws = [Draw(source) for source in sources]
    return mix(draws, lambda draw: _tokens(draw, config, tokenizer), config.num_samples, config.max_tokens)


def _text_tokenizer(tokenizer: Any, sources: Sequence[TextSource]) -> Any:
    if tokenizer is None and not all(source.is_tokenized for source in sources):
        raise ValueError("Text needs a tokenizer, and none was given. Pass tokenizer=, or rows of token ids.")
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def _tokens(draw: Draw, config: CalibrationConfig, tokenizer: Any) -> Iterator[TokenIds]:
    max_chars = _CHARS_PER_ROW_TOKEN * config.sequence_length
    return tokenized(ordered(draw.source, config.random_seed, max_chars), tokenizer, draw)


def _draw_rows(
    config: CalibrationConfig, sources: Sequence[TextSource], tokenizer: Any
) -> tuple[list[TokenIds], list[Draw]]:
    affixes = Affixes((), ()) if tokenizer is None else find_affixes(tokenizer)
    if len(affixes.prefix) >= config.sequence_length:
        raise ValueError(
            f"sequence_length={config.sequence_length} leaves no room for text after the {len(affixes.prefix)} special "
            "tokens that the tokenizer adds. Raise it."
        )
    texts = [source for source in sources if not source.is_tokenized]
    if texts and config.packing and tokenizer.eos_token_id is None:
        raise ValueError("packing joins documents with the EOS token, and this tokenizer has none. Pass packing=False.")

    def rows_of(draw: Draw) -> Iterator[TokenIds]:
        documents = _tokens(draw, config, tokenizer)
        if draw.source.is_tokenized:
            # Tokenized rows already contain their special tokens.
            return document_rows(documents, config.sequence_length, Affixes((), ()))
        if not config.packing:
            return document_rows(documents, config.sequence_length, affixes)
        return packed_rows(documents, config.sequence_length, int(tokenizer.eos_token_id), affixes.prefix, draw)

    draws = [Draw(source) for source in sources]
    rows = mix(draws, rows_of, config.num_samples, config.max_tokens)
    _check_drawn(draws, config, affixes)
    return rows, draws


def _check_drawn(draws: Sequence[Draw], config: CalibrationConfig, affixes: Affixes) -> None:
    for draw in draws:
        if draw.items:
            continue
        if draw.exhausted and draw.tokens_left_over:
            raise ValueError(
                f"{draw.source.name} has {draw.tokens_left_over} tokens, fewer than one packed row of "
                f"sequence_length={config.sequence_length}. Add data, lower sequence_length, or pass packing=False."
            )
        if draw.exhausted:
            raise ValueError(f"{draw.source.name} holds no text ({draw.texts_read} documents, all empty). Add data.")
        raise ValueError(
            f"The limits num_samples={config.num_samples}, max_tokens={config.max_tokens} end before "
            f"{draw.source.name} (weight {draw.source.weight}) gets one row. Raise them."
        )
    exhausted = [draw.source.name for draw in draws if draw.exhausted]
    if len(draws) > 1 and exhausted and (config.max_tokens or config.num_samples):
        logger.warning(
            "The mixture ends at %d tokens (max_tokens=%s): %s is exhausted, and more tokens would break the weights.",
            sum(draw.tokens for draw in draws),
            config.max_tokens,
            exhausted[0],
        )


def _warn_of_repeats(rows: Sequence[TokenIds]) -> None:
    """Warn of text that is mostly copies of itself, such as one license many times."""
    if sum(map(len, rows)) < _CHECKED.start:
        return
    share = repeated_share(rows, _CHECKED.stop)
    if share >= _REPEATED:
        warnings.warn(
            f"{100 * share:.0f}% of the calibration text was there before, in sequences of 16 tokens, so experts are "
            "fitted to less text than its tokens promise. Give every document once, and more of them.",
            stacklevel=4,
        )


def _describe(draw: Draw) -> dict[str, Any]:
    return {
        "name": draw.source.name,
        "weight": draw.source.weight,
        "documents": draw.source.num_documents,
        "texts_read": draw.texts_read,
        "empty_texts": draw.empty_texts,
        "rows": draw.items,
        "tokens": draw.tokens,
        "tokens_left_over": draw.tokens_left_over if draw.exhausted else 0,
    }


def _pad(rows: Sequence[TokenIds], pad_token_id: int) -> Batch:
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def _media_batches(source: MediaSource, config: CalibrationConfig, processor: Any) -> CalibrationBatches:
    """Batches of one example each, without padding, as the processor returns them."""
    check_processor(source, processor)
    batches: list[Any] = []
    tokens = 0
    for example in islice(source.drawn(config.random_seed), config.num_samples):
        batch = model_inputs(example, processor)
        tokens += _count_tokens(batch)
        if config.max_tokens is not None and tokens > config.max_tokens:
            if not batches:
                raise ValueError(
                    f"max_tokens={config.max_tokens} is less than the {tokens} of {example.where}. Raise it."
                )
            break
        batches.append(batch)
    if not batches:
        raise ValueError(f"{source.name} holds no examples. Add data.")
    described = {"name": source.name, "examples": source.num_examples, "batches": len(batches)}
    return _finish(batches, config, [described], ("seed", "max_tokens"))


def _finish(
    batches: Sequence[Batch], config: CalibrationConfig, sources: list[dict[str, Any]], used: Sequence[str] = ()
) -> CalibrationBatches:
    """Add the description, in which settings that are not in `used` are None."""
    digest, num_tokens = hashlib.sha256(), 0
    for batch in batches:
        num_tokens += _count_tokens(batch)
        for piece in _identity(batch):
            digest.update(piece)
    description = {
        "sources": sources,
        "num_tokens": num_tokens,
        "num_batches": len(batches),
        "hash": digest.hexdigest(),
        "num_samples": config.num_samples,
        **{name: getattr(config, name) if name in used else None for name in _TEXT_SETTINGS},
        "seed": config.random_seed if "seed" in used else None,
    }
    return CalibrationBatches(tuple(batches), num_tokens, digest.hexdigest(), description)


def _count_tokens(batch: Mapping[str, Tensor]) -> int:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return int((mask != 0).sum())
    if ids is not None:
        return ids.numel()
    embeds = batch.get("inputs_embeds")
    return 0 if embeds is None else embeds.shape[0] * embeds.shape[1]


def _bytes_of(name: str, tensor: Tensor) -> bytes:
    return name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _identity(batch: Mapping[str, Tensor]) -> Iterable[bytes]:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        for name in sorted(batch):
            if isinstance(batch[name], Tensor):
                yield _bytes_of(name, batch[name])
        return
    for row in range(len(ids)):
        real = ids[row] if mask is None or mask.ndim != 2 else ids[row][mask[row] != 0]
        yield len(real).to_bytes(8, "little") + real.to("cpu", torch.int64).numpy().tobytes()
    # Different pixels and audio features have the same placeholder ids, so hash them too.
    for name in sorted(batch):
        if isinstance(batch[name], Tensor) and batch[name].is_floating_point():
            yield _bytes_of(name, batch[name])
