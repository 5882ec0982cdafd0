from __future__ import annotations

import math

import pytest
import torch

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.neuron_similarity import neuron_similarity
from optimum_moe.algorithms.output_comparison import compare_outputs
from optimum_moe.algorithms.similarity import pair_correlation


def experts_of(down_EHI: torch.Tensor, up_EIH: torch.Tensor) -> ExpertTensors:
    return ExpertTensors(up=up_EIH, down=down_EHI, activate=lambda gate, up: up.relu())


def random_experts(number: int = 4, hidden: int = 6, inner: int = 5) -> ExpertTensors:
    generator = torch.Generator().manual_seed(1)
    return experts_of(
        torch.randn(number, hidden, inner, generator=generator), torch.randn(number, inner, hidden, generator=generator)
    )


def test_all_experts_run_on_all_tokens():
    experts, input_SH = random_experts(), torch.randn(70, 6, generator=torch.Generator().manual_seed(2))
    found = compare_outputs(experts, input_SH)
    output_ESH = torch.stack([(input_SH @ experts.up[e].T).relu() @ experts.down[e].T for e in range(4)])
    assert torch.allclose(found.norm_SE, output_ESH.norm(dim=-1).T.double(), rtol=1e-6)
    cosine_EE = torch.nn.functional.cosine_similarity(output_ESH[:, None], output_ESH[None], dim=-1).mean(-1).double()
    off = ~torch.eye(4, dtype=torch.bool)
    assert torch.allclose(found.similarity_EE[off], (cosine_EE[off] + 1) / 2, atol=1e-6)
    assert found.similarity_EE.diagonal().tolist() == [1, 1, 1, 1]


def test_scaled_and_negated_experts():
    experts = random_experts()
    copies = experts_of(torch.stack([experts.down[0], 3 * experts.down[0], -experts.down[0]]), experts.up[[0, 0, 0]])
    found = compare_outputs(copies, torch.randn(40, 6, generator=torch.Generator().manual_seed(3)))
    assert torch.allclose(found.norm_SE[:, 1], 3 * found.norm_SE[:, 0])
    # Tokens for which the expert is silent count as a cosine of 0 on both sides.
    silent = float((found.norm_SE[:, 0] == 0).double().mean())
    assert float(found.similarity_EE[0, 1]) == pytest.approx(1 - silent / 2, abs=1e-6)
    assert float(found.similarity_EE[0, 2]) == pytest.approx(silent / 2, abs=1e-6)


def test_no_token_gives_no_similarity():
    assert compare_outputs(random_experts(), torch.empty(0, 6)).similarity_EE.isnan().all()


def test_neurons_of_a_permuted_copy_match_after_alignment_only():
    experts = random_experts(2, 16, 12)
    order_I = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    copy = experts_of(
        torch.stack([experts.down[0], experts.down[0][:, order_I]]),
        torch.stack([experts.up[0], experts.up[0][order_I]]),
    )
    unaligned, aligned = neuron_similarity(copy, 0, 1)
    assert aligned == pytest.approx(1, abs=1e-6)
    features_ID = torch.cat([experts.up[0], experts.down[0].T], dim=1)
    expected = torch.nn.functional.cosine_similarity(features_ID, features_ID[order_I]).mean()
    assert unaligned == pytest.approx(float(expected), abs=1e-6)
    fixed = ExpertTensors(up=copy.up, down=copy.down, fixed_neurons=True)
    assert neuron_similarity(fixed, 0, 1) == (unaligned, unaligned)


def test_correlation_over_pairs():
    one_EE = torch.tensor([[1.0, 0.1, 0.2], [0.1, 1.0, 0.6], [0.2, 0.6, 1.0]])
    assert pair_correlation(one_EE, 3 * one_EE + 1) == pytest.approx(1, rel=1e-6)
    assert pair_correlation(one_EE, -one_EE) == pytest.approx(-1, rel=1e-6)
    other_EE = torch.tensor([[9.0, 0.2, 0.1], [0.2, 9.0, 0.0], [0.1, 0.0, 9.0]])
    pairs = torch.tensor([[0.1, 0.2, 0.6], [0.2, 0.1, 0.0]])
    assert pair_correlation(one_EE, other_EE) == pytest.approx(float(torch.corrcoef(pairs)[0, 1]), rel=1e-6)
    assert math.isnan(pair_correlation(torch.ones(3, 3), one_EE))
    assert math.isnan(pair_correlation(torch.ones(1, 1), torch.ones(1, 1)))
