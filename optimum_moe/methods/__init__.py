"""Methods decide what remains of each block; they see tensors, never a model."""

from optimum_moe.methods.base import BlockContext, Method
from optimum_moe.methods.composed import Composed
from optimum_moe.methods.expert_pruning import ExpertPruning
from optimum_moe.methods.low_rank_sparse import LowRankSparse
from optimum_moe.methods.msmoe import MSMoE
from optimum_moe.methods.saliency import register_saliency

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (MSMoE, ExpertPruning, LowRankSparse)}
"""Every method by the name that recipes use."""

__all__ = [
    "METHODS",
    "BlockContext",
    "Composed",
    "ExpertPruning",
    "LowRankSparse",
    "MSMoE",
    "Method",
    "register_saliency",
]
