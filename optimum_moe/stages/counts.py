"""The number of experts that remain, from a count, a ratio or a target size, checked against the model."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.plan import Routing
from optimum_moe.settings import exactly_one, percent, plain, product

_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
ENTRY_BYTES = 180
"""Maximum bytes of a tensor's entry in a safetensors header, without the path of its block."""


def parse_size(size: Any, name: str = "target_size", whole: int | None = None) -> int:
    """Parse a size such as `"16GB"` (10^9 bytes), `"900 MiB"` (2^20 bytes), a plain number, or `"50%"` into bytes.

    Args:
        size: The size.
        name: Name of the setting in errors.
        whole: Bytes that a percentage refers to; None if percentages are not allowed.

    Raises:
        ValueError: If it cannot be parsed or is less than one byte.
    """
    size = plain(size)
    share = percent(size)
    if whole is not None and isinstance(share, float) and isinstance(size, str):
        return int(product(share, whole))
    text = f"{size:f}" if isinstance(size, float) else str(size)
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        also = "" if whole is None else ", or a share of the model like '50%'"
        raise ValueError(f"{name}={size!r} is not a size. Write a number of bytes, or '16GB' or '900MiB'{also}.")
    found = int(Decimal(match[1]) * _UNITS[match[2]])
    if found < 1:
        raise ValueError(f"{name}={size!r} is less than one byte. Write a number of bytes, or for example '16GB'.")
    return found


def bytes_for_tensors(model: ModelInfo, target_size: Any, more: int = 0) -> int:
    """Bytes left for tensors in a target size, after the headers of the files.

    Args:
        model: The model.
        target_size: Size of the checkpoint.
        more: Bytes of headers and maps that the original does not have.

    Raises:
        ValueError: If the model already fits.
    """
    target = parse_size(target_size, whole=model.bytes)
    if target >= model.bytes:
        raise ValueError(
            f"target_size={target_size!r} is {target:,} bytes, and the model has only {model.bytes:,}: there is "
            "nothing to remove. Use a smaller size."
        )
    return target - model.header_bytes - more


def check_counts(num_experts: int | None, keep_ratio: float | None, target_size: str | int | None) -> None:
    """Check without a model that exactly one of the three is given and lies in its range."""
    exactly_one(num_experts=num_experts, keep_ratio=keep_ratio, target_size=target_size)
    if num_experts is not None and (isinstance(num_experts, bool) or not isinstance(num_experts, int)):
        raise ValueError(f"num_experts={num_experts!r} must be an integer. For a share of the experts use keep_ratio.")
    if keep_ratio is not None and (isinstance(keep_ratio, bool) or not isinstance(keep_ratio, int | float)):
        raise ValueError(f"keep_ratio={keep_ratio!r} must be a number in (0, 1], the share of experts that remain.")
    if num_experts is not None and num_experts < 1:
        raise ValueError(f"num_experts={num_experts} keeps no expert. Use at least 1.")
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio} must lie in (0, 1]: it is the share of experts that remain.")
    if target_size is not None:
        check_size(target_size)


