"""Calibration examples with images, audio or video, which a processor turns into model inputs."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ProcessorMixin
from transformers.audio_utils import load_audio
from transformers.image_utils import load_image

MEDIA_COLUMNS = {
    "images": "images",
    "image": "images",
    "audio": "audio",
    "audios": "audio",
    "videos": "videos",
    "video": "videos",
}
"""Keys of a row that hold media, and the argument of a processor that takes them."""
_COMPONENTS = {"images": ("image_processor",), "audio": ("feature_extractor",), "videos": ("video_processor",)}
_PART_SOURCES = ("image", "audio", "video", "path", "url")
_REMOTE = ("http://", "https://", "data:")


@dataclass(frozen=True)
class MediaExample:
    """One example with checked absolute paths; media are not loaded yet.

    Args:
        where: Name of the example in errors.
        text: Text with the processor's placeholders, or a chat whose messages hold the media.
        media: Media by argument of the processor: `"images"`, `"audio"`, `"videos"`.
    """

    where: str
    text: str | list[dict[str, Any]]
    media: Mapping[str, list[Any]]

    @property
    def plain_text(self) -> str:
        """The text without the media."""
        if isinstance(self.text, str):
            return self.text
        return "\n".join(part.get("text", "") for message in self.text for part in message["content"])


class ExampleColumn:
    """A sequence of examples that reads and checks each row when it is accessed.

    Args:
        length: Number of rows.
        read: Function from row index to example.
    """

    def __init__(self, length: int, read: Callable[[int], MediaExample]) -> None:
        self._length, self._read = length, read

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> MediaExample:
        return self._read(index)


@dataclass(frozen=True)
class MediaSource:
    """Examples with media: in memory, in a column on disk, or as a one-shot stream."""

    name: str
    examples: list[MediaExample] | ExampleColumn | Iterator[MediaExample]

    @property
    def num_examples(self) -> int | None:
        """Number of examples, None for a stream."""
        return None if isinstance(self.examples, Iterator) else len(self.examples)

    def drawn(self, seed: int) -> Iterator[MediaExample]:
        """The examples in a seeded random order; a stream keeps its order."""
        if isinstance(self.examples, Iterator):
            yield from self.examples
            return
        order = list(range(len(self.examples)))
        random.Random(seed).shuffle(order)
        for index in order:
            yield self.examples[index]


def has_media(item: Any) -> bool:
    """Whether a row or chat holds images, audio or video."""
    if isinstance(item, Mapping):
        return any(_is_given(item.get(name)) for name in MEDIA_COLUMNS) or has_media(item.get("messages"))
    return isinstance(item, list | tuple) and any(_parts_with_media(message) for message in item)


def read_example(item: Any, text_column: str, where: str, folder: Path | None = None) -> MediaExample:
    """One row or chat as an example.

    Args:
        item: `{"text": ..., "images": [...]}` (or `audio`, `videos`), `{"messages": [...]}`, a chat, or plain text.
        text_column: Column of the text.
        where: Name of the row in errors.
        folder: Folder of relative paths; the working directory by default.

    Raises:
        ValueError: If the row has no text, or a file does not exist.
    """
    row = item if isinstance(item, Mapping) else {"messages" if isinstance(item, list | tuple) else text_column: item}
    text = row.get(text_column) if row.get(text_column) is not None else row.get("messages")
    media: dict[str, list[Any]] = {}
    for column, argument in MEDIA_COLUMNS.items():
        value = row.get(column)
        if _is_given(value):
            values = list(value) if isinstance(value, list | tuple) else [value]
            media.setdefault(argument, []).extend(_located(v, where, folder) for v in values)
    if isinstance(text, str):
        return MediaExample(where, text, media)
    if isinstance(text, list | tuple) and text and all(isinstance(m, Mapping) and "role" in m for m in text):
        if media:
            raise ValueError(
                f"{where} has a chat and beside it {', '.join(media)}. Put them into the messages' content, as "
                '{"type": "image", "image": ...}.'
            )
        return MediaExample(where, [_message(message, where, folder) for message in text], {})
    raise ValueError(
        f"{where} has media but no text or chat in {text_column!r} or 'messages'; it has {list(row)}. Set text_column."
    )


def check_processor(source: MediaSource, processor: Any) -> None:
    """Raise a `ValueError` unless the processor takes images, audio or video."""
    if not isinstance(processor, ProcessorMixin):
        given = "no processor was given" if processor is None else f"{type(processor).__name__} takes text only"
        raise ValueError(
            f"The calibration data ({source.name}) have images, audio or video, and {given}. Pass the model's "
            "processor: tokenizer=AutoProcessor.from_pretrained(...)."
        )


def model_inputs(example: MediaExample, processor: Any) -> dict[str, Any]:
    """The model inputs of one example, as a batch of one row.

    Raises:
        ValueError: If the processor does not support the example's media, or refuses it, for instance because of too
            few placeholders.
    """
    kinds = set(example.media) | _kinds_of(example.text)
    for kind in sorted(kinds):
        if not any(getattr(processor, name, None) is not None for name in _COMPONENTS[kind]):
            raise ValueError(
                f"{example.where} has {kind}, and {type(processor).__name__} has no {_COMPONENTS[kind][0]}. "
                "Pass the model's own processor, or leave them out."
            )
    if isinstance(example.text, str):
        make = partial(_processed, example, example.text, processor)
    else:
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{example.where} is a chat, and {type(processor).__name__} has no chat template. Set "
                'processor.chat_template, or pass {"text": ..., "images": [...]}.'
            )
        messages = [{**message, "content": [_loaded(part) for part in message["content"]]} for message in example.text]
        make = partial(processor.apply_chat_template, messages, tokenize=True, return_dict=True, return_tensors="pt")
    try:
        return dict(make())
    except ValueError as error:
        raise ValueError(f"{type(processor).__name__} cannot read {example.where}: {error}") from error


def _processed(example: MediaExample, text: str, processor: Any) -> Any:
    media = dict(example.media)
    if "images" in media:
        media["images"] = [[_image(value) for value in media["images"]]]
    if "videos" in media:
        media["videos"] = [media["videos"]]
    if "audio" in media:
        rate = processor.feature_extractor.sampling_rate
        media["audio"] = [_audio(value, rate, example.where) for value in media["audio"]]
        media["sampling_rate"] = rate
    return processor(text=[text], return_tensors="pt", **media)


def _loaded(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of a chat with its image loaded."""
    path = next((part[key] for key in ("image", "path") if isinstance(part.get(key), str)), None)
    if part.get("type") != "image" or path is None or path.startswith(_REMOTE):
        return part
    return {"type": "image", "image": load_image(path)}


