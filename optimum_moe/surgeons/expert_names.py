"""Names of compressed experts in the files of a checkpoint: one tensor for each expert, projection and part.

Other runtimes find experts under the names that the stock checkpoint of an architecture has. In memory those of one
width lie in stacks, so loading joins tensors of the files into a stack, and saving divides it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_moe.formats.base import JOINT, PROJECTIONS
from optimum_moe.hf.compat import (
    ConversionOps,
    DtensorShardOperation,
    WeightConverter,
    WeightRenaming,
    is_distributed,
    revert_weight_conversion,
)
from optimum_moe.nn import FactorizedExperts
from optimum_moe.nn.expert_projection import Piece
from optimum_moe.surgeons.base import probed

if TYPE_CHECKING:
    from optimum_moe.surgeons.registry import FoundBlock

MARK = "optimum_moe_expert_"
"""Begins the last part of a name that hides one of ours, in hexadecimal, from the patterns of transformers."""
_STEMS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_FACTORS, _INSIDE = ".factors.", "optimum_moe_block"


@dataclass(frozen=True)
class BlockNames:
    """Where a block and its experts lie in the files.

    Args:
        block: Prefix of the block.
        expert: Prefix of an expert, without its number at the end.
        stems: Name of each projection within an expert.
        alias: Prefix under which transformers saves a tensor of the block's own module.
    """

    block: str
    expert: str
    stems: Mapping[str, str]
    alias: str

    def name_of(self, piece: Piece) -> str:
        """The name of one tensor in the files."""
        owner = f"{self.expert}{piece.owner}"
        if piece.is_shared:
            owner = f"{self.expert.rpartition('.')[0]}.shared.{piece.owner}"
        if piece.projection is None and piece.tensor != "bias":
            return f"{owner}.{piece.tensor}"
        # What is left of an empty expert is its down bias.
        projection = piece.projection or "down"
        stem = f"{JOINT}_proj" if projection == JOINT else self.stems[projection]
        return f"{owner}.{stem}.{piece.tensor if piece.tensor in ('weight', 'bias') else f'weight_{piece.tensor}'}"


@dataclass(eq=False)
class ExpertNames:
    """The names of the compressed experts of a model.

    Args:
        blocks: Names by the path of the block.
        factors: Path of the block by that of its `FactorizedExperts`.
        base: Prefix of the base model, which names in the files may lack.
        more: Prefixes that they may have in addition.
        homes: Stacked tensor by name in the files; only where a checkpoint is read.
        stacks: By stacked tensor its pieces with their names, in their order; likewise.
        seen: Names that were read.
        misfits: Those of another shape than the model.
    """

    blocks: dict[str, BlockNames] = field(default_factory=dict)
    factors: dict[str, str] = field(default_factory=dict)
    base: str = ""
    more: frozenset[str] = frozenset()
    homes: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, list[tuple[str, Piece]]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    misfits: set[str] = field(default_factory=set)

    def with_block(self, path: str, names: BlockNames, block: nn.Module) -> ExpertNames:
        """The names with those of another block."""
        held = {f"{path}.{name}": path for name, found in block.named_modules() if isinstance(found, FactorizedExperts)}
        return ExpertNames({**self.blocks, path: names}, {**self.factors, **held})

    def reading(self, model: PreTrainedModel, in_files: Iterable[str] = ()) -> ExpertNames:
        """The names with the tables by which a checkpoint is read into a model.

        Args:
            model: The model.
            in_files: Prefixes of its blocks in the files, as far as they are known.
        """
        base = f"{model.base_model_prefix}."
        pairs = ((prefix, names.block) for prefix in in_files for names in self.blocks.values())
        more = {prefix.removesuffix(own) for prefix, own in pairs if prefix.endswith(f".{own}")}
        read = ExpertNames(self.blocks, self.factors, base, frozenset({base, *more}))
        for factors in self.factors:
            for stack, named in self.pieces(model, factors).items():
                read.stacks[stack] = named
                read.homes |= dict.fromkeys((name for name, _ in named), stack)
        return read

    def pieces(self, model: nn.Module, factors: str) -> dict[str, list[tuple[str, Piece]]]:
        """By stacked tensor the pieces of the experts in the module `factors`, with their names."""
        held: Any = model.get_submodule(factors)
        names, found = self.blocks[self.factors[factors]], defaultdict(list)
        for piece in held.pieces():
            found[f"{factors}.{piece.stack}"].append((names.name_of(piece), piece))
        return dict(found)

    def holds(self, name: str) -> bool:
        """Whether a tensor of the model belongs to compressed experts."""
        return _factors_of(name) in self.factors

    def lacking(self, stack: str) -> list[str]:
        """The names that were not read of a stacked tensor's; its own if it is none of ours."""
        return [name for name, _ in self.stacks.get(stack, ()) if name not in self.seen] or [stack]

    def forget(self) -> None:
        """Empty the tables, once a checkpoint is read."""
        self.homes, self.stacks, self.seen, self.misfits = {}, {}, set(), set()

    def find(self, key: str) -> str | None:
        """The name of a tensor of the files that may have more or less of a prefix; None if it is none of ours."""
        if key in self.homes:
            return key
        if self.base + key in self.homes:
            return self.base + key
        # Other layers of the same structure (for multi-token prediction) differ in their prefix only.
        ends = (key.removeprefix(prefix) for prefix in self.more if key.startswith(prefix))
        return next((end for end in ends if end in self.homes), None)

    def intermediate(self, key: str) -> str | None:
        """What other conversions meet instead of a tensor of the files; None if it is none of ours."""
        name = self.find(key)
        if name is None:
            return None
        self.seen.add(name)
        block = self.factors[_factors_of(self.homes[name])]
        return f"{_moved(self.blocks[block].alias, name, key)}{_hidden(block, name)}"

    def final(self, key: str) -> str | None:
        """The name in the files of what other conversions left of an intermediate one; None for any other name."""
        before, mark, _ = key.rpartition(MARK)
        if not mark:
            return None
        block, name = _shown(key)
        return _moved(name, self.blocks[block].alias, before)


