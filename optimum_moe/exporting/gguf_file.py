"""GGUF files: their metadata and the types and sizes of their tensors, and the writing of small ones.

A file is a magic number, a version, the counts of tensors and metadata, the metadata, one record for each tensor, and
the tensors at multiples of the alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from optimum_moe.exporting.gguf_types import TENSOR_TYPES

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_NAMES = {kind.number: name for name, kind in TENSOR_TYPES.items()}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file.

    Args:
        type: Name of its type, as in `TENSOR_TYPES`; its number for a type that is not in the table.
        shape: Its shape with the row length last, as in torch.
    """

    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int | None:
        """Its bytes; None for a type that is not in the table."""
        kind = TENSOR_TYPES.get(self.type)
        return None if kind is None else prod(self.shape) // kind.block * kind.bytes


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says before its tensors.

    Args:
        metadata: Values by key, such as "general.architecture".
        tensors: The tensors by name.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def types(self) -> dict[str, int]:
        """The number of tensors of each type."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
        return counts


def read_gguf(file: Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises:
        ValueError: If it is none, or a truncated one.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != _MAGIC:
                raise ValueError("magic number")
            _, num_tensors, num_values = struct.unpack("<IQQ", stream.read(20))
            metadata = {}
            for _ in range(num_values):
                key = _read_string(stream)
                metadata[key] = _read_value(stream, _read_number(stream, "<I"))
            tensors = {}
            for _ in range(num_tensors):
                name = _read_string(stream)
                sizes = [_read_number(stream, "<Q") for _ in range(_read_number(stream, "<I"))]
                number, _ = struct.unpack("<IQ", stream.read(12))
                tensors[name] = GGUFTensor(_NAMES.get(number, str(number)), tuple(reversed(sizes)))
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise ValueError(f"{file} is not a readable GGUF file. Export or copy it again.") from error
    return GGUFHeader(metadata, tensors)


def _read_number(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _read_string(stream: BinaryIO) -> str:
    return stream.read(_read_number(stream, "<Q")).decode("utf-8", errors="replace")


def _read_value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _read_string(stream)
    if kind == _ARRAY:
        inner, length = _read_number(stream, "<I"), _read_number(stream, "<Q")
        return [_read_value(stream, inner) for _ in range(length)]
    return _read_number(stream, _NUMBERS[kind])


def write_gguf(
    file: Path, metadata: Mapping[str, int | str | Sequence[str]], tensors: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """Write a GGUF file of float32 tensors.

    Args:
        file: The file.
        metadata: Whole numbers (written as uint32), texts, or lists of texts by key.
        tensors: Tensors by name, with the row length last.
    """
    head = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_string(key), _value(value)]
    arrays, offset = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}, 0
    for name, array in arrays.items():
        sizes = array.shape[::-1]
        head += [_string(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        head.append(struct.pack("<IQ", TENSOR_TYPES["F32"].number, offset))
        offset += _aligned(array.nbytes)
    with file.open("wb") as stream:
        start = b"".join(head)
        stream.write(start.ljust(_aligned(len(start)), b"\0"))
        for array in arrays.values():
            stream.write(array.tobytes().ljust(_aligned(array.nbytes), b"\0"))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: int | str | Sequence[str]) -> bytes:
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_string(text) for text in value)
