"""Shards in safetensors format, written tensor by tensor under a temporary name and renamed when complete."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from optimum_moe.checkpoint.byte_ranges import ByteRange
from optimum_moe.checkpoint.dtypes import DTYPES
from optimum_moe.checkpoint.system import begin_writing, sync_to_disk

_BEHIND = 32 << 20
"""Bytes written between hints to start writing to the disk."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_shard(file: Path, tensors: Mapping[str, torch.Tensor], copied: Mapping[str, ByteRange] | None = None) -> int:
    """Write a shard under a temporary name, sync it to the disk, and rename it; returns its bytes.

    Unlike `save_file` of safetensors it needs memory for only one tensor at a time.

    Args:
        file: The shard.
        tensors: Its tensors by name.
        copied: Byte ranges of the tensors that are on the meta device.

    Raises:
        OSError: If the disk is full or refuses; the temporary file is then removed.
    """
    # Wide dtypes come first, so that every tensor starts at a multiple of its itemsize.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb", buffering=0) as stream:
            write_all(stream.fileno(), memoryview(struct.pack("<Q", len(text)) + text))
            begun = 0
            for name, tensor in ordered:
                for chunk in (copied or {})[name].chunks() if tensor.is_meta else _chunks(tensor):
                    write_all(stream.fileno(), chunk)
                if stream.tell() - begun > _BEHIND:
                    # Start writing to the disk while the rest is read, so that the final sync is short.
                    begin_writing(stream.fileno(), begun, stream.tell() - begun)
                    begun = stream.tell()
            os.fsync(stream.fileno())
        put_in_place(part, file)
    finally:
        part.unlink(missing_ok=True)
    return 8 + len(text) + end


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, which must not be empty."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        yield bytes_of(tensor.cpu().contiguous())


def write_text(file: Path, text: str) -> None:
    """Replace a small text file atomically."""
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb", buffering=0) as stream:
            write_all(stream.fileno(), memoryview(text.encode()))
            os.fsync(stream.fileno())
        put_in_place(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all bytes, since one system call may write only a part."""
    while data:
        data = data[os.write(descriptor, data) :]


def put_in_place(part: Path, place: Path) -> None:
    """Rename a complete file, and sync the rename to the disk."""
    part.replace(place)
    sync_to_disk(place.parent)