def _image(value: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        from PIL import Image

        return load_image(Image.open(io.BytesIO(value["bytes"])))
    if isinstance(value, Mapping):
        value = value.get("path")
    return load_image(value) if isinstance(value, str) else value


def _audio(value: Any, rate: int, where: str) -> Any:
    if isinstance(value, Mapping):
        if value.get("array") is None:
            value = value.get("path")
        elif value.get("sampling_rate") != rate:
            raise ValueError(
                f"The audio of {where} has a sampling rate of {value.get('sampling_rate')}, the model takes {rate}. "
                "Resample it."
            )
        else:
            value = value["array"]
    return load_audio(value, sampling_rate=rate) if isinstance(value, str) else np.asarray(value, dtype=np.float32)


def _message(message: Mapping[str, Any], where: str, folder: Path | None) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        # Processors expect every content to be a list of parts.
        return {**message, "content": [{"type": "text", "text": content}]}
    parts = [
        {k: _located(v, where, folder) if k in _PART_SOURCES else v for k, v in part.items()} for part in content or ()
    ]
    return {**message, "content": parts}


def _located(value: Any, where: str, folder: Path | None) -> Any:
    """A medium with its path resolved; other values are unchanged."""
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and not value.get("bytes"):
        return {**value, "path": _located(value["path"], where, folder)}
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or value.startswith(_REMOTE):
        return value
    path = (folder or Path()) / value
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}, which {where} names. Correct the path.")
    return str(path)


def _parts_with_media(message: Any) -> list[str]:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts: Iterable[Any] = content if isinstance(content, list | tuple) else ()
    return [p["type"] for p in parts if isinstance(p, Mapping) and p.get("type") in ("image", "audio", "video")]


def _kinds_of(text: Any) -> set[str]:
    if isinstance(text, str):
        return set()
    return {MEDIA_COLUMNS[kind] for message in text for kind in _parts_with_media(message)}


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, list | tuple) and not value)
