"""Reusable memory buffers for tensors: allocating fresh pages takes several times longer than filling them."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch

from optimum_moe.checkpoint.system import private_memory


class Buffers:
    """A pool of buffers for tensors; idle buffers of other sizes are freed before a new one is allocated.

    A buffer is either idle in the pool or lent to one tensor. Each loan is an object that the tensor's storage owns: it
    ends with the last tensor, view or array that shares the memory, and then the buffer returns to the pool.
    """

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor whose address is a multiple of the page size."""
        size = shape.numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        buffer = self._take(size)
        # Views keep this object alive; views of a memoryview would only keep the memory below it.
        loan = (ctypes.c_ubyte * size).from_buffer(buffer)
        weakref.finalize(loan, self._idle.append, buffer).atexit = False
        return torch.frombuffer(loan, dtype=dtype).view(shape)

    def release(self) -> None:
        """Free all idle buffers."""
        self._idle.clear()

    def _take(self, size: int) -> mmap.mmap:
        for place, buffer in enumerate(self._idle):
            if len(buffer) == size:
                return self._idle.pop(place)
        self.release()
        return private_memory(size)
