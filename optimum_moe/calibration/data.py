"""Calibration data: one config for every kind of source, and the batches that models are run on.

Shape letters: B rows of a batch, S tokens of a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor
from transformers import ProcessorMixin

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
    tokenized,
)
from optimum_moe.calibration.sources import ReadyInputs, TextSource, did_you_mean, read_sources

logger = logging.getLogger(__name__)

Batch: TypeAlias = dict[str, Tensor]
UnseenPolicy: TypeAlias = Literal["warn", "error", "keep", "prune"]

# Parts that a long document is cut into, in characters for each token of a row: about four rows of English text.
_CHARS_PER_ROW_TOKEN = 16
_TEXT_SETTINGS = ("seed", "max_tokens", "sequence_length", "batch_size", "packing")


DEFAULT_SAMPLE = 4096
"""Tokens of a block's sample where neither user nor method says how many."""


@dataclass(frozen=True)
class CalibrationConfig:
    """What a model is observed on.

    Args:
        source: one of
            a path to a .txt (documents separated by blank lines), .jsonl or .parquet file;
            a list of strings, or of chats (lists of {"role", "content"} messages, rendered with the tokenizer's chat
            template), or of rows with a text or messages column; a stream of those keeps its order;
            a `datasets.Dataset`;
            examples with images, audio or video, which the model's processor turns into inputs one by one and whole
            (`sequence_length`, `batch_size` and `packing` do not apply): chats with such content, or rows of {"text":
            with the processor's placeholders, "images", "audio" or "videos": objects or paths}; paths in a .jsonl
            start from its folder;
            an iterable of model-input dicts, passed on untouched and whole: only `num_samples` limits them;
            a mixture of text sources, {source: weight} or [(source, weight), ...]: token counts follow the weights,
            and the mixture ends where its first source does.
        num_samples: at most so many rows (of ready inputs: dicts); None (default) for no limit.
        max_tokens: at most so many tokens, padding not counted. Default 65,536; None for all there are.
        sequence_length: tokens of a row, default 512.
        batch_size: rows of a batch, default 8.
        packing: True (default) joins documents with the EOS token and cuts rows without padding; the tail that fills
            no row is left over. False makes one document a row, padded, and cuts longer documents into several rows.
        text_column: column of the text in .jsonl, .parquet and datasets, default "text". Without it a "messages"
            column is read as chats.
        seed: which documents are drawn and in which order, default 0.
        unseen: what happens to an expert that no calibration token reached: "warn" (default), "error", "keep", "prune".
        reservoir_tokens: tokens of each block that are kept whole, for what needs several experts on the same tokens.
            None (default) for as many as the method wants (4,096, or more where it factorises); 0 keeps none.

    Raises:
        ValueError: a value outside of its range.
    """

    source: Any
    num_samples: int | None = None
    max_tokens: int | None = 65536
    sequence_length: int = 512
    batch_size: int = 8
    packing: bool = True
    text_column: str = "text"
    seed: int = 0
    unseen: UnseenPolicy = "warn"
    reservoir_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.source is None:
            raise ValueError("source is None. Pass a path, texts, chats, a dataset or model inputs.")
        for name, least in (("num_samples", 1), ("max_tokens", 1), ("reservoir_tokens", 0)):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least, ", or None")
        # A row of one token predicts nothing.
        for name, least in (("sequence_length", 2), ("batch_size", 1), ("seed", 0)):
            _check_count(name, getattr(self, name), least)
        if self.max_tokens is not None and self.max_tokens < self.sequence_length:
            raise ValueError(
                f"max_tokens={self.max_tokens} is smaller than sequence_length={self.sequence_length}: not one row "
                "fits. Raise max_tokens or lower sequence_length."
            )
        if self.unseen not in get_args(UnseenPolicy):
            raise ValueError(
                f"unseen={self.unseen!r} is not one of {get_args(UnseenPolicy)}"
                f"{did_you_mean(self.unseen, get_args(UnseenPolicy)) or '.'}"
            )

    @property
    def sampled_tokens(self) -> int:
        """Tokens of the sample of each block."""
        return DEFAULT_SAMPLE if self.reservoir_tokens is None else self.reservoir_tokens

    @classmethod
    def coerce(cls, value: Any) -> CalibrationConfig:
        """A config from whatever `calibration=` accepts.

        Args:
            value: a config (returned as it is), a dict of its fields with "source" among them (as a recipe has it), or
                any source.

        Raises:
            ValueError: None, an unknown field, or a field outside of its range.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and "source" in value and not isinstance(value["source"], int | float):
            fields = [field.name for field in dataclasses.fields(cls)]
            for key in value:
                if key not in fields:
                    raise ValueError(
                        f"Unknown field {key!r}{did_you_mean(key, fields) or f', the fields are {fields}.'}"
                    )
            return cls(**value)
        return cls(source=value)


@dataclass(frozen=True, eq=False)
class CalibrationBatches(Sequence[Batch]):
    """Batches of model inputs, sized and readable any number of times.

    Args:
        batches: dicts with input_ids (B, S) and attention_mask (B, S), int64, on the CPU; for encoder-decoder models
            also decoder_input_ids (B, S) and decoder_attention_mask (B, S). Ready inputs are what they were.
        num_tokens: real tokens of the input_ids, padding excluded; 0 for inputs that have no tokens (images).
        hash: sha256 (hex) over the token ids of every row, padding excluded, and over pixels and audio features.
        description: JSON-able record of the data: sources, counts, hash, seed, lengths.
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


