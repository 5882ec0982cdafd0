"""What pruning leaves of an expert for which the router goes on selecting it: a constant, or a low-rank affine map.

A stock checkpoint has no place for either, so all experts of the block are stored in formats of this package.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from optimum_moe.algorithms.affine import AffineFit
from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.formats import StoredExpert, StoredExperts, build_expert
from optimum_moe.formats.affine import Affine, affine_part
from optimum_moe.formats.base import ExpertFormat, get_format
from optimum_moe.formats.constant import Constant, constant_part
from optimum_moe.formats.stored import without_neurons
from optimum_moe.model_info import BlockInfo
from optimum_moe.stages.context import BlockContext

LEAVES = ("nothing", "constant", "low_rank")
"""What may be left of a removed expert."""


def stored_experts(context: BlockContext, kept: Collection[int], rank: int | None) -> StoredExperts:
    """The experts that stay as they are, and what is left of each of the others.

    It is fitted to the sampled tokens of the expert, all of which count the same; of an expert without any, nothing is
    left.

    Args:
        context: The block.
        kept: Ids of the experts that stay.
        rank: Of the map; None for a constant.

    Raises:
        ValueError: If the outputs of the experts do not follow from their own weights.
    """
    if context.experts.fixed_neurons:
        name = context.info.name
        raise ValueError(
            f"The neurons of the experts of {name} meet what all experts share, so what one of them gives does not "
            f'follow from its own weights. Pass leaves="nothing", or leave the block out with protect=["{name}"].'
        )
    sample, stored = context.sample(), []
    for index in range(context.info.num_experts):
        expert, tokens = single_expert(context.experts, index), sample.of_expert(index)
        if index in kept:
            stored.append(build_expert(expert, tokens, Candidate("dense", expert.inner)))
        else:
            stored.append(_left(expert, tokens, rank, context.experts.up[index].dtype))
    return StoredExperts(tuple(stored))


def left_numbers(block: BlockInfo, rank: int | None) -> int:
    """Numbers that are stored of a removed expert, its down bias included."""
    form: ExpertFormat = get_format(Constant.name if rank is None else Affine.name, ExpertFormat)
    return sum(spec.numbers for spec in form.tensors(rank or 1, block.hidden_size, False).values())


def _left(expert: Expert, tokens: ExpertTokens, rank: int | None, dtype: torch.dtype) -> StoredExpert:
    if not len(tokens):
        return without_neurons(expert)
    output_PH = expert.activated(expert.preactivations(tokens.input_PH)) @ expert.down_HI.T
    if rank is None:
        return without_neurons(expert, constant_part(output_PH.mean(0, keepdim=True), dtype))
    return without_neurons(expert, affine_part(AffineFit(tokens.input_PH, output_PH, rank), rank, dtype))
