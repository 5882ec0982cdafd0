"""The registry of surgeons, and the search for a model's MoE blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from optimum_moe.model_info import BlockInfo
from optimum_moe.settings import nearest
from optimum_moe.surgeons.architecture import ARCHITECTURES, Architecture
from optimum_moe.surgeons.base import Surgeon
from optimum_moe.surgeons.dbrx import DbrxSurgeon
from optimum_moe.surgeons.discovery import discover, how_to, looks_like_moe, unknown_blocks
from optimum_moe.surgeons.ernie4_5_vl_moe import Ernie45VLSurgeon
from optimum_moe.surgeons.generic import GenericSurgeon
from optimum_moe.surgeons.jetmoe import JetMoeAttentionSurgeon, JetMoeSurgeon
from optimum_moe.surgeons.layers import layer_around
from optimum_moe.surgeons.llama4 import Llama4Surgeon
from optimum_moe.surgeons.longcat_flash import LongcatFlashSurgeon
from optimum_moe.surgeons.refused import refuse
from optimum_moe.surgeons.step3p7 import Step3p7Surgeon
from optimum_moe.surgeons.switch_transformers import SwitchTransformersSurgeon
from optimum_moe.surgeons.vitpose_backbone import VitPoseBackboneSurgeon

_SURGEONS: dict[str, Surgeon] = {}


def register_surgeon(surgeon: Surgeon | Architecture) -> None:
    """Register an architecture: a row for the generic surgeon, or a surgeon.

    Args:
        surgeon: An `Architecture` row, or an instance of a `Surgeon` subclass.

    Raises:
        ValueError: If it is neither, or its name is already registered.
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
    """All registered surgeons by name."""
    return dict(_SURGEONS)


def get_surgeon(name: str) -> Surgeon:
    """The surgeon of that name.

    Raises:
        ValueError: If there is none; with the nearest match.
    """
    if name not in _SURGEONS:
        near = nearest(name, _SURGEONS)
        hint = f"; did you mean {near!r}?" if near else f". Known: {', '.join(sorted(_SURGEONS))}."
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
    """All MoE blocks of a model, in module order; works on the meta device.

    Blocks of an unknown class that follow the common contract are registered with a warning after a self-test on random
    weights.

    Raises:
        ValueError: If the model has no MoE block, or one that cannot be read or compressed.
    """
    found = _known_blocks(model)
    unread = unknown_blocks(model, {block.info.name for block in found})
    for unknown in unread:
        row = discover(unknown)
        register_surgeon(row)
        warnings.warn(
            f"{row.block} has no row in optimum_moe. It follows the common contract and passed the self-test.",
            stacklevel=2,
        )
    if unread:
        found = _known_blocks(model)
    if not found and (suspects := looks_like_moe(model)):
        raise ValueError(how_to(suspects[0], f"{type(model).__name__} has {', '.join(suspects)}"))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no MoE blocks. `optimum-cli moe inspect` lists the supported architectures."
        )
    return found


def _known_blocks(model: nn.Module) -> list[FoundBlock]:
    found: list[FoundBlock] = []
    for name, module in model.named_modules():
        refuse(module, name)
        for surgeon in _SURGEONS.values():
            if surgeon.matches(module):
                info = surgeon.info(module, name, len(found))
                info = replace(
                    info,
                    layer=layer_around(model, name),
                    no_skipping=surgeon.no_skipping,
                    no_refit=surgeon.experts(module).no_refit(info.top_k),
                )
                found.append(FoundBlock(info, surgeon))
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
for _surgeon in (
    SwitchTransformersSurgeon(),
    DbrxSurgeon(),
    Ernie45VLSurgeon(),
    JetMoeSurgeon(),
    JetMoeAttentionSurgeon(),
    Llama4Surgeon(),
    LongcatFlashSurgeon(),
    Step3p7Surgeon(),
    VitPoseBackboneSurgeon(),
):
    register_surgeon(_surgeon)
