"""Reads parts of a checkpoint as tensors of the model, with the weight conversions of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from optimum_moe.checkpoint.byte_ranges import ByteRange
from optimum_moe.checkpoint.headers import data_start, read_header
from optimum_moe.checkpoint.system import open_binary
from optimum_moe.hf.compat import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from optimum_moe.surgeons import own_conversions

Entries = tuple[tuple[str, ...], ...]
"""By entry of a tensor's first axis: names of the stored tensors that make up its bytes, in this order."""

Get = Callable[[str], torch.Tensor]


class CheckpointReader:
    """Maps the tensors of a checkpoint to those of a model, and converts them.

    Args:
        model: The model, on any device; tensors are read in its dtypes.
        names: Names of the tensors in the checkpoint.
        quantizer: Quantizer to dequantize with; None for an unquantized checkpoint.
        cast: Read in the dtypes of the model; else in the stored dtypes.
    """

    def __init__(
        self, model: PreTrainedModel, names: Iterable[str], quantizer: HfQuantizer | None = None, cast: bool = True
    ) -> None:
        self.model = model
        self.cast = cast
        self.quantizer = quantizer
        self.unloaded: list[str] = []
        self._state = model.state_dict()
        own, self._names = own_conversions(model)
        conversions = [*own, *get_model_conversion_mapping(model, None, quantizer)]
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._parts: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self._target(name)
            if target in self._state:
                self._parts.setdefault(target, []).append((name, pattern))
            else:
                self.unloaded.append(name)
        self.incomplete = {
            target: lacking for target in self._parts if (lacking := self._names.lacking(target)) != [target]
        }
        """By tensor of the model what the checkpoint lacks of several tensors that it is converted from."""
        self.used_conversions = [c for c in conversions if c.was_used()]

    def _target(self, name: str) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if target not in self._state and name in self._state:
            return rename_source_key(name, [], [], prefix, self._state)
        return target, pattern

    def names(self, module: str) -> list[str]:
        """Names of the checkpoint's tensors that those of a module are converted from."""
        return [name for target, parts in self._parts.items() if _inside(target, module) for name, _ in parts]

    def read(self, module: str, get: Get) -> dict[str, torch.Tensor]:
        """Tensors of a module (`""` for the model) by their names in the model.

        Args:
            module: Path of the module.
            get: Function that returns a tensor of the checkpoint; with meta tensors only shapes are computed.
        """
        return self.read_targets([target for target in self._parts if _inside(target, module)], get)

    def targets(self) -> list[str]:
        """Arguments of `read_targets`: one tensor of the model for each conversion."""
        return list(self._parts)

    def parts(self, target: str) -> list[str]:
        """Names of the stored tensors that one of `targets()` is converted from."""
        return [name for name, _ in self._parts[target]]

    def read_targets(self, targets: Iterable[str], get: Get) -> dict[str, torch.Tensor]:
        """Read some of `targets()`, like `read`."""
        tensors: dict[str, torch.Tensor] = {}
        for target in targets:
            for name, tensor in self._convert(target, get).items():
                value = tensor[0] if isinstance(tensor, list) else tensor
                tensors[name] = value.detach()
        return tensors

    def entries(self, target: str) -> Entries | None:
        """The stored tensors whose concatenated bytes are those of one of `targets()`.

        This applies to a renamed tensor, and to a stack with one tensor (or several concatenated by rows) per expert.
        None if bytes are moved or changed in another way; dtypes are not compared.
        """
        if self.quantizer is not None:
            return None
        parts = self._parts[target]
        pattern = parts[0][1]
        if pattern is None:
            return ((parts[0][0],),) if len(parts) == 1 else None
        transform = self._by_pattern[pattern]
        if not _only_stacks(transform.operations):
            return None
        lists = [[name for name, p in parts if p == source] for source in transform.source_patterns]
        if len({len(names) for names in lists}) != 1:
            return None
        return tuple(zip(*lists, strict=True))

    def _convert(self, target: str, get: Get) -> Mapping[str, Any]:
        transform: Any = None
        for name, pattern in self._parts[target]:
            if transform is None:
                transform = deepcopy(self._by_pattern[pattern]) if pattern else WeightRenaming(name, target)
            tensor = get(name)
            dequantized = any(getattr(op, "hf_quantizer", None) for op in getattr(transform, "operations", ()))
            if self.cast and tensor.is_floating_point() and not dequantized:
                tensor = tensor.to(self._state[target].dtype)
            transform.add_tensor(target, name, pattern or name, tensor)
        return transform.convert(target, model=self.model, config=self.model.config, hf_quantizer=self.quantizer)


class ShardReader:
    """Reads tensors of shards by name; a context manager that keeps the shards open.

    Args:
        homes: The shard of each tensor.
        local: Function from a shard to its local file.
        stored_as: The name in the shard of each tensor that is asked for by another one.
    """

    def __init__(
        self,
        homes: Mapping[str, Path],
        local: Callable[[Path], Path] = lambda file: file,
        stored_as: Mapping[str, str] | None = None,
    ) -> None:
        self._homes, self._local, self._stored_as = homes, local, stored_as or {}
        self._open: dict[Path, Any] = {}
        self._byte_ranges: dict[Path, dict[str, ByteRange]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._byte_ranges.clear()
        self._stack.close()

    def __call__(self, name: str) -> torch.Tensor:
        """Read a tensor by its stored name."""
        file = self._homes[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self._local(file), "pt"))
        return self._open[file].get_tensor(self._stored_as.get(name, name))

    def byte_range(self, name: str) -> ByteRange:
        """The byte range of a stored tensor."""
        file = self._homes[name]
        if file not in self._byte_ranges:
            local = self._local(file)
            descriptor = open_binary(local)
            self._stack.callback(os.close, descriptor)
            begin, header = data_start(local), read_header(local)
            offsets = {stored: entry["data_offsets"] for stored, entry in header.items()}
            self._byte_ranges[file] = {
                stored: ByteRange(local, descriptor, begin + first, last - first)
                for stored, (first, last) in offsets.items()
            }
        return self._byte_ranges[file][self._stored_as.get(name, name)]


def _only_stacks(operations: Sequence[Any]) -> bool:
    """Whether the operations only concatenate or stack tensors along the first axis."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _inside(target: str, module: str) -> bool:
    return not module or target.startswith(f"{module}.")


def take_dtypes(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Set the dtypes of named tensors in a model on the meta device, so that its reader reads them."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
