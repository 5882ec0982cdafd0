"""The safetensors headers of a checkpoint: names, dtypes, shapes and sizes, read without any tensor, or torch."""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from huggingface_hub.utils import SafetensorsRepoMetadata

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_VARIANT = re.compile(r"model\.(?:safetensors\.index\.(\w+)\.json|(\w+)\.safetensors)$")
# {"NAME":{"dtype":"BF16","shape":[128,2048,4096],"data_offsets":[1234567890,1234567890]}, and what begins a file.
_ENTRY, _FILE = 90, 48
LONGEST_HEADER = 100_000_000
"""Maximum bytes of a header that safetensors reads."""
ITEMSIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per element of the dtypes in headers."""
_RUNNING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Headers:
    """Names, dtypes and shapes of all tensors of a checkpoint.

    Args:
        tensors: `(dtype, shape, bytes)` of each tensor.
        files: The shards.
        homes: The shard of each tensor.
        stored_as: The name in the files of each tensor that has another name here.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    files: tuple[Path, ...]
    homes: Mapping[str, Path] = field(default_factory=dict)
    stored_as: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, new_name: Callable[[str], str | None]) -> Headers:
        """The headers with other names.

        Args:
            new_name: Function from the name of a tensor to its new one; None for a tensor to leave out.
        """
        names = {new: old for old in self.tensors if (new := new_name(old)) is not None}
        return Headers(
            {new: self.tensors[old] for new, old in names.items()},
            self.files,
            {new: self.homes[old] for new, old in names.items()},
            {new: self.stored_as.get(old, old) for new, old in names.items()},
        )

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(prod(shape) for _, shape, _ in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size for _, _, size in self.tensors.values())

    @property
    def itemsize(self) -> float:
        """Bytes per element of the most frequent dtype, which is that of the experts."""
        return float(ITEMSIZES.get(self._counts().most_common(1)[0][0], 1))

    @property
    def dtype(self) -> torch.dtype | None:
        """The most frequent floating dtype in which a model can run; None if there is none."""
        from optimum_moe.checkpoint.dtypes import DTYPES

        running = [name for name, _ in self._counts().most_common() if name in _RUNNING]
        return DTYPES[running[0]] if running else None

    @property
    def dtypes(self) -> set[torch.dtype]:
        """All floating-point dtypes of the tensors."""
        from optimum_moe.checkpoint.dtypes import DTYPES

        found = {DTYPES.get(dtype) for dtype, _, _ in self.tensors.values()}
        return {dtype for dtype in found if dtype is not None and dtype.is_floating_point}

    def _counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for dtype, shape, _ in self.tensors.values():
            counts[dtype] += prod(shape)
        return counts


def header_bytes(names: Iterable[str], num_files: int = 1) -> int:
    """Maximum bytes of the headers for tensors of these names, in `num_files` files or one file per layer."""
    entries = list(names)
    layers = {match[0] for name in entries if (match := re.match(r".*?\.\d+\.", name))}
    return sum(len(name) for name in entries) + _ENTRY * len(entries) + _FILE * max(num_files, len(layers) + 2)


def read_headers(directory: str | Path, variant: str | None = None) -> Headers:
    """Read and check the headers of all shards in a local folder.

    Args:
        directory: The folder.
        variant: As in `from_pretrained`.

    Raises:
        ValueError: If there are no safetensors files, a shard is missing, or one is corrupt or truncated.
    """
    directory = Path(directory)
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    homes: dict[str, Path] = {}
    files, index = weight_files(directory, variant)
    for file in files:
        for name, entry in read_header(file).items():
            first, last = entry["data_offsets"]
            tensors[name] = (entry["dtype"], tuple(entry["shape"]), last - first)
            homes[name] = file
    if not tensors:
        raise ValueError(f"The files of {directory} hold no tensor. Copy or download the checkpoint again.")
    lacking = sorted(set(index.get("weight_map", ())) - set(tensors))
    if lacking:
        raise ValueError(
            f"The index of {directory} lists {len(lacking)} tensors that no shard has ({', '.join(lacking[:3])}). "
            "They would be random. Copy or download the checkpoint again, or remove the index if it is outdated."
        )
    shards = set(index.get("weight_map", {}).values())
    if shards == {file.name for file in files} and not isinstance(index.get("metadata"), dict):
        raise ValueError(
            f'The index of {directory} has no "metadata", without which transformers cannot load it. Add "metadata": '
            "{} to it, or copy or download it again."
        )
    return Headers(tensors, files, homes)


def headers_from_metadata(metadata: SafetensorsRepoMetadata) -> Headers:
    """Convert the headers of a Hub repository, as fetched by `huggingface_hub`."""
    tensors = {
        name: (tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0])
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    homes = {name: Path(file) for name, file in metadata.weight_map.items()}
    return Headers(tensors, tuple(Path(name) for name in metadata.files_metadata), homes)


