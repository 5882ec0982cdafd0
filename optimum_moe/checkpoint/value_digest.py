"""A digest of a model's values that is cheap to compute and independent of how they are stored.

It covers a seeded sample of every tensor of the model, so it is the same for one file, shards, one tensor per expert
and a model in memory, and for two dtypes that represent the same values. Small tensors are covered completely, large
ones by runs of a thousand elements at random positions, at least two runs for each entry of a stack of experts.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod

import torch
from accelerate.utils import align_module_device
from torch import nn

from optimum_moe.checkpoint.byte_ranges import ByteRange
from optimum_moe.checkpoint.checkpoint_tensors import CheckpointTensors
from optimum_moe.checkpoint.headers import Headers
from optimum_moe.checkpoint.reader import ShardReader
from optimum_moe.checkpoint.shards import bytes_of

WHOLE = 1 << 21
"""Maximum elements of a tensor that is covered completely."""
SPAN = 1 << 19
"""Elements per run in a larger tensor, fewer if there are many experts."""
RUN = 1 << 10
"""Number of elements in a run."""

Runs = Sequence[tuple[int, int]]


def sample_runs(name: str, shape: Sequence[int]) -> Runs:
    """Start and length of each run of a tensor's sample, in the order of the flattened tensor."""
    numel = prod(shape)
    if numel <= WHOLE:
        return [(0, numel)]
    # Gate and up of an expert follow each other.
    span = min(SPAN, numel // (2 * shape[0])) if len(shape) >= 3 else SPAN
    if span <= RUN:
        return [(0, numel)]
    runs = []
    for first in range(0, numel, span):
        room = min(span, numel - first) - RUN + 1
        drawn = hashlib.blake2b(f"{name} {first}".encode(), digest_size=8).digest()
        if room > 0:
            runs.append((first + int.from_bytes(drawn, "little") % room, RUN))
    return runs


def values_in_memory(model: nn.Module, names: Collection[str], tied: Mapping[str, str]) -> str:
    """The digest of a model in memory, on any device; offloaded tensors are fetched module by module.

    Args:
        model: The model.
        names: Names of the covered tensors.
        tied: Names of tied tensors, with the name of the tensor that they share.
    """
    found = {}
    for path, module in model.named_modules():
        with align_module_device(module):
            own = module.named_parameters(recurse=False, remove_duplicate=False)
            for key, tensor in [*own, *module.named_buffers(recurse=False, remove_duplicate=False)]:
                name = f"{path}.{key}" if path else key
                if name in names:
                    found[name] = _digest(tensor.shape, _sample(name, tensor))
    return _total(found, tied)


def values_stored(
    checkpoint_tensors: CheckpointTensors,
    shards: ShardReader,
    names: Collection[str],
    tied: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
) -> list[str]:
    """The digest of a checkpoint's stored values, and of the loaded values if they differ.

    Args:
        checkpoint_tensors: The checkpoint, read in its stored dtypes.
        shards: Reader of its shards.
        names: Names of the covered tensors of the model.
        tied: Names of tied tensors, with the name of the tensor that they share.
        dtypes: Dtypes of loaded tensors, if they may differ from the stored ones.

    Raises:
        ValueError: If a shard no longer matches its header.
    """
    stored, loaded = {}, {}
    for name, like in checkpoint_tensors.tensors.items():
        if name not in names:
            continue
        entries = checkpoint_tensors.entries(name)
        if entries is None:
            # A tensor that a conversion moves or changes is not one byte range of the file.
            numbers = _sample(name, checkpoint_tensors.read([name])[name])
        else:
            places = [shards.byte_range(part) for entry in entries for part in entry]
            numbers = _read(places, name, like.shape, like.dtype)
        stored[name] = loaded[name] = _digest(like.shape, numbers)
        if dtypes.get(name, like.dtype) != like.dtype:
            loaded[name] = _digest(like.shape, numbers.to(dtypes[name]))
    return list(dict.fromkeys((_total(stored, tied), _total(loaded, tied))))


def values_packed(headers: Headers, shards: ShardReader) -> list[str]:
    """The digest of a quantized checkpoint's stored bytes, since its values would all need dequantization."""
    found = {}
    for name, (_, shape, size) in headers.tensors.items():
        item = size // max(prod(shape), 1)
        shape = (*shape, item) if item * prod(shape) == size else (size,)
        found[name] = _digest(shape, _read([shards.byte_range(name)], name, shape, torch.uint8))
    return [_total(found, {})]


def _sample(name: str, tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[first : first + count] for first, count in sample_runs(name, tensor.shape)])


def _read(places: Sequence[ByteRange], name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The sample of a tensor whose bytes are the concatenation of several byte ranges."""
    runs = sample_runs(name, shape)
    if prod(shape) * dtype.itemsize != sum(place.size for place in places):
        raise ValueError(f"{places[0].file} was changed since it was opened. Make a new MoECompressor.")
    numbers = torch.empty(sum(count for _, count in runs), dtype=dtype)
    if numbers.numel():
        memory, done = bytes_of(numbers), 0
        pieces = list(_pieces(places, runs, dtype.itemsize))
        for piece in pieces:
            piece.expect()
        for piece in pieces:
            piece.read_into(memory[done : done + piece.size])
            done += piece.size
    return numbers


def _pieces(places: Sequence[ByteRange], runs: Runs, item: int) -> Iterator[ByteRange]:
    ends = list(accumulate(place.size for place in places))
    for begin, count in runs:
        first, last = begin * item, (begin + count) * item
        while first < last:
            index = bisect_right(ends, first)
            size = min(last, ends[index]) - first
            place = places[index]
            yield replace(place, start=place.start + place.size - (ends[index] - first), size=size)
            first += size


def _digest(shape: Sequence[int], numbers: torch.Tensor) -> str:
    """SHA-256 of a shape and of values; floating-point values are cast to one wide dtype first."""
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers)
    if numbers.is_floating_point() and numbers.dtype != torch.float64:
        numbers = numbers.to(torch.float32)
    found = hashlib.sha256(f"{tuple(shape)} {numbers.dtype}".encode())
    if numbers.numel():
        found.update(bytes_of(numbers.cpu().contiguous()))
    return found.hexdigest()


def _total(found: Mapping[str, str], tied: Mapping[str, str]) -> str:
    """SHA-256 of all tensor digests; tied tensors are covered once."""
    kept = dict(found)
    for name in found:
        root = name
        while root in tied:
            root = tied[root]
        if root != name and found.get(root, found[name]) == found[name]:
            kept[root] = kept.pop(name)
    return hashlib.sha256("".join(f"{name} {kept[name]}\n" for name in sorted(kept)).encode()).hexdigest()
