"""Stock models with fewer or narrower experts: which config settings make them, and what their blocks look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from optimum_moe.hf.compat import model_from_config
from optimum_moe.plan import BlockPlan, CompressionPlan
from optimum_moe.surgeons.registry import FoundBlock, find_blocks
from optimum_moe.surgeons.towers import config_at, tower_of

# What the constructors of models raise for sizes that they cannot have.
REFUSALS = (
    *(ValueError, TypeError, RuntimeError, AssertionError, KeyError, IndexError, AttributeError, ArithmeticError),
    StrictDataclassError,
)


@dataclass(frozen=True, eq=False)
class StockModel:
    """A model of the original's class with experts of another number or width, on the meta device.

    Args:
        settings: The config settings that differ from the original's, by dotted path.
        skeleton: The model.
    """

    settings: Mapping[str, int]
    skeleton: PreTrainedModel


def update_config(config: Any, settings: Mapping[str, Any]) -> None:
    """Set settings by dotted path in a config of the original's class."""
    for path, value in settings.items():
        tower, _, name = path.rpartition(".")
        setattr(config_at(config, tower), name, value)


_BUILT: WeakKeyDictionary[PreTrainedModel, dict[tuple[int, int], StockModel]] = WeakKeyDictionary()


def stock_model(model: PreTrainedModel, blocks: Sequence[FoundBlock], num_experts: int, width: int) -> StockModel:
    """The stock model whose blocks have so many experts of that width; built once for each model and pair.

    Args:
        model: The model, of which some blocks may be cut already.
        blocks: Its original blocks.
        num_experts: Experts of each block.
        width: Neurons of each expert.

    Raises:
        ValueError: If no setting of the config gives such a model.
    """
    built = _BUILT.setdefault(model, {})
    if (num_experts, width) not in built:
        found = _build(model, blocks, num_experts, width)
        if isinstance(found, str):
            raise ValueError(f"{type(model).__name__} cannot have {num_experts} experts of {width} neurons: {found}.")
        built[num_experts, width] = found
    return built[num_experts, width]


