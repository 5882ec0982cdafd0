"""Runs of any size that nobody made, for reports."""

from __future__ import annotations

import torch

from optimum_moe import CompressionPlan
from optimum_moe.plan import keep_some
from optimum_moe.reporting.page import RunRecord
from optimum_moe.reporting.page.run_record import BlockFacts


def synthetic_run(blocks: int, experts: int, name: str = "large", block_name: str = "model.layers.{}.mlp") -> RunRecord:
    """A run whose plan keeps every second expert, and whose use is skewed."""
    names = [block_name.format(number) for number in range(blocks)]
    plans = {own: keep_some(own, experts, range(0, experts, 2)) for own in names}
    count_E = (1e4 / torch.arange(1, experts + 1)).long()
    generator = torch.Generator().manual_seed(0)
    facts = {
        own: BlockFacts(
            8, 4096, 1536, 37.7e6, 2.0, 1 << 20, tuple(count_E[torch.randperm(experts, generator=generator)].tolist())
        )
        for own in names
    }
    costs = {"parameters": 10, "bytes": 20, "flops_per_token": 30.0, "flops_upper": 30.0}
    report = {
        "before": costs,
        "after": costs,
        "counts": {own: [experts, plan.num_groups] for own, plan in plans.items()},
        "versions": {"optimum_moe": "0.1.0"},
    }
    source = {"name": name, "values": ["0123"]}
    return RunRecord(name, CompressionPlan(plans, source=source), facts, report, "stage: x", [], "abc")
