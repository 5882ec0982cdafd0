"""Byte ranges of stored tensors in their files, which are read into memory or copied without a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optimum_moe.checkpoint.system import expect_reading, read_at

_CHUNK = 1 << 20
"""Bytes copied at a time, few enough that they are still in the processor's cache when they are written."""


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
        """Ask the system to prefetch the bytes."""
        expect_reading(self.descriptor, self.start, self.size)

    def read_into(self, buffer: memoryview) -> None:
        """Read the range into a buffer of `size` bytes.

        Unlike a mapped file this causes few page faults, and needs no second copy for alignment.

        Raises:
            ValueError: If the file ends before the range does.
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
        """Yield the bytes in order; each chunk is only valid until the next one."""
        buffer = memoryview(bytearray(min(self.size, _CHUNK)))
        for start in range(0, self.size, _CHUNK):
            part = ByteRange(self.file, self.descriptor, self.start + start, min(_CHUNK, self.size - start))
            part.read_into(buffer[: part.size])
            yield buffer[: part.size]