def with_widths(model: PreTrainedModel, blocks: Sequence[FoundBlock]) -> tuple[FoundBlock, ...]:
    """The blocks with the reason why their experts cannot be narrower in stock classes, or what widths have to divide.

    Half of the width is tried, on the meta device.

    Args:
        model: The original.
        blocks: Its blocks.
    """
    info = blocks[0].info
    found = _build(model, blocks, info.num_experts, info.intermediate_size // 2)
    if isinstance(found, str):
        return tuple(replace(each, info=replace(each.info, fixed_width=found)) for each in blocks)
    # Shared experts keep their width, so it has to be a multiple of the new one.
    divides = 0
    for tower, _, name in (path.rpartition(".") for path in found.settings):
        if "shared" in name:
            divides = getattr(config_at(model.config, tower), name) * info.intermediate_size
    return tuple(replace(each, info=replace(each.info, width_divides=divides)) for each in blocks)


def _build(model: PreTrainedModel, blocks: Sequence[FoundBlock], num_experts: int, width: int) -> StockModel | str:
    """A stock model of these sizes, or the reason why there is none."""
    # Blocks of the model itself may be cut already.
    original = _from_config(model, deepcopy(model.config))
    if original is None:
        return "its class makes no model of its config alone"
    for found in blocks:
        if reason := found.surgeon.no_resize or _trailing(original, found):
            return reason
    towers = {tower_of(original, found) for found in blocks}
    if None in towers or len(towers) != 1:
        return "its experts are not described by one config"
    tower = next(name for name in towers if name is not None)
    whole, counted = blocks[0].info.intermediate_size, blocks[0].surgeon.count_fields[0]
    wanted = {} if num_experts == blocks[0].info.num_experts else {counted: num_experts}
    for settings in _possible_settings(config_at(model.config, tower), whole, width):
        config, named = deepcopy(model.config), {f"{tower}.{k}".lstrip("."): v for k, v in (wanted | settings).items()}
        update_config(config, named)
        built = _from_config(model, config)
        if built is not None and _differs_in_experts_only(original, blocks, built, width):
            return StockModel(named, built)
    return f"no setting of its config changes the width of its experts ({whole}) alone"


def _from_config(model: PreTrainedModel, config: Any) -> PreTrainedModel | None:
    """A model of the same class on the meta device; None where it cannot have these sizes."""
    try:
        with torch.device("meta"):
            return model_from_config(type(model), config)
    except REFUSALS:
        return None


def _possible_settings(config: Any, whole: int, width: int) -> Iterator[dict[str, int]]:
    """Settings that may be the width of experts, alone or with a number of shared experts of that width."""
    if width == whole:
        yield {}
        return
    numbers = {name: value for name, value in config.to_dict().items() if type(value) is int}
    named = sorted((name for name, value in numbers.items() if value == whole), key=lambda name: "moe" not in name)
    yield from ({name: width} for name in named)
    shared = [name for name, value in numbers.items() if "shared" in name and value and value * whole % width == 0]
    yield from ({name: width, other: numbers[other] * whole // width} for name in named for other in shared)


def _trailing(model: PreTrainedModel, found: FoundBlock) -> str:
    """Why the stacks of a block cannot be resized, because not all of their rows are routed experts."""
    block: Any = found.module(model)
    for path, axis in found.surgeon.expert_axes(block).items():
        if axis.is_matrix and len(block.get_parameter(path)) != axis.num_experts * axis.entries and axis.axis == 0:
            return "its stacked experts include shared ones"
    return ""


def _differs_in_experts_only(
    model: PreTrainedModel, blocks: Sequence[FoundBlock], built: PreTrainedModel, width: int
) -> bool:
    """Whether a model has blocks of that width, and all other tensors of the original but those with an expert axis."""
    there = find_blocks(built)
    if [found.info.name for found in there] != [found.info.name for found in blocks]:
        return False
    if any(found.info.intermediate_size != width for found in there):
        return False
    changed = set()
    for found in blocks:
        block: Any = found.module(model)
        own = {id(parameter) for parameter in found.surgeon.expert_parameters(block)}
        changed |= {f"{found.info.name}.{path}" for path, p in block.named_parameters() if id(p) in own}
        changed |= {f"{found.info.name}.{path}" for path in found.surgeon.expert_axes(block)}
    before, after = model.state_dict(), built.state_dict()
    return before.keys() == after.keys() and all(
        before[name].shape == after[name].shape for name in before if name not in changed
    )


def stock_block(model: PreTrainedModel, blocks: Sequence[FoundBlock], plan: BlockPlan) -> nn.Module | None:
    """The stock block of a plan's sizes on the meta device; None for a plan that does not change the width of experts.

    Args:
        model: The model.
        blocks: Its original blocks.
        plan: Plan of one of them.
    """
    width = _new_width(blocks, plan)
    if width is None:
        return None
    return stock_model(model, blocks, plan.num_groups, width).skeleton.get_submodule(plan.name)


def stock_settings(model: PreTrainedModel, blocks: Sequence[FoundBlock], plan: CompressionPlan) -> dict[str, int]:
    """The config settings, by dotted path, with which stock experts have the width that a plan gives them.

    They are empty where no width changes. The number of experts is among them where stock classes load the result;
    elsewhere each block has a number of its own, in place of the original's.

    Args:
        model: The model.
        blocks: Its original blocks.
        plan: The plan.
    """
    for block in plan.blocks.values():
        width = _new_width(blocks, block)
        if width is not None:
            count = block.num_groups if plan.is_plain else block.num_experts
            return dict(stock_model(model, blocks, count, width).settings)
    return {}


def _new_width(blocks: Sequence[FoundBlock], plan: BlockPlan) -> int | None:
    """The width that the plan of one of the blocks gives stock experts, None if they keep their own."""
    whole = next(found.info.intermediate_size for found in blocks if found.info.name == plan.name)
    return None if plan.width == whole else plan.width
