"""A guard is a tensor of one element under the name of a removed stock expert: loading without this package fails.

transformers initializes missing tensors randomly and only warns, but raises an error if a tensor has a wrong shape. A
guard is a buffer, so it is kept by training, copies and `save_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from optimum_moe.hf.compat import (
    PrefixChange,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    revert_weight_conversion,
    set_weight_conversions,
    weight_conversions,
)
from optimum_moe.surgeons.expert_names import BlockNames, ExpertConverter, ExpertNames, ExpertRenaming, names_of

if TYPE_CHECKING:
    from optimum_moe.surgeons.registry import FoundBlock

GUARD = "optimum_moe_guard"
"""The buffer of a block; in the checkpoint it has the name of an expert."""


@contextmanager
def guarded(model: PreTrainedModel, found: FoundBlock, needed: bool) -> Iterator[None]:
    """Give the experts that a block gets within this context their names in the files, and the block a guard.

    The guard is saved under the name of the last stock expert tensor that no expert of the block has. If a stock tensor
    keeps that name, because it stacks all experts, its shape does not fit a stock model, and the block needs no guard.

    Args:
        model: The model around the block.
        found: The block, with its stock experts.
        needed: Whether a stock model could otherwise load the compressed block without an error.
    """
    if not needed:
        yield
        return
    block: Any = found.module(model)
    taken = {name for renaming in guard_renamings(model) for name in renaming.names}
    stock = [name for name in _stored_names(model, found) if name not in taken]
    names, dtype = names_of(model, found), found.surgeon.expert_parameters(block)[-1].dtype
    yield
    known = expert_names(model).with_block(found.info.name, names, block)
    _convert_with(model, guard_renamings(model), known)
    held = [path for path, owner in known.factors.items() if owner == found.info.name]
    if held:
        used = {name for path in held for named in known.pieces(model, path).values() for name, _ in named}
        free = [name for name in stock if name not in used]
    else:
        free = [name for name in stock[-1:] if name not in _stored_names(model, found)]
    # Where all names are used, some matrices have other shapes than stock ones.
    if free:
        # Experts may be on the meta device while they are copied from file to file; the router is not.
        device = found.surgeon.router_rows(block).device
        block.register_buffer(GUARD, torch.zeros(1, dtype=dtype, device=device))
        _save_as(model, f"{found.info.name}.{GUARD}", free[-1])


class GuardRenaming(WeightRenaming):
    """Renames guards between model and checkpoint, by whole names instead of patterns.

    Args:
        names: New names by old name. Either may lack a prefix of the other, if the base of a model is loaded or a
            model from its base.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(GUARD, GUARD)
        self.names = dict(names)
        self._ends = {_end(name) for name in self.names}
        self._renamed = False

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name and the matched old name; the old name and None if it is not the name of a guard."""
        if _end(source_key) not in self._ends:
            return source_key, None
        for old, new in sorted(self.names.items(), key=lambda item: item[0] != source_key):
            if f".{source_key}".endswith(f".{old}"):
                self._renamed = True
                return source_key.removesuffix(old) + new, GUARD
            if old.endswith(f".{source_key}"):
                self._renamed = True
                return new.removeprefix(old.removesuffix(source_key)), GUARD
        return source_key, None

    def was_used(self) -> bool:
        """Whether any name was that of a guard."""
        return self._renamed

    def reverse_transform(self) -> GuardRenaming:
        """The inverse renaming, for saving."""
        return GuardRenaming({new: old for old, new in self.names.items()})


def guard_renamings(model: PreTrainedModel) -> list[GuardRenaming]:
    """Renamings of the guards in a model whose names in its checkpoint differ."""
    return [c for c in weight_conversions(model) or () if isinstance(c, GuardRenaming)]


def block_names(model: PreTrainedModel, found: FoundBlock) -> BlockNames:
    """The names in the files of a block, which may be compressed."""
    return expert_names(model).blocks.get(found.info.name) or names_of(model, found)


def expert_names(model: PreTrainedModel) -> ExpertNames:
    """The names in the files of a model's compressed experts."""
    found = (c.names for c in weight_conversions(model) or () if isinstance(c, ExpertRenaming))
    return next(found, ExpertNames())


def own_conversions(model: PreTrainedModel, in_files: Iterable[str] = ()) -> tuple[list[Any], ExpertNames]:
    """The conversions by which a checkpoint of ours is read, to be tried before all others, and the names therein.

    Args:
        model: The model, with the structure of the checkpoint.
        in_files: Prefixes of its blocks in the files, as far as they are known.
    """
    names = expert_names(model).reading(model, in_files)
    return [*guard_renamings(model), *_conversions_of(names)], names


def as_stored(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model with only what is ours converted to what the checkpoint has."""
    names = expert_names(model)
    own = {name for name in state if name.rpartition(".")[2] == GUARD or names.holds(name)}
    kept = {name: tensor for name, tensor in state.items() if name not in own}
    return kept | revert_weight_conversion(model, {name: state[name] for name in own})


def _save_as(model: Any, name: str, stored: str) -> None:
    """Have `save_pretrained` write a guard under another name."""
    alias = next(iter(revert_weight_conversion(model, {name: torch.empty(1, device="meta")})))
    names = {old: new for renaming in guard_renamings(model) for old, new in renaming.names.items()}
    _convert_with(model, [GuardRenaming({**names, stored: alias})], expert_names(model))


def _convert_with(model: PreTrainedModel, guards: list[GuardRenaming], names: ExpertNames) -> None:
    """Have a model converted by these names and guards, which come first: other conversions use names of the model."""
    others = [c for c in _conversions(model) if not isinstance(c, GuardRenaming | ExpertRenaming | ExpertConverter)]
    set_weight_conversions(model, [*guards, *_conversions_of(names), *others])


def _conversions_of(names: ExpertNames) -> list[Any]:
    return [ExpertRenaming(names), ExpertConverter(names)] if names.blocks else []


def _conversions(model: Any) -> list[Any]:
    """The weight conversions that transformers uses to save a model."""
    loaded = weight_conversions(model)
    if loaded is not None:
        return loaded
    return [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]


def _stored_names(model: PreTrainedModel, found: FoundBlock) -> list[str]:
    """Names of a block's expert tensors in the checkpoint of its model, last those of the last parameter's last."""
    block: Any = found.module(model)
    own = {id(parameter) for parameter in found.surgeon.expert_parameters(block)}
    named = {f"{found.info.name}.{path}": p for path, p in block.named_parameters() if id(p) in own}
    *others, last = named or [""]
    stored: dict[str, None] = {}
    # The last one's alone first; if all experts are empty there is none.
    for names in ([last], others):
        empty: dict[str, torch.Tensor] = {}
        for name in filter(None, names):
            like = torch.empty(named[name].shape, device="meta")
            empty |= dict.fromkeys(_converted_with(model, name), like)
        saved = revert_weight_conversion(model, empty)
        stored |= dict.fromkeys(sorted(saved, key=dot_natural_key, reverse=True))
    return list(stored)[::-1]


def _converted_with(model: PreTrainedModel, name: str) -> list[str]:
    """Names of a tensor of a model and of those that are converted together with it."""
    for conversion in _conversions(model):
        reverse = conversion.reverse_transform()
        pattern = reverse.rename_source_key(name)[1]
        if pattern is not None and len(reverse.source_patterns) > 1:
            return [name.replace(pattern, other) for other in reverse.source_patterns]
    return [name]


def _end(name: str) -> str:
    """The end of a name, for a fast comparison that excludes most other names."""
    return ".".join(name.split(".")[-3:])
