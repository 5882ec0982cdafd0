from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr

from optimum_moe.algorithms.router_choice import norm_choice, router_entropy


def test_entropy_by_hand():
    scores_SE = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0], [2.0, 1.0, 1.0, 0.0], [0.0] * 4])
    found_S = router_entropy(scores_SE)
    assert found_S[:3].tolist() == pytest.approx([math.log(4), 0, 1.5 * math.log(2)], rel=1e-12)
    assert math.isnan(found_S[3])


def test_a_router_that_chooses_the_largest_outputs():
    norm_SE = torch.rand(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights_SK, index_SK = norm_SE.topk(2)
    found = norm_choice(norm_SE.square(), norm_SE, index_SK, weights_SK)
    assert (found.rank_correlation, found.first_is_largest) == (pytest.approx(1, rel=1e-12), 1)
    assert found.norm_rank_E.tolist() == [1, 0, 0, 0, 0, 0]
    # And one that chooses the smallest.
    weights_SK, index_SK = (-norm_SE).exp().topk(2)
    found = norm_choice(-norm_SE, norm_SE, index_SK, weights_SK)
    assert (found.rank_correlation, found.first_is_largest) == (pytest.approx(-1, rel=1e-12), 0)
    assert found.norm_rank_E.tolist() == [0, 0, 0, 0, 0, 1]


def test_ranks_by_hand_with_ties_and_slots_without_an_expert():
    norm_SE = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0], [5.0, 6.0, 7.0]])
    scores_SE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.4, 0.4, 0.4]])
    index_SK, weights_SK = torch.tensor([[1, 0], [2, 3], [3, 3]]), torch.tensor([[0.2, 0.6], [0.1, 0.9], [0.5, 0.5]])
    found = norm_choice(scores_SE, norm_SE, index_SK, weights_SK)
    # The slot of id 3 is none, so the second token has expert 2, and the third is not served at all.
    assert found.norm_rank_E.tolist() == [1, 0, 0]
    by_scipy = [spearmanr(scores, norms).statistic for scores, norms in zip(scores_SE[:2], norm_SE[:2], strict=True)]
    assert found.rank_correlation == pytest.approx(sum(by_scipy) / 2, rel=1e-12)


def test_no_token_gives_no_number():
    nothing = torch.empty(0, 4)
    found = norm_choice(nothing, nothing, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert all(map(math.isnan, (found.rank_correlation, found.first_is_largest, *found.norm_rank_E.tolist())))
