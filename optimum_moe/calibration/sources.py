"""Reading calibration text: files, lists, chats, datasets and ready model inputs behind one interface.

Nothing here executes code or unpickles: text files, JSON lines and Parquet columns are the only formats read from disk.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch

from optimum_moe.calibration.hub import load_hub_data_set
from optimum_moe.calibration.media import (
    MEDIA_COLUMNS,
    ExampleColumn,
    MediaExample,
    MediaSource,
    has_media,
    read_example,
)
from optimum_moe.checkpoint.names import data_set_name
from optimum_moe.checkpoint.system import native_path, utf8_path

Chat: TypeAlias = list[Mapping[str, Any]]
"""One conversation: messages of {"role": ..., "content": ...}."""
Document: TypeAlias = str | Chat
"""What one source row holds: plain text, or a chat still to be rendered with the tokenizer's template."""

FILE_TYPES = (".txt", ".jsonl", ".parquet")
MESSAGES_COLUMN = "messages"


class DocumentColumn:
    """A sized, lazily read column of documents: row i is read and checked only when it is asked for.

    Args:
        length: number of rows.
        read: row index -> raw value (a string, a list of messages, or None for an empty row).
        name: how errors name the source.
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
    """Documents of one source, with the share of tokens that it gets in a mixture.

    Args:
        name: the source's own name (a file name, never a full path: it ends up in model cards).
        documents: a list in memory, a lazily read column, or a one-shot stream.
        weight: relative share of tokens in a mixture, > 0.
    """

    name: str
    documents: list[Document] | DocumentColumn | Iterator[Document]
    weight: float = 1.0

    @property
    def num_documents(self) -> int | None:
        """Number of documents, None for a stream."""
        return None if isinstance(self.documents, Iterator) else len(self.documents)


@dataclass(frozen=True)
class ReadyInputs:
    """Model inputs that the caller has already made: dicts of tensors, passed on untouched."""

    name: str
    inputs: Iterable[Mapping[str, Any]]


def did_you_mean(word: object, options: Iterable[str]) -> str:
    """The tail of an error about an unknown name: "; did you mean 'x'?" with the nearest of `options`, or ""."""
    matches = difflib.get_close_matches(str(word), list(options), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def read_sources(source: Any, text_column: str = "text") -> list[TextSource] | ReadyInputs | MediaSource:
    """Read any supported source, see `CalibrationConfig.source`.

    Args:
        source: a path, list of strings, list of chats, dataset, iterable of model inputs, or a mixture of text sources.
        text_column: column of text in .jsonl, .parquet and datasets; a "messages" column is read as chats without it.

    Returns:
        The text sources with their weights (one with weight 1.0 unless it is a mixture), or the ready inputs, or
        examples with images, audio or video.

    Raises:
        ValueError: nothing in the source, an unknown type of file or object, a missing column, an invalid weight.
    """
    pairs = _mixture(source)
    if pairs is None:
        read = _read_one(source, text_column)
        return [read] if isinstance(read, TextSource) else read
    sources = []
    for part, weight in pairs:
        if isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"The weight of {part!r} in a mixture is {weight}: it must be positive and finite.")
        read = _read_one(part, text_column)
        if not isinstance(read, TextSource):
            kind = "model inputs" if isinstance(read, ReadyInputs) else "images, audio or video"
            raise ValueError(f"A mixture holds text sources, this one holds {kind}. Mix them yourself.")
        sources.append(TextSource(read.name, read.documents, float(weight)))
    return sources


def to_document(value: Any, where: str) -> Document:
    """Check one raw value: text, a chat, or None (an empty row, returned as "").

    Raises:
        ValueError: it is neither; `where` names the place.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    _refuse_media(value, where)
    if isinstance(value, list | tuple) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return [dict(message) for message in value]
    raise ValueError(
        f"Text or a chat is expected, {where} is {_shorten(value)}. Pass strings, or lists of "
        '{"role": ..., "content": ...} messages.'
    )


def _refuse_media(item: Any, where: str) -> None:
    """Rows are read as text where the first one has no media: later media would be left out."""
    if has_media(item):
        raise ValueError(
            f"{where} has images, audio or video, and the first row has none. Put a row that has some first, or pass "
            "the rows as a list."
        )


