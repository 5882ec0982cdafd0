"""Storage for the hidden states of paused forward passes: memory up to a limit, then unlinked temporary files."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

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
