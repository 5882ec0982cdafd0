"""Towers: the sub models of a composite model, each with a config of its own that counts its experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from optimum_moe.surgeons.registry import FoundBlock


def tower_of(model: PreTrainedModel, found: FoundBlock) -> str | None:
    """Path of the config that counts the experts of a block, from the model's own config.

    Returns:
        For example `"text_config"` or `"thinker_config.text_config"`, `""` for the model's own config; None where no
        single number in a config counts the experts of this block.
    """
    field, nested = found.surgeon.count_fields[0], found.surgeon.count_config
    configs = dict(_configs(model.config))
    for module in _ancestors(model, found.info.name):
        config: Any = getattr(module, "config", None)
        if not isinstance(module, PreTrainedModel):
            continue
        try:
            counting = getattr(config, nested, None) if nested else config
            if not isinstance(getattr(counting, field, None), int):
                continue
        except RuntimeError:
            # transformers refuses to read a field that differs from layer to layer.
            return None
        # Some models are built on a copy of their config.
        same = [path for path, known in configs.items() if known is config] or [
            path for path, known in configs.items() if type(known) is type(config)
        ]
        if len(same) == 1:
            return f"{same[0]}.{nested}".strip(".")
    return None


def config_at(config: Any, tower: str) -> Any:
    """The config at a path that `tower_of` gave."""
    for name in filter(None, tower.split(".")):
        config = getattr(config, name)
    return config


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, config
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            yield from _configs(sub, f"{path}.{name}".lstrip("."))


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around a block, the nearest first, the model last."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:length]))
