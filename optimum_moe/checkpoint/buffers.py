"""Memory that is filled again once no tensor lies in it: fresh pages cost several times what filling them does."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch

from optimum_moe.checkpoint.system import private_memory


class Buffers:
    """Buffers for tensors, all of which may be idle; those of other sizes go before a new one is made.

    A buffer is either idle here or lent to one tensor. Each loan is an object of its own, which the tensor's storage
    owns: it ends with the last tensor, view or array that shares the memory, and its end brings the buffer back.
    """

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor with any numbers in it, at an address that is a multiple of a page."""
        size = shape.numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        buffer = self._take(size)
        # Views of this object keep it; views of a memoryview would only keep what lies below.
        loan = (ctypes.c_ubyte * size).from_buffer(buffer)
        weakref.finalize(loan, self._idle.append, buffer).atexit = False
        return torch.frombuffer(loan, dtype=dtype).view(shape)

    def release(self) -> None:
        """Let the idle ones go."""
        self._idle.clear()

    def _take(self, size: int) -> mmap.mmap:
        for place, buffer in enumerate(self._idle):
            if len(buffer) == size:
                return self._idle.pop(place)
        self.release()
        return private_memory(size)