class ExpertRenaming(WeightRenaming):
    """Hides the names of our tensors from all other conversions.

    Args:
        names: The names.
        is_saving: Whether it shows them again.
    """

    def __init__(self, names: ExpertNames, is_saving: bool = False) -> None:
        super().__init__(MARK, MARK)
        self.names, self.is_saving = names, is_saving

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name and what it matched; the old name and None if it is none of ours."""
        found = self.names.final(source_key) if self.is_saving else self.names.intermediate(source_key)
        return (source_key, None) if found is None else (found, MARK)

    def was_used(self) -> bool:
        """Always, since the model is to be saved under these names."""
        return True

    def reverse_transform(self) -> ExpertRenaming:
        """The inverse renaming, for saving."""
        return ExpertRenaming(self.names, not self.is_saving)


class ExpertConverter(WeightConverter):
    """Joins our tensors into stacks, and divides the stacks again.

    Args:
        names: The names.
        is_saving: Whether it divides.
    """

    def __init__(self, names: ExpertNames, is_saving: bool = False) -> None:
        # Processes that load a model together read its experts as a whole, for which a device may have no room.
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(MARK, MARK, operations=[_Divide(names) if is_saving else _Join(names)], force_cpu=shared)
        self.names, self.is_saving = names, is_saving

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The stacked tensor and what matched; the old name and None if it is none of ours."""
        if self.is_saving:
            return source_key, MARK if self.names.holds(source_key) else None
        return (self.names.homes[_shown(source_key)[1]], MARK) if MARK in source_key else (source_key, None)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Collect a tensor by its name instead of by a pattern."""
        super().add_tensor(target_key, source_key, self.names.find(source_key) or source_key, future)

    def was_used(self) -> bool:
        """Always, since the model is to be saved in this form."""
        return True

    def reverse_transform(self) -> ExpertConverter:
        """The inverse conversion, for saving."""
        return ExpertConverter(self.names, not self.is_saving)

    def __deepcopy__(self, memo: Any) -> ExpertConverter:
        # transformers copies it for each tensor of the files, and all but what is collected may be shared.
        twin = object.__new__(type(self))
        for name in _SLOTS:
            if hasattr(self, name):
                setattr(twin, name, getattr(self, name))
        twin.names, twin.is_saving = self.names, self.is_saving
        twin.collected_tensors, twin.layer_targets = defaultdict(list), defaultdict(set)
        return twin


_SLOTS = [name for cls in ExpertConverter.__mro__ for name in getattr(cls, "__slots__", ())]


class _Join(ConversionOps):
    """Tensors of the files to one stack."""

    def __init__(self, names: ExpertNames) -> None:
        self.names = names

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """See `ConversionOps`.

        Raises:
            ValueError: If a tensor is missing, or has another shape than the model.
        """
        parts = []
        for name, piece in self.names.stacks[full_layer_name]:
            if name not in input_dict:
                raise ValueError(f"{name} is missing")
            (tensor,) = input_dict.pop(name)
            if tuple(tensor.shape) != piece.shape:
                self.names.misfits.add(name)
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and should have {piece.shape}")
            parts.append(tensor.unsqueeze(0) if piece.is_entry else tensor)
        path, _, name = full_layer_name.rpartition(".")
        stack, target = torch.cat(parts), getattr(model.get_submodule(path), name)
        if is_distributed(target):
            # A copy, so that the rest is freed.
            stack = DtensorShardOperation(target).shard_tensor(stack).clone()
        return {full_layer_name: stack}


class _Divide(ConversionOps):
    """A stack to tensors of the files."""

    def __init__(self, names: ExpertNames) -> None:
        self.names = names
        self._pieces: dict[str, dict[str, list[tuple[str, Piece]]]] = {}

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """See `ConversionOps`; a stack that is quantized as a whole, or of another module (an adapter), stays one."""
        (tensor,) = input_dict.pop(full_layer_name)
        factors = _factors_of(full_layer_name)
        if factors not in self._pieces:
            self._pieces[factors] = self.names.pieces(model, factors)
        named = self._pieces[factors].get(full_layer_name)
        if named is None or type(tensor) not in (torch.Tensor, nn.Parameter):
            return {full_layer_name: tensor}
        block = self.names.factors[factors]
        return {
            f"{block}.{_hidden(block, name)}": tensor[piece.part][0] if piece.is_entry else tensor[piece.part]
            for name, piece in named
        }


def names_of(model: PreTrainedModel, found: FoundBlock) -> BlockNames:
    """The names in the files of a block, whose experts are stock ones, and of its experts once they are compressed.

    The experts of an architecture whose checkpoints hold them one by one keep their prefix and stems; those of others
    get `<block>.experts.<number>.gate_proj`, `up_proj` and `down_proj`.
    """
    path, block = found.info.name, found.module(model)
    alias = next(iter(_saved(model, {f"{path}.{_INSIDE}": torch.empty(1, device="meta")}))).removesuffix(_INSIDE)
    expert, stems = _stock_names(_saved(model, {f"{path}.{name}": t for name, t in found.surgeon.probe(block).items()}))
    if expert:
        return BlockNames(expert.rpartition(".")[0].rpartition(".")[0], expert, stems, alias)
    own = {*map(id, found.surgeon.expert_parameters(block)), *(id(t) for _, t in found.surgeon.router_tensors(block))}
    tensors = [(f"{path}.{name}", t) for name, t in [*block.named_parameters(), *block.named_buffers()] if id(t) in own]
    inside = [_saved(model, {name: torch.empty(tensor.shape, device="meta")}) for name, tensor in tensors]
    parts = zip(*(name.split(".") for names in inside for name in names), strict=False)
    prefix = ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, parts))
    # Some blocks have only experts, and others share a list of experts with another block.
    if f"{prefix}.".startswith(alias) or not all(inside):
        prefix = alias.removesuffix(".")
    return BlockNames(prefix, f"{prefix}.experts.", dict(_STEMS), alias)


def _stock_names(saved: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, str]]:
    """Prefix of experts and stem of each projection, where `Surgeon.probe` is saved expert by expert; else nothing."""
    by_value = {tuple(set(tensor.flatten().tolist())): name for name, tensor in saved.items()}
    prefixes, stems = set(), {}
    for projection in PROJECTIONS:
        first, second = (by_value.get((probed(projection, expert),), "").split(".") for expert in (0, 1))
        place = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if place is None:
            continue
        number = first[place]
        stem = first[place + 1 :]
        if not number.endswith("0") or second != [*first[:place], f"{number[:-1]}1", *stem] or stem[-1:] != ["weight"]:
            return "", {}
        prefixes.add(".".join([*first[:place], number[:-1]]))
        stems[projection] = ".".join(stem[:-1])
    return (prefixes.pop(), stems) if len(prefixes) == 1 and "down" in stems else ("", {})


def _saved(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names in the files; none where they are saved together with others only."""
    try:
        return dict(revert_weight_conversion(model, dict(tensors))) if tensors else {}
    except ValueError:
        return {}


def in_one_place(prefix: str, other: str) -> bool:
    """Whether two prefixes of files are those of one block, of which one may have or lack that of the base model."""
    return f".{prefix}".endswith(f".{other}") or f".{other}".endswith(f".{prefix}")


def _moved(name: str, before: str, after: str) -> str:
    """A name with as much more or less of a prefix as `after` has, compared with `before`."""
    if after.endswith(before):
        return after.removesuffix(before) + name
    return name.removeprefix(before.removesuffix(after)) if before.endswith(after) else name


def _factors_of(stack: str) -> str:
    """The path of the `FactorizedExperts` that hold a stacked tensor."""
    before, found, _ = stack.partition(_FACTORS)
    return before + found.rstrip(".")


def _hidden(block: str, name: str) -> str:
    return MARK + f"{block}\n{name}".encode().hex()


def _shown(key: str) -> list[str]:
    """Path of the block and name in the files behind `MARK`."""
    return bytes.fromhex(key.rpartition(MARK)[2]).decode().split("\n")
