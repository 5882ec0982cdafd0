"""From documents to rows of token ids, lazily: seeded order, tokenization, packing, and mixing by weight."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from optimum_moe.calibration.chats import render_chat
from optimum_moe.calibration.documents import Document, TextSource

TokenIds: TypeAlias = list[int]

_SEQUENCE = 16
"""Tokens that are repeated together by copying, but hardly by chance."""

# Documents tokenized in one call: enough for the threads of fast tokenizers, few enough to waste little at the end.
_TOKENIZE_AT_ONCE = 32


@dataclass(frozen=True)
class Affixes:
    """The special tokens that a tokenizer adds around a text, for instance BOS before it; both may be empty."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass
class Draw:
    """The state of reading one source, with counts of the data taken from it.

    Args:
        source: source of the documents.
        texts_read: number of documents tokenized so far (parts, for documents split by `split_long`).
        empty_texts: number of those without a token.
        items: number of rows (or documents) taken.
        tokens: number of tokens in them.
        tokens_left_over: tokens at the end of the source that did not fill a packed row.
        exhausted: whether the source has no more documents.
    """

    source: TextSource
    texts_read: int = 0
    empty_texts: int = 0
    items: int = 0
    tokens: int = 0
    tokens_left_over: int = 0
    exhausted: bool = False


def find_affixes(tokenizer: Any) -> Affixes:
    """The special tokens that a tokenizer adds around a text by default."""
    # A word-level tokenizer may not know the shorter texts.
    for probe in ("a", "1", "the", "hello"):
        bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(probe)["input_ids"])
        for start in range(len(full) - len(bare) + 1 if bare else 0):
            if full[start : start + len(bare)] == bare:
                return Affixes(tuple(full[:start]), tuple(full[start + len(bare) :]))
    return Affixes((), ())


def split_long(document: Document, max_chars: int) -> list[Document]:
    """Cut a text of more than 4 * max_chars characters into consecutive parts of at most max_chars characters.

    Otherwise a book in one file would be tokenized as a whole, and only its beginning sampled. Cuts are made after a
    line, else after a space, if there is one; the joined parts are equal to the text. Chats and token ids are not
    split.
    """
    if not isinstance(document, str) or len(document) <= 4 * max_chars:
        return [document]
    parts: list[Document] = []
    start = 0
    while start < len(document):
        end = start + max_chars
        if end < len(document):
            for mark in ("\n", " "):
                found = document.rfind(mark, start + max_chars // 2, end)
                if found >= 0:
                    end = found + 1
                    break
        parts.append(document[start:end])
        start = end
    return parts


def ordered(source: TextSource, seed: int, max_chars: int) -> Iterator[Document]:
    """The documents of a source in their seeded order.

    Sources in memory are split (`split_long`) and then shuffled; columns on disk are read in a shuffled order and split
    when read; streams keep their order, since they may be endless.
    """
    documents = source.documents
    if isinstance(documents, Iterator):
        for document in documents:
            yield from split_long(document, max_chars)
    elif isinstance(documents, list):
        parts = [part for document in documents for part in split_long(document, max_chars)]
        random.Random(seed).shuffle(parts)
        yield from parts
    else:
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        for index in order:
            yield from split_long(documents[index], max_chars)


def tokenized(documents: Iterable[Document], tokenizer: Any, draw: Draw) -> Iterator[TokenIds]:
    """Token ids of every nonempty document, without the special tokens that the tokenizer would add.

    Rows of token ids are unchanged.

    Raises:
        ValueError: the source mixes texts and rows of token ids.
    """
    pending: list[str] = []

    def flush() -> Iterator[TokenIds]:
        if not pending:
            return
        for ids in tokenizer(pending, add_special_tokens=False, verbose=False)["input_ids"]:
            draw.texts_read += 1
            if ids:
                yield list(ids)
            else:
                draw.empty_texts += 1
        pending.clear()

    for document in documents:
        if isinstance(document, tuple) != draw.source.is_tokenized and document:
            raise ValueError(
                f"{draw.source.name} holds both texts and rows of token ids. Give them as two sources of a mixture."
            )
        if isinstance(document, tuple):
            draw.texts_read += 1
            yield list(document)
            continue
        pending.append(document if isinstance(document, str) else render_chat(document, tokenizer))
        if len(pending) == _TOKENIZE_AT_ONCE:
            yield from flush()
    yield from flush()


def packed_rows(
    documents: Iterable[TokenIds], length: int, eos: int, prefix: Sequence[int], draw: Draw
) -> Iterator[TokenIds]:
    """Rows of exactly `length` tokens cut from the documents joined by `eos`.

    Each row starts with `prefix`, since models trained with BOS need it. Tokens at the end of the source that fill no
    row are counted in `draw.tokens_left_over`.
    """
    buffer: TokenIds = []
    head = list(prefix)
    for ids in documents:
        buffer += ids
        if ids[-1] != eos:
            buffer.append(eos)
        start = 0
        while len(buffer) - start >= length:
            row_head = [] if buffer[start : start + len(head)] == head else head
            end = start + length - len(row_head)
            yield row_head + buffer[start:end]
            start = end
        del buffer[:start]
    draw.tokens_left_over = len(buffer)


def document_rows(documents: Iterable[TokenIds], length: int, affixes: Affixes) -> Iterator[TokenIds]:
    """One row of at most `length` tokens per document; a longer document gives several rows, each with the prefix."""
    prefix, suffix = list(affixes.prefix), list(affixes.suffix)
    for ids in documents:
        body = ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else list(ids)
        if suffix and body[-len(suffix) :] != suffix:
            body += suffix
        room = length - len(prefix)
        for start in range(0, len(body), room):
            yield prefix + body[start : start + room]


def mix(
    draws: Sequence[Draw],
    items_of: Callable[[Draw], Iterator[TokenIds]],
    max_items: int | None,
    max_tokens: int | None,
) -> list[TokenIds]:
    """Take items from several sources so that their token counts follow the weights, until a limit or an end.

    The next item always comes from the source that is furthest below its share, so shares are exact to within one item
    at any point. Mixing stops when a source with weight is exhausted, since more items would break the shares.

    Args:
        draws: the sources; their counts are updated.
        items_of: opens the items (rows or documents, as token ids) of a source.
        max_items: maximum number of items, None for no limit.
        max_tokens: maximum number of tokens, None for no limit; an item that would exceed it is not taken.

    Returns:
        The items in the order taken.
    """
    streams = [items_of(draw) for draw in draws]
    taken: list[TokenIds] = []
    total = 0
    while max_items is None or len(taken) < max_items:
        index = min(range(len(draws)), key=lambda i: (draws[i].tokens / draws[i].source.weight, i))
        item = next(streams[index], None)
        if item is None:
            draws[index].exhausted = True
            break
        if max_tokens is not None and total + len(item) > max_tokens:
            break
        taken.append(item)
        total += len(item)
        draws[index].items += 1
        draws[index].tokens += len(item)
    return taken


def repeated_share(rows: Iterable[TokenIds], max_tokens: int) -> float:
    """Share of all sequences of 16 tokens that occurred before, in the same row or another.

    Args:
        rows: rows of token ids; shorter ones than a sequence do not count.
        max_tokens: maximum number of tokens to look at.
    """
    seen: set[int] = set()
    count = 0
    for row in rows:
        count += max(0, len(row) - _SEQUENCE + 1)
        seen.update(hash(tuple(row[i : i + _SEQUENCE])) for i in range(len(row) - _SEQUENCE + 1))
        if count >= max_tokens:
            break
    return (count - len(seen)) / max(count, 1)