def weight_files(directory: Path, variant: str | None = None) -> tuple[tuple[Path, ...], Mapping[str, Any]]:
    """The files that transformers loads the weights from, and the content of their index.

    These are the file that the config names, else a single file, else the shards of an index. Other files in the folder
    are not part of the checkpoint.

    Args:
        directory: The folder.
        variant: As in `from_pretrained`.

    Raises:
        ValueError: If there are no safetensors files, or one of them is missing.
    """
    ranks = sorted(path.name for path in directory.iterdir() if _RANK_SHARD.fullmatch(path.name))
    if ranks:
        raise ValueError(
            f"{directory} holds shards of single ranks ({ranks[0]}, ...), which only a distributed run can load. Load "
            "the model there, and save it with distributed_checkpoint=False."
        )
    named = _named_weights(directory)
    single, index = directory / _varied(SINGLE_FILE, variant), directory / _varied(INDEX_FILE, variant)
    if named is not None:
        single, index = (index, named) if named.name.endswith(".index.json") else (named, index)
    if single.is_file() and single != index:
        if named is None and index.is_file():
            # A wrong index means that the checkpoint is incomplete or outdated.
            _, record = _indexed(directory, index)
            warnings.warn(
                f"{directory} has {single.name} and {index.name}. transformers loads {single.name}, so that file is "
                f"compressed. Remove it to use the shards, else remove {index.name}.",
                stacklevel=2,
            )
            return (single,), record
        return (single,), {}
    if index.is_file():
        return _indexed(directory, index)
    others = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
    found = f" It has {', '.join(others[:3])}, which would need unpickling." if others else ""
    found_variants = (_VARIANT.match(path.name) for path in sorted(directory.iterdir()))
    variants = [found[1] or found[2] for found in found_variants if found]
    if variants:
        found += f" It has the variants {', '.join(variants)}: pass variant={variants[0]!r} for one of them."
    raise ValueError(
        f"{directory} has neither {single.name} nor {index.name}.{found} Give a checkpoint in safetensors format."
    )


def _indexed(directory: Path, index: Path) -> tuple[tuple[Path, ...], Mapping[str, Any]]:
    try:
        record = dict(json.loads(index.read_text(encoding="utf-8")))
        names = sorted(set(dict(record["weight_map"]).values()))
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not a readable index of shards. Copy or download it again.") from error
    if outside:
        raise ValueError(f"{index} names {outside[0]}, outside of {directory}. Do not use this checkpoint.")
    files = tuple(directory / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{index} names shards that do not exist: {', '.join(missing)}. Copy or download them, or remove the "
            "index if it is outdated."
        )
    return files, record


def _named_weights(directory: Path) -> Path | None:
    """The file that `transformers_weights` in `config.json` names, as `from_pretrained` reads it."""
    try:
        name = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if name is None:
        return None
    path = Path(os.path.normpath(directory / str(name)))
    inside = path.is_relative_to(os.path.normpath(directory))
    if not inside or not path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"config.json has transformers_weights={name!r}, not a safetensors file. Correct it.")
    if not path.is_file():
        raise ValueError(
            f"config.json names transformers_weights={name!r}, which is not in {directory}. Copy it there."
        )
    return path


def _varied(name: str, variant: str | None) -> str:
    """The file name of a variant, as transformers forms it."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def data_start(file: Path) -> int:
    """Position in a shard at which its tensor offsets start; its header must have been read before."""
    with file.open("rb") as stream:
        return 8 + int(struct.unpack("<Q", stream.read(8))[0])


def read_header(file: Path) -> dict[str, Any]:
    """The header entries of one shard.

    Raises:
        ValueError: If the shard is corrupt or truncated.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, LONGEST_HEADER):
                raise ValueError("header length")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = _end_of_tensors(header)
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({size:,} bytes). Copy or download it again."
        ) from error
    expected = 8 + length + end
    if size != expected:
        raise ValueError(
            f"{file} is truncated or corrupt: its header describes {expected:,} bytes, it has {size:,}. "
            "Copy or download it again."
        )
    return header


def _end_of_tensors(header: Mapping[str, Any]) -> int:
    """End of the last tensor, after a check that tensors are contiguous and as long as their shapes and dtypes require.

    Raises:
        ValueError: If they are not.
    """
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        first, last = entry["data_offsets"]
        numbers, itemsize = [*entry["shape"], first, last], ITEMSIZES.get(entry["dtype"])
        if any(type(number) is not int or number < 0 for number in numbers) or first != end or last < first:
            raise ValueError("shapes or offsets")
        if itemsize is not None and prod(entry["shape"]) * itemsize != last - first:
            raise ValueError("shapes")
        end = last
    return end
