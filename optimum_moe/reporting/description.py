"""What stands beside the weights of a compressed checkpoint: its plan, recipe, report and card."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

from optimum_moe.plan import CompressionPlan
from optimum_moe.reporting.card import CardFacts, model_card
from optimum_moe.reporting.preview import Cost, flops_per_token
from optimum_moe.statistics import Statistics
from optimum_moe.surgeons import FoundBlock

RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "compression_report.json"


def write_description(directory: Path, name: str, facts: CardFacts) -> None:
    """Write plan, recipe, report and the card of a checkpoint called `name`."""
    facts.plan.save_pretrained(directory)
    (directory / RECIPE_FILE).write_text(facts.recipe)
    (directory / REPORT_FILE).write_text(json.dumps(facts.cost.to_dict(), indent=1) + "\n")
    (directory / "README.md").write_text(model_card(facts, name))


def measured_cost(
    model: PreTrainedModel,
    blocks: list[FoundBlock],
    plan: CompressionPlan,
    statistics: Statistics | None,
    more_parameters: int = 0,
    more_bytes: int = 0,
) -> Cost:
    """Cost of a compressed model, on any device, with repeats as they were observed.

    Args:
        model: The model.
        blocks: Its MoE blocks as they were.
        plan: How they were cut.
        statistics: What was observed.
        more_parameters: Parameters of the checkpoint that the model does not load.
        more_bytes: Their bytes.
    """
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    active = {f.info.name: float(min(f.info.top_k, plan.blocks[f.info.name].num_groups)) for f in blocks}
    for name, block in plan.blocks.items() if statistics is not None else ():
        if block.routing == "map" and not block.keeps_all:
            assert statistics is not None
            observed = statistics.blocks[name]
            if len(observed.reservoir.index_SK):
                active[name] = observed.mean_distinct(block.labels_E)
    flops = flops_per_token(model, blocks, active)
    return Cost(parameters + more_parameters, size + more_bytes, flops, flops)
