"""Towers: the sub-models of a composite model, each with its own config and number of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from optimum_moe.surgeons.registry import FoundBlock


def tower_of(model: PreTrainedModel, found: FoundBlock) -> str | None:
    """Path from the model's config to the sub-config with the number of experts of a block.

    Returns:
        For example `"text_config"` or `"thinker_config.text_config"`, `""` for the model's config; None if no single
        number in a config is the number of experts of this block.
    """
    field, nested = found.surgeon.count_fields[0], found.surgeon.count_config
    configs = dict(config_paths(model.config))
    for module in _ancestors(model, found.info.name):
        config: Any = getattr(module, "config", None)
        if not isinstance(module, PreTrainedModel):
            continue
        try:
            counting = getattr(config, nested, None) if nested else config
            if not isinstance(getattr(counting, field, None), int):
                continue
        except RuntimeError:
            # transformers raises an error for a field that differs between layers.
            return None
        path = _path_in(configs, config)
        if path is not None:
            return f"{path}.{nested}".strip(".")
    return None


def path_of_config(model: PreTrainedModel, name: str) -> str | None:
    """Path from the model's config to that of the sub-model around a module; None if it is not known."""
    configs = dict(config_paths(model.config))
    owner = next(module for module in _ancestors(model, name) if isinstance(module, PreTrainedModel))
    return _path_in(configs, owner.config)


def _path_in(configs: Mapping[str, Any], config: Any) -> str | None:
    # Some models use a copy of their config.
    same = [path for path, known in configs.items() if known is config] or [
        path for path, known in configs.items() if type(known) is type(config)
    ]
    return same[0] if len(same) == 1 else None


def config_at(config: Any, tower: str) -> Any:
    """The config at a path that `tower_of` returned."""
    for name in filter(None, tower.split(".")):
        config = getattr(config, name)
    return config


def config_paths(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and its sub-configs, with their dotted paths."""
    yield path, config
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            yield from config_paths(sub, f"{path}.{name}".lstrip("."))


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The parent modules of a block, from the nearest one to the model."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:length]))