def _shorten(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _mixture(source: Any) -> list[tuple[Any, float]] | None:
    if isinstance(source, Mapping):
        if source and all(_is_number(weight) for weight in source.values()):
            return list(source.items())
        raise ValueError(
            f"A dict as a source is a mixture of {{source: weight}}, this one has the keys {list(source)[:8]} and no "
            "weights. Pass one split of a DatasetDict, or put a single dict of model inputs in a list."
        )
    if isinstance(source, list | tuple) and source and all(_is_pair(item) for item in source):
        return list(source)
    return None


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and _is_number(item[1])


def _read_one(source: Any, text_column: str) -> TextSource | ReadyInputs | MediaSource:
    if isinstance(source, str) and data_set_name(source) is not None:
        return _stream(iter(load_hub_data_set(source)), text_column, source)
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(native_path(source)), text_column)
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise ValueError(
            f"Unknown calibration source {_shorten(source)}. Pass a path to {', '.join(FILE_TYPES)}, a list of strings "
            "or of chats, a datasets.Dataset, or an iterable of model inputs."
        )
    if hasattr(source, "column_names"):
        return _read_dataset(source, text_column)
    return _read_iterable(source, text_column)


def _read_file(path: Path, text_column: str) -> TextSource | MediaSource:
    if path.suffix.lower() not in FILE_TYPES:
        raise ValueError(
            f"Unknown file type {path.suffix!r} of {str(path)[:80]!r}"
            f"{did_you_mean(path.suffix, FILE_TYPES) or '.'} A string is a path to one of "
            f"{', '.join(FILE_TYPES)}; pass text itself as a list of strings."
        )
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}. Check the path (the working directory is {os.getcwd()!r}).")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, text_column)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error}). Convert it, for instance with iconv.") from error
    if path.suffix.lower() == ".txt":
        blocks: list[Document] = [block.strip("\n") for block in re.split(r"\n[^\S\n]*\n", text) if block.strip()]
        return TextSource(path.name, blocks)
    rows = _parse_jsonl(text, path.name)
    if any(has_media(row) for row, _ in rows):
        return MediaSource(path.name, [read_example(row, text_column, where, path.parent) for row, where in rows])
    documents = [to_document(row[_pick_column(list(row), text_column, where)], where) for row, where in rows]
    return TextSource(path.name, documents)


def _parse_jsonl(text: str, name: str) -> list[tuple[dict[str, Any], str]]:
    """The rows, each with how errors name it."""
    rows = []
    # str.splitlines would also cut at U+2028, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {name}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Every line of a .jsonl file is one JSON object, {where} is not: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"Every line of a .jsonl file is one JSON object, {where} is {_shorten(row)}.")
        rows.append((row, where))
    return rows


def _pick_column(columns: Iterable[str], text_column: str, where: str) -> str:
    columns = list(columns)
    for column in (text_column, MESSAGES_COLUMN):
        if column in columns:
            return column
    raise ValueError(
        f"No column {text_column!r} or {MESSAGES_COLUMN!r} in {where}, which has {columns}"
        f"{did_you_mean(text_column, columns) or '.'} Set text_column."
    )


def _read_parquet(path: Path, text_column: str) -> TextSource | MediaSource:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"Reading {path.name} needs pyarrow, which is not installed. Run `pip install pyarrow`, or convert the "
            "file to .jsonl."
        ) from error
    with utf8_path(path) as given, parquet.ParquetFile(given) as file:
        names = file.schema_arrow.names
        column = _pick_column(names, text_column, path.name)
        media = [name for name in names if name in MEDIA_COLUMNS]
        table = file.read(columns=[column, *media])
    values = table.column(column)
    if media or (len(values) and has_media(values[0].as_py())):

        def read(index: int) -> MediaExample:
            row = table.slice(index, 1).to_pylist()[0]
            return read_example(row, text_column, f"row {index} of {path.name}", path.parent)

        return MediaSource(path.name, ExampleColumn(len(values), read))
    return TextSource(path.name, DocumentColumn(len(values), lambda index: values[index].as_py(), path.name))