def check_share(name: str, value: Any, hint: str = "") -> None:
    """Raise a `ValueError` unless a share is None or lies in (0, 1].

    Args:
        name: Name of the setting in the error.
        value: The share.
        hint: Text that is appended to the error.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} must be a number in (0, 1].{hint}")


def check_size(target_size: Any) -> None:
    """Raise a `ValueError` unless a target size can be parsed; needs no model."""
    parse_size(target_size, whole=1)


def selected_blocks(
    model: ModelInfo, layers: Sequence[int] | None, protect: Sequence[str] | None
) -> tuple[BlockInfo, ...]:
    """The blocks to compress: those of `layers` (positions among the MoE blocks) that match no `protect` pattern.

    Raises:
        ValueError: If a layer does not exist, a pattern matches nothing, or no block is left.
    """
    total = len(model.blocks)
    lists = all(given is None or isinstance(given, list | tuple) for given in (layers, protect))
    if not lists or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers or ()):
        raise ValueError(f"layers={layers!r} and protect={protect!r} must be lists: [0, 1], ['*.layers.0.*'].")
    wrong = [layer for layer in layers or () if not -total <= layer < total]
    if wrong:
        raise ValueError(f"layers={wrong} do not exist: the model has MoE blocks 0 to {total - 1}. Correct the list.")
    for pattern in protect or ():
        if not any(fnmatch.fnmatch(block.name, pattern) for block in model.blocks):
            names = f"{model.blocks[0].name} ... {model.blocks[-1].name}"
            raise ValueError(f"protect={pattern!r} matches no MoE block. The blocks are {names}.")
    chosen = tuple(block for block in model.blocks if is_selected(block, total, layers, protect))
    if not chosen:
        raise ValueError(
            f"layers={layers} and protect={protect} select none of the {total} MoE blocks. Select at least one."
        )
    return chosen


def is_selected(block: BlockInfo, num_blocks: int, layers: Sequence[int] | None, protect: Sequence[str] | None) -> bool:
    """Whether `layers` and `protect` select a block for compression."""
    wanted = layers is None or block.index in {layer % num_blocks for layer in layers}
    return wanted and not any(fnmatch.fnmatch(block.name, pattern) for pattern in protect or ())


def resolve_counts(
    model: ModelInfo,
    chosen: Sequence[BlockInfo],
    routing: Routing,
    num_experts: int | None = None,
    keep_ratio: float | None = None,
    target_size: str | int | None = None,
) -> dict[str, int]:
    """Number of remaining experts of every block; blocks that are not chosen keep all.

    `keep_ratio` rounds up, and to a multiple of the router groups if the router shrinks with the experts.

    Raises:
        ValueError: If the count is below top-k, above the number of experts, or not divisible by the router groups, or
            if a ratio below 1 keeps all experts.
    """
    counts = {block.name: block.num_experts for block in model.blocks}
    for block in chosen:
        if num_experts is not None:
            counts[block.name] = num_experts
        elif keep_ratio is not None:
            step = block.router_groups if routing == "reduce" else 1
            kept = math.ceil(product(keep_ratio / step, block.num_experts)) * step
            counts[block.name] = min(block.num_experts, max(kept, step))
    if target_size is not None:
        counts |= _fit(model, chosen, routing, target_size)
    if keep_ratio is not None and keep_ratio < 1 and all(counts[b.name] == b.num_experts for b in chosen):
        most = max(chosen, key=lambda block: block.num_experts)
        step = most.router_groups if routing == "reduce" else 1
        raise ValueError(
            f"keep_ratio={keep_ratio} of {most.num_experts} experts rounds up to all of them: nothing would be "
            f"removed. Use at most {math.floor((1 - step / most.num_experts) * 1e4) / 1e4:g}."
        )
    for block in chosen:
        check_count(block, counts[block.name], routing)
    return counts


def check_count(block: BlockInfo, count: int, routing: Routing) -> None:
    """Raise a `ValueError` if `count` experts cannot remain of this block."""
    if count > block.num_experts:
        raise ValueError(
            f"num_experts={count} is larger than the {block.num_experts} experts of {block.name}. "
            f"Use at most {block.num_experts}."
        )
    if routing == "map":
        return
    if block.fixed_router and count < block.num_experts:
        raise ValueError(
            f"num_experts={count} would remove ids that {block.name} selects from: {block.fixed_router}. "
            'Merge its experts with routing="map".'
        )
    if count < block.top_k:
        raise ValueError(
            f"num_experts={count} is smaller than num_experts_per_tok={block.top_k}: the router cannot pick "
            f'{block.top_k} of {count}. Use at least {block.top_k}, or merge with routing="map".'
        )
    groups = block.router_groups
    if count % groups or (groups > 1 and count // groups < 2):
        raise ValueError(
            f"num_experts={count} does not fit the {groups} router groups of {block.name}: each needs the same "
            f'number of experts, at least 2. Use a multiple of {groups} from {2 * groups} up, or routing="map".'
        )
    reachable = count // groups * min(block.router_groups_used, groups)
    if reachable < block.top_k:
        raise ValueError(
            f"num_experts={count} leaves a token {reachable} experts to choose num_experts_per_tok={block.top_k} from: "
            f"it may use {block.router_groups_used} of the {groups} router groups of {block.name}. "
            'Keep more experts, or merge with routing="map".'
        )


def _fit(model: ModelInfo, chosen: Sequence[BlockInfo], routing: Routing, target_size: Any) -> dict[str, int]:
    """Counts for the largest share of experts, equal in all blocks, whose checkpoint fits into the target size."""
    maps = sum(8 * b.num_experts + 2 * header_entry(b) for b in chosen) if routing == "map" else 0
    target = bytes_for_tensors(model, target_size, maps)
    most = max(block.num_experts for block in chosen)
    smallest = model.bytes
    for keep in range(most, 0, -1):
        counts, saved = {}, 0.0
        for block in chosen:
            step = block.router_groups if routing == "reduce" else 1
            count = max(fewest_experts(block, routing), math.ceil(keep * block.num_experts / most / step) * step)
            counts[block.name] = count
            each = block.bytes_of_experts(1, block.expert_parameters)
            if routing == "reduce":
                each += block.router_parameters * block.router_itemsize
            saved += (block.num_experts - count) * each
        smallest = int(model.bytes - saved)
        if smallest <= target:
            return counts
    raise ValueError(
        f"target_size={parse_size(target_size, whole=model.bytes):,} bytes cannot be reached: the fewest experts that "
        f"the routers can work with still leave {smallest + model.header_bytes + maps:,} of {model.bytes:,} bytes, "
        "headers and maps included. Ask for at least that."
    )


def header_entry(block: BlockInfo) -> int:
    """Maximum bytes of the header entry of one tensor of a block."""
    return len(block.name) + ENTRY_BYTES


def fewest_experts(block: BlockInfo, routing: Routing) -> int:
    """The smallest count that `check_count` allows."""
    if routing == "map":
        return 1
    step = block.router_groups
    each = math.ceil(block.top_k / min(block.router_groups_used, step))
    return min(block.num_experts, step * max(each, 2 if step > 1 else 1))
