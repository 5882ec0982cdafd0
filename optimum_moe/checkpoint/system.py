"""What operating systems do differently: each call works everywhere, and is faster or surer where the system helps."""

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
"""Windows translates line ends without it."""


def open_binary(file: Path) -> int:
    """A descriptor that reads a file; close it with `os.close`."""
    return os.open(file, os.O_RDONLY | _BINARY)


def read_at(descriptor: int, buffer: memoryview, start: int) -> int:
    """Read bytes at a position of a file, at most as many as the buffer takes; returns how many, 0 at the end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], start)
    os.lseek(descriptor, start, os.SEEK_SET)
    data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def expect_reading(descriptor: int, start: int, size: int) -> None:
    """Have the system fetch a part of a file meanwhile, where it can."""
    _advise("POSIX_FADV_WILLNEED", descriptor, start, size)


def begin_writing(descriptor: int, start: int, size: int) -> None:
    """Have the disk begin with what was written to a part of a file, where the system can."""
    _advise("POSIX_FADV_DONTNEED", descriptor, start, size)


def _advise(advice: str, descriptor: int, start: int, size: int) -> None:
    # macOS and Windows have no such call, and no result depends on it.
    advise: Any = getattr(os, "posix_fadvise", None)
    if advise is not None:
        advise(descriptor, start, size, getattr(os, advice))


def make_last(path: Path) -> None:
    """Return when the disk has a file, or the names in a folder, so that a power failure does not lose them."""
    if sys.platform == "win32" and path.is_dir():
        # There a folder cannot be opened; the file system itself keeps names in order.
        return
    descriptor = os.open(path, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | _BINARY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Take `size` bytes on the disk for an empty file, so that writing to it through a mapping cannot fail.

    Raises:
        OSError: If the disk is full.
    """
    allocate: Any = getattr(os, "posix_fallocate", None)
    if allocate is not None:
        allocate(descriptor, 0, size)
        return
    # Zeros take their place like anything else, only slower.
    zeros = memoryview(bytes(min(size, 1 << 20)))
    while size:
        size -= os.write(descriptor, zeros[:size])


def private_memory(size: int) -> mmap.mmap:
    """Fresh memory of this process, from the start of a page."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    # Private, so that it counts as memory of this process.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def return_freed() -> None:
    """Give the system back what was freed; every thread that ran the model keeps some for itself otherwise."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def ended_like_an_interrupt() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise `SystemExit`, as Ctrl-C raises an error: by themselves they end a process at once.

    Whoever set up something else for a signal keeps it. Only the main thread can do this; in others nothing changes.
    """
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    process = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != process:
            # A fork has nothing to clear up.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        for other in numbers:
            # Once is enough: clearing up is not to be disturbed.
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
    """A path as the locale spells it: letters that it does not have stand for the bytes that they are in UTF-8."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return os.fsdecode(os.fspath(path).encode("utf-8", "surrogateescape"))
    return os.fspath(path)


def readable_path(path: str | os.PathLike[str]) -> str:
    """A path as text that can be written, also where the locale cannot spell it."""
    return os.fsencode(native_path(path)).decode("utf-8", "replace")


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A path to the same file or folder for libraries that take every path for UTF-8, whatever the locale says."""
    if readable_path(path) == str(path):
        yield path
        return
    with TemporaryDirectory() as beside:
        link = Path(beside) / "link"
        link.symlink_to(path.resolve(), target_is_directory=path.is_dir())
        yield link
