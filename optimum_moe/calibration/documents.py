"""Documents: rows of calibration data from any source, as text, a chat, or token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from optimum_moe.calibration.chats import Chat, is_chat, read_chat
from optimum_moe.calibration.media import has_media
from optimum_moe.settings import nearest, plain

TokenRow: TypeAlias = tuple[int, ...]
"""A tokenized row, including its special tokens."""
Document: TypeAlias = str | Chat | TokenRow
"""Plain text, a chat still to be rendered with the tokenizer's template, or token ids."""

MESSAGES_COLUMN = "messages"
IDS_COLUMN = "input_ids"
DOMAIN_COLUMN = "domain"
_USUAL_COLUMNS = ("conversations", "conversation", "content", "body", "document", "prompt", "instruction")
_HALVES = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)


class DocumentColumn:
    """A sequence of documents that reads and checks each row when it is accessed.

    Args:
        length: number of rows.
        read: row index -> raw value (a string, a list of messages, token ids, or None for an empty row).
        name: name of the source in errors.
    """

    def __init__(self, length: int, read: Callable[[int], Any], name: str) -> None:
        self._length, self._read, self._name = length, read, name

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document:
        return to_document(self._read(index), f"row {index} of {self._name}")

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class TextSource:
    """Documents of one source, with its weight in a mixture.

    Args:
        name: the source's name (a file name, never a full path, since model cards show it).
        documents: a list in memory, a lazily read column, or a one-shot stream.
        weight: relative share of tokens in a mixture, > 0.
        is_tokenized: whether the documents are rows of token ids.
        has_labels: whether rows of token ids have labels.
        domains: the domain of each document as its row names it, or of all of them; None if none is named.
    """

    name: str
    documents: list[Document] | DocumentColumn | Iterator[Document]
    weight: float = 1.0
    is_tokenized: bool = False
    has_labels: bool = False
    domains: Sequence[Any] | str | None = None

    def selected(self, chosen: Sequence[int], name: str | None = None) -> TextSource:
        """The source with some of its documents, by number; not for a stream."""
        documents = self.documents
        assert not isinstance(documents, Iterator)
        kept: list[Document] | DocumentColumn
        if isinstance(documents, list):
            kept = [documents[index] for index in chosen]
        else:
            kept = DocumentColumn(len(chosen), lambda index: documents[chosen[index]], self.name)
        domains = self.domains
        if domains is not None and not isinstance(domains, str):
            domains = [domains[index] for index in chosen]
        return replace(self, name=name or self.name, documents=kept, domains=domains)

    @property
    def num_documents(self) -> int | None:
        """Number of documents, None for a stream."""
        return None if isinstance(self.documents, Iterator) else len(self.documents)


def did_you_mean(word: object, options: Iterable[str], cutoff: float = 0.5) -> str:
    """The tail of an error about an unknown name: "; did you mean 'x'?" with the nearest of `options`, or ""."""
    near = nearest(word, options, cutoff)
    return f"; did you mean {near!r}?" if near else ""


def shorten(value: Any) -> str:
    """Type and beginning of a value, for errors."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def to_document(value: Any, where: str) -> Document:
    """Check one raw value: text, a chat, token ids, or None (an empty row, returned as "").

    Raises:
        ValueError: the value is of another type; `where` names the place.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return _checked_text(value, where)
    refuse_media(value, where)
    if is_chat(value):
        return read_chat(value, where)
    if is_tokens(value):
        return tuple(plain(value)) or ""
    raise ValueError(
        f"Text, a chat or token ids are expected, {where} is {shorten(value)}. Pass strings, lists of "
        '{"role": ..., "content": ...} messages, or lists of token ids.'
    )


def is_tokens(value: Any) -> bool:
    """Whether a raw value is one row of token ids."""
    ids = plain(value)
    return isinstance(ids, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)


def row_value(row: Mapping[str, Any], column: str) -> Any:
    """The value of a row's column; masked token ids are dropped."""
    value, mask = plain(row[column]), plain(row.get("attention_mask")) if column == IDS_COLUMN else None
    if not isinstance(mask, list) or not is_tokens(value) or len(mask) != len(value):
        return value
    return [token for token, real in zip(value, mask, strict=True) if real]


def refuse_media(item: Any, where: str) -> None:
    """Refuse a row with media if the first row has none, since then all rows are read as text."""
    if has_media(item):
        raise ValueError(
            f"{where} has images, audio or video, and the first row has none. Put a row with media first, or pass "
            "the rows as a list."
        )


def pick_column(columns: Iterable[str], text_column: str, where: str) -> str:
    """The column to read: `text_column`, else messages, else token ids.

    Raises:
        ValueError: none of these columns exists.
    """
    columns = list(columns)
    for column in (text_column, MESSAGES_COLUMN, IDS_COLUMN):
        if column in columns:
            return column
    halves = next((pair for pair in _HALVES if set(pair) <= set(columns)), None)
    near = next((name for name in _USUAL_COLUMNS if name in columns), None)
    if halves is not None:
        hint = (
            f". Make one of {halves[0]!r} and {halves[1]!r} in every row: "
            '"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]. A single column is '
            "read with text_column."
        )
    elif near is not None:
        hint = f"; did you mean text_column={near!r}?"
    else:
        hint = f"{did_you_mean(text_column, columns) or '.'} Set text_column."
    raise ValueError(
        f"No column {text_column!r}, {MESSAGES_COLUMN!r} or {IDS_COLUMN!r} in {where}, which has {columns}{hint}"
    )


def _checked_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} is not valid Unicode text ({error.reason} at character {error.start}). Repair it, for instance "
            'with text.encode(errors="replace").decode().'
        ) from error
    return text
