"""The joint refit of a block's down projections, against least squares."""

import pytest
import torch
from test_byte_budget import HIDDEN, INNER, candidate, make_expert, output
from torch.testing import assert_close

from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.formats import build_expert, is_worth_refitting, refit_block
from optimum_moe.formats.stored import stored_matrix

SAMPLED, TOP_K = 400, 2
FORMS = (candidate(0), candidate(8), candidate(16, 8), candidate(INNER))


def make_block(gradient=True, bias=False):
    generator = torch.Generator().manual_seed(0)
    experts = [make_expert(seed, bias=bias) for seed in range(len(FORMS))]
    index_SK = torch.rand(SAMPLED, len(FORMS), generator=generator).topk(TOP_K, dim=1).indices
    tokens = SampledTokens(
        torch.randn(SAMPLED, HIDDEN, generator=generator),
        index_SK,
        torch.rand(SAMPLED, TOP_K, generator=generator),
        torch.randn(SAMPLED, 2, HIDDEN, generator=generator) if gradient else None,
    )
    factors = [
        build_expert(e, tokens.routed(i)[1], form) for i, (e, form) in enumerate(zip(experts, FORMS, strict=True))
    ]
    return experts, factors, tokens


def block_output(experts, factors, tokens):
    total_SH = torch.zeros(tokens.input_SH.shape)
    for index, (expert, kept) in enumerate(zip(experts, factors, strict=True)):
        token_P, seen = tokens.routed(index)
        total_SH[token_P] += seen.weight_P[:, None] * output(expert, kept, seen.input_PH)
    return total_SH


def error(experts, factors, tokens):
    whole = [build_expert(expert, tokens.routed(0)[1], candidate(INNER)) for expert in experts]
    change_SH = block_output(experts, factors, tokens) - block_output(experts, whole, tokens)
    return float((change_SH.square().sum(1) * tokens.importance()).sum())


@pytest.mark.parametrize(("gradient", "bias"), [(True, False), (False, False), (True, True)])
def test_sweeps_reach_the_least_squares_solution(gradient, bias):
    experts, factors, tokens = make_block(gradient, bias)
    errors = [
        error(experts, refit_block(experts, factors, tokens, sweeps=sweeps, ridge=1e-9), tokens)
        for sweeps in (0, 1, 4, 100)
    ]
    assert errors[0] == pytest.approx(error(experts, factors, tokens))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1.02 * errors[3]
    numbers = {
        index: output_hidden(experts[index], factors[index], tokens.routed(index)[1].input_PH) for index in (1, 2)
    }
    assert errors[3] == pytest.approx(least_error(experts, factors, tokens, numbers), rel=1e-3)


def least_error(experts, factors, tokens, numbers):
    """Of any directions for these (P, N) numbers of some experts, beside the last expert, which stays."""
    columns = []
    for index, number_PN in numbers.items():
        token_P, seen = tokens.routed(index)
        probe = number_PN * seen.weight_P[:, None]
        columns.append(torch.zeros(SAMPLED, probe.shape[1]).index_copy_(0, token_P, probe))
    root_S1 = tokens.importance().sqrt()[:, None]
    design_SN = (torch.cat(columns, 1) * root_S1).double()
    whole = [build_expert(expert, tokens.routed(0)[1], candidate(INNER)) for expert in experts]
    target_SH = block_output(experts, whole, tokens) - block_output(experts[3:], factors[3:], shifted(tokens, 3))
    target_SH = (target_SH * root_S1).double()
    best = target_SH - design_SN @ torch.linalg.lstsq(design_SN, target_SH).solution
    return float(best.square().sum())


def output_hidden(expert, factors, input_PH):
    identity = torch.eye(factors.width)
    hidden = type(factors)(up=factors.up, down=stored_matrix(identity), gate=factors.gate)
    neurons = factors.neurons
    return output(expert if neurons is None else expert.narrowed(neurons), hidden, input_PH)


def shifted(tokens, by):
    return SampledTokens(tokens.input_SH, tokens.index_SK - by, tokens.weights_SK, tokens.gradient_SJH)


