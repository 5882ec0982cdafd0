"""Where the decoder layers of a model are: the members of its outermost module lists."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def outermost_lists(model: nn.Module) -> Iterator[str]:
    """Paths of the module lists that are in no other one."""
    last = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and (last is None or not is_inside(path, last)):
            last = path
            yield path


def layer_around(model: nn.Module, name: str) -> str:
    """Path of the layer that holds a module; empty if it is in no module list."""
    for stack in outermost_lists(model):
        if is_inside(name, stack) and name != stack:
            return f"{stack}.{name.removeprefix(f'{stack}.').partition('.')[0]}"
    return ""


def is_inside(name: str, path: str) -> bool:
    """Whether a name is that of a module at a path, or of something in it."""
    return name == path or name.startswith(f"{path}.")
