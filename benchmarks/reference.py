"""The bundled reference MoE and the variants that every table about it compares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from optimum_moe import ExpertPruning, MSMoE

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "data" / "reference"
MODEL = REFERENCE / "model"
"""The bundled model; `quality.py --model` takes another one that `train_reference.py` made."""
CALIBRATION = REFERENCE / "calibration.jsonl"
HELD_OUT = REFERENCE / "held_out.jsonl"
NUM_EXPERTS = 32

Variant = Callable[[int], MSMoE | ExpertPruning]

VARIANTS: dict[str, Variant] = {
    "M-SMoE": lambda k: MSMoE(num_experts=k),
    "M-SMoE, plain checkpoint": lambda k: MSMoE(num_experts=k, routing="reduce"),
    "plain, dominant rows": lambda k: MSMoE(num_experts=k, routing="reduce", router_rows="dominant"),
    "M-SMoE, adaptive budget": lambda k: MSMoE(num_experts=k, allocation="adaptive"),
    "no alignment": lambda k: MSMoE(num_experts=k, align=False),
    "random groups": lambda k: MSMoE(num_experts=k, grouping="random"),
    "plain average": lambda k: MSMoE(num_experts=k, weighting="uniform"),
    "frequency pruning": lambda k: ExpertPruning(num_experts=k, saliency="frequency"),
    "REAP pruning": lambda k: ExpertPruning(num_experts=k, saliency="reap"),
    "random pruning": lambda k: ExpertPruning(num_experts=k, saliency="random"),
}
"""Name of each variant, and its method for K remaining experts a block."""


def source_line() -> str:
    """What the tables of the reference model ran on, with its license."""
    return (
        "Model: the bundled reference MoE (Qwen3-MoE, 4 blocks x 32 experts, top-4), trained by "
        "benchmarks/train_reference.py on public-domain text (State of the Union addresses, Moby-Dick, King James "
        "Bible, Jane Austen). Evaluated on whole held-out documents."
    )
