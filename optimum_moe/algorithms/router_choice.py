"""How decided a router is, and whether it selects the experts with the largest outputs.

Shape letters: E experts, S sampled tokens, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import rankdata


def router_entropy(scores_SE: torch.Tensor) -> torch.Tensor:
    """(S,) entropy in nats of each token's scores divided by their sum: log E where all experts score alike.

    Args:
        scores_SE: (S, E) nonnegative scores of the routed experts, such as their softmax or sigmoid.

    Returns:
        float64 in [0, log E]; NaN for a token whose scores are all 0.
    """
    share_SE = scores_SE.double() / scores_SE.double().sum(-1, keepdim=True)
    return torch.special.entr(share_SE).sum(-1)


@dataclass(frozen=True, eq=False)
class NormChoice:
    """How the choice of experts goes with the norms of the outputs that all experts have for the same tokens.

    Args:
        rank_correlation: Mean over the tokens of Spearman's correlation between the scores and the output norms of all
            experts; NaN without a token whose scores and norms differ between experts.
        first_is_largest: Share of the tokens whose selected expert with the largest routing weight also has the largest
            output norm of all experts; 1 / E by chance. NaN without tokens.
        norm_rank_E: (E,) float64, share of the tokens whose expert with the largest routing weight has the largest
            output norm, the second largest, and so on; NaN without tokens.
    """

    rank_correlation: float
    first_is_largest: float
    norm_rank_E: torch.Tensor


def norm_choice(
    scores_SE: torch.Tensor, norm_SE: torch.Tensor, index_SK: torch.Tensor, weights_SK: torch.Tensor
) -> NormChoice:
    """Compare a router's choice with output norms ("A Closer Look into Mixture-of-Experts", arXiv:2406.18219).

    The paper counts, token by token, the rank of an expert's score against the rank of its output's norm.

    Args:
        scores_SE: (S, E) router scores.
        norm_SE: (S, E) norm of every expert's output for every token, whether or not it was selected.
        index_SK: (S, K) selected experts; an id outside of [0, E) is none.
        weights_SK: (S, K) routing weights; 0 is none either.
    """
    num_experts = norm_SE.shape[1]
    weights_SK = weights_SK.double().masked_fill(index_SK >= num_experts, 0.0)
    served_S = (weights_SK > 0).any(-1)
    first_S = index_SK[served_S].gather(1, weights_SK[served_S].argmax(-1, keepdim=True))
    own_S = norm_SE[served_S].gather(1, first_S)
    rank_S = (norm_SE[served_S] > own_S).sum(-1)
    norm_rank_E = torch.bincount(rank_S, minlength=num_experts).double() / len(rank_S)
    ranks = [torch.from_numpy(rankdata(values.cpu().numpy(), axis=1)) for values in (scores_SE, norm_SE)]
    centered = [values - values.mean(1, keepdim=True) for values in ranks]
    correlation_S = (centered[0] * centered[1]).sum(1) / (centered[0].norm(dim=1) * centered[1].norm(dim=1))
    return NormChoice(float(correlation_S.nanmean()), float(norm_rank_E[0]), norm_rank_E)
