"""The files beside the weights of a compressed checkpoint: its plan, recipe, report and model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum_moe.algorithms.expert_skipping import experts_per_token
from optimum_moe.checkpoint.checksums import write_checksums
from optimum_moe.checkpoint.mtp import MTPLayers
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.model_info import BlockInfo
from optimum_moe.nn import FactorizedExperts
from optimum_moe.plan import PLAN_NAME, BlockPlan, CompressionPlan
from optimum_moe.recipe import Recipe
from optimum_moe.records import read_digest
from optimum_moe.reporting.card import CardFacts, inherited_metadata, mean_stable_ranks, model_card
from optimum_moe.reporting.loads_in import FIELD, REPORT_FILE, known_rows, to_json
from optimum_moe.reporting.page import PAGE_FILE, RunRecord, write_page
from optimum_moe.reporting.page.run_record import RECIPE_FILE, BlockFacts, read_report
from optimum_moe.reporting.preview import Cost, Preview, flops_per_token, original_cost, preview, values_only
from optimum_moe.reporting.versions import versions
from optimum_moe.statistics import BlockStatistics, Statistics
from optimum_moe.surgeons import FoundBlock


def card_facts(
    source: ModelSource,
    recipe: Recipe,
    plan: CompressionPlan,
    cost: Preview,
    auto_class: str,
    page: bool,
) -> CardFacts:
    """The content of a compressed checkpoint's model card, without local paths.

    Args:
        source: The original.
        recipe: The recipe.
        plan: The plan that was carried out.
        cost: Measured sizes, before and after.
        auto_class: Class to load with.
        page: Whether the report is written as HTML too.
    """
    return CardFacts(
        base=source.title,
        auto_class=auto_class,
        cost=cost,
        plan=plan,
        recipe=recipe.as_used(plan).to_yaml(),
        hub_id=source.hub_id,
        inherited=inherited_metadata(source.directory),
        page=page,
    )


def block_facts(source: ModelSource, statistics: Statistics | None) -> dict[str, BlockFacts]:
    """Sizes of each MoE block, and what was observed of it."""
    observed = {} if statistics is None else statistics.blocks
    return {info.name: BlockFacts.of(info, observed.get(info.name)) for info in source.info.blocks}


def write_description(directory: Path, name: str, facts: CardFacts, blocks: Mapping[str, BlockFacts]) -> None:
    """Write plan, recipe, report and model card of a checkpoint, and the digests of all these files.

    Args:
        directory: Its folder, with weights and config already written.
        name: What it is called.
        facts: Content of the card.
        blocks: Facts of each MoE block.
    """
    facts.plan.save_pretrained(directory)
    (directory / RECIPE_FILE).write_text(facts.recipe, encoding="utf-8")
    ranks = mean_stable_ranks(facts.plan)
    report = facts.cost.to_dict() | {"versions": versions(), FIELD: to_json(known_rows(directory))}
    report["blocks"] = {block: own.to_dict() for block, own in blocks.items()}
    report |= {} if ranks is None else {"stable_rank": dict(zip(("before", "after"), ranks, strict=True))}
    (directory / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_card(directory, name, facts)
    if facts.page:
        write_page(RunRecord.read(directory, name), directory / PAGE_FILE)
    write_checksums(directory)


def write_card(directory: Path, name: str, facts: CardFacts) -> None:
    """Write the model card of a checkpoint called `name`."""
    # Paths that the locale cannot encode are written as their bytes.
    (directory / "README.md").write_text(
        model_card(facts, name, known_rows(directory), read_digest(directory, PLAN_NAME), read_report(directory)),
        encoding="utf-8",
        errors="surrogateescape",
    )


def expected_preview(source: ModelSource, remaining: ModelSource, recipe: Recipe, mtp: MTPLayers) -> Preview:
    """Expected sizes for a recipe from config and headers, including tensors that the model does not load.

    Args:
        source: The original.
        remaining: The original, or what is left of it without the layers that the recipe drops.
        recipe: The recipe.
        mtp: Layers of the checkpoint that the model does not load.
    """
    cost = preview(remaining.skeleton, list(remaining.blocks), remaining.info, recipe)
    if remaining is not source:
        before = original_cost(source.skeleton, list(source.blocks), source.info)
        cost = replace(cost, before=before, layers=(_num_layers(source), _num_layers(remaining)))
    counts = {name: after for name, (_, after) in cost.counts.items()}
    # Those that are numbered as further layers are gone from `remaining` already.
    gone, size = replace(mtp, source=remaining).removed(counts, recipe.routing)
    after = replace(cost.after, parameters=cost.after.parameters - gone, bytes=cost.after.bytes - size)
    return replace(cost, after=after)


def _num_layers(source: ModelSource) -> int:
    return len({block.layer for block in source.info.blocks})


def measured_preview(
    source: ModelSource,
    recipe: Recipe,
    model: PreTrainedModel,
    plan: CompressionPlan,
    statistics: Statistics | None,
    mtp: MTPLayers,
    before: Cost,
    itemsize: Callable[[str, torch.Tensor], float] | None,
) -> Preview:
    """A preview with actual counts, and with repeated experts counted as observed.

    Args:
        source: The original, or what was left of it without the layers that were dropped.
        recipe: The recipe.
        model: The compressed model.
        plan: The plan that was carried out.
        statistics: Observed statistics, None for data-free recipes.
        mtp: Layers of the checkpoint that the model does not load.
        before: Cost of the original.
        itemsize: As in `measured_cost`.
    """
    blocks = list(source.blocks)
    counts = {name: block.num_groups for name, block in plan.blocks.items()}
    more_parameters, more_bytes = mtp.size(counts, "reduce" if plan.is_plain else recipe.routing)
    after = measured_cost(
        model,
        blocks,
        plan,
        statistics,
        more_parameters=more_parameters,
        more_bytes=more_bytes,
        itemsize=itemsize,
    )
    narrow = {block.width for block in plan.blocks.values()} - {None, blocks[0].info.intermediate_size}
    return Preview(
        before=before,
        after=after,
        counts={name: (block.num_experts, block.num_groups) for name, block in plan.blocks.items()},
        plain=plan.is_plain,
        widths=next(((blocks[0].info.intermediate_size, width) for width in narrow if width is not None), None),
        layers=(_num_layers(source) + len(plan.dropped), _num_layers(source)) if plan.dropped else None,
        only_values=values_only(recipe),
        training="" if recipe.recover is None else str(recipe.recover),
    )


def measured_cost(
    model: PreTrainedModel,
    blocks: list[FoundBlock],
    plan: CompressionPlan,
    statistics: Statistics | None,
    more_parameters: int = 0,
    more_bytes: int = 0,
    itemsize: Callable[[str, torch.Tensor], float] | None = None,
) -> Cost:
    """Cost of a compressed model, on any device, with repeated experts counted as observed.

    Args:
        model: The model.
        blocks: Its original MoE blocks.
        plan: The plan that was carried out.
        statistics: Observed statistics, None for data-free recipes.
        more_parameters: Parameters of the checkpoint that the model does not load.
        more_bytes: Their bytes.
        itemsize: Function from name and tensor to saved bytes per element; None for the tensor's own.
    """
    tensors = dict(model.named_parameters()) | _indices(model)
    sizes = (t.numel() * (t.element_size() if itemsize is None else itemsize(name, t)) for name, t in tensors.items())
    size = int(sum(sizes))
    routed = {}
    for found in blocks:
        name, block = found.info.name, plan.blocks[found.info.name]
        observed = None if statistics is None else statistics.blocks[name]
        routed[name] = routed_multiply_adds(found.info, block, observed)
    flops = flops_per_token(model, blocks, routed)
    parameters = sum(t.numel() for t in tensors.values())
    return Cost(parameters + more_parameters, size + more_bytes, flops, flops)


def routed_multiply_adds(info: BlockInfo, plan: BlockPlan, observed: BlockStatistics | None) -> float:
    """Multiply-adds per token in the routed experts of a block, averaged over the observed tokens.

    Without observations all remaining experts count as equally likely.
    """
    active = float(min(info.top_k, plan.num_groups))
    if plan.skipping is not None and observed is not None and len(observed.reservoir.weights_SK):
        active = experts_per_token(observed.reservoir.weights_SK, plan.skipping)
    if plan.sizes is None or plan.is_stock:
        share = 1.0 if plan.width is None else plan.width / info.intermediate_size
        merged = plan.routing == "map" and not plan.keeps_all
        if observed is not None and merged and len(observed.reservoir.index_SK):
            active = observed.mean_distinct(plan.labels_E)
        return active * share * info.expert_multiply_adds
    sizes, own = plan.sizes, {plan.labels_E: [0.0] * plan.num_groups}
    own[plan.labels_E] = [float(sizes.multiply_adds(g, info.hidden_size)) for g in range(plan.num_groups)]
    # A shared base runs once per token, however many experts of its group the token selects.
    for labels, each in sizes.shared_multiply_adds(info.hidden_size).items():
        own[labels] = [a + b for a, b in zip(own.get(labels, [0.0] * len(each)), each, strict=True)]
    rerouted = plan.routing == "reduce" and not plan.keeps_all
    if observed is None or rerouted or not len(observed.reservoir.index_SK):
        # Tokens of removed experts go to others, which nobody has observed.
        return active * sum(sum(each) / len(each) for each in own.values())
    return sum(observed.mean_of_distinct(labels, each) for labels, each in own.items())


def _indices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Buffers of compressed experts, such as the indices of sparse rows."""
    held = {path: module for path, module in model.named_modules() if isinstance(module, FactorizedExperts)}
    return {f"{path}.{name}": t for path, module in held.items() for name, t in module.named_buffers()}
