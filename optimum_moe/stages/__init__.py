"""Stages decide how each block is compressed; they see tensors, never a model.

Every module of this package is imported with it, so that a new file is enough for a stage, a criterion or a choice of a
merge that registers itself.
"""

import importlib
import pkgutil

from optimum_moe.stages.base import Stage, register_stage, registered_stages
from optimum_moe.stages.block_drop import BlockDrop
from optimum_moe.stages.byte_budget import ByteBudget
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.layer_drop import LayerDrop
from optimum_moe.stages.low_rank_sparse import LowRankSparse
from optimum_moe.stages.merge import ExpertMerging, MSMoE
from optimum_moe.stages.merge_choices import (
    register_grouping,
    register_router_rows,
    register_similarity,
    register_weighting,
)
from optimum_moe.stages.neuron_pruning import NeuronPruning
from optimum_moe.stages.prune import ExpertPruning
from optimum_moe.stages.results import Groups, RouterRows
from optimum_moe.stages.rounding import Rounding
from optimum_moe.stages.saliency import register_saliency
from optimum_moe.stages.skip import ExpertSkipping
from optimum_moe.stages.weight_pruning import WeightPruning

__all__ = [
    "BlockContext",
    "BlockCost",
    "BlockDrop",
    "ByteBudget",
    "ExpertMerging",
    "ExpertPruning",
    "ExpertSkipping",
    "Groups",
    "LayerDrop",
    "LowRankSparse",
    "MSMoE",
    "NeuronPruning",
    "Rounding",
    "RouterRows",
    "Stage",
    "WeightPruning",
    "register_grouping",
    "register_router_rows",
    "register_saliency",
    "register_similarity",
    "register_stage",
    "register_weighting",
    "registered_stages",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
