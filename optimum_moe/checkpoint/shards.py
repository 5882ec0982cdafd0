"""Shards in safetensors format, written tensor by tensor and put in place only when they are complete."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from optimum_moe.checkpoint.headers import read_header

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shard(file: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write a shard beside its place, make it last, and rename it; returns its bytes.

    Unlike `save_file` of safetensors it holds the bytes of one tensor at a time.

    Raises:
        OSError: If the disk is full or refuses; nothing is left then.
    """
    # Wide numbers first: every tensor starts at a multiple of its item's size.
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
            for _, tensor in ordered:
                if tensor.numel():
                    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                    write_all(stream.fileno(), flat.numpy().data)
            os.fsync(stream.fileno())
        put_in_place(part, file)
    finally:
        part.unlink(missing_ok=True)
    return 8 + len(text) + end


def write_text(file: Path, text: str) -> None:
    """Replace a small file at once."""
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb", buffering=0) as stream:
            write_all(stream.fileno(), memoryview(text.encode()))
            os.fsync(stream.fileno())
        put_in_place(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of it, which one call to the system need not do."""
    while data:
        data = data[os.write(descriptor, data) :]


def put_in_place(part: Path, place: Path) -> None:
    """Rename, and make the rename last."""
    part.rename(place)
    directory = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_whole(file: Path, size: int) -> bool:
    """Whether a shard is there, as long as it was, and as its header says."""
    try:
        read_header(file)
    except (OSError, ValueError):
        return False
    return file.stat().st_size == size
