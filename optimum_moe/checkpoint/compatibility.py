"""Checks that folders, statistics, plans and configs match a checkpoint, before and after a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from optimum_moe.checkpoint.identity import first_difference
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.checkpoint.writer import set_expert_counts
from optimum_moe.hf.carried_code import mark_model
from optimum_moe.hf.structure import MoEStructureConfig
from optimum_moe.nn import FactorizedExperts
from optimum_moe.plan import CompressionPlan
from optimum_moe.recipe import Recipe
from optimum_moe.statistics import Statistics
from optimum_moe.surgeons import block_names, expert_names, in_one_place, update_config


def refuse_original(directory: Path, source: ModelSource) -> None:
    """Raise a `ValueError` if the result would replace the original, or a part of it."""
    folder = source.directory
    if folder is None and source.live is not None and source.live.name_or_path:
        # The folder that a model in memory was loaded from.
        folder = Path(source.live.name_or_path)
    if folder is None or not folder.is_dir():
        return
    # Files of the checkpoint may be links to other folders.
    originals = {path.resolve() for path in (folder, *folder.iterdir()) if path == folder or path.is_file()}
    if any(original == directory or directory in original.parents for original in originals):
        raise ValueError(f"{directory} holds the original checkpoint, which would be replaced. Choose another folder.")
    if folder.resolve() in directory.parents and directory.is_dir() and any(directory.iterdir()):
        raise ValueError(
            f"{directory} is in the folder of the original checkpoint and is not empty, so a part of the original "
            "could be replaced. Choose another folder."
        )


def check_belongs(what: str, made_from: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if statistics or a plan belong to another model than the one with this identity."""
    difference = first_difference(made_from, here)
    if difference is not None:
        raise ValueError(
            f"The {what} passed to apply() belong to {made_from.get('name')} ({made_from.get('architecture')}), "
            f"whose {difference} differs from that of {here['name']} ({here['architecture']}). "
            "Use those of this checkpoint."
        )


def check_statistics(statistics: Statistics, here: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise a `ValueError` if statistics belong to another model, or lack observations that a recipe needs."""
    check_belongs("statistics", statistics.source, here)
    statistics.check_complete(here["num_experts"], recipe.needs)


def check_plan(plan: CompressionPlan, here: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a plan belongs to another model, or lacks its factors."""
    check_belongs("plan", plan.source, here)
    lacking = [block.name for block in plan.blocks.values() if block.sizes is not None and block.factors is None]
    if lacking:
        raise ValueError(
            f"The plan has the sizes of the factors of {lacking[0]}, but the factors themselves are in the checkpoint "
            "that it was made for. Load that checkpoint, or pass statistics= to decide again."
        )


def mark_structure(model: PreTrainedModel, source: ModelSource, plan: CompressionPlan) -> None:
    """Update the model's config to its compressed structure, so that `model.save_pretrained` output loads again."""
    update_config(model.config, plan.settings)
    if plan.is_plain:
        set_expert_counts(model, source.blocks, {name: block.num_groups for name, block in plan.blocks.items()})
    elif structure := plan.structure():
        in_files = {found.info.name: block_names(model, found).block for found in source.blocks}
        mark_model(model, MoEStructureConfig({in_files[name]: entry for name, entry in structure.items()}))


def refresh_structure(model: nn.Module) -> None:
    """Update the config of a model in memory with the sizes of its experts, after sparse rows were dropped.

    The config then says that the sizes are no longer those of the plan.

    Args:
        model: A `PreTrainedModel`, or a wrapper of one (PEFT); other modules are not changed.
    """
    owner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    structure = getattr(getattr(owner, "config", None), "quantization_config", None)
    if not isinstance(structure, MoEStructureConfig):
        return
    for name, entry in structure.blocks.items():
        paths = [path for path, names in expert_names(owner).blocks.items() if in_one_place(names.block, name)]
        held = [
            m for path in paths[:1] for m in owner.get_submodule(path).modules() if isinstance(m, FactorizedExperts)
        ]
        if held and entry.get("factors") != (sizes := held[0].sizes.to_dict()):
            entry["factors"], structure.saved_again = sizes, True
