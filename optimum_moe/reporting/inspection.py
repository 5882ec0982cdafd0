"""Inspection of a compressed checkpoint from config, headers and plan, without reading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum_moe.checkpoint.checkpoint_tensors import built
from optimum_moe.checkpoint.headers import Headers
from optimum_moe.checkpoint.location import raw_config
from optimum_moe.hf.structure import METHOD
from optimum_moe.model_info import BlockInfo
from optimum_moe.plan import PLAN_NAME, CompressionPlan
from optimum_moe.reporting.card import describe_calibration, describe_stages
from optimum_moe.reporting.description import REPORT_FILE, routed_multiply_adds
from optimum_moe.reporting.preview import flops_per_token


def is_structured(directory: Path) -> bool:
    """Whether a checkpoint needs optimum_moe (or the code in its folder) to be loaded."""
    record = raw_config(directory).get("quantization_config")
    return isinstance(record, dict) and record.get("quant_method") == METHOD


def how_it_was_made(directory: Path) -> dict[str, Any]:
    """Facts from the plan of a compressed checkpoint; empty if there is no plan."""
    if not (directory / f"{PLAN_NAME}.json").is_file() or not (directory / REPORT_FILE).is_file():
        return {}
    plan = CompressionPlan.from_pretrained(directory)
    return {
        "original": plan.source.get("name"),
        "stages": describe_stages(plan.stages),
        "calibration": describe_calibration(plan.calibration),
        "seed": plan.seed,
        "experts": {name: [block.num_experts, block.num_groups] for name, block in plan.blocks.items()},
    }


def inspect_structured(directory: Path, headers: Headers) -> dict[str, Any]:
    """Facts of a checkpoint that `is_structured`, as JSON values.

    Raises:
        ValueError: If config, plan and model do not match.
    """
    model, blocks = built(directory)
    plan = CompressionPlan.from_pretrained(directory)
    lacking = sorted({found.info.name for found in blocks} ^ set(plan.blocks))
    if lacking:
        raise ValueError(
            f"Plan and config of {directory} have different MoE blocks ({', '.join(lacking[:3])}). Copy the checkpoint "
            "again."
        )
    routed = {found.info.name: routed_multiply_adds(found.info, plan.blocks[found.info.name], None) for found in blocks}
    return {
        "architecture": type(model).__name__,
        "surgeon": blocks[0].surgeon.name,
        "parameters": headers.parameters,
        "bytes": headers.bytes,
        "flops_per_token": flops_per_token(model, blocks, routed),
        "blocks": [_block(found.info, plan) for found in blocks],
    }


def _block(info: BlockInfo, plan: CompressionPlan) -> dict[str, Any]:
    block = plan.blocks[info.name]
    sizes = None if block.is_stock else block.sizes
    total = info.expert_parameters * block.num_groups
    if sizes is not None:
        total = sum(sizes.numbers(expert, info.hidden_size) for expert in range(block.num_groups))
    return {
        "name": info.name,
        "num_experts": block.num_groups,
        "top_k": info.top_k,
        "router_groups": info.router_groups,
        "hidden_size": info.hidden_size,
        "intermediate_size": info.intermediate_size,
        "expert_parameters": total,
        "original_experts": block.num_experts,
        "routing": block.routing,
        "forms": "stock" if sizes is None else sizes.describe(),
    }
