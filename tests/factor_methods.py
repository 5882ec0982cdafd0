"""The ways of factorizing experts that tests run through, and which of them an architecture takes."""

from __future__ import annotations

from typing import Any

from optimum_moe import CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import Target, build, inputs_for

METHODS: dict[str, Any] = {
    "uniform": LowRankSparse(rank=8, density=0.25),
    "energy": LowRankSparse(energy=0.7, density=0.25),
    "map": [MSMoE(num_experts=4), LowRankSparse(rank=8, density=0.25)],
    "reduce": [MSMoE(num_experts=4, routing="reduce"), LowRankSparse(rank=8, density=None)],
    "prune": [ExpertPruning(num_experts=4, saliency="reap"), LowRankSparse(rank_ratio=0.6, density=0.25)],
}


def refusal(target: Target, name: str) -> str:
    """Why an architecture does not take a method; empty if it does."""
    without = next((found.info.no_factors for found in find_blocks(build(target)) if found.info.no_factors), "")
    return without or target.refuses(name)


def calibration(target: Target | str, batches: int = 3) -> CalibrationConfig:
    return CalibrationConfig([inputs_for(target, rows=4, length=32, seed=seed) for seed in range(batches)])


def compressor_for(model: Any, method: Any, target: Target | str, **settings: Any) -> MoECompressor:
    return MoECompressor.from_pretrained(model, method, calibration(target), progress=False, **settings)
