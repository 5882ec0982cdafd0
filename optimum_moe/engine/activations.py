"""Where the hidden states of parked forward passes lie: in memory up to a limit, then in files without a name."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from optimum_moe.checkpoint.system import reserve


class Activations:
    """Moves the outputs of layers into files where memory for them has run out.

    Args:
        folder: For the files, which vanish with the process.
        limit: Bytes of outputs that may stay in memory.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.in_memory, self.on_disk = 0, 0

    def keep(self, output: Any) -> Any:
        """The output of a layer, its tensors perhaps in files."""
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
            # Writing to a mapped page that the disk has no room for would end the process.
            reserve(descriptor, tensor.numel() * tensor.element_size())
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(descriptor)
            os.unlink(name)
        return mapped.view(tensor.shape).copy_(tensor)
