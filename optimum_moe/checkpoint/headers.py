"""What a checkpoint folder says of itself without reading a tensor: safetensors headers and sizes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import SafetensorsRepoMetadata

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


@dataclass(frozen=True)
class Headers:
    """Names, dtypes and shapes of all tensors of a checkpoint.

    Args:
        tensors: `(dtype, shape, bytes)` of each tensor.
        files: The shards.
        homes: The shard of each tensor.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    files: tuple[Path, ...]
    homes: Mapping[str, Path] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return sum(_numel(shape) for _, shape, _ in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size for _, _, size in self.tensors.values())

    @property
    def itemsize(self) -> float:
        """Bytes of one number in the dtype that most numbers have: that of the experts."""
        counts: Counter[str] = Counter()
        for dtype, shape, _ in self.tensors.values():
            counts[dtype] += _numel(shape)
        return _BITS.get(counts.most_common(1)[0][0], 8) / 8

    @property
    def fingerprint(self) -> str:
        """Hash of names, dtypes and shapes."""
        listing = sorted((name, dtype, shape) for name, (dtype, shape, _) in self.tensors.items())
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def read_headers(directory: str | Path) -> Headers:
    """Read and check the headers of all shards in a local folder.

    Raises:
        ValueError: If there are no safetensors files, a shard is missing, or one is corrupt or truncated.
    """
    directory = Path(directory)
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    homes: dict[str, Path] = {}
    files, promised = _shards(directory)
    for file in files:
        for name, entry in read_header(file).items():
            first, last = entry["data_offsets"]
            tensors[name] = (entry["dtype"], tuple(entry["shape"]), last - first)
            homes[name] = file
    lacking = sorted(promised - set(tensors))
    if lacking:
        raise ValueError(
            f"{directory / INDEX_FILE} promises {len(lacking)} tensors that no shard has ({', '.join(lacking[:3])}). "
            "They would be random. Copy or download the checkpoint again."
        )
    return Headers(tensors, files, homes)


def headers_from_metadata(metadata: SafetensorsRepoMetadata) -> Headers:
    """The headers of a Hub repository, as `huggingface_hub` fetches them."""
    tensors = {
        name: (tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0])
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    homes = {name: Path(file) for name, file in metadata.weight_map.items()}
    return Headers(tensors, tuple(Path(name) for name in metadata.files_metadata), homes)


def _shards(directory: Path) -> tuple[tuple[Path, ...], set[str]]:
    """The shards, and the tensors that an index says they have."""
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is no readable index of shards. Copy or download it again.") from error
        files = tuple(directory / name for name in sorted(set(weight_map.values())))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{index} names shards that are not there: {', '.join(missing)}. Copy or download them.")
        return files, set(weight_map)
    if (directory / SINGLE_FILE).is_file():
        return (directory / SINGLE_FILE,), set()
    others = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
    found = f" It has {', '.join(others[:3])}, which would have to be unpickled." if others else ""
    raise ValueError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}.{found} Give a checkpoint in safetensors format."
    )


def data_start(file: Path) -> int:
    """Where in a shard, whose header was read before, the bytes begin that its offsets count from."""
    with file.open("rb") as stream:
        return 8 + int(struct.unpack("<Q", stream.read(8))[0])


def read_header(file: Path) -> dict[str, Any]:
    """The entries of one shard.

    Raises:
        ValueError: If it is corrupt or truncated.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("header length")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{file} is no readable safetensors file ({size:,} bytes). Copy or download it again."
        ) from error
    expected = 8 + length + end
    if size != expected:
        raise ValueError(
            f"{file} is truncated or corrupt: its header describes {expected:,} bytes, it has {size:,}. "
            "Copy or download it again."
        )
    return header


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for side in shape:
        numel *= side
    return numel
