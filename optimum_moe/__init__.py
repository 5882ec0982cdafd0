"""Compress any Mixture-of-Experts model that transformers can load.

Importing this package only imports the standard library and installs an import hook, so that
`AutoModel...from_pretrained` loads compressed checkpoints. Public names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from optimum_moe.hf.import_hook import install_import_hook

if TYPE_CHECKING:
    from optimum_moe.calibration import CalibrationConfig
    from optimum_moe.compressor import MoECompressor
    from optimum_moe.domain_guard import Guard, compress_guarded
    from optimum_moe.evaluation import evaluate
    from optimum_moe.exporting import export
    from optimum_moe.formats import register_format
    from optimum_moe.look import LookInside, look_inside
    from optimum_moe.nn import LowRankSparseLinear, MergedExpertLayer
    from optimum_moe.plan import CompressionPlan
    from optimum_moe.recovery import recover, store_teacher_logits
    from optimum_moe.recovery_settings import Recovery
    from optimum_moe.report import write_report
    from optimum_moe.stages import (
        BlockDrop,
        ByteBudget,
        ExpertMerging,
        ExpertPruning,
        ExpertSkipping,
        LayerDrop,
        LowRankSparse,
        MSMoE,
        NeuronPruning,
        Rounding,
        Stage,
        WeightPruning,
        register_grouping,
        register_router_rows,
        register_saliency,
        register_similarity,
        register_stage,
        register_weighting,
    )
    from optimum_moe.statistics import Statistics
    from optimum_moe.surgeons import register_surgeon
    from optimum_moe.verification import verify

__version__ = "0.1.0"

_HOMES = {
    "BlockDrop": "optimum_moe.stages",
    "ByteBudget": "optimum_moe.stages",
    "CalibrationConfig": "optimum_moe.calibration",
    "CompressionPlan": "optimum_moe.plan",
    "ExpertMerging": "optimum_moe.stages",
    "ExpertPruning": "optimum_moe.stages",
    "ExpertSkipping": "optimum_moe.stages",
    "Guard": "optimum_moe.domain_guard",
    "LayerDrop": "optimum_moe.stages",
    "LookInside": "optimum_moe.look",
    "LowRankSparse": "optimum_moe.stages",
    "LowRankSparseLinear": "optimum_moe.nn",
    "MSMoE": "optimum_moe.stages",
    "MergedExpertLayer": "optimum_moe.nn",
    "MoECompressor": "optimum_moe.compressor",
    "NeuronPruning": "optimum_moe.stages",
    "Recovery": "optimum_moe.recovery_settings",
    "Rounding": "optimum_moe.stages",
    "Stage": "optimum_moe.stages",
    "Statistics": "optimum_moe.statistics",
    "WeightPruning": "optimum_moe.stages",
    "compress_guarded": "optimum_moe.domain_guard",
    "evaluate": "optimum_moe.evaluation",
    "export": "optimum_moe.exporting",
    "look_inside": "optimum_moe.look",
    "recover": "optimum_moe.recovery",
    "register_format": "optimum_moe.formats",
    "register_grouping": "optimum_moe.stages",
    "register_router_rows": "optimum_moe.stages",
    "register_saliency": "optimum_moe.stages",
    "register_similarity": "optimum_moe.stages",
    "register_stage": "optimum_moe.stages",
    "register_surgeon": "optimum_moe.surgeons",
    "register_weighting": "optimum_moe.stages",
    "store_teacher_logits": "optimum_moe.recovery",
    "verify": "optimum_moe.verification",
    "write_report": "optimum_moe.report",
}

__all__ = [
    "BlockDrop",
    "ByteBudget",
    "CalibrationConfig",
    "CompressionPlan",
    "ExpertMerging",
    "ExpertPruning",
    "ExpertSkipping",
    "Guard",
    "LayerDrop",
    "LookInside",
    "LowRankSparse",
    "LowRankSparseLinear",
    "MSMoE",
    "MergedExpertLayer",
    "MoECompressor",
    "NeuronPruning",
    "Recovery",
    "Rounding",
    "Stage",
    "Statistics",
    "WeightPruning",
    "compress_guarded",
    "evaluate",
    "export",
    "look_inside",
    "recover",
    "register_format",
    "register_grouping",
    "register_router_rows",
    "register_saliency",
    "register_similarity",
    "register_stage",
    "register_surgeon",
    "register_weighting",
    "store_teacher_logits",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


install_import_hook()
