"""What neurons of two experts are compared by when they are aligned, beside their weights: their activations.

Activations say what a neuron does on the tokens that a merged expert will serve, weights also what it does on inputs
that no calibration token has. REAM (arXiv:2604.04356) adds up the costs of both.

Shape letters: E experts, S sampled tokens, P those of one group, I intermediate, D features.
"""

from __future__ import annotations

import torch

from optimum_moe.algorithms.alignment import Features, FeaturesOf, weights_of
from optimum_moe.algorithms.expert_tokens import SampledTokens, single_expert
from optimum_moe.algorithms.experts import ExpertTensors

# Tokens of a group that are looked at, which bounds the memory of wide experts.
_TOKENS = 8192

TIES = 1e-3
"""Share of the weights that only decides between neurons whose activations say the same, such as those that no token
activates."""


def activation_features(
    experts: ExpertTensors, sample: SampledTokens, labels_E: torch.Tensor, weights_share: float = TIES
) -> FeaturesOf:
    """Features whose products are the correlation of two neurons' activations plus a share of their weights' cosine.

    Activations are those of the sampled tokens that were routed to a member of the group, which the merged expert will
    serve; of the whole sample where there are none. A neuron that gives the same on all of them correlates with none.

    Args:
        experts: The block's routed experts.
        sample: The block's sampled tokens.
        labels_E: (E,) group of each expert, -1 for a pruned one.
        weights_share: What the cosine of the weights counts, 1 for as much as the correlation.

    Raises:
        ValueError: When the features are asked for, if the architecture does not give its gate function.
    """

    def features(expert: int, group: int) -> Features:
        members = (labels_E == group).nonzero()[:, 0].to(sample.index_SK)
        reached_S = (torch.isin(sample.index_SK, members) & (sample.weights_SK != 0)).any(-1)
        token_P = (reached_S if bool(reached_S.any()) else torch.ones_like(reached_S)).nonzero()[:, 0]
        input_PH = sample.input_SH[token_P[:: -(-len(token_P) // _TOKENS) or 1]].float()
        single = single_expert(experts, expert)
        hidden_PI = single.activated(single.preactivations(input_PH))
        weights_ID = torch.cat([matrix.float() for matrix in weights_of(experts, expert)], dim=1)
        return _unit_rows((hidden_PI - hidden_PI.mean(0)).T), _unit_rows(weights_ID) * weights_share**0.5

    return features


def _unit_rows(features_ID: torch.Tensor) -> torch.Tensor:
    """(I, D) rows of norm 1; rows of zeros stay."""
    return torch.nn.functional.normalize(features_ID, dim=1)
