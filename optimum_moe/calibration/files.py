"""Calibration data in files: text, JSON lines and Parquet; nothing here executes code or unpickles."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_moe.calibration.documents import (
    DOMAIN_COLUMN,
    IDS_COLUMN,
    Document,
    DocumentColumn,
    TextSource,
    did_you_mean,
    pick_column,
    row_value,
    shorten,
    to_document,
)
from optimum_moe.calibration.media import (
    MEDIA_COLUMNS,
    ExampleColumn,
    MediaExample,
    MediaSource,
    has_media,
    read_example,
)
from optimum_moe.checkpoint.system import utf8_path

FILE_TYPES = (".txt", ".jsonl", ".parquet")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # The byte order mark of UTF-32 starts with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_file(path: Path, text_column: str) -> TextSource | MediaSource:
    """The documents of one file.

    Raises:
        ValueError: an unknown type, a missing file, an unknown encoding, a broken row or a missing column.
    """
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
    text = _decoded(path)
    if path.suffix.lower() == ".txt":
        blocks: list[Document] = [block.strip("\n") for block in re.split(r"\n[^\S\n]*\n", text) if block.strip()]
        return TextSource(path.name, blocks)
    rows = _parse_jsonl(text, path.name)
    if any(has_media(row) for row, _ in rows):
        return MediaSource(path.name, [read_example(row, text_column, where, path.parent) for row, where in rows])
    columns = [pick_column(row, text_column, where) for row, where in rows]
    documents = [to_document(row_value(row, c), where) for (row, where), c in zip(rows, columns, strict=True)]
    tokenized = bool(columns) and columns[0] == IDS_COLUMN
    return TextSource(
        path.name,
        documents,
        is_tokenized=tokenized,
        has_labels=bool(rows) and "labels" in rows[0][0],
        domains=domains_of([row for row, _ in rows]),
    )


def domains_of(rows: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """The domain that each row names; None if no row does."""
    found = [row.get(DOMAIN_COLUMN) for row in rows]
    return None if all(domain is None for domain in found) else found


def _decoded(path: Path) -> str:
    """The text of a file in UTF-8, or in the encoding of its byte order mark, with line ends as "\\n"."""
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error}). Convert it, for instance with iconv.") from error
    if "\0" in text:
        raise ValueError(
            f"{path.name} holds NUL characters: it is not text, or it is UTF-16 without a byte order mark. Convert it "
            "to UTF-8, for instance with iconv."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_jsonl(text: str, name: str) -> list[tuple[dict[str, Any], str]]:
    """The rows, each with its name in errors."""
    rows = []
    # str.splitlines would also cut at U+2028, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        # Concatenated files have byte order marks in between.
        line = line.strip().strip("\ufeff")
        if not line:
            continue
        where = f"line {number} of {name}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Every line of a .jsonl file is one JSON object, {where} is not: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"Every line of a .jsonl file is one JSON object, {where} is {shorten(row)}.")
        rows.append((row, where))
    return rows


def _read_parquet(path: Path, text_column: str) -> TextSource | MediaSource:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"Reading {path.name} needs pyarrow, which is not installed. Run `pip install pyarrow`, or convert the "
            "file to .jsonl."
        ) from error
    try:
        with utf8_path(path) as given, parquet.ParquetFile(given) as file:
            names = file.schema_arrow.names
            column = pick_column(names, text_column, path.name)
            media = [name for name in names if name in MEDIA_COLUMNS]
            wanted = [column, *media] + ["attention_mask"] * (column == IDS_COLUMN and "attention_mask" in names)
            wanted += [DOMAIN_COLUMN] * (DOMAIN_COLUMN in names and column != DOMAIN_COLUMN)
            table = file.read(columns=wanted)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path.name} is not a valid Parquet file ({error}). Copy or download it again.") from error

    def row(index: int) -> dict[str, Any]:
        found: dict[str, Any] = table.slice(index, 1).to_pylist()[0]
        return found

    if media or (len(table) and has_media(row(0)[column])):

        def read(index: int) -> MediaExample:
            return read_example(row(index), text_column, f"row {index} of {path.name}", path.parent)

        return MediaSource(path.name, ExampleColumn(len(table), read))
    documents = DocumentColumn(len(table), lambda index: row_value(row(index), column), path.name)
    return TextSource(
        path.name,
        documents,
        is_tokenized=column == IDS_COLUMN,
        has_labels="labels" in names,
        domains=table.column(DOMAIN_COLUMN).to_pylist() if DOMAIN_COLUMN in names else None,
    )
