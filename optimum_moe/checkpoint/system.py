"""Portable wrappers of system calls: each works on all systems, with optimizations where they are supported."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_BINARY: int = getattr(os, "O_BINARY", 0)
"""Flag without which Windows translates line ends; 0 on other systems."""


def open_binary(file: Path) -> int:
    """Open a file for reading and return its descriptor; close it with `os.close`."""
    return os.open(file, os.O_RDONLY | _BINARY)


def read_at(descriptor: int, buffer: memoryview, start: int) -> int:
    """Read from a position of a file, at most the size of the buffer; returns the number of bytes, 0 at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], start)
    os.lseek(descriptor, start, os.SEEK_SET)
    data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def expect_reading(descriptor: int, start: int, size: int) -> None:
    """Ask the system to prefetch a part of a file, if supported."""
    _advise("POSIX_FADV_WILLNEED", descriptor, start, size)


def begin_writing(descriptor: int, start: int, size: int) -> None:
    """Ask the system to start writing a part of a file to the disk, if supported."""
    _advise("POSIX_FADV_DONTNEED", descriptor, start, size)


def _advise(advice: str, descriptor: int, start: int, size: int) -> None:
    # macOS and Windows do not have this call; it affects only speed.
    advise: Any = getattr(os, "posix_fadvise", None)
    if advise is not None:
        advise(descriptor, start, size, getattr(os, advice))


def sync_to_disk(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk, so that a power failure does not lose them."""
    if sys.platform == "win32" and path.is_dir():
        # Windows cannot open folders; its file system keeps names consistent itself.
        return
    descriptor = os.open(path, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | _BINARY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Reserve `size` bytes on the disk for an empty file, so that writing through a mapping cannot fail.

    Raises:
        OSError: If the disk is full.
    """
    allocate: Any = getattr(os, "posix_fallocate", None)
    if allocate is not None:
        allocate(descriptor, 0, size)
        return
    # Writing zeros reserves the space too, but takes longer.
    zeros = memoryview(bytes(min(size, 1 << 20)))
    while size:
        size -= os.write(descriptor, zeros[:size])


def private_memory(size: int) -> mmap.mmap:
    """New page-aligned memory of this process."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    # A private mapping is counted as memory of this process.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def return_freed() -> None:
    """Return freed memory to the system; otherwise the allocator keeps some for every thread."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def ended_like_an_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `SystemExit`, so that files are cleaned up; by default they kill the process.

    Handlers that were set before are kept. Only the main thread can set handlers; in other threads nothing changes.
    """
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    process = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != process:
            # A forked process has no files to clean up.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        for other in numbers:
            # Ignore further signals, so that cleanup is not interrupted.
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def native_path(path: str | os.PathLike[str]) -> str:
    """A path in the encoding of the locale; characters that it lacks are replaced by their UTF-8 bytes."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return os.fsdecode(os.fspath(path).encode("utf-8", "surrogateescape"))
    return os.fspath(path)


def readable_path(path: str | os.PathLike[str]) -> str:
    """A path as printable text, even if the locale cannot encode it."""
    return os.fsencode(native_path(path)).decode("utf-8", "replace")


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A path to the same file or folder for libraries that assume UTF-8 paths in every locale."""
    if readable_path(path) == str(path):
        yield path
        return
    with TemporaryDirectory() as beside:
        link = Path(beside) / "link"
        link.symlink_to(path.resolve(), target_is_directory=path.is_dir())
        yield link
