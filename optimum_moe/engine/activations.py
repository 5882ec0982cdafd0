"""Storage for the hidden states of paused passes: memory up to a limit, then unlinked temporary files."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from optimum_moe.checkpoint.byte_ranges import ByteRange
from optimum_moe.checkpoint.shards import bytes_of, write_all
from optimum_moe.checkpoint.system import reserve


class Activations:
    """Moves layer outputs to memory-mapped files once they take more memory than allowed.

    Args:
        folder: Folder of the files, which disappear with the process.
        limit: Maximum bytes of outputs in memory.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.in_memory, self.on_disk = 0, 0

    def keep(self, output: Any) -> Any:
        """An equal layer output, whose tensors may be memory-mapped files."""
        if isinstance(output, torch.Tensor):
            return self._kept(output)
        if type(output) in (tuple, list):
            return type(output)(self.keep(part) for part in output)
        return output

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or not size:
            return tensor
        if self.in_memory + size <= self.limit:
            self.in_memory += size
            weakref.finalize(tensor, self._released, size)
            return tensor
        self.on_disk += size
        return self._in_file(tensor)

    def _released(self, size: int) -> None:
        self.in_memory -= size

    def _in_file(self, tensor: torch.Tensor) -> torch.Tensor:
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        try:
            # Writing to a mapped page kills the process if the disk is full, so reserve the space first.
            reserve(descriptor, tensor.numel() * tensor.element_size())
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(descriptor)
            os.unlink(name)
        return mapped.view(tensor.shape).copy_(tensor)


class SavedActivations:
    """Writes what enters the layers to files until the backward pass, one unlinked file for each layer.

    A file goes with the last tensor that is still to be read from it.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        """Number of files that something is still to be read from."""
        return len(self._files)

    def save(self, layer: str, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Write a tensor that enters a layer; returns a function that reads an equal one, on the same device.

        Raises:
            OSError: If the disk is full.
        """
        file = self._files.get(layer)
        if file is None:
            # Without a buffer, nothing is left to be written when a full disk has ended the run.
            file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  (closed by its last reader)
            self._files[layer] = file
        start = file.seek(0, os.SEEK_END)
        if tensor.numel():
            write_all(file.fileno(), bytes_of(tensor.cpu().contiguous()))
        return partial(_read, file, start, tensor.shape, tensor.dtype, tensor.device)


def _read(file: Any, start: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        memory = bytes_of(tensor)
        ByteRange(Path("saved activations"), file.fileno(), start, len(memory)).read_into(memory)
    return tensor.to(device)
