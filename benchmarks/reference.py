"""The two bundled reference MoEs and the variants that every table about them compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optimum_moe import ExpertPruning, MSMoE

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
CALIBRATION = DATA / "reference" / "calibration.jsonl"
"""Calibration text of both models."""
HELD_OUT = DATA / "reference" / "held_out.jsonl"
"""Held-out text of both models."""


def text_of(file: Path) -> str:
    """All documents of one of the two, one below the other."""
    return "\n".join(json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Reference:
    """A bundled model.

    Args:
        model: Its checkpoint.
        description: What tables call it.
        num_experts: Routed experts in each block.
        least_experts: The smallest number of experts from which its router can select.
        hidden_size: Width of the residual stream.
        intermediate_size: Neurons of an expert.
        router_groups: Router groups, which must stay equally large.
    """

    model: Path
    description: str
    num_experts: int
    least_experts: int
    hidden_size: int
    intermediate_size: int
    router_groups: int = 1

    @property
    def source_line(self) -> str:
        """What a table ran on, with its license."""
        return (
            f"Model: the bundled reference MoE ({self.description}), trained by benchmarks/train_reference.py on "
            "public-domain text (State of the Union addresses, Moby-Dick, King James Bible, Jane Austen). Evaluated on "
            "whole held-out documents."
        )

    def experts_at(self, share: float) -> int | None:
        """As many experts as a share of them in equal router groups; None where a router needs more."""
        count = int(self.num_experts * share) // self.router_groups * self.router_groups
        return count if count >= self.least_experts else None

    def variants(self, num_experts: int) -> dict[str, MSMoE | ExpertPruning]:
        """Those of `VARIANTS` that leave a router from which as many experts can be selected as before."""
        methods = {name: variant(num_experts) for name, variant in VARIANTS.items()}
        enough = num_experts >= self.least_experts
        return {
            name: method
            for name, method in methods.items()
            if enough or (isinstance(method, MSMoE) and method.routing == "map")
        }


REFERENCES = {
    "reference": Reference(
        model=DATA / "reference" / "model",
        description="Qwen3-MoE, 4 blocks x 32 experts, top-4",
        num_experts=32,
        least_experts=4,
        hidden_size=128,
        intermediate_size=80,
    ),
    "reference_deepseek": Reference(
        model=DATA / "reference_deepseek" / "model",
        description="DeepSeek-V3, 3 blocks x 24 experts in 2 router groups and a shared one, top-4",
        num_experts=24,
        # All four experts of a token come from one of the two router groups, which stay equally large.
        least_experts=8,
        hidden_size=128,
        intermediate_size=96,
        router_groups=2,
    ),
}
"""The bundled models by the name of their folder in `tests/data`."""

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
