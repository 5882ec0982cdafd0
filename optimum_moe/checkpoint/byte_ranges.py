"""Where stored tensors lie in their files: bytes that are read into memory once, or copied without a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optimum_moe.checkpoint.system import expect_reading, read_at

_CHUNK = 1 << 20
"""Bytes that are copied at a time: what was read is still in the processor's cache when it is written."""


@dataclass(frozen=True)
class ByteRange:
    """The bytes of one stored tensor.

    Args:
        file: The shard.
        descriptor: The shard, open for reading.
        start: First byte in it.
        size: Number of bytes.
    """

    file: Path
    descriptor: int
    start: int
    size: int

    def expect(self) -> None:
        """Have the system fetch the bytes meanwhile."""
        expect_reading(self.descriptor, self.start, self.size)

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of `size` bytes.

        Unlike a mapped file this takes no page fault for every few pages, and no second copy to align it.

        Raises:
            ValueError: If the file ends before.
        """
        done = 0
        while done < self.size:
            count = read_at(self.descriptor, buffer[done : self.size], self.start + done)
            if not count:
                raise ValueError(
                    f"{self.file} ends at byte {self.start + done:,}, its header promises {self.start + self.size:,}. "
                    "Copy or download it again."
                )
            done += count

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order; each chunk is gone when the next one is asked for."""
        buffer = memoryview(bytearray(min(self.size, _CHUNK)))
        for start in range(0, self.size, _CHUNK):
            part = ByteRange(self.file, self.descriptor, self.start + start, min(_CHUNK, self.size - start))
            part.read_into(buffer[: part.size])
            yield buffer[: part.size]
