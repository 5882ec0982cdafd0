"""Boundaries of decoder layers: the tensors through which gradients enter a layer from the layers after it.

A model in memory goes back through all layers at once, a streamed one through one layer at a time. Floating-point sums
depend on their order, so in both of them the gradients of each boundary are added up within a layer first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from optimum_moe.calibration.layer_watch import replaced_forward
from optimum_moe.surgeons import FoundBlock
from optimum_moe.surgeons.layers import is_inside, outermost_lists

Arguments = Mapping[int | str, Any]
"""Arguments of a call by position or keyword."""


@dataclass(frozen=True)
class _Place:
    """Stands for the tensor of that number."""

    number: int


def take_out(value: Any) -> tuple[Any, list[torch.Tensor]]:
    """Separate a value from the tensors in it that require gradients.

    Args:
        value: Tensors in nested tuples, lists and mappings, beside anything else.

    Returns:
        The same value with a place for each of these tensors, and the tensors. One that occurs twice is taken once.
        Mappings are copied.
    """
    found: dict[int, tuple[_Place, torch.Tensor]] = {}

    def taken(part: Any) -> Any:
        if not isinstance(part, torch.Tensor) or not part.requires_grad:
            return part
        return found.setdefault(id(part), (_Place(len(found)), part))[0]

    return _replaced(value, taken), [tensor for _, tensor in found.values()]


def put_back(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Put other tensors in the places that `take_out` made; mappings are copied."""
    return _replaced(value, lambda part: tensors[part.number] if isinstance(part, _Place) else part)


def _replaced(value: Any, replace: Callable[[Any], Any]) -> Any:
    if isinstance(value, MutableMapping):
        made = copy(value)
        for name, part in value.items():
            made[name] = _replaced(part, replace)
        return made
    if type(value) in (tuple, list):
        return type(value)(_replaced(part, replace) for part in value)
    return replace(value)


def run_layer_call(name: str, forward: Callable[..., Any], arguments: Arguments) -> tuple[Any, dict[Any, Any]]:
    """Run a layer, which may pass tensors to other layers by its output and by writing to mappings that it is given.

    Args:
        name: Path of the layer.
        forward: Its forward pass.
        arguments: Arguments of the call, whose mappings are copies.

    Returns:
        Its output, and what it wrote to the mappings, by argument.

    Raises:
        ValueError: If tensors with gradients go into or out of the layer in another way.
    """
    before = {what: dict(value) for what, value in arguments.items() if isinstance(value, MutableMapping)}
    entered = {what: list(_tensors(value)) for what, value in arguments.items() if what not in before}
    output = call_with(forward, arguments)
    for what, tensors in entered.items():
        now = list(_tensors(arguments[what]))
        changed = len(now) != len(tensors) or any(a is not b for a, b in zip(now, tensors, strict=True))
        if (changed and any(tensor.requires_grad for tensor in now)) or isinstance(arguments[what], Cache):
            raise _refused(name, what)
    if any(tensor.requires_grad for tensor in _tensors(take_out(output)[0])):
        raise _refused(name, "its output")
    written = {
        what: {key: value for key, value in arguments[what].items() if value is not held.get(key)}
        for what, held in before.items()
    }
    return output, written


def _refused(name: str, where: int | str) -> ValueError:
    return ValueError(
        f"{name} passes tensors to other layers in {where}, through which no backward pass can go layer by layer. Take "
        "a recipe that reads no gradients, such as ByteBudget(curvature=False), which measures output errors instead "
        "(--set curvature=false)."
    )


def named_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """Arguments of a call by position or keyword."""
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    return named


def call_with(forward: Callable[..., Any], arguments: Arguments) -> Any:
    """Call a function with what `named_arguments` gave."""
    args = [value for what, value in arguments.items() if isinstance(what, int)]
    return forward(*args, **{what: value for what, value in arguments.items() if isinstance(what, str)})


def write_back(written: Mapping[Any, Mapping[Any, Any]], arguments: Arguments) -> None:
    """Write to the mappings of a call what the layer wrote to the copies."""
    for what, items in written.items():
        arguments[what].update(items)


def entering(tensor: torch.Tensor) -> torch.Tensor:
    """The copy of a tensor that a layer works on; its gradient is the sum of those of its uses in the layer."""
    return tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def bounded_layers(model: nn.Module, blocks: Sequence[FoundBlock]) -> Iterator[None]:
    """Context in which gradients add up at the boundaries of all layers, as in a backward pass layer by layer.

    Args:
        model: The model.
        blocks: Its MoE blocks; one outside of all module lists is a layer of its own.
    """
    lists = {stack: model.get_submodule(stack).named_children() for stack in outermost_lists(model)}
    paths = [f"{stack}.{key}" for stack, children in lists.items() for key, _ in children]
    names = [found.info.name for found in blocks]
    paths += [name for name in names if not any(is_inside(name, path) for path in paths)]
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(replaced_forward(model.get_submodule(path), partial(_run_bounded, path)))
        yield


def _run_bounded(
    path: str, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    arguments = named_arguments(args, kwargs)
    places, tensors = take_out(arguments)
    output, written = run_layer_call(path, forward, put_back(places, [entering(tensor) for tensor in tensors]))
    write_back(written, arguments)
    return output


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors that are nested in tuples, lists and mappings of any type."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
