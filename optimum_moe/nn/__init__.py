"""Modules that compressed models are made of."""

from optimum_moe.nn.class_swap import SwappedModule, swapped_class
from optimum_moe.nn.merged_experts import MergedExpertLayer
from optimum_moe.nn.routing import MappedRouter, map_routing

__all__ = ["MappedRouter", "MergedExpertLayer", "SwappedModule", "map_routing", "swapped_class"]
