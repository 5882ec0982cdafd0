"""What became of each expert of the original: its form, and the bytes that are left of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimum_moe.formats import ExpertsSpec
from optimum_moe.formats.base import DEFAULT, MatrixFormat, get_format
from optimum_moe.formats.specification import matrix_shape
from optimum_moe.plan import BlockPlan
from optimum_moe.reporting.page.run_record import BlockFacts

UNCHANGED, REMOVED = "unchanged", "removed"


@dataclass(frozen=True)
class Fate:
    """What became of one expert of the original.

    Args:
        form: In a few words.
        bytes: What is stored of it; of a merged expert each member has an equal part.
    """

    form: str
    bytes: float


def fates(plan: BlockPlan, facts: BlockFacts) -> list[Fate]:
    """What became of each expert of a block."""
    members = Counter(label for label in plan.labels_E if label >= 0)
    forms = {group: _form(plan, facts, group, number > 1) for group, number in members.items()}
    sizes = {group: _stored_bytes(plan, facts, group) / number for group, number in members.items()}
    return [Fate(REMOVED, 0.0) if label < 0 else Fate(forms[label], sizes[label]) for label in plan.labels_E]


def stored_experts(plan: BlockPlan, experts: Sequence[Fate]) -> int:
    """How many experts of a block are stored: merged ones are one, removed ones none."""
    return len({label for label, fate in zip(plan.labels_E, experts, strict=True) if fate.form != REMOVED})


def _form(plan: BlockPlan, facts: BlockFacts, group: int, is_merged: bool) -> str:
    said = ["merged"] if is_merged else []
    sizes = plan.sizes
    if sizes is not None:
        instead = sizes.in_place_of(group)
        if instead is not None:
            return instead[0].replace("_", " ")
        if sizes.widths[group] == 0:
            return REMOVED
        parts = {name for projection in sizes.layout(group).values() for name in projection} - {DEFAULT}
        said += [" + ".join(sorted(name.replace("_", " ") for name in parts))] if parts else []
        if not parts and sizes.widths[group] < facts.intermediate_size:
            said.append("fewer neurons")
    if not said and plan.weights == "masked":
        said.append("zeros among its weights")
    return ", ".join(said) or UNCHANGED


def _stored_bytes(plan: BlockPlan, facts: BlockFacts, group: int) -> float:
    """Bytes of one remaining expert, with its part of what it shares."""
    sizes = plan.sizes
    if sizes is None:
        return facts.expert_bytes
    own = sizes.bytes(group, facts.hidden_size, facts.itemsize)
    return min(own + _shared_bytes(sizes, facts, group), facts.expert_bytes)


def _shared_bytes(sizes: ExpertsSpec, facts: BlockFacts, group: int) -> float:
    total = 0.0
    for name, by_projection in sizes.parts.items():
        form = get_format(name, MatrixFormat)
        for projection, numbers in by_projection.items() if form.is_shared else ():
            if numbers[group] is None:
                continue
            shape = matrix_shape(projection, max(sizes.widths), facts.hidden_size)
            stored = sum(spec.bytes(facts.itemsize) for spec in form.tensors(0, *shape).values())
            total += stored / numbers.count(numbers[group])
    return total


def by_form(found: Mapping[str, list[Fate]]) -> Counter[str]:
    """How many experts of all blocks have each form."""
    return Counter(fate.form for experts in found.values() for fate in experts)
