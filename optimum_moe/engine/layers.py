"""The layers of a model, which are loaded, cut and written one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from optimum_moe.surgeons import FoundBlock
from optimum_moe.surgeons.layers import is_inside, outermost_lists


@dataclass(frozen=True)
class Layer:
    """A part of a model.

    Args:
        name: Path of the module, for example `model.layers.3`; any name for a part that is not a module.
        blocks: The MoE blocks in it.
        tensors: Names of its tensors, if it is not a module.
    """

    name: str
    blocks: tuple[FoundBlock, ...] = ()
    tensors: tuple[str, ...] = ()


def find_layers(model: nn.Module, blocks: Sequence[FoundBlock]) -> list[Layer]:
    """Members of the outermost module lists that contain MoE blocks; a block outside of any list is its own layer."""
    names = [found.info.name for found in blocks]
    layers = [
        layer for stack in outermost_lists(model) if _any_inside(names, stack) for layer in _members(model, stack)
    ]
    single = [name for name in names if not any(is_inside(name, layer) for layer in layers)]
    return [Layer(path, tuple(f for f in blocks if is_inside(f.info.name, path))) for path in [*layers, *single]]


def other_layers(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Members of all other outermost module lists, for example of a vision tower."""
    names = [layer.name for layer in layers]
    stacks = [stack for stack in outermost_lists(model) if not _any_inside(names, stack)]
    return [layer for stack in stacks for layer in _members(model, stack)]


def is_in(name: str, layers: Sequence[Layer]) -> bool:
    """Whether a tensor belongs to one of the layers, which are modules."""
    return any(is_inside(name, layer.name) for layer in layers)


def _members(model: nn.Module, stack: str) -> list[str]:
    return [f"{stack}.{key}" for key, _ in model.get_submodule(stack).named_children()]


def _any_inside(names: Sequence[str], path: str) -> bool:
    return any(is_inside(name, path) for name in names)
