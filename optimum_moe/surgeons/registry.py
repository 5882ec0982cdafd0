"""The registry: which surgeon is responsible for which block."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from optimum_moe.blocks import BlockInfo
from optimum_moe.surgeons.architecture import ARCHITECTURES, Architecture
from optimum_moe.surgeons.base import Surgeon
from optimum_moe.surgeons.generic import GenericSurgeon
from optimum_moe.surgeons.switch_transformers import SwitchTransformersSurgeon

_SURGEONS: dict[str, Surgeon] = {}


def register_surgeon(surgeon: Surgeon | Architecture) -> None:
    """Make an architecture known: a row for the generic surgeon, or a surgeon of its own.

    Args:
        surgeon: An `Architecture` row, or an instance of a `Surgeon` subclass.

    Raises:
        ValueError: If it is neither, or its name is taken.
    """
    if isinstance(surgeon, Architecture):
        surgeon = GenericSurgeon(surgeon)
    if not isinstance(surgeon, Surgeon):
        raise ValueError(
            f"register_surgeon takes an Architecture row or a Surgeon instance, got {type(surgeon).__name__}. "
            "Instantiate your subclass of optimum_moe.surgeons.Surgeon."
        )
    if surgeon.name in _SURGEONS:
        raise ValueError(f"A surgeon named {surgeon.name!r} is already registered. Choose another name.")
    _SURGEONS[surgeon.name] = surgeon


def registered_surgeons() -> Mapping[str, Surgeon]:
    """All surgeons by name."""
    return dict(_SURGEONS)


def get_surgeon(name: str) -> Surgeon:
    """The surgeon of that name.

    Raises:
        ValueError: If there is none; names the nearest match.
    """
    if name not in _SURGEONS:
        near = difflib.get_close_matches(name, _SURGEONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f". Known: {', '.join(sorted(_SURGEONS))}."
        raise ValueError(f"No surgeon named {name!r}{hint}")
    return _SURGEONS[name]


@dataclass(frozen=True)
class FoundBlock:
    """A block of a model with its surgeon."""

    info: BlockInfo
    surgeon: Surgeon

    def module(self, model: nn.Module) -> nn.Module:
        """The block in `model`."""
        return model.get_submodule(self.info.name)


def find_blocks(model: nn.Module) -> list[FoundBlock]:
    """All MoE blocks of a model that a surgeon knows, in module order; works on the meta device.

    Raises:
        ValueError: If there is none.
    """
    found: list[FoundBlock] = []
    for name, module in model.named_modules():
        for surgeon in _SURGEONS.values():
            if surgeon.matches(module):
                found.append(FoundBlock(surgeon.info(module, name, len(found)), surgeon))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no MoE blocks that optimum_moe knows. "
            "See `optimum-cli moe inspect` for what is supported, and CONTRIBUTING.md for how to add an architecture."
        )
    return found


def owning_configs(config: Any) -> Iterator[Any]:
    """A config and all its sub-configs."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            yield from owning_configs(sub)


for _row in ARCHITECTURES:
    register_surgeon(_row)
register_surgeon(SwitchTransformersSurgeon())
