"""Held-out text, tokenized for the tasks: packed windows, and seeded spans of documents."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import ProcessorMixin

from optimum_moe.calibration.chats import chat_text
from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig, build_batches, draw_documents
from optimum_moe.calibration.media import MediaSource
from optimum_moe.calibration.sampling import find_affixes
from optimum_moe.calibration.sources import ReadyInputs, by_domain, read_sources

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, tokenized once for all models.

    Args:
        windows: rows of sequence_length tokens without overlap, as batches.
        documents: token ids of the documents in the windows (parts, for long documents), without special tokens.
        prefix: special tokens that the tokenizer adds before a text, often BOS or none.
    """

    windows: CalibrationBatches
    documents: tuple[tuple[int, ...], ...]
    prefix: tuple[int, ...]

    def spans(self, length: int, count: int, seed: int, purpose: str) -> list[tuple[int, int]]:
        """At most `count` (document, start) of spans of `length` tokens that do not overlap, in a seeded order.

        Raises:
            ValueError: no document is that long.
        """
        spans = [
            (index, start)
            for index, document in enumerate(self.documents)
            for start in range(0, len(document) - length + 1, length)
        ]
        if not spans:
            longest = max((len(document) for document in self.documents), default=0)
            raise ValueError(
                f"{purpose} needs documents of at least {length} tokens, the longest held-out one has {longest}. Pass "
                "longer documents, or tasks=... without it."
            )
        if len(spans) < count:
            logger.warning("%s: the held-out text has room for %d of %d.", purpose, len(spans), count)
        random.Random(seed).shuffle(spans)
        return spans[:count]


def prepare(
    text: Any, tokenizer: Any, *, max_tokens: int | None, sequence_length: int, batch_size: int, seed: int
) -> HeldOut:
    """Read, sample and tokenize held-out text; arguments as for `evaluate`.

    Raises:
        ValueError: as for `build_batches`.
    """
    given = CalibrationConfig.coerce(text)
    config = CalibrationConfig(
        source=given.source,
        text_column=given.text_column,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    windows = build_batches(config, tokenizer)
    if isinstance(read_sources(config.source, config.text_column), ReadyInputs):
        documents = tuple(tuple(row) for row in _rows(windows))
        return HeldOut(windows, documents, ())
    if tokenizer is None:
        # Rows of token ids need no tokenizer, and get no prefix.
        return HeldOut(windows, tuple(tuple(ids) for ids in draw_documents(config, None)), ())
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    drawn = draw_documents(config, tokenizer)
    return HeldOut(windows, tuple(tuple(ids) for ids in drawn), find_affixes(tokenizer).prefix)


def prepare_domains(text: Any, tokenizer: Any, **amount: Any) -> dict[str, HeldOut]:
    """Held-out text of each domain, or of "" alone if none is named; the amount, as for `prepare`, is that of each.

    Raises:
        ValueError: as for `prepare`, or only some of the text has a domain.
    """
    given = CalibrationConfig.coerce(text)
    domains = by_domain(given.source, given.text_column)
    if not domains:
        return {"": prepare(text, tokenizer, **amount)}
    return {name: prepare(replace(given, source=parts), tokenizer, **amount) for name, parts in domains.items()}


def texts_of(value: Any, tokenizer: Any = None) -> Iterator[str]:
    """The plain texts of any source, for comparison; chats give their contents, and model inputs are decoded.

    Raises:
        ValueError: model inputs without a tokenizer to decode them.
    """
    config = CalibrationConfig.coerce(value)
    sources = read_sources(config.source, config.text_column)
    if isinstance(sources, ReadyInputs):
        yield from (_decoded(row, tokenizer) for row in _rows(build_batches(config)))
        return
    if isinstance(sources, MediaSource):
        yield from (example.plain_text for example in sources.drawn(config.random_seed))
        return
    for source in sources:
        for document in source.documents:
            if isinstance(document, tuple):
                yield _decoded(document, tokenizer)
            else:
                yield document if isinstance(document, str) else chat_text(document)


def _decoded(row: Sequence[int], tokenizer: Any) -> str:
    if tokenizer is None:
        raise ValueError("Model inputs are compared as text, which needs a tokenizer. Pass tokenizer=.")
    return str(tokenizer.decode(list(row), skip_special_tokens=True))


def _rows(batches: CalibrationBatches) -> Iterator[list[int]]:
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(f"Held-out model inputs need input_ids, these have {list(batch)}. Pass text.")
        mask = batch.get("attention_mask")
        for row, ids in enumerate(batch["input_ids"]):
            yield (ids if mask is None else ids[mask[row] != 0]).tolist()
