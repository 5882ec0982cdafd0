"""Modules that compressed models are made of."""

from optimum_moe.nn.class_swap import SwappedModule, swapped_class
from optimum_moe.nn.factorized_experts import FactorizedExperts
from optimum_moe.nn.factorized_layer import FactorizedExpertLayer
from optimum_moe.nn.low_rank_sparse import LowRankSparseLinear
from optimum_moe.nn.merged_experts import MergedExpertLayer
from optimum_moe.nn.routing import MappedRouter, map_routing
from optimum_moe.nn.sparse_part import HasSparseRows, SparsePart, keep_rows

__all__ = [
    "FactorizedExpertLayer",
    "FactorizedExperts",
    "HasSparseRows",
    "LowRankSparseLinear",
    "MappedRouter",
    "MergedExpertLayer",
    "SparsePart",
    "SwappedModule",
    "keep_rows",
    "map_routing",
    "swapped_class",
]