def _read_dataset(dataset: Any, text_column: str) -> TextSource | MediaSource:
    label = getattr(getattr(dataset, "info", None), "dataset_name", None) or type(dataset).__name__
    split = getattr(dataset, "split", None)
    name = f"{label}[{split}]" if split else str(label)
    if not hasattr(dataset, "__len__"):
        return _stream(iter(dataset), text_column, name)
    column = _pick_column(dataset.column_names, text_column, name)
    media = [name for name in dataset.column_names if name in MEDIA_COLUMNS]
    # Reading a row reads all its columns.
    texts = dataset.select_columns([column, *media])
    if media or (len(texts) and has_media(texts[0][column])):
        read = partial(_read_row, texts, text_column, name)
        return MediaSource(name, ExampleColumn(len(texts), read))
    return TextSource(name, DocumentColumn(len(texts), lambda index: texts[index][column], name))


def _read_row(rows: Any, text_column: str, name: str, index: int) -> MediaExample:
    return read_example(rows[index], text_column, f"row {index} of {name}")


def _stream(rows: Iterator[Any], text_column: str, name: str) -> TextSource | MediaSource:
    """Rows of a dataset without a length; the first one says whether they have media."""
    first = next(rows, None)
    rows = rows if first is None else chain([first], rows)
    if has_media(first):
        return MediaSource(name, _examples(rows, text_column, name))
    return TextSource(name, _records(rows, text_column, name))


def _examples(rows: Iterable[Any], text_column: str, name: str) -> Iterator[MediaExample]:
    return (read_example(row, text_column, f"row {index} of {name}") for index, row in enumerate(rows))


def _read_iterable(source: Iterable[Any], text_column: str) -> TextSource | ReadyInputs | MediaSource:
    is_list = isinstance(source, list | tuple)
    items = iter(source)
    first = next(items, None)
    if first is None:
        raise ValueError(f"The calibration source is empty ({type(source).__name__} without items). Pass data.")
    if isinstance(first, Mapping) and "role" in first and is_list:
        raise ValueError(
            "A list of messages is one chat; pass a list of chats: [[{'role': ..., 'content': ...}, ...]]."
        )
    if _is_model_input(first, text_column):
        # A list or a DataLoader can be read again, an iterator has already lost its first item.
        inputs = source if items is not source else chain([first], items)
        return ReadyInputs(f"{type(source).__name__} of model inputs", inputs)
    stream = chain([first], items)
    kind = "rows" if isinstance(first, Mapping) else "texts" if isinstance(first, str) else "chats"
    name = f"list of {len(source)} {kind}" if isinstance(source, list | tuple) else f"stream of {kind}"
    if any(has_media(item) for item in (source if isinstance(source, list | tuple) else [first])):
        examples = _examples(stream, text_column, name)
        return MediaSource(name, list(examples) if is_list else examples)
    if kind == "rows":
        documents = _records(stream, text_column, name)
    else:
        documents = (to_document(item, f"item {index} of {name}") for index, item in enumerate(stream))
    return TextSource(name, list(documents) if is_list else documents)


def _is_model_input(item: Any, text_column: str) -> bool:
    if not isinstance(item, Mapping) or text_column in item or MESSAGES_COLUMN in item:
        return False
    return "input_ids" in item or any(isinstance(value, torch.Tensor) for value in item.values())


def _records(rows: Iterator[Any], text_column: str, name: str) -> Iterator[Document]:
    for index, row in enumerate(rows):
        where = f"row {index} of {name}"
        if not isinstance(row, Mapping):
            raise ValueError(f"Every row is a dict, {where} is {_shorten(row)}.")
        _refuse_media(row, where)
        yield to_document(row[_pick_column(list(row), text_column, where)], where)


def check_source(source: Any) -> None:
    """Refuse the path of a file that is not there before any work is done, also where nothing would read it.

    Raises:
        ValueError: as `read_sources` for such a path.
    """
    for part, _ in _mixture(source) or [(source, 1.0)]:
        if isinstance(part, str | os.PathLike) and not Path(native_path(part)).is_file():
            if isinstance(part, str) and data_set_name(part) is not None:
                continue
            _read_one(part, "text")