def build_batches(
    config: CalibrationConfig,
    tokenizer: Any = None,
    pad_token_id: int | None = None,
    is_encoder_decoder: bool = False,
    decoder_start_token_id: int | None = None,
) -> CalibrationBatches:
    """Read, sample, tokenise and batch the calibration data.

    Args:
        config: what to read and how much of it.
        tokenizer: the model's tokenizer or processor; only ready inputs do without.
        pad_token_id: id that fills padding; by default the tokenizer's pad token, else 0. Padding is masked.
        is_encoder_decoder: add decoder inputs: the same row shifted right, with the same mask as the encoder's.
        decoder_start_token_id: first decoder token, needed for encoder-decoder models.

    Raises:
        ValueError: empty or too little data, an unknown type, a missing column, tokenizer, EOS token, chat template or
            decoder start token.
    """
    sources = read_sources(config.source, config.text_column)
    if isinstance(sources, ReadyInputs):
        return _ready_batches(sources, config)
    if isinstance(sources, MediaSource):
        return _media_batches(sources, config, tokenizer)
    tokenizer = _text_tokenizer(tokenizer)
    if is_encoder_decoder and decoder_start_token_id is None:
        raise ValueError("An encoder-decoder model needs decoder_start_token_id. Pass config.decoder_start_token_id.")
    if pad_token_id is None:
        pad_token_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    rows, draws = _draw_rows(config, sources, tokenizer)
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
    """The documents that `build_batches` would draw, as token ids without special tokens; not cut into rows.

    Long documents come in parts. At most `config.max_tokens` tokens in all, `config.num_samples` documents.

    Raises:
        ValueError: as for `build_batches`, and for ready inputs, which have no documents.
    """
    sources = read_sources(config.source, config.text_column)
    if not isinstance(sources, list):
        raise ValueError("Model inputs, images, audio and video have no documents. Pass text.")
    tokenizer = _text_tokenizer(tokenizer)
    draws = [Draw(source) for source in sources]
    return mix(draws, lambda draw: _tokens(draw, config, tokenizer), config.num_samples, config.max_tokens)


def _check_count(name: str, value: Any, least: int, other: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is out of range. Pass an integer of at least {least}{other}.")


def _text_tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("Text needs a tokenizer and none was given. Pass tokenizer=, or ready model inputs.")
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def _tokens(draw: Draw, config: CalibrationConfig, tokenizer: Any) -> Iterator[TokenIds]:
    max_chars = _CHARS_PER_ROW_TOKEN * config.sequence_length
    return tokenized(ordered(draw.source, config.seed, max_chars), tokenizer, draw)


def _draw_rows(
    config: CalibrationConfig, sources: Sequence[TextSource], tokenizer: Any
) -> tuple[list[TokenIds], list[Draw]]:
    affixes = find_affixes(tokenizer)
    if len(affixes.prefix) >= config.sequence_length:
        raise ValueError(
            f"sequence_length={config.sequence_length} leaves no room beside the {len(affixes.prefix)} special tokens "
            "that the tokenizer puts before a text. Raise it."
        )
    if config.packing and tokenizer.eos_token_id is None:
        raise ValueError("packing joins documents with the EOS token, this tokenizer has none. Pass packing=False.")

    def rows_of(draw: Draw) -> Iterator[TokenIds]:
        documents = _tokens(draw, config, tokenizer)
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
            "The mixture ends at %d tokens (max_tokens=%s): %s has no more, and going on would break the weights.",
            sum(draw.tokens for draw in draws),
            config.max_tokens,
            exhausted[0],
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


def _ready_batches(ready: ReadyInputs, config: CalibrationConfig) -> CalibrationBatches:
    batches: list[Any] = []
    for index, batch in enumerate(islice(ready.inputs, config.num_samples)):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(batch, Mapping) or (ids is not None and not (isinstance(ids, Tensor) and ids.ndim == 2)):
            raise ValueError(
                f"Model inputs are dicts whose input_ids are a tensor of shape (batch, tokens), item {index} is "
                f"{type(batch).__name__} with input_ids of {getattr(ids, 'shape', type(ids).__name__)}. Pass batches, "
                "for instance from a DataLoader."
            )
        batches.append(batch)
    return _finish(batches, config, [{"name": ready.name, "batches": len(batches)}])


def _media_batches(source: MediaSource, config: CalibrationConfig, processor: Any) -> CalibrationBatches:
    """One example a batch: whole, without padding, as its processor makes it."""
    check_processor(source, processor)
    batches: list[Any] = []
    tokens = 0
    for example in islice(source.drawn(config.seed), config.num_samples):
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
    """The batches with their description, in which settings that were not `used` are None."""
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
    # Pixels and audio features stand behind the same placeholder ids.
    for name in sorted(batch):
        if isinstance(batch[name], Tensor) and batch[name].is_floating_point():
            yield _bytes_of(name, batch[name])
