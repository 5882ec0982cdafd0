"""Errors of a device whose memory ran out, told from others and said with a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SAID = ("out of memory", "can't allocate memory", "not enough memory")
"""In the messages of accelerators, and of torch on a CPU of Linux or macOS and of Windows."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def explanation(error: BaseException, doing: str, remedy: str) -> ValueError:
    """An error of `ran_out`, with what it stopped and what to do.

    Args:
        error: The error, whose first line says what was asked for.
        doing: What ran out of memory, such as `"Observing batches of 8 rows"`.
        remedy: A sentence.
    """
    first = str(error).strip().split("\n")[0]
    # The place in the source of torch, and the number of the error, say nothing to the user.
    asked = re.sub(r"^\[enforce fail at [^]]*\][^.]*\. |\. Error code .*$", "", first).rstrip(".")
    return ValueError(f"{doing} ran out of memory ({asked}). {remedy}")


@contextmanager
def explained(doing: str, remedy: str) -> Iterator[None]:
    """Context in which torch's errors of `ran_out` become an `explanation`; a `MemoryError` says itself what to do."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise explanation(error, doing, remedy) from error
