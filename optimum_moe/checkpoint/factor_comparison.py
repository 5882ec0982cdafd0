"""Comparison of a checkpoint's factorized experts with its plan and the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimum_moe.checkpoint.comparison import Comparison, same_bits
from optimum_moe.formats import ExpertsSpec
from optimum_moe.formats.base import MatrixFormat, get_format
from optimum_moe.plan import BlockPlan
from optimum_moe.surgeons import FoundBlock


def compare_factors(
    found: FoundBlock,
    block: Any,
    plan: BlockPlan,
    stored: Mapping[str, torch.Tensor],
    result: Comparison,
    sizes: ExpertsSpec | None = None,
    stock: nn.Module | None = None,
) -> None:
    """Compare the compressed experts of one block: all with the plan's digests, exact parts with the original.

    Args:
        found: The block.
        block: The block after merging or pruning, with the original's values; the stored experts are put into it.
        plan: Its plan, with sizes.
        stored: Tensors of the block in the checkpoint, by the model's names.
        result: Collects the results.
        sizes: Sizes after training dropped rows; None for those of the plan.
        stock: A stock block of the plan's sizes, for a plan that resizes stock experts.
    """
    assert plan.sizes is not None
    resized = sizes is not None and sizes != plan.sizes
    plan = plan if sizes is None else replace(plan, sizes=sizes)
    surgeon, name = found.surgeon, found.info.name
    view = surgeon.experts(block)
    originals = {key: values for key, values in _matrices(view).items() if values is not None}
    formats = None if plan.is_stock else plan.sizes
    surgeon.build_structure(block, plan.num_groups, plan.routing, formats, stock)
    state = surgeon.written_experts(block)
    prefix = f"{name}."
    result.count += len(state)
    missing = [f"{prefix}{key} is missing" for key in state if f"{prefix}{key}" not in stored]
    if missing:
        result.failures += missing
        return
    block.load_state_dict({key: stored[f"{prefix}{key}"] for key in state}, assign=True, strict=False)
    found_digests, told = surgeon.digest(block), plan.digest or {}
    for key in [*found_digests, *(key for key in told if key not in found_digests)]:
        if found_digests.get(key) != told.get(key):
            text = f"{prefix}{key} does not match the digest in the plan"
            # Indices change only if rows were dropped.
            changes = resized or (key in state and state[key].is_floating_point())
            result.differs(text, f"{prefix}{key}") if changes else result.failures.append(text)
    read = _readable(found, block)
    for expert in range(plan.num_groups):
        for text in _dense_failures(read, expert, plan, originals, prefix):
            result.differs(text, *(f"{prefix}{key}" for key in state))


def _matrices(view: Any) -> dict[str, Any]:
    return {"gate": view.gate, "up": view.up, "down": view.down}


def _readable(found: FoundBlock, block: Any) -> Callable[[int], Mapping[str, torch.Tensor]]:
    """Function from an expert of a block to its dense matrices; `{}` for an expert without neurons."""
    held = found.surgeon.factors(block)
    if held is not None:
        return lambda expert: {} if held.home(expert) is None else held.densified(expert)
    view = found.surgeon.experts(block)
    return lambda expert: {name: values[expert] for name, values in _matrices(view).items() if values is not None}


def _dense_failures(
    read: Callable[[int], Mapping[str, torch.Tensor]],
    expert: int,
    plan: BlockPlan,
    originals: Mapping[str, Any],
    prefix: str,
) -> list[str]:
    """Failures for matrices that should equal the original; a down projection refitted to fewer neurons may differ."""
    sizes = plan.sizes
    assert sizes is not None
    kept = None if plan.neurons is None else plan.neurons[expert]
    exact = {name: _is_exact(sizes.sizes_of(name, expert)) for name in originals}
    # Experts that keep all of their neurons are refitted to the tokens of removed ones, if no others can be.
    make_up = not sizes.parts and 0 in sizes.widths and len(set(sizes.widths)) == 2
    make_up = make_up or (plan.is_stock and plan.weights != "masked") or plan.refits_down
    failures = []
    for projection in originals:
        refitted = projection == "down" and (kept is not None or make_up or not all(exact.values()))
        if not exact[projection] or refitted or plan.weights == "fitted":
            continue
        # Matrices in other formats are not made: the values of a broken checkpoint may not allow it.
        now = read(expert)
        if projection not in now:
            continue
        expected = originals[projection][expert]
        expected = expected if kept is None else expected[kept]
        if plan.weights == "masked":
            # A weight that is neither zero nor the original's.
            if bool(((now[projection] != 0) & (now[projection] != expected)).any()):
                failures.append(f"{prefix}{projection} of expert {expert} has weights that the original does not have")
        elif not same_bits(now[projection], expected):
            failures.append(f"{prefix}{projection} of expert {expert} is kept dense, but differs from the original")
    return failures


def _is_exact(parts: Mapping[str, int]) -> bool:
    """Whether a matrix with these parts has the original's bits."""
    return all(get_format(name, MatrixFormat).is_exact for name in parts)
