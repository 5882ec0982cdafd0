"""How evenly the experts of a block are used, over all tokens and by modality.

Shape letters: E experts, V modalities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def effective_experts(token_count_E: torch.Tensor) -> float:
    """Exponential of the entropy of the frequencies: E for even use, 1 if a single expert gets all tokens.

    Args:
        token_count_E: (E,) tokens of each expert.

    Returns:
        A number in [1, E]; NaN without any token.
    """
    share_E = token_count_E.double() / token_count_E.sum()
    return float(torch.special.entr(share_E).sum().exp())


def busiest_share(token_count_E: torch.Tensor, part: float = 0.25) -> float:
    """Share of the routed tokens that the busiest experts get; equal to their share of the experts for even use.

    Args:
        token_count_E: (E,) tokens of each expert.
        part: Share of the experts, rounded up to whole ones.

    Returns:
        A number in (0, 1]; NaN without any token.
    """
    number = math.ceil(part * len(token_count_E))
    return float(token_count_E.double().topk(number).values.sum() / token_count_E.sum())


def imbalance(token_count_E: torch.Tensor) -> float:
    """Tokens of the busiest expert over the mean of all experts, 1 for even use; NaN without any token.

    Args:
        token_count_E: (E,) tokens of each expert.
    """
    return float(token_count_E.max() / token_count_E.double().mean())


def shared_tokens(coactivation_EE: torch.Tensor) -> torch.Tensor:
    """Normalized co-activation: of the tokens that selected either of two experts, the share that selected both.

    Args:
        coactivation_EE: (E, E) tokens that selected both experts, with the tokens of each on the diagonal.

    Returns:
        (E, E) float64 in [0, 1], ones on the diagonal; NaN for two experts without any token.
    """
    both_EE = coactivation_EE.double()
    count_E = both_EE.diagonal()
    return both_EE / (count_E[:, None] + count_E - both_EE)


@dataclass(frozen=True)
class Starved:
    """A modality that loses more of its experts than the whole data tell.

    Args:
        modality: Its row in the counts.
        share: Share of its routed tokens that the removed experts served.
        whole_share: The same share over the tokens of all modalities.
        experts: Removed experts that served at least one of its tokens, those with the most of them first.
    """

    modality: int
    share: float
    whole_share: float
    experts: tuple[int, ...]


def starved_modalities(
    token_count_VE: torch.Tensor, removed: tuple[int, ...], most: float = 0.5, factor: float = 2.0
) -> tuple[Starved, ...]:
    """The modalities most of whose tokens were served by removed experts that look rare over all tokens.

    Args:
        token_count_VE: (V, E) tokens of each modality that were routed to each expert.
        removed: Experts that are removed.
        most: A modality starves if the removed experts served more than this share of its routed tokens ...
        factor: ... and more than this many times their share over all modalities.

    Returns:
        In the order of the modalities; empty if none starves. One without tokens does not.
    """
    count_VE = token_count_VE.double()
    gone_VR = count_VE[:, list(removed)]
    whole = float(gone_VR.sum() / count_VE.sum().clamp(min=1))
    found = []
    for modality, count_R in enumerate(gone_VR):
        share = float(count_R.sum() / count_VE[modality].sum().clamp(min=1))
        if share > most and share > factor * whole:
            order = count_R.argsort(descending=True, stable=True)
            experts = tuple(removed[place] for place in order.tolist() if count_R[place] > 0)
            found.append(Starved(modality, share, whole, experts))
    return tuple(found)
