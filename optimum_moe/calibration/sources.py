"""Reading calibration data: files, lists, chats, datasets and ready model inputs behind one interface."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from optimum_moe.calibration.chats import is_chat
from optimum_moe.calibration.documents import (
    DOMAIN_COLUMN,
    IDS_COLUMN,
    MESSAGES_COLUMN,
    Document,
    DocumentColumn,
    TextSource,
    is_tokens,
    pick_column,
    refuse_media,
    row_value,
    shorten,
    to_document,
)
from optimum_moe.calibration.files import FILE_TYPES, domains_of, read_file
from optimum_moe.calibration.hub import load_hub_data_set
from optimum_moe.calibration.inputs import ReadyInputs
from optimum_moe.calibration.media import (
    MEDIA_COLUMNS,
    ExampleColumn,
    MediaExample,
    MediaSource,
    has_media,
    read_example,
)
from optimum_moe.checkpoint.names import data_set_name
from optimum_moe.checkpoint.system import native_path


def read_sources(source: Any, text_column: str = "text") -> list[TextSource] | ReadyInputs | MediaSource:
    """Read any supported source, see `CalibrationConfig.source`.

    Args:
        source: a path, list of strings, list of chats, dataset, iterable of model inputs, or a mixture of text sources;
            or text sources that were read already.
        text_column: column of text in .jsonl, .parquet and datasets; without it a "messages" column is read as chats,
            else "input_ids" as token ids.

    Returns:
        The text sources with their weights (one with weight 1.0 unless it is a mixture), or prepared model inputs, or
        examples with images, audio or video.

    Raises:
        ValueError: an empty source, an unknown type of file or object, a missing column, or an invalid weight.
    """
    if isinstance(source, list) and source and all(isinstance(part, TextSource) for part in source):
        return source
    pairs = _mixture(source)
    if pairs is None:
        read = _read_one(source, text_column)
        return [read] if isinstance(read, TextSource) else read
    sources = []
    for part, weight, domain in pairs:
        if isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"The weight of {part!r} in a mixture is {weight}: it must be positive and finite.")
        read = _read_one(part, text_column)
        if not isinstance(read, TextSource):
            kind = "model inputs" if isinstance(read, ReadyInputs) else "images, audio or video"
            raise ValueError(f"A mixture holds text sources, this one holds {kind}. Mix them before calibration.")
        sources.append(replace(read, weight=float(weight), domains=domain or read.domains))
    return sources


def by_domain(source: Any, text_column: str = "text") -> dict[str, list[TextSource]]:
    """The text of each domain, in the order in which they first occur; empty if no domain is named.

    Raises:
        ValueError: as `read_sources`, or some text has a domain and other text has none.
    """
    sources = read_sources(source, text_column)
    if not isinstance(sources, list) or all(part.domains is None for part in sources):
        return {}
    found: dict[str, list[TextSource]] = {}
    for part in sources:
        if isinstance(part.domains, str):
            found.setdefault(part.domains, []).append(part)
            continue
        places: dict[str, list[int]] = {}
        for index, domain in enumerate(part.domains or [None]):
            if domain is None or domain == "":
                raise ValueError(
                    f"Row {index} of {part.name} has no domain, and other text has one. Give every row a "
                    f"{DOMAIN_COLUMN!r}, or name the domain of a whole source: {{'code': {part.name!r}}}."
                )
            places.setdefault(str(domain), []).append(index)
        for domain, chosen in places.items():
            own = replace(part.selected(chosen, f"{part.name} ({domain})"), domains=domain)
            found.setdefault(domain, []).append(own)
    return found


def _is_file(value: Any) -> bool:
    """Whether a value names a file of text, or a data set of the Hub."""
    if isinstance(value, str):
        return value.lower().endswith(FILE_TYPES) or data_set_name(value) is not None
    return isinstance(value, os.PathLike)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _mixture(source: Any) -> list[tuple[Any, float, str | None]] | None:
    """Parts of a mixture with their weights and the domains that name them; None for a single source."""
    if isinstance(source, Mapping):
        if source and all(_is_number(weight) for weight in source.values()):
            return [(part, weight, None) for part, weight in source.items()]
        return [(part, 1.0, domain) for domain, part in _named(source)]
    if isinstance(source, list | tuple) and source and all(_is_pair(item) for item in source):
        found: list[tuple[Any, float, str | None]] = []
        for part, weight in source:
            named = _named(part) if isinstance(part, Mapping) else [(None, part)]
            found += [(own, weight, domain) for domain, own in named]
        return found
    return None


def _named(sources: Mapping[Any, Any]) -> list[tuple[str | None, Any]]:
    """Files or data sets by the name of their domain."""
    if not sources or not all(map(_is_file, sources.values())):
        raise ValueError(
            f"A dict as a source is a mixture of {{source: weight}}, or has the file of each domain; this one has the "
            f"keys {list(sources)[:8]} and no weights or files. Pass one split of a DatasetDict, or put a single dict "
            "of model inputs in a list."
        )
    return [(str(domain), part) for domain, part in sources.items()]


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and _is_number(item[1]) and not _is_number(item[0])


def _read_one(source: Any, text_column: str) -> TextSource | ReadyInputs | MediaSource:
    if isinstance(source, str) and data_set_name(source) is not None:
        return _stream(iter(load_hub_data_set(source)), text_column, source)
    if isinstance(source, str | os.PathLike):
        return read_file(Path(native_path(source)), text_column)
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise ValueError(
            f"Unknown calibration source {shorten(source)}. Pass a path to {', '.join(FILE_TYPES)}, a list of strings "
            "or of chats, a datasets.Dataset, or an iterable of model inputs."
        )
    if hasattr(source, "columns"):
        raise ValueError(
            f"A {type(source).__name__} is read by column, and calibration data by row. Pass "
            "datasets.Dataset.from_pandas(frame), or frame.to_dict('records')."
        )
    if hasattr(source, "column_names"):
        return _read_dataset(source, text_column)
    return _read_iterable(source, text_column)


def _read_dataset(dataset: Any, text_column: str) -> TextSource | MediaSource:
    label = getattr(getattr(dataset, "info", None), "dataset_name", None) or type(dataset).__name__
    split = getattr(dataset, "split", None)
    name = f"{label}[{split}]" if split else str(label)
    if not hasattr(dataset, "__len__"):
        return _stream(iter(dataset), text_column, name)
    column = pick_column(dataset.column_names, text_column, name)
    media = [name for name in dataset.column_names if name in MEDIA_COLUMNS]
    # Reading a row reads all its columns, so select the column first.
    mask = ["attention_mask"] if column == IDS_COLUMN and "attention_mask" in dataset.column_names else []
    texts = dataset.select_columns([column, *media, *mask])
    if media or (len(texts) and has_media(texts[0][column])):
        read = partial(_read_row, texts, text_column, name)
        return MediaSource(name, ExampleColumn(len(texts), read))
    documents = DocumentColumn(len(texts), lambda index: row_value(texts[index], column), name)
    labeled = "labels" in dataset.column_names
    domains = dataset[DOMAIN_COLUMN] if DOMAIN_COLUMN in dataset.column_names else None
    return TextSource(name, documents, is_tokenized=column == IDS_COLUMN, has_labels=labeled, domains=domains)


def _read_row(rows: Any, text_column: str, name: str, index: int) -> MediaExample:
    return read_example(rows[index], text_column, f"row {index} of {name}")


def _stream(rows: Iterator[Any], text_column: str, name: str) -> TextSource | MediaSource:
    """Read a dataset without a length; its first row decides whether rows have media."""
    first = next(rows, None)
    rows = rows if first is None else chain([first], rows)
    if has_media(first):
        return MediaSource(name, _examples(rows, text_column, name))
    return _text_source(name, _records(rows, text_column, name), first, text_column)


def _text_source(name: str, documents: Any, first: Any, text_column: str) -> TextSource:
    """A source whose first document decides whether all are token ids."""
    if not isinstance(first, Mapping):
        return TextSource(name, documents, is_tokenized=is_tokens(first))
    tokenized = not {text_column, MESSAGES_COLUMN} & set(first) and IDS_COLUMN in first
    return TextSource(name, documents, is_tokenized=tokenized, has_labels="labels" in first)


def _examples(rows: Iterable[Any], text_column: str, name: str) -> Iterator[MediaExample]:
    return (read_example(row, text_column, f"row {index} of {name}") for index, row in enumerate(rows))


def _read_iterable(source: Iterable[Any], text_column: str) -> TextSource | ReadyInputs | MediaSource:
    is_list = isinstance(source, list | tuple)
    items = iter(source)
    first = next(items, None)
    if first is None:
        raise ValueError(f"The calibration source is empty ({type(source).__name__} without items). Pass data.")
    if isinstance(first, Mapping) and is_chat([first]) and is_list:
        raise ValueError(
            "A list of messages is one chat; pass a list of chats: [[{'role': ..., 'content': ...}, ...]]."
        )
    if _is_model_input(first, text_column):
        # A list or a DataLoader can be read again; an iterator has lost its first item, so add it back.
        inputs = source if items is not source else chain([first], items)
        return ReadyInputs(f"{type(source).__name__} of model inputs", inputs)
    stream = chain([first], items)
    kind = "rows" if isinstance(first, Mapping) or is_tokens(first) else "texts" if isinstance(first, str) else "chats"
    name = f"list of {len(source)} {kind}" if isinstance(source, list | tuple) else f"stream of {kind}"
    if any(has_media(item) for item in (source if isinstance(source, list | tuple) else [first])):
        examples = _examples(stream, text_column, name)
        return MediaSource(name, list(examples) if is_list else examples)
    if isinstance(first, Mapping):
        documents = _records(stream, text_column, name)
    else:
        documents = (to_document(item, f"item {index} of {name}") for index, item in enumerate(stream))
    read = _text_source(name, list(documents) if is_list else documents, first, text_column)
    return replace(read, domains=domains_of(list(source))) if is_list and isinstance(first, Mapping) else read


def _is_model_input(item: Any, text_column: str) -> bool:
    if not isinstance(item, Mapping) or text_column in item or MESSAGES_COLUMN in item:
        return False
    if IDS_COLUMN in item:
        return not is_tokens(item[IDS_COLUMN])
    return any(isinstance(value, torch.Tensor) for value in item.values())


def _records(rows: Iterator[Any], text_column: str, name: str) -> Iterator[Document]:
    for index, row in enumerate(rows):
        where = f"row {index} of {name}"
        if not isinstance(row, Mapping):
            raise ValueError(f"Every row is a dict, {where} is {shorten(row)}.")
        refuse_media(row, where)
        yield to_document(row_value(row, pick_column(row, text_column, where)), where)


def check_source(source: Any) -> None:
    """Refuse the path of a missing file before any work, even if the data are not used.

    Raises:
        ValueError: as `read_sources` for such a path.
    """
    for part, _, _ in _mixture(source) or [(source, 1.0, None)]:
        if isinstance(part, str | os.PathLike) and not Path(native_path(part)).is_file():
            if isinstance(part, str) and data_set_name(part) is not None:
                continue
            _read_one(part, "text")
