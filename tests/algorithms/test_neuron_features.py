"""Neurons that are matched by what they compute on sampled tokens."""

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from optimum_moe.algorithms.alignment import align_experts
from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.neuron_features import TIES, activation_features

SIZE, HIDDEN = 40, 16
SHARES = [TIES, 1.0]


def silu_gated(gate_PI, up_PI):
    return torch.nn.functional.silu(gate_PI) * up_PI


def block_of(gates, ups, downs, tokens=200):
    """Experts of three or more, each token with two of them."""
    generator = torch.Generator().manual_seed(1)
    index_SK = torch.rand(tokens, len(ups), generator=generator).argsort(-1)[:, :2]
    sample = SampledTokens(
        torch.randn(tokens, HIDDEN, generator=generator), index_SK, torch.rand(tokens, 2, generator=generator)
    )
    return ExpertTensors(torch.stack(ups), torch.stack(downs), torch.stack(gates), activate=silu_gated), sample


def random_matrices(generator):
    shapes = [(SIZE, HIDDEN), (SIZE, HIDDEN), (HIDDEN, SIZE)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("share", SHARES)
def test_permuted_copies_are_aligned_back(share):
    generator = torch.Generator().manual_seed(0)
    gate, up, down = random_matrices(generator)
    orders = [torch.randperm(SIZE, generator=generator) for _ in range(3)]
    experts, sample = block_of([gate[o] for o in orders], [up[o] for o in orders], [down[:, o] for o in orders])
    labels_E = torch.zeros(3, dtype=torch.int64)
    perm_EI = align_experts(experts, labels_E, (1,), features=activation_features(experts, sample, labels_E, share))
    for order, perm_I in zip(orders, perm_EI, strict=True):
        assert torch.equal(order[perm_I], orders[1])


def test_activations_know_a_neuron_whose_weights_say_little():
    """The same neurons with up scaled and down unrelated: weights match others, activations match all."""
    generator = torch.Generator().manual_seed(0)
    gate, up, down = random_matrices(generator)
    order = torch.randperm(SIZE, generator=generator)
    scale_I1 = 0.01 + torch.rand(SIZE, 1, generator=generator)
    other = 10 * torch.randn(HIDDEN, SIZE, generator=generator)
    experts, sample = block_of([gate, gate[order]], [up, (up * scale_I1)[order]], [down, other])
    labels_E = torch.zeros(2, dtype=torch.int64)
    by_activations = align_experts(experts, labels_E, (0,), features=activation_features(experts, sample, labels_E))
    assert torch.equal(order[by_activations[1]], torch.arange(SIZE))
    by_weights = align_experts(experts, labels_E, (0,))
    assert int((order[by_weights[1]] == torch.arange(SIZE)).sum()) < SIZE // 2


def correlation(experts, sample, labels_E, pair):
    """(I, I) of the neurons of two experts, written out in float64 with NumPy's definition."""
    members = (labels_E == labels_E[pair[0]]).nonzero()[:, 0]
    reached_S = (sample.index_SK[..., None] == members).any(-1).any(-1)
    input_PH = sample.input_SH[reached_S].double()
    assert 0 < len(input_PH) < len(sample.input_SH)
    hidden = [silu_gated(input_PH @ experts.gate[e].double().T, input_PH @ experts.up[e].double().T) for e in pair]
    return torch.corrcoef(torch.cat(hidden, dim=1).T)[:SIZE, SIZE:]


def cosine(experts, pair):
    rows = [torch.cat([experts.gate[e], experts.up[e], experts.down[e].T], dim=1).double() for e in pair]
    first, second = (row / row.norm(dim=1, keepdim=True) for row in rows)
    return first @ second.T


@pytest.mark.parametrize("share", SHARES)
def test_the_assignment_is_the_best_for_the_correlation_over_the_tokens_of_the_group(share):
    generator = torch.Generator().manual_seed(0)
    matrices = [random_matrices(generator) for _ in range(4)]
    experts, sample = block_of(*zip(*matrices, strict=True))
    labels_E = torch.tensor([0, 1, 0, 2])
    perm_EI = align_experts(
        experts, labels_E, (2, 1, 3), features=activation_features(experts, sample, labels_E, share)
    )
    gain_II = correlation(experts, sample, labels_E, (2, 0))
    gain_II = gain_II + share * cosine(experts, (2, 0))
    rows, best_I = linear_sum_assignment(gain_II.numpy(), maximize=True)
    assert gain_II[rows, perm_EI[0]].sum().item() == pytest.approx(gain_II[rows, best_I].sum().item(), rel=1e-5)
    assert gain_II[rows, perm_EI[0]].sum() > 1.5 * gain_II.diagonal().sum().abs()


def test_neurons_that_no_token_activates_are_matched_by_their_weights():
    generator = torch.Generator().manual_seed(0)
    gate, up, down = random_matrices(generator)
    order = torch.randperm(SIZE, generator=generator)
    experts, sample = block_of([gate, gate[order]], [up, up[order]], [down, down[:, order]])
    silent = replace(experts, activate=lambda gate_PI, up_PI: 0 * up_PI)
    labels_E = torch.zeros(2, dtype=torch.int64)
    perm_EI = align_experts(silent, labels_E, (0,), features=activation_features(silent, sample, labels_E))
    assert torch.equal(order[perm_EI[1]], torch.arange(SIZE))


@pytest.mark.parametrize("share", SHARES)
def test_a_group_without_tokens_is_compared_on_all_and_constant_neurons_correlate_with_none(share):
    generator = torch.Generator().manual_seed(0)
    gate, up, down = random_matrices(generator)
    up[3] = 0
    order = torch.randperm(SIZE, generator=generator)
    ups = [up, up[order], up, up]
    experts, sample = block_of([gate, gate[order], gate, gate], ups, [down, down[:, order], down, down])
    sample = SampledTokens(sample.input_SH, sample.index_SK.clamp(min=2), sample.weights_SK)
    labels_E = torch.tensor([0, 0, 1, 2])
    described = activation_features(experts, sample, labels_E, share)
    activations_ID, weights_ID = described(0, 0)
    assert activations_ID.shape == (SIZE, 200)
    assert not activations_ID[3].any()
    torch.testing.assert_close(activations_ID.norm(dim=1), (torch.arange(SIZE) != 3).float())
    torch.testing.assert_close(weights_ID.norm(dim=1), torch.full((SIZE,), share**0.5))
    perm_EI = align_experts(experts, labels_E, (0, 2, 3), features=described)
    assert torch.equal(order[perm_EI[1]], torch.arange(SIZE))


@pytest.mark.parametrize("share", SHARES)
def test_experts_without_a_gate_function_say_so(share):
    up, down = torch.randn(2, SIZE, HIDDEN), torch.randn(2, HIDDEN, SIZE)
    sample = SampledTokens(torch.randn(4, HIDDEN), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    experts, labels_E = ExpertTensors(up, down), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not give their gate function"):
        align_experts(experts, labels_E, (0,), features=activation_features(experts, sample, labels_E, share))
