"""Memory that is filled again once nothing refers to it: fresh pages cost several times what filling them does."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

_IDLE = 3
"""References to a buffer that no tensor uses: the list, the variable of a loop, the argument of `getrefcount`."""


class Buffers:
    """Buffers for tensors, all of which may be idle; those of other sizes go before a new one is made."""

    def __init__(self) -> None:
        self._all: list[mmap.mmap] = []

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor with any numbers in it, at an address that is a multiple of a page."""
        size = shape.numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._idle(size) or self._new(size), dtype=dtype).view(shape)

    def _idle(self, size: int) -> mmap.mmap | None:
        for buffer in self._all:
            # A tensor, and whatever shares its memory, refers to the buffer.
            if len(buffer) == size and sys.getrefcount(buffer) == _IDLE:
                return buffer
        return None

    def release(self) -> None:
        """Let the idle ones go."""
        used = []
        for buffer in self._all:
            if sys.getrefcount(buffer) > _IDLE:
                used.append(buffer)
        self._all = used

    def _new(self, size: int) -> mmap.mmap:
        self.release()
        # Private, so that it counts as memory of this process.
        self._all.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return self._all[-1]


def return_freed() -> None:
    """Give the system back what was freed; every thread that ran the model keeps some for itself otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
