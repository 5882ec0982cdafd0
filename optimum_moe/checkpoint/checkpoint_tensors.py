"""A checkpoint as the tensors of its model: shapes come from the headers, and values are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from optimum_moe.checkpoint.dtypes import DTYPES
from optimum_moe.checkpoint.headers import Headers
from optimum_moe.checkpoint.missing import as_saved, lacking, refuse_lacking
from optimum_moe.checkpoint.reader import CheckpointReader, Entries, Get
from optimum_moe.hf.compat import model_from_config
from optimum_moe.hf.quantizer import rebuild_structure
from optimum_moe.hf.structure import METHOD, MoEStructureConfig
from optimum_moe.surgeons import FoundBlock, find_blocks, owning_configs, registered_surgeons

_WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_COUNTS = {name for surgeon in registered_surgeons().values() for name in surgeon.count_fields}
Parts = tuple[tuple[tuple[str, torch.dtype], ...], ...]
"""By entry of a tensor's first axis: the stored tensors that it consists of, with their dtypes."""


class CheckpointTensors:
    """The tensors of a checkpoint by their names in the model.

    Args:
        reader: Reader of the checkpoint.
        headers: Headers of the checkpoint.
        get: Function that reads a stored tensor.
    """

    def __init__(self, reader: CheckpointReader, headers: Headers, get: Get) -> None:
        self.reader = reader
        self.headers = headers
        self.get = get
        self.tensors: dict[str, torch.Tensor] = {}
        """Every tensor of the model that is in the checkpoint, on the meta device."""
        self.broken: dict[str, str] = {}
        """Names of the tensors that cannot be converted, with the reason."""
        self._target: dict[str, str] = {}

        def empty(name: str) -> torch.Tensor:
            return meta_tensor(*headers.tensors[name][:2])

        for target in reader.targets():
            try:
                made = reader.read_targets([target], empty)
            except Exception as error:
                self.broken[target] = str(error).split("\n")[0]
                continue
            self.tensors |= made
            self._target |= dict.fromkeys(made, target)

    def inside(self, module: str) -> list[str]:
        """Names of all tensors in a module."""
        return [name for name in self.tensors if name.startswith(f"{module}.")]

    def beside(self, name: str) -> list[str]:
        """Names of all tensors that the same conversion reads as the tensor `name`."""
        return [other for other, target in self._target.items() if target == self._target[name]]

    def entries(self, name: str) -> Entries | None:
        """The stored tensors whose concatenated bytes are those of a tensor; None if there are no such tensors."""
        entries = self.reader.entries(self._target[name])
        if entries is None or len(self.beside(name)) > 1:
            return None
        stored = [self.headers.tensors[part] for entry in entries for part in entry]
        made = self.tensors[name]
        same = {DTYPES.get(dtype) for dtype, _, _ in stored} == {made.dtype}
        whole = sum(size for _, _, size in stored) == made.numel() * made.element_size()
        return entries if same and whole else None

    def mixed(self) -> dict[str, Parts]:
        """Tensors whose stored parts have different dtypes, which are saved in the same dtypes again.

        Raises:
            ValueError: If such parts are not simply concatenated, so that they cannot be separated for saving.
        """
        found: dict[str, Parts] = {}
        for name, target in self._target.items() if not self.reader.cast else ():
            stored = {part: DTYPES.get(self.headers.tensors[part][0]) for part in self.reader.parts(target)}
            kinds = {dtype for dtype in stored.values() if dtype is not None and dtype.is_floating_point}
            if len(kinds) < 2:
                continue
            entries = self.reader.entries(target)
            if entries is None or len(self.beside(name)) > 1:
                raise ValueError(
                    f"{name} consists of stored tensors in {' and '.join(sorted(map(str, kinds)))}, which could not be "
                    'separated again. Pass dtype="bfloat16" or another dtype to read all of them in one.'
                )
            found[name] = tuple(tuple((part, stored[part]) for part in entry) for entry in entries)  # type: ignore[misc]
        return found

    def itemsize(self, name: str, tensor: torch.Tensor) -> float:
        """Bytes per element of a tensor as stored; of the smallest entry, if entries differ."""
        if name not in self.tensors:
            return tensor.element_size()
        parts = self.mixed().get(name)
        if parts is None:
            return self.tensors[name].element_size()
        return min(sum(dtype.itemsize for _, dtype in entry) / len(entry) for entry in parts)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors of the model; those that the checkpoint lacks are left out."""
        wanted = [name for name in names if name in self._target]
        made = self.reader.read_targets(sorted({self._target[name] for name in wanted}), self.get)
        return {name: made[name] for name in wanted}


def refuse_larger_than_file(config: PreTrainedConfig, headers: Headers) -> None:
    """Raise a `ValueError` if sizes in a config exceed its checkpoint, before modules are created."""
    counted = {"num_hidden_layers": len(headers.tensors), "num_layers": len(headers.tensors)}
    # A quantized file may store two elements per byte.
    counted |= dict.fromkeys((*_WIDTHS, *_COUNTS), 2 * headers.bytes)
    for owner in owning_configs(config):
        for name, most in counted.items():
            # Attribute access raises an error in some configs whose value differs between layers.
            value = vars(owner).get(name)
            if isinstance(value, int) and value > most:
                raise ValueError(
                    f"config.json says {name}={value:,}, and the checkpoint has {len(headers.tensors):,} tensors of "
                    f"{headers.bytes:,} bytes. Restore the config that belongs to these weights."
                )


def refuse_incomplete(name: str, model: PreTrainedModel, headers: Headers, blocks: Sequence[FoundBlock]) -> None:
    """Raise a `ValueError` if a checkpoint lacks tensors of its model, or has tensors of another shape.

    Args:
        name: Name of the checkpoint in errors.
        model: The model, on the meta device.
        headers: Headers of the checkpoint, dequantized.
        blocks: The MoE blocks of the model.
    """
    reader = CheckpointReader(model, headers.tensors)
    checkpoint_tensors = CheckpointTensors(reader, headers, lambda stored: meta_tensor(*headers.tensors[stored][:2]))
    state, given = model.state_dict(), checkpoint_tensors.tensors
    wrong = [key for key, tensor in given.items() if key in state and tensor.shape != state[key].shape]
    gone = lacking(model, given.keys() | checkpoint_tensors.broken.keys(), [found.info.name for found in blocks])
    incomplete = set(as_saved(model, [*wrong, *checkpoint_tensors.broken], headers.tensors)) - {
        *wrong,
        *checkpoint_tensors.broken,
    }
    refuse_lacking(name, {*as_saved(model, gone, headers.tensors), *incomplete})
    if wrong:
        raise ValueError(
            f"{name} has {wrong[0]} of shape {tuple(given[wrong[0]].shape)}, but {type(model).__name__} needs "
            f"{tuple(state[wrong[0]].shape)} by its config.json. Restore the config that belongs to these weights."
        )


def no_numbers(name: str) -> torch.Tensor:
    """The `get` of `CheckpointTensors` whose values must not be read."""
    raise AssertionError(f"{name} was read before the input was checked")


def with_itemsizes(
    blocks: Iterable[FoundBlock],
    model: PreTrainedModel,
    itemsize: Callable[[str, torch.Tensor], float],
    mixed: Collection[str] = (),
) -> tuple[FoundBlock, ...]:
    """Blocks with the stored bytes per element of their experts and routers.

    Args:
        blocks: Blocks of the model.
        model: The model.
        itemsize: Function from name and tensor to bytes per element.
        mixed: Names of tensors that are stored in parts of several dtypes.
    """
    found = []
    for each in blocks:
        block = each.module(model)
        named = [*block.named_parameters(), *block.named_buffers()]
        names = {id(tensor): f"{each.info.name}.{name}" for name, tensor in named}
        experts = each.surgeon.expert_parameters(block)
        biases = [tensor for tensor in experts if names[id(tensor)].endswith("bias")]
        matrices = [tensor for tensor in experts if not names[id(tensor)].endswith("bias")]
        sizes = []
        for tensors in (matrices, biases, [tensor for _, tensor in each.surgeon.router_tensors(block)]):
            taken = sum(tensor.numel() * itemsize(names[id(tensor)], tensor) for tensor in tensors)
            sizes.append(taken / max(1, sum(tensor.numel() for tensor in tensors)))
        info = replace(each.info, expert_itemsize=sizes[0], bias_itemsize=sizes[1], router_itemsize=sizes[2])
        if any(names[id(tensor)] in mixed for tensor in experts):
            odd = (
                'they are stored in several dtypes, but factors have one; dtype="bfloat16" or another reads all in one'
            )
            info = replace(info, no_factors=info.no_factors or odd)
        found.append(replace(each, info=info))
    return tuple(found)


def meta_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor on the meta device with the dtype and shape in a header."""
    return torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta")


