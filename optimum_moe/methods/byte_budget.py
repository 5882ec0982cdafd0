"""The byte budget over all experts of a model: what a block says of its experts, and how the bytes are spent."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from optimum_moe.algorithms.block_refit import refit_block
from optimum_moe.algorithms.byte_budget import Point, build, candidates, choose
from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.algorithms.factors import BlockFactors
from optimum_moe.algorithms.one_expert import Form
from optimum_moe.blocks import BlockInfo, ModelInfo
from optimum_moe.methods.base import BlockContext


@dataclass(frozen=True)
class BlockSurvey:
    """The candidates of one block's experts.

    Args:
        points: For each expert, see `optimum_moe.algorithms.byte_budget.candidates`.
        in_loss: Whether damages are changes of the loss; else squared output errors, in a unit of the block's own.
    """

    points: tuple[tuple[Point, ...], ...]
    in_loss: bool


def survey_block(context: BlockContext, kinds: Sequence[str]) -> BlockSurvey:
    """The candidates of all experts of a block, damages summed over all tokens that the block saw.

    Neurons that have a meaning outside of their expert are kept all or none. An expert without tokens costs nothing to
    empty, unless `unseen` says that it is kept or pruned.
    """
    sample, found = context.sample(), []
    gradient_SJH = sample.gradient_SJH
    if gradient_SJH is not None and len(gradient_SJH) and not gradient_SJH.any():
        raise ValueError(
            f"All gradients of the loss at {context.info.name} are zero, as if nothing depended on its experts: they "
            "would all be emptied. Check the weights behind it; load the model in a wider dtype, leave the block out "
            f'with protect=["{context.info.name}"], or pass curvature=False.'
        )
    kinds = [kind for kind in kinds if kind != "neurons" or not context.experts.fixed_neurons]
    for index in range(context.experts.num_experts):
        expert, tokens = single_expert(context.experts, index), sample.of_expert(index)
        points = candidates(expert, tokens, kinds=kinds)
        if len(tokens) == 0 and context.unseen in ("keep", "prune"):
            points = points[-1:] if context.unseen == "keep" else points[:1]
        found.append(tuple(replace(point, damage=point.damage / sample.share) for point in points))
    return BlockSurvey(tuple(found), sample.gradient_SJH is not None)


def spend_budget(
    model: ModelInfo, surveys: Mapping[str, BlockSurvey | None], numbers: int
) -> dict[str, tuple[Form, ...]]:
    """The form of every expert of every block, with which all of them store at most `numbers`.

    Args:
        model: The model.
        surveys: By block; None for one that stays as it is.
        numbers: The budget, in numbers of the narrowest dtype that experts are stored in.

    Raises:
        ValueError: If the experts that have to stay take more.
    """
    chosen = [block for block in model.blocks if surveys[block.name] is not None]
    taken = {block.name: survey for block in chosen if (survey := surveys[block.name]) is not None}
    widths = {block.name: round(block.expert_itemsize / narrowest_item(chosen)) for block in chosen}
    without = [name for name, survey in taken.items() if not survey.in_loss]
    if without:
        warnings.warn(
            f"No gradient of the loss was observed at {len(without)} of {len(taken)} blocks ({without[0]}, ...): "
            "damage is measured by output errors, and every block counts as much as any other. A backward pass needs "
            'engine="memory" without error propagation, and a model that gives logits.',
            stacklevel=2,
        )
    offered, owners = [], []
    for name, survey in taken.items():
        # Squared errors of different blocks have nothing in common but the share of what would be lost.
        total = sum(points[0].damage for points in survey.points) or 1.0
        for points in survey.points:
            unit = total if without else 1.0
            offered.append([replace(p, damage=p.damage / unit, numbers=p.numbers * widths[name]) for p in points])
            owners.append(name)
    forms: dict[str, list[Form]] = {name: [] for name in taken}
    for name, point in zip(owners, choose(offered, numbers), strict=True):
        forms[name].append(point.form)
    return {name: tuple(found) for name, found in forms.items()}


def narrowest_item(blocks: Sequence[BlockInfo]) -> float:
    """Bytes of one number in the narrowest dtype that experts of some blocks are stored in."""
    return min(block.expert_itemsize for block in blocks)


def build_block(context: BlockContext, forms: Sequence[Form]) -> BlockFactors:
    """All experts of a block in the forms that were chosen, refitted together to what the block gave.

    An expert that no token chooses any more is fitted to those that chose it when its form was decided.
    """
    sample, surveyed = context.sample(), context.surveyed_sample()
    experts = [single_expert(context.experts, index) for index in range(len(forms))]
    tokens = [found if len(found := sample.of_expert(e)) else surveyed.of_expert(e) for e in range(len(forms))]
    made = [build(*parts) for parts in zip(experts, tokens, forms, strict=True)]
    # What follows an expert's output is no sum, so that no other expert can make up for it.
    summed = context.experts.finish is None and not context.experts.fixed_neurons
    return BlockFactors(tuple(refit_block(experts, made, sample) if summed else made))