def test_a_ridge_helps_on_other_tokens_where_tokens_are_few():
    experts, factors, tokens = make_block()
    few = SampledTokens(*(value[:40] for value in (tokens.input_SH, tokens.index_SK, tokens.weights_SK)))
    others = SampledTokens(*(value[40:] for value in (tokens.input_SH, tokens.index_SK, tokens.weights_SK)))
    lost = {ridge: error(experts, refit_block(experts, factors, few, ridge=ridge), others) for ridge in (None, 1e-9)}
    assert lost[None] < 0.8 * lost[1e-9]


def test_untouched_and_empty_experts_and_all_sizes_stay():
    experts, factors, tokens = make_block()
    refitted = refit_block(experts, factors, tokens)
    assert refitted[0] is factors[0]
    assert refitted[3] is factors[3]
    assert [kept.numbers for kept in refitted] == [kept.numbers for kept in factors]
    assert refitted[2].wants_joint
    assert torch.equal(refitted[1].neurons, factors[1].neurons)


def test_maps_are_refitted_with_the_down_projections():
    experts, _, tokens = make_block()
    forms = (Candidate("affine", 0, 4), candidate(8), Candidate("affine", 0, 2), Candidate("constant", 0, 1))
    stored = [
        build_expert(e, tokens.routed(i)[1], form) for i, (e, form) in enumerate(zip(experts, forms, strict=True))
    ]
    refitted = refit_block(experts, stored, tokens, sweeps=100, ridge=1e-9)
    assert refitted[3] is stored[3]
    numbers = {}
    for index in (0, 1, 2):
        input_PH = tokens.routed(index)[1].input_PH
        numbers[index], direction_HN = stored[index].terms(experts[index], input_PH)
        assert_close(numbers[index] @ direction_HN.T, stored[index].run(experts[index], input_PH))
        for name, value in {} if refitted[index].instead is None else stored[index].instead.tensors.items():
            assert torch.equal(refitted[index].instead.tensors[name], value) is (name == "affine_v")
    least = least_error(experts, stored, tokens, numbers)
    assert error(experts, refitted, tokens) == pytest.approx(least, rel=1e-3)


def test_slots_that_do_not_count():
    experts, factors, tokens = make_block()
    index_SK = torch.cat([tokens.index_SK, torch.full((SAMPLED, 1), len(FORMS)), tokens.index_SK[:, :1]], 1)
    weights_SK = torch.cat([tokens.weights_SK, torch.ones(SAMPLED, 1), torch.zeros(SAMPLED, 1)], 1)
    padded = SampledTokens(tokens.input_SH, index_SK, weights_SK, tokens.gradient_SJH)
    for one, other in zip(refit_block(experts, factors, tokens), refit_block(experts, factors, padded), strict=True):
        assert torch.equal(one.down.densified(), other.down.densified())


def test_an_expert_without_tokens_stays():
    experts, factors, tokens = make_block()
    unseen = SampledTokens(tokens.input_SH, torch.full_like(tokens.index_SK, 3), tokens.weights_SK)
    assert refit_block(experts, factors, unseen) == factors


def test_refused():
    experts, factors, tokens = make_block()
    with pytest.raises(ValueError, match=r"Got 4 experts and 3 stored ones"):
        refit_block(experts, factors[1:], tokens)
    with pytest.raises(ValueError, match=r"Pass \(S, H\)"):
        SampledTokens(tokens.input_SH, tokens.index_SK[1:], tokens.weights_SK)
    tokens.input_SH[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN"):
        refit_block(experts, factors, tokens)


def test_a_refit_is_worth_it_where_it_helps_on_tokens_that_it_has_not_seen():
    experts, _, tokens = make_block()
    whole = [build_expert(expert, tokens.routed(e)[1], candidate(INNER)) for e, expert in enumerate(experts)]
    output_SH = block_output(experts, whole, tokens)
    noise_SH = torch.randn(output_SH.shape, generator=torch.Generator().manual_seed(1))
    # Smaller outputs come from smaller down projections; noise cannot be learned from other tokens.
    assert is_worth_refitting(experts, whole, tokens, 0.5 * output_SH)
    assert not is_worth_refitting(experts, whole, tokens, output_SH + noise_SH)