def built(directory: Path, headers: Headers | None = None) -> tuple[PreTrainedModel, list[FoundBlock]]:
    """The model of a folder's config on the meta device, and its blocks before compression.

    Raises:
        ValueError: If the config has no known model, a structure that the model cannot have, or larger sizes than the
            headers.
    """
    config, structure = compressed_config(directory)
    if headers is not None:
        refuse_larger_than_file(config, headers)
    names = getattr(config, "architectures", None) or []
    cls: Any = getattr(transformers, names[0], AutoModelForCausalLM) if names else AutoModelForCausalLM
    with torch.device("meta"):
        model = model_from_config(cls, config)
    blocks = find_blocks(model)
    if structure is not None:
        rebuild_structure(model, structure)
    return model, blocks


def compressed_config(directory: Path) -> tuple[PreTrainedConfig, MoEStructureConfig | None]:
    """The stock config of a folder, and the structure that its `quantization_config` adds.

    Raises:
        ValueError: If the folder is quantized by something else, or the structure is broken.
    """
    config = AutoConfig.from_pretrained(directory)
    record = getattr(config, "quantization_config", None)
    for name in ("quantization_config", "fusion_config"):
        if hasattr(config, name):
            delattr(config, name)
    if record is None:
        return config, None
    if not isinstance(record, Mapping):
        record = record.to_dict()
    if record.get("quant_method") != METHOD:
        raise ValueError(
            f"{directory} was quantized ({record.get('quant_method')}) with another tool. "
            "Verify the checkpoint from before the quantization."
        )
    return config, MoEStructureConfig(**record)
