"""Expected parameters, bytes and FLOPs per token of a compression, from config and headers only."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import is_expressible
from optimum_moe.recipe import Recipe
from optimum_moe.surgeons import FoundBlock, tower_of


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Args:
        parameters: Number of stored parameters; tied ones count once.
        bytes: Bytes of the weights on disk.
        flops_per_token: 2 x multiply-adds of all weight matmuls for one token (for an encoder-decoder one source
            and one target token), lm_head included, attention scores excluded.
        flops_upper: Upper bound of the FLOPs, if a token may select merged experts repeatedly; else equal.
    """

    parameters: int
    bytes: int
    flops_per_token: float
    flops_upper: float


@dataclass(frozen=True)
class Preview:
    """Cost before and after, and the experts of each block; `str()` gives a table.

    Args:
        before: Cost of the original.
        after: Cost after compression.
        counts: `(experts, remaining)` by block; remaining is the average with an adaptive allocation.
        plain: Whether stock transformers can load the result without this package.
        widths: `(neurons, remaining)` of every expert, where stock experts were made narrower; else None.
        choices: `(experts, neurons)` of every block among which the calibration data will choose; empty for none.
        layers: Number of layers with MoE blocks before and after, if some are dropped.
        only_values: What stages write into experts that keep their size, in sentences.
        training: What is trained afterwards, in a sentence; empty for nothing.
    """

    before: Cost
    after: Cost
    counts: Mapping[str, tuple[int, int]]
    plain: bool
    widths: tuple[int, int] | None = None
    choices: tuple[tuple[int, int], ...] = ()
    layers: tuple[int, int] | None = None
    only_values: tuple[str, ...] = ()
    training: str = ""

    def warn_if_nothing_shrinks(self, recipe: Recipe) -> None:
        """Warn if the settings of a recipe remove nothing."""
        before, after = self.before, self.after
        if (
            recipe.knows_size
            and not self.only_values
            and (after.parameters, after.bytes) == (before.parameters, before.bytes)
        ):
            shown = ", ".join(
                f"{name}={value!r}"
                for stage in recipe.stages
                for name, value in stage.settings().items()
                if name in stage.size_fields and value
            )
            warnings.warn(
                f"{recipe.name} with {shown} removes nothing of {before.parameters:,} parameters. Use a smaller size.",
                stacklevel=3,
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    @property
    def experts(self) -> str:
        """Experts of a block before and after, in words."""
        kept = sorted(set(self.counts.values()))
        if self.choices and self.widths is None:
            shown = [f"{experts} of {width}" for experts, width in _ends_of(self.choices)]
            return f"{kept[0][0]} -> {', '.join(shown[:-1])}{' or ' * (len(shown) > 1)}{shown[-1]} neurons, by the data"
        said = ", ".join(f"{old} -> {new}" for old, new in kept)
        if self.widths is not None:
            return said + " of {} -> {} neurons".format(*self.widths)
        as_many = all(old == new for old, new in kept) and self.layers is None
        return f"{said}, in smaller formats" if as_many and self.after.bytes < self.before.bytes else said

    def __str__(self) -> str:
        before, after = self.before, self.after
        flops = f"{after.flops_per_token:,.0f}"
        if after.flops_upper != after.flops_per_token:
            flops += f" to {after.flops_upper:,.0f}"
        rows = [
            ("", "before", "after", "ratio"),
            (
                "parameters",
                f"{before.parameters:,}",
                f"{after.parameters:,}",
                _ratio(after.parameters, before.parameters),
            ),
            ("bytes", f"{before.bytes:,}", f"{after.bytes:,}", _ratio(after.bytes, before.bytes)),
            ("FLOPs per token", f"{before.flops_per_token:,.0f}", flops, _ratio(after.flops_upper, before.flops_upper)),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        loads = "any transformers" if self.plain else "transformers with optimum-moe installed"
        if self.layers is not None:
            lines.append("layers with MoE blocks: {} -> {}".format(*self.layers))
        lines.append(f"experts of {len(self.counts)} MoE blocks: {self.experts}; loads in {loads}")
        return "\n".join([*lines, *self.only_values, *([self.training] if self.training else [])])


def values_only(recipe: Recipe) -> tuple[str, ...]:
    """What the stages of a recipe write into experts that keep their size."""
    return tuple(said for stage in recipe.stages if (said := stage.only_changes_values))


def _ends_of(choices: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most five of many choices, evenly."""
    last, most = len(choices) - 1, min(len(choices), 5)
    return [choices[round(n * last / max(most - 1, 1))] for n in range(most)]


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.3f}"


def flops_per_token(model: PreTrainedModel, blocks: list[FoundBlock], routed: Mapping[str, float]) -> float:
    """FLOPs per token if the routed experts of block `name` take `routed[name]` multiply-adds; works on meta."""
    inside_experts = {id(p) for found in blocks for p in found.surgeon.expert_parameters(found.module(model))}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    dense = sum(
        p.numel()
        for p in model.parameters()
        if p.dim() >= 2 and id(p) not in inside_experts and id(p) not in embeddings
    )
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in embeddings:
        dense += head.weight.numel()
    return 2.0 * (dense + sum(routed[found.info.name] for found in blocks))


def original_cost(skeleton: PreTrainedModel, blocks: list[FoundBlock], info: ModelInfo) -> Cost:
    """Cost of a model before anything is done to it."""
    full = {block.name: float(block.top_k * block.expert_multiply_adds) for block in info.blocks}
    flops = flops_per_token(skeleton, blocks, full)
    return Cost(info.parameters, info.bytes, flops, flops)


def preview(skeleton: PreTrainedModel, blocks: list[FoundBlock], info: ModelInfo, recipe: Recipe) -> Preview:
    """Costs of a model before and after a recipe, from config and headers."""
    costs = recipe.costs(info)
    counts = {name: cost.experts for name, cost in costs.items()}
    removed_parameters, removed_router, indices, saved = 0.0, 0, 0.0, 0.0
    low, high = {}, {}
    for block in info.blocks:
        cost = costs[block.name]
        removed_parameters += cost.removed_parameters(block)
        removed_router += cost.removed_router_parameters(block)
        indices += cost.indices
        saved += cost.saved_bytes(block)
        low[block.name], high[block.name] = cost.multiply_adds
    dense_saving = 2.0 * removed_router
    unchanged = {block.name for block in info.blocks if counts[block.name] == block.num_experts}
    towers = {found.info.name: tower_of(skeleton, found) for found in blocks}
    mapped = recipe.routing == "map" and len(unchanged) < len(blocks)
    stock = all(cost.stock for cost in costs.values())
    narrow = {(block.intermediate_size, costs[block.name].width) for block in info.blocks}
    return Preview(
        before=original_cost(skeleton, blocks, info),
        after=Cost(
            int(info.parameters - removed_parameters - removed_router + indices),
            int(info.bytes - saved),
            flops_per_token(skeleton, blocks, low) - dense_saving,
            flops_per_token(skeleton, blocks, high) - dense_saving,
        ),
        counts={block.name: (block.num_experts, counts[block.name]) for block in info.blocks},
        plain=stock and not mapped and is_expressible(counts, unchanged, towers),
        widths=next((pair for pair in narrow if pair[0] != pair[1]), None),
        choices=next((found for stage in recipe.stages if (found := stage.choices(info))), ()),
        only_values=values_only(recipe),
        training="" if recipe.recover is None else str(recipe.recover),
    )
