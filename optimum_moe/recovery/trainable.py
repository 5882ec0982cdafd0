"""What trains: parameters chosen by their place in an MoE block and by their shape, for every architecture alike."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_moe.hf.compat import model_from_config
from optimum_moe.nn import SwappedModule
from optimum_moe.recovery_settings import check_train
from optimum_moe.surgeons import FoundBlock, find_blocks


def blocks_of(model: PreTrainedModel) -> list[FoundBlock]:
    """The MoE blocks of a model, compressed or not, with the surgeons of their architecture.

    Raises:
        ValueError: If the model has no MoE blocks.
    """
    config: Any = deepcopy(model.config)
    for name in ("quantization_config", "fusion_config"):
        if hasattr(config, name):
            delattr(config, name)
    cls: Any = model.original_class if isinstance(model, SwappedModule) else type(model)
    with torch.device("meta"):
        stock = model_from_config(cls, config)
    return find_blocks(stock)


def trained_names(model: PreTrainedModel, train: str) -> list[str]:
    """The parameters that train, by name, in the order of the model; `"lora"` adapts those of `"full"`.

    `"router"` gives those of the routers and of all norms, `"experts"` also what every format stores of the routed
    experts (matrices, factors, rows, constants, scales), but no whole numbers.

    Raises:
        ValueError: If `train` is unknown, or the model has no parameter of that kind.
    """
    check_train(train)
    if train in ("full", "lora"):
        chosen = {id(parameter) for parameter in model.parameters()}
    else:
        chosen = {id(parameter) for parameter in _in_blocks(model, train)}
    names = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in chosen and parameter.is_floating_point()
    ]
    if not names:
        raise ValueError(
            f"train={train!r} finds no parameter of {type(model).__name__} that can be trained: all it stores of that "
            "kind are whole numbers, or nothing. Pass another train=, such as 'full'."
        )
    return names


def _in_blocks(model: PreTrainedModel, train: str) -> Iterator[nn.Parameter]:
    blocks = blocks_of(model)
    for found in blocks:
        block: Any = found.module(model)
        yield from found.surgeon.router_parameters(block)
        if train == "experts":
            yield from found.surgeon.expert_parameters(block)
    yield from norms(model)


def norms(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all norms: of modules without children that hold vectors and no matrix."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not list(module.children()) and all(parameter.dim() == 1 for parameter in own):
            yield from own
