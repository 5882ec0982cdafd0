import pytest
import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.merge_damage import pair_damages
from optimum_moe.algorithms.neuron_merge import choose_neurons, fit_down, in_turns
from optimum_moe.algorithms.similarity import distance_similarity, mean_outputs

TOKENS, HIDDEN, INNER, EXPERTS = 256, 6, 5, 4


def gated(gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
    assert gate_PI is not None
    return torch.nn.functional.silu(gate_PI) * up_PI


def random_block(seed: int = 0, **fields) -> tuple[ExpertTensors, SampledTokens]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    experts = ExpertTensors(
        up=normal(EXPERTS, INNER, HIDDEN),
        gate=normal(EXPERTS, INNER, HIDDEN),
        down=normal(EXPERTS, HIDDEN, INNER),
        activate=gated,
    )
    index_SK = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    weights_SK = torch.rand(TOKENS, 2, generator=generator)
    return experts, SampledTokens(normal(TOKENS, HIDDEN), index_SK, weights_SK, normal(TOKENS, 1, HIDDEN), **fields)


def outputs_of(experts: ExpertTensors, expert: int, input_SH: torch.Tensor) -> torch.Tensor:
    assert experts.gate is not None
    hidden_SI = gated(input_SH @ experts.gate[expert].T, input_SH @ experts.up[expert].T)
    return hidden_SI @ experts.down[expert].T


def test_neurons_without_effect_go_first():
    generator = torch.Generator().manual_seed(0)
    hidden_PU = torch.randn(200, 8, generator=generator)
    down_HU = torch.randn(6, 8, generator=generator)
    down_HU[:, [1, 4, 6]] = 0
    rows_QH = torch.eye(6)
    kept_N = choose_neurons(hidden_PU, hidden_PU @ down_HU.T, rows_QH, 5)
    assert kept_N.tolist() == [0, 2, 3, 5, 7]
    assert choose_neurons(hidden_PU, hidden_PU @ down_HU.T, rows_QH, 8).tolist() == list(range(8))


def test_of_two_equal_neurons_one_stays():
    hidden_PN = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    target_PH = hidden_PN @ torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    order = [3, 1, 4, 0, 2]
    kept_N = choose_neurons(torch.cat([hidden_PN, hidden_PN[:, order]], dim=1), target_PH, torch.eye(6), 5)
    assert sorted(n if n < 5 else order[n - 5] for n in kept_N.tolist()) == list(range(5))


def test_neurons_are_chosen_by_the_metric_of_the_output():
    """Only the first output counts, to which the first three neurons contribute."""
    hidden_PU = torch.randn(200, 6, generator=torch.Generator().manual_seed(3))
    down_HU = torch.zeros(2, 6)
    down_HU[0, :3], down_HU[1, 3:] = 0.1, 10.0
    assert choose_neurons(hidden_PU, hidden_PU @ down_HU.T, torch.tensor([[1.0, 0.0]]), 3).tolist() == [0, 1, 2]


def test_a_down_projection_that_fits_stays_and_another_becomes_the_least_squares_one():
    generator = torch.Generator().manual_seed(4)
    hidden_PN, down_HN = torch.randn(300, 5, generator=generator), torch.randn(6, 5, generator=generator)
    torch.testing.assert_close(fit_down(hidden_PN, hidden_PN @ down_HN.T, down_HN), down_HN)
    target_PH = torch.randn(300, 6, generator=generator)
    fitted_HN = fit_down(hidden_PN, target_PH, down_HN, damping=1e-9)
    torch.testing.assert_close(fitted_HN, torch.linalg.lstsq(hidden_PN, target_PH).solution.T, rtol=1e-4, atol=1e-5)


def test_a_large_group_is_chosen_from_in_turns():
    assert in_turns([7, 2, 5, 1, 0], each=10, largest=30) == [[7, 2, 5], [1, 0]]
    assert in_turns([7, 2, 5], each=10, largest=5) == [[7, 2], [5]]
    assert in_turns([7], each=10, largest=30) == [[7]]


@pytest.mark.parametrize("has_gradients", [True, False])
def test_pair_damage_is_the_error_that_least_squares_leaves(has_gradients):
    experts, sample = random_block()
    if not has_gradients:
        sample = SampledTokens(sample.input_SH, sample.index_SK, sample.weights_SK)
    weight_SE = torch.zeros(TOKENS, EXPERTS).scatter_(1, sample.index_SK, sample.weights_SK)
    gradient_SH = torch.ones(TOKENS, HIDDEN) if sample.gradient_SJH is None else sample.gradient_SJH[:, 0]
    root_S1 = sample.importance().sqrt()[:, None]
    metric_HH = gradient_SH.T @ gradient_SH / gradient_SH.square().sum() if has_gradients else torch.eye(HIDDEN)
    damage_EE = pair_damages(experts, sample, damping=1e-9)
    for i in range(EXPERTS):
        for j in range(i):
            target_SH = sum(outputs_of(experts, e, sample.input_SH) * weight_SE[:, e, None] for e in (i, j)) * root_S1
            left = []
            for host in (i, j):
                assert experts.gate is not None
                hidden_SI = gated(sample.input_SH @ experts.gate[host].T, sample.input_SH @ experts.up[host].T)
                scaled_SI = hidden_SI * weight_SE[:, [i, j]].sum(1, keepdim=True) * root_S1
                rest_SH = target_SH - scaled_SI @ torch.linalg.lstsq(scaled_SI, target_SH).solution
                left.append(0.5 * float((rest_SH @ metric_HH * rest_SH).sum()))
            assert float(damage_EE[i, j]) == pytest.approx(min(left), rel=1e-3)
    assert torch.equal(damage_EE, damage_EE.T)


def test_copies_cost_nothing_to_merge():
    experts, sample = random_block()
    order_I = torch.tensor([2, 0, 4, 1, 3])
    for name, axis in (("up", 0), ("gate", 0), ("down", 1)):
        values = getattr(experts, name)
        values[3] = values[1].index_select(axis, order_I)
    damage_EE = pair_damages(experts, sample)
    others = [float(damage_EE[i, j]) for i in range(EXPERTS) for j in range(i) if (i, j) != (3, 1)]
    assert float(damage_EE[3, 1]) <= 1e-6 * min(others)


def test_mean_outputs_are_those_over_all_tokens():
    experts, sample = random_block()
    expected_EH = torch.stack([outputs_of(experts, e, sample.input_SH).mean(0) for e in range(EXPERTS)]).double()
    torch.testing.assert_close(mean_outputs(experts, sample), expected_EH, rtol=1e-5, atol=1e-6)
    similarity_EE = distance_similarity(expected_EH)
    assert float(similarity_EE[0, 2]) == pytest.approx(-float((expected_EH[0] - expected_EH[2]).norm()))
