"""The residual stream before an MoE block, seen from the outside: what the norm before the block was given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_moe.surgeons.base import hooked

ResidualOf = Callable[[torch.Tensor], torch.Tensor | None]


@contextmanager
def residual_before(model: nn.Module, block: str) -> Iterator[ResidualOf]:
    """Context with a function that gives the (T, H) residual stream of the (T, H) input of a block's experts.

    It is the input of the module of the same decoder layer whose output the experts get: the norm before the block.
    None where no module gives what they get.

    Args:
        model: The model.
        block: Module path of the block.
    """
    match = re.match(r"(.*\.\d+)(?:\.|$)", block)
    layer = model.get_submodule(match[1] if match else block.rpartition(".")[0])
    # With their outputs, so that no memory is used again while it is looked up.
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args else None
        if not isinstance(given, torch.Tensor) or not isinstance(output, torch.Tensor) or given.shape != output.shape:
            return
        # `nn.Identity`, and dropout, give back what they got.
        if output.data_ptr() != given.data_ptr():
            seen[output.data_ptr()] = given.detach(), output.detach()

    def residual_of(input_TH: torch.Tensor) -> torch.Tensor | None:
        found = seen.get(input_TH.data_ptr())
        seen.clear()
        return None if found is None else found[0].reshape(input_TH.shape)

    leaves = [module for module in layer.modules() if next(module.children(), None) is None]
    with hooked([module.register_forward_hook(after) for module in leaves]):
        yield residual_of
