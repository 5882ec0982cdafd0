"""Surgeons find, read and cut the MoE blocks of an architecture; they contain no compression algorithm."""

from optimum_moe.surgeons.architecture import ARCHITECTURES, Architecture
from optimum_moe.surgeons.base import BlockWatcher, ExpertAxis, Surgeon
from optimum_moe.surgeons.expert_names import BlockNames, ExpertNames, in_one_place, names_of
from optimum_moe.surgeons.guard import block_names, expert_names, guarded, own_conversions
from optimum_moe.surgeons.registry import (
    FoundBlock,
    find_blocks,
    get_surgeon,
    owning_configs,
    register_surgeon,
    registered_surgeons,
)
from optimum_moe.surgeons.shallower import ShallowModel, drop_layers, shallow_model
from optimum_moe.surgeons.stock import stock_block, stock_settings, update_config, with_widths
from optimum_moe.surgeons.towers import config_at, tower_of

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BlockNames",
    "BlockWatcher",
    "ExpertNames",
    "ExpertAxis",
    "FoundBlock",
    "ShallowModel",
    "Surgeon",
    "config_at",
    "drop_layers",
    "find_blocks",
    "get_surgeon",
    "block_names",
    "expert_names",
    "guarded",
    "in_one_place",
    "names_of",
    "own_conversions",
    "owning_configs",
    "register_surgeon",
    "registered_surgeons",
    "shallow_model",
    "stock_block",
    "stock_settings",
    "tower_of",
    "update_config",
    "with_widths",
]
