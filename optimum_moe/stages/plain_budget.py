"""The byte budget for stock classes: K experts of n neurons each, the same numbers in every block.

Shape letters: E experts, S sampled tokens, H hidden, I intermediate.

Which experts stay and how wide they are is chosen together: of all pairs (K, n) that fill the budget, the one with the
least expected damage, where each block keeps the experts that lose the most when they are removed. After the cut the
tokens of removed experts go to others, so the neurons of those that stay are chosen on the tokens that they have then
(optimal brain surgeon), and the down projections of the block are refitted together to what it gave before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from optimum_moe.algorithms.byte_budget import Candidate, Point
from optimum_moe.algorithms.expert import ExpertTokens
from optimum_moe.algorithms.expert_tokens import SampledTokens, single_expert
from optimum_moe.algorithms.experts import ExpertTensors, PerExpert
from optimum_moe.formats import StoredExperts, build_expert, is_worth_refitting, refit_block
from optimum_moe.model_info import BlockInfo
from optimum_moe.plan import BlockPlan, keep_all, keep_some
from optimum_moe.runtimes import Quantizer, Runtime, width_step
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.counts import fewest_experts

Points = Sequence[Sequence[Point]]
"""For each expert its candidates: empty, narrow and untouched, by ascending bytes."""

# Share of the damage of removing an expert that is left after the others of its block are refitted, compared with the
# same share for neurons. On the reference models the best pair by it is the measured best.
_REMOVED = 0.75


@dataclass(frozen=True)
class PlainShape:
    """What a block keeps.

    Args:
        kept: Ascending ids of the experts that remain.
        width: Neurons of each of them.
    """

    kept: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Pair:
    """A number of experts, and the width of each of them."""

    experts: int
    width: int


def check_uniform(blocks: Sequence[BlockInfo], chosen: Sequence[BlockInfo], runtime: Runtime) -> None:
    """Check that one number of experts and one width can describe all blocks of a model.

    Raises:
        ValueError: If blocks differ, are left out, or allow neither fewer experts nor fewer neurons.
    """
    otherwise = f"runs_in={runtime.name!r} gives all blocks the same number of experts of the same width"
    remedy = 'Pass runs_in="transformers".'
    if len(chosen) < len(blocks):
        left = next(block.name for block in blocks if block not in chosen)
        raise ValueError(f"{otherwise}, but layers= and protect= leave out {left}. Compress all blocks, or: {remedy}")
    sizes = {(b.num_experts, b.intermediate_size, b.hidden_size, b.top_k, b.router_groups) for b in blocks}
    if len(sizes) > 1:
        shown = ", ".join(f"{e} experts of {i} neurons, top-{k}" for e, i, _, k, _ in sorted(sizes))
        raise ValueError(f"{otherwise}, but those of this model differ: {shown}. {remedy}")
    first = blocks[0]
    if first.fixed_router and first.fixed_width:
        raise ValueError(
            f"{otherwise}, but {first.name} can lose neither experts ({first.fixed_router}) nor neurons "
            f"({first.fixed_width}). {remedy}"
        )


def possible_widths(block: BlockInfo, quantizer: Quantizer | None = None, tensor_parallel: int = 1) -> list[int]:
    """The widths that experts of a block may get, ascending.

    Args:
        block: The block.
        quantizer: What comes after the compression, None for nothing.
        tensor_parallel: Processes that the neurons of every expert are split over.

    Raises:
        ValueError: If there is none.
    """
    whole = block.intermediate_size
    step = width_step(whole, quantizer, tensor_parallel)
    last = step if quantizer is not None else tensor_parallel
    widths = [] if block.fixed_width else [*range(step, whole, step)]
    widths = [width for width in widths if not block.width_divides or block.width_divides % width == 0]
    widths += [whole] if whole % last == 0 else []
    if not widths:
        fixed = f" The width of experts cannot change: {block.fixed_width}." if block.fixed_width else ""
        raise ValueError(
            f"No width of at most {whole} neurons is a multiple of {step}, as quantize="
            f"{None if quantizer is None else quantizer.name!r} with tensor_parallel={tensor_parallel} needs.{fixed} "
            "Use another quantizer, such as q8_0 with blocks of 32, or fewer processes."
        )
    return widths


def pairs(
    block: BlockInfo, num_blocks: int, widths: Sequence[int], budget: float, router_bytes: float = 0.0
) -> list[Pair]:
    """The most experts for each width that together store at most the budget, at least one pair.

    Args:
        block: Any block of the model, see `check_uniform`.
        num_blocks: How many there are.
        widths: Ascending widths to choose from, see `possible_widths`.
        budget: Bytes for the experts of all blocks.
        router_bytes: Bytes that go with each removed expert of a block, in addition to its own.

    Raises:
        ValueError: If the budget is below the smallest checkpoint that the router and the widths allow.
    """
    whole, total = block.intermediate_size, block.num_experts
    fewest = total if block.fixed_router else fewest_experts(block, "reduce")
    groups = block.router_groups
    found: list[Pair] = []
    for width in widths:
        each = _bytes_of_expert(block, width)
        experts = min(total, int((budget / num_blocks + total * router_bytes) / (each + router_bytes) + 1e-9))
        experts = total if block.fixed_router and experts == total else experts // groups * groups
        if experts >= fewest:
            found.append(Pair(experts, width))
    if not found:
        least = num_blocks * fewest * _bytes_of_expert(block, widths[0])
        share = least / (num_blocks * total * _bytes_of_expert(block, whole))
        raise ValueError(
            f"{budget:,.0f} bytes for the experts are less than stock classes can express: {fewest} experts of "
            f"{widths[0]} neurons in each block, {least:,.0f} bytes or a share of {ceil(share * 1e4) / 1e4:g}. "
            'Use a larger size, or runs_in="transformers".'
        )
    # Of pairs with as many experts only the widest is worth trying.
    return [pair for pair in found if not any(o.experts == pair.experts and o.width > pair.width for o in found)]


def choose_shapes(
    blocks: Sequence[BlockInfo], points: Mapping[str, Points], offered: Sequence[Pair]
) -> dict[str, PlainShape]:
    """The shape of every block at the pair that is expected to lose the least; ties go to more experts.

    Args:
        blocks: The blocks.
        points: By block, damages in one unit.
        offered: See `pairs`.
    """
    best, result = float("inf"), {}
    for pair in sorted(offered, key=lambda pair: -pair.experts):
        total, shapes = 0.0, {}
        for block in blocks:
            damage, kept = _keep(block, points[block.name], pair)
            total += damage
            shapes[block.name] = PlainShape(kept, pair.width)
        if total < best:
            best, result = total, shapes
    return result


def expected_damage(
    blocks: Sequence[BlockInfo], points: Mapping[str, Points], shapes: Mapping[str, PlainShape]
) -> float:
    """What the chosen shapes lose before anything is refitted, in the unit of the points."""
    total = 0.0
    for block in blocks:
        shape = shapes[block.name]
        for expert, own in enumerate(points[block.name]):
            total += _damage_at(own, shape.width if expert in shape.kept else 0)
    return total


def stored_bytes(blocks: Sequence[BlockInfo], shapes: Mapping[str, PlainShape]) -> float:
    """Bytes of the experts that remain, router rows excluded."""
    total = 0.0
    for block in blocks:
        number, narrow = len(shapes[block.name].kept), block.with_width(shapes[block.name].width)
        total += narrow.bytes_of_experts(number, number * narrow.expert_parameters)
    return total


def _keep(block: BlockInfo, points: Points, pair: Pair) -> tuple[float, tuple[int, ...]]:
    """Expected damage of a block at a pair, and the experts that it keeps, as many in each router group."""
    # By the policy for unseen experts some have to be kept, and have no empty candidate, or removed, and have no other.
    removed = [_REMOVED * own[0].damage if own[0].candidate.neurons == 0 else float("inf") for own in points]
    narrow = [_damage_at(own, pair.width) if own[-1].candidate.neurons else float("inf") for own in points]
    size, each = len(points) // block.router_groups, pair.experts // block.router_groups
    kept: list[int] = []
    for group in range(block.router_groups):
        members = range(group * size, (group + 1) * size)
        kept += sorted(members, key=lambda e: (narrow[e] - removed[e], e))[:each]
    gone = set(range(len(points))) - set(kept)
    lost = [*(narrow[e] for e in kept), *(removed[e] for e in gone)]
    return sum(damage for damage in lost if damage < float("inf")), tuple(sorted(kept))


def _damage_at(points: Sequence[Point], width: int) -> float:
    """Damage of an expert of a width, linear between those that were tried."""
    widths = [point.candidate.neurons for point in points]
    at = bisect_left(widths, width)
    if at == len(points) or widths[at] == width or at == 0:
        return points[min(at, len(points) - 1)].damage
    low, high = points[at - 1], points[at]
    share = (width - widths[at - 1]) / (widths[at] - widths[at - 1])
    return low.damage + share * (high.damage - low.damage)


def _bytes_of_expert(block: BlockInfo, width: int) -> float:
    """Bytes of an expert of a width."""
    narrow = block.with_width(width)
    return narrow.bytes_of_experts(1, narrow.expert_parameters)


def plain_plan(context: BlockContext, shape: PlainShape, refit: bool = True) -> BlockPlan:
    """The plan for one block that keeps some experts with some of their neurons.

    Args:
        context: The block.
        shape: What it keeps.
        refit: Whether the down projections are refitted together to the block's output.
    """
    info, experts = context.info, context.experts
    keeps_all = len(shape.kept) == info.num_experts
    plan = keep_all(info.name, info.num_experts) if keeps_all else keep_some(info.name, info.num_experts, shape.kept)
    is_whole = shape.width == info.intermediate_size
    refit = refit and experts.finish is None and not experts.fixed_neurons
    if is_whole and (plan.keeps_all or not refit):
        # Nothing is narrowed, and nothing is, or where outputs are not simply summed can be, refitted.
        return plan
    sample = context.sample()
    rerouted = _rerouted(context, sample, shape.kept)
    kept = [single_expert(experts, expert) for expert in shape.kept]
    candidate = Candidate("dense" if is_whole else "narrow", shape.width)
    stored = [build_expert(expert, tokens_of(rerouted, slot), candidate) for slot, expert in enumerate(kept)]
    if refit:
        target_SH = block_output(experts, range(info.num_experts), sample)
        if experts.down_bias is not None:
            target_SH -= bias_output(experts.down_bias, shape.kept, rerouted)
        if is_whole and not is_worth_refitting(kept, stored, rerouted, target_SH):
            return plan
        stored = refit_block(kept, stored, rerouted, target_SH=target_SH)
    return replace(plan, factors=StoredExperts(tuple(stored)), is_stock=True)


def _rerouted(context: BlockContext, sample: SampledTokens, kept: Sequence[int]) -> SampledTokens:
    """The sample as it is routed among the experts that stay, whose ids are their slots.

    Where the router's rule is not known, tokens of removed experts stay without them.
    """
    info, found = context.info, context.observed().reservoir
    slots_E = torch.full((info.num_experts + 1,), len(kept))
    slots_E[list(kept)] = torch.arange(len(kept))
    routed = context.rerouter().route(kept)
    index_SK, weights_SK = (found.index_SK, found.weights_SK) if routed is None else routed
    device = sample.input_SH.device
    slot_SK = slots_E[index_SK.long().clamp(max=info.num_experts).cpu()].to(device)
    return replace(sample, index_SK=slot_SK, weights_SK=weights_SK.to(device))


def tokens_of(sample: SampledTokens, expert: int) -> ExpertTokens:
    """The tokens of an expert that stays; for one that no token selects, those of the whole block."""
    found = sample.of_expert(expert)
    if len(found):
        return found
    input_SH = sample.input_SH.float()
    return ExpertTokens(input_SH, torch.ones(len(input_SH), device=input_SH.device))


def block_output(
    experts: ExpertTensors, ids: Sequence[int], tokens: SampledTokens, biased: bool = True
) -> torch.Tensor:
    """(S, H) float32 weighted sum of the outputs of some experts, with their down biases or without."""
    output_SH = torch.zeros(tokens.input_SH.shape, device=tokens.input_SH.device)
    for slot, index in enumerate(ids):
        token_P, seen = tokens.routed(slot)
        expert = single_expert(experts, index)
        hidden_PI = expert.activated(expert.preactivations(seen.input_PH))
        output_SH.index_add_(0, token_P, (hidden_PI * seen.weight_P[:, None] @ expert.down_HI.T).float())
    if experts.down_bias is not None and biased:
        output_SH += bias_output(experts.down_bias, ids, tokens)
    return output_SH


def bias_output(bias_EH: PerExpert, ids: Sequence[int], tokens: SampledTokens) -> torch.Tensor:
    """(S, H) what the down biases of some experts give."""
    output_SH = torch.zeros(tokens.input_SH.shape, device=tokens.input_SH.device)
    for slot, index in enumerate(ids):
        token_P, seen = tokens.routed(slot)
        output_SH.index_add_(0, token_P, seen.weight_P[:, None] * bias_EH[index].float())
    return output_SH
