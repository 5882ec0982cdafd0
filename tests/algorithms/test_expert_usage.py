from __future__ import annotations

import math

import pytest
import torch

from optimum_moe.algorithms.expert_usage import (
    Starved,
    busiest_share,
    effective_experts,
    imbalance,
    shared_tokens,
    starved_modalities,
)


def test_even_use_and_a_single_expert():
    even_E, single_E = torch.full((8,), 5.0), torch.tensor([0.0, 7.0, 0.0, 0.0])
    assert effective_experts(even_E) == pytest.approx(8, rel=1e-12)
    assert effective_experts(single_E) == 1
    assert (busiest_share(even_E), busiest_share(single_E)) == (0.25, 1)
    assert (imbalance(even_E), imbalance(single_E)) == (1, 4)


def test_use_of_four_experts_by_hand():
    count_E = torch.tensor([4.0, 1.0, 2.0, 1.0])
    # Entropy of (1/2, 1/8, 1/4, 1/8) is 1.75 bits.
    assert effective_experts(count_E) == pytest.approx(2**1.75, rel=1e-12)
    assert busiest_share(count_E) == 0.5
    assert busiest_share(count_E, 0.3) == 0.75
    assert imbalance(count_E) == 2


def test_without_tokens_there_is_no_number():
    for measure in (effective_experts, busiest_share, imbalance):
        assert math.isnan(measure(torch.zeros(4)))
    assert shared_tokens(torch.zeros(2, 2)).isnan().all()


def test_shared_tokens_by_hand():
    # Experts 0 and 1 of 6 and 4 tokens meet in 2 of the 8 that have either; expert 2 has none.
    counts_EE = torch.tensor([[6.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    shared_EE = shared_tokens(counts_EE)
    assert shared_EE[:2].tolist() == [[1, 0.25, 0], [0.25, 1, 0]]
    assert math.isnan(shared_EE[2, 2])


def test_a_modality_that_starves():
    # Expert 3 serves most of the images, which are few: by tokens it is the rarest but one.
    count_VE = torch.tensor([[60.0, 30.0, 8.0, 0.0], [0.0, 1.0, 2.0, 7.0]])
    assert starved_modalities(count_VE, (2, 3)) == (Starved(1, 0.9, 17 / 108, (3, 2)),)
    assert starved_modalities(count_VE, (3,)) == (Starved(1, 0.7, 7 / 108, (3,)),)
    # Half of its tokens is not most of them; and without tokens nothing starves.
    assert starved_modalities(count_VE, (1, 2)) == ()
    assert starved_modalities(count_VE * torch.tensor([[1.0], [0.0]]), (2, 3)) == ()
    assert starved_modalities(count_VE, ()) == ()
    # What removes as much of everything is no news of one modality.
    assert starved_modalities(torch.tensor([[10.0, 10.0], [0.0, 3.0]]), (1,)) == ()
