"""Compress any Mixture-of-Experts model that transformers can load.

Importing this package imports the standard library only; it arms the loading of compressed checkpoints through
`AutoModel...from_pretrained` and gives the public names on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from optimum_moe.arming import arm

if TYPE_CHECKING:
    from optimum_moe.calibration import CalibrationConfig
    from optimum_moe.compressor import MoECompressor
    from optimum_moe.evaluation import evaluate
    from optimum_moe.methods import ExpertPruning, LowRankSparse, MSMoE, register_saliency
    from optimum_moe.nn import LowRankSparseLinear, MergedExpertLayer
    from optimum_moe.plan import CompressionPlan
    from optimum_moe.statistics import Statistics
    from optimum_moe.surgeons import register_surgeon
    from optimum_moe.verification import verify

__version__ = "0.1.0"

_HOMES = {
    "CalibrationConfig": "optimum_moe.calibration",
    "CompressionPlan": "optimum_moe.plan",
    "ExpertPruning": "optimum_moe.methods",
    "LowRankSparse": "optimum_moe.methods",
    "LowRankSparseLinear": "optimum_moe.nn",
    "MSMoE": "optimum_moe.methods",
    "MergedExpertLayer": "optimum_moe.nn",
    "MoECompressor": "optimum_moe.compressor",
    "Statistics": "optimum_moe.statistics",
    "evaluate": "optimum_moe.evaluation",
    "register_saliency": "optimum_moe.methods",
    "register_surgeon": "optimum_moe.surgeons",
    "verify": "optimum_moe.verification",
}

__all__ = [
    "CalibrationConfig",
    "CompressionPlan",
    "ExpertPruning",
    "LowRankSparse",
    "LowRankSparseLinear",
    "MSMoE",
    "MergedExpertLayer",
    "MoECompressor",
    "Statistics",
    "evaluate",
    "register_saliency",
    "register_surgeon",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


arm()
