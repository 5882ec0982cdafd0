"""Modules that compressed models are made of."""

from optimum_moe.nn.class_swap import SwappedModule, swapped_class
from optimum_moe.nn.factorised_experts import FactorisedExperts
from optimum_moe.nn.factorised_layer import FactorisedExpertLayer
from optimum_moe.nn.low_rank_sparse import LowRankSparseLinear
from optimum_moe.nn.merged_experts import MergedExpertLayer
from optimum_moe.nn.routing import MappedRouter, map_routing
from optimum_moe.nn.sparse_part import HasSparseRows, SparsePart, keep_rows

__all__ = [
    "FactorisedExpertLayer",
    "FactorisedExperts",
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
