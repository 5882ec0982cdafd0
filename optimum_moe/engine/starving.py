"""Tells where a plan removes the experts of one modality, although they look rare over all tokens."""

from __future__ import annotations

from collections.abc import Mapping

from optimum_moe.algorithms.expert_usage import Starved, starved_modalities
from optimum_moe.plan import BlockPlan
from optimum_moe.statistics import MODALITIES, BlockStatistics

_SHOWN_BLOCKS, _SHOWN_EXPERTS = 4, 5


def starving_remarks(plans: Mapping[str, BlockPlan], observed: Mapping[str, BlockStatistics]) -> tuple[str, ...]:
    """A sentence for each modality most of whose tokens were routed to experts that are removed.

    Args:
        plans: Plans by block.
        observed: Statistics of the same blocks; without media in the calibration data there is nothing to tell.
    """
    found: dict[int, dict[str, Starved]] = {}
    for name, plan in plans.items():
        removed = plan.removed_experts
        token_count_VE = observed[name].modality_count_VE if removed else None
        if token_count_VE is not None:
            for starved in starved_modalities(token_count_VE, removed):
                found.setdefault(starved.modality, {})[name] = starved
    return tuple(_sentence(MODALITIES[modality], blocks) for modality, blocks in sorted(found.items()))


def _sentence(modality: str, blocks: Mapping[str, Starved]) -> str:
    shown = [
        f"{name}: {starved.share:.0%} of the {modality} tokens and {starved.whole_share:.0%} of all, experts "
        f"{', '.join(map(str, starved.experts[:_SHOWN_EXPERTS]))}{', ...' * (len(starved.experts) > _SHOWN_EXPERTS)}"
        for name, starved in list(blocks.items())[:_SHOWN_BLOCKS]
    ]
    return (
        f"Most {modality} tokens of the calibration data were routed to experts that are removed, in {len(blocks)} "
        f"block{'s' * (len(blocks) > 1)} ({'; '.join(shown)}{'; ...' * (len(blocks) > _SHOWN_BLOCKS)}). Remove fewer "
        f'experts, leave a block out with protect=["{next(iter(blocks))}"], or calibrate with a larger share of '
        f"{modality} tokens if the model will see more of them."
    )
