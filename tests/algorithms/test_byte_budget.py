"""The byte budget: convex curves, exact allocation, and candidates that are built as their points say."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from optimum_moe.algorithms.byte_budget import Candidate, Point, allocate, frontier, hull
from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.expert_fitter import ExpertFitter, HeldOutEstimate
from optimum_moe.formats import budget_formats, build_expert, candidates, choose
from optimum_moe.formats.budget import worth_trying

HIDDEN, INNER, TOKENS = 24, 32, 200


def swiglu(gate_PI, up_PI):
    return torch.nn.functional.silu(gate_PI) * up_PI


def relu_squared(gate_PI, up_PI):
    assert gate_PI is None
    return up_PI.relu().square()


def make_expert(seed=0, gated=True, bias=False, inner=INNER, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype) / shape[-1] ** 0.5

    return Expert(
        draw(inner, HIDDEN),
        draw(HIDDEN, inner),
        swiglu if gated else relu_squared,
        draw(inner, HIDDEN) if gated else None,
        draw(inner) if bias else None,
        draw(inner) if bias and gated else None,
    )


def make_tokens(seed=0, tokens=TOKENS, draws=1, gradient=True):
    generator = torch.Generator().manual_seed(100 + seed)
    gradient_JPH = torch.randn(draws, tokens, HIDDEN, generator=generator) * torch.linspace(0.1, 1, HIDDEN)
    return ExpertTokens(
        torch.randn(tokens, HIDDEN, generator=generator),
        torch.rand(tokens, generator=generator),
        gradient_JPH if gradient else None,
    )


def output(expert, factors, input_PH):
    """What the module that the factors stand for computes."""
    if factors.instead is not None:
        parts = factors.instead.tensors
        if "approx_value" in parts:
            return parts["approx_value"].expand(len(input_PH), -1)
        return input_PH @ parts["affine_v"].T @ parts["affine_u"] + parts["affine_offset"]
    linear = torch.nn.functional.linear
    kept = slice(None) if factors.neurons is None else factors.neurons
    up_bias = None if expert.up_bias_I is None else expert.up_bias_I[kept]
    gate_bias = None if expert.gate_bias_I is None else expert.gate_bias_I[kept]
    gate_PN = None if factors.gate is None else linear(input_PH, factors.gate.densified(), gate_bias)
    hidden_PN = expert.activate(gate_PN, linear(input_PH, factors.up.densified(), up_bias))
    return linear(hidden_PN, factors.down.densified())


def measured(expert, tokens, factors):
    """1/2 sum q d^T B d of the output's change, from the definition."""
    change_PH = (output(expert, factors, tokens.input_PH) - output(expert, whole(expert), tokens.input_PH)).double()
    gradient_JPH = tokens.gradient_JPH
    if gradient_JPH is None:
        return 0.5 * float((change_PH * tokens.weight_P[:, None]).square().sum())
    c_JPH = (gradient_JPH.reshape(-1, *tokens.input_PH.shape) * tokens.weight_P[:, None]).double()
    q_P = c_JPH.square().sum(-1).mean(0)
    b_HH = torch.einsum("jph,jpi->hi", c_JPH, c_JPH) / c_JPH.square().sum()
    return 0.5 * float((q_P * torch.einsum("ph,hi,pi->p", change_PH, b_HH, change_PH)).sum())


def candidate(neurons, rank=None, inner=INNER):
    if rank is not None:
        return Candidate("low_rank", neurons, rank)
    return Candidate({0: "empty", inner: "dense"}.get(neurons, "narrow"), neurons)


def curve(expert, tokens):
    """With bytes that are numbers."""
    return hull(candidates(expert, tokens, itemsize=1))


def whole(expert):
    return build_expert(expert, make_tokens(), candidate(expert.inner, inner=expert.inner))


def is_convex(points):
    slopes = [(a.damage - b.damage) / (b.bytes - a.bytes) for a, b in itertools.pairwise(points)]
    return all(a > b or a == b == 0 for a, b in itertools.pairwise(slopes)) and all(s >= 0 for s in slopes)


def counted_on(damage, point, points):
    """Of what a constant gains over an empty expert half is counted on, of what an affine map gains four fifths."""
    certain = {"constant": 0.5, "affine": 0.8}.get(point.candidate.format, 1.0)
    return points[0].damage - certain * (points[0].damage - damage)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("inner", [HIDDEN - 8, INNER])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, False), (False, True)])
def test_points_are_what_build_makes_of_them(gated, bias, inner, gradient):
    expert, tokens = make_expert(gated=gated, bias=bias, inner=inner), make_tokens(draws=2, gradient=gradient)
    points = curve(expert, tokens)
    biases = (2 if gated else 1) if bias else 0
    dense_numbers = ((3 if gated else 2) * HIDDEN + biases) * inner
    assert (points[0].bytes, points[0].candidate) == (0, candidate(0))
    assert (points[-1].bytes, points[-1].damage) == (dense_numbers, 0.0)
    assert points[-1].candidate == Candidate("dense", inner)
    assert is_convex(points)
    assert len(points) >= (5 if inner == INNER else 3)
    fitted, held = tokens.halves()
    for point in points:
        factors = build_expert(expert, fitted, pickle.loads(pickle.dumps(point)).candidate)
        assert factors.numbers == factors.bytes(1)
        instead = 0 if factors.instead is None else sum(t.numel() for t in factors.instead.tensors.values())
        assert factors.numbers + biases * factors.width + instead == point.bytes
        lost_held, lost_seen = measured(expert, held, factors), measured(expert, fitted, factors)
        expected = TOKENS * (0.75 * lost_held / len(held) + 0.25 * lost_seen / len(fitted))
        expected = counted_on(expected, point, points)
        assert expected == pytest.approx(point.damage, rel=1e-3, abs=1e-5 * points[0].damage)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("inner", [HIDDEN - 8, INNER])
def test_the_damage_of_outputs_is_that_of_the_candidate_that_gives_them(inner, gradient):
    expert, tokens = make_expert(inner=inner, bias=True), make_tokens(draws=2, gradient=gradient)
    fitted, held_out = tokens.halves()
    estimate = HeldOutEstimate(ExpertFitter(expert, fitted), held_out, TOKENS)
    points = candidates(expert, tokens)
    for point in points:
        stored = build_expert(expert, fitted, point.candidate)
        damage = estimate.of_outputs(lambda input_PH, stored=stored: stored.run(expert, input_PH))
        damage = counted_on(damage, point, points)
        assert damage == pytest.approx(point.damage, rel=1e-3, abs=1e-5 * points[0].damage)


@pytest.mark.parametrize("tokens", [128, 512])
def test_curves_tell_what_forms_lose_on_other_tokens(tokens):
    # Few tokens for 32 neurons: what a form loses on its own tokens is far less.
    told = own = other = 0.0
    for seed in range(8):
        expert, seen, fresh = make_expert(seed), make_tokens(seed, tokens), make_tokens(50 + seed, 4096)
        for point in curve(expert, seen)[1:-1]:
            factors = build_expert(expert, seen, point.candidate)
            told += point.damage / tokens
            own += measured(expert, seen, factors) / tokens
            other += measured(expert, fresh, factors) / len(fresh)
    assert abs(told / other - 1) < 0.5 * abs(own / other - 1)


def test_halves_have_every_token_once():
    tokens = make_tokens(tokens=5, draws=2)
    first, second = tokens.halves()
    assert torch.equal(first.input_PH, tokens.input_PH[[0, 2, 4]])
    assert torch.equal(second.gradient_JPH, tokens.gradient_JPH[:, [1, 3]])
    assert torch.equal(second.weight_P, tokens.weight_P[[1, 3]])
    (single, same) = make_tokens(tokens=1).halves()
    assert single is same


def test_ranks_share_the_right_factor():
    expert, tokens = make_expert(), make_tokens()
    factors = build_expert(expert, tokens, candidate(16, 8))
    assert factors.wants_joint
    assert factors.gate.sizes == factors.up.sizes == {"low_rank": 8}
    assert factors.width == len(factors.neurons) == 16
    assert factors.numbers == 8 * (2 * 16 + HIDDEN) + 16 * HIDDEN
    assert not whole(expert).wants_joint


def test_one_neuron_and_one_token_is_the_second_order_change():
    expert, tokens = make_expert(inner=1), make_tokens(tokens=1)
    points = curve(expert, tokens)
    change_H = -tokens.weight_P[0] * output(expert, whole(expert), tokens.input_PH)[0]
    assert points[0].damage == pytest.approx(0.5 * float(tokens.gradient_JPH[0, 0] @ change_H) ** 2, rel=1e-5)


def test_whole_budget_changes_nothing():
    experts = [make_expert(seed, dtype=torch.bfloat16) for seed in range(3)]
    tokens = [make_tokens(0), make_tokens(1, tokens=0), make_tokens(2, tokens=3)]
    curves = [curve(expert, seen) for expert, seen in zip(experts, tokens, strict=True)]
    chosen = allocate(curves, 3 * 3 * HIDDEN * INNER)
    for expert, seen, point in zip(experts, tokens, chosen, strict=True):
        factors = build_expert(expert, seen, point.candidate)
        assert factors.neurons is None
        for name, original in (("gate", expert.gate_IH), ("up", expert.up_IH), ("down", expert.down_HI)):
            assert torch.equal(factors.matrices[name].densified(), original)


@pytest.mark.parametrize("numbers", [0, 1, 999, 2500, 5000, 6911, 6912, 10**6])
def test_allocate_stays_within_the_budget_and_wastes_less_than_a_step(numbers):
    curves = [curve(make_expert(seed), make_tokens(seed)) for seed in range(3)]
    chosen = allocate(curves, numbers)
    left = numbers - sum(point.bytes for point in chosen)
    assert left >= 0
    for points, point in zip(curves, chosen, strict=True):
        at = points.index(point)
        assert at + 1 == len(points) or points[at + 1].bytes - point.bytes > left


@pytest.mark.parametrize("seed", range(20))
def test_allocate_is_the_best_there_is_where_steps_are_alike(seed):
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for _ in range(4):
        gains = torch.rand(3, generator=generator).sort(descending=True).values.tolist()
        curves.append(hull([Point(8 * k, sum(gains[k:]), candidate(8 * k)) for k in range(4)]))
    for numbers in range(0, 97, 8):
        best = min(
            sum(point.damage for point in chosen)
            for chosen in itertools.product(*curves)
            if sum(point.bytes for point in chosen) <= numbers
        )
        assert sum(point.damage for point in allocate(curves, numbers)) == pytest.approx(best, abs=1e-9)


def test_a_step_that_does_not_fit_leaves_room_for_smaller_ones():
    large = [Point(0, 10.0, candidate(0)), Point(100, 0.0, candidate(8))]
    small = [Point(0, 1.0, candidate(0)), Point(60, 0.0, candidate(8))]
    assert [point.bytes for point in allocate([large, small], 99)] == [0, 60]
    assert [point.bytes for point in allocate([large, small], 100)] == [100, 0]


def test_candidates_of_one_kind_are_those_that_the_other_does_not_need():
    expert, tokens = make_expert(), make_tokens()
    points = candidates(expert, tokens, itemsize=1)
    assert [point.bytes for point in points] == sorted(point.bytes for point in points)
    for kind in budget_formats():
        alone = candidates(expert, tokens, formats=[kind], itemsize=1)
        assert set(alone) <= set(points)
        (chosen,), (best,) = choose([alone], 1200), allocate([hull(alone)], 1200)
        assert chosen == best


@pytest.mark.parametrize("gain", [0.01, 0.02])
def test_a_mixture_has_to_save_more_than_a_little(gain):
    def points(rank_damage):
        return [
            Point(0, 100.0, candidate(0)),
            Point(50, rank_damage, candidate(16, 8)),
            Point(50, 10.0, candidate(8)),
            Point(100, 0.0, candidate(16, inner=16)),
        ]

    # One expert where ranks are far worse, one where they are a little better.
    offered = [points(50.0), points(10.0 - 20.0 * gain)]
    second = choose(offered, 100)[1]
    assert second.candidate == (candidate(8) if gain < 0.0125 else candidate(16, 8))
    assert [point.candidate for point in choose(offered, 200)] == [candidate(16, inner=16)] * 2


def test_order_of_experts_does_not_matter():
    experts = [(make_expert(seed), make_tokens(seed)) for seed in range(5)]
    curves = [curve(*pair) for pair in experts]
    order = [3, 0, 4, 2, 1]
    chosen, permuted = allocate(curves, 4000), allocate([curves[index] for index in order], 4000)
    assert permuted == [chosen[index] for index in order]


def test_order_of_neurons_does_not_matter():
    expert, tokens = make_expert(), make_tokens()
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(5))
    mixed = Expert(expert.up_IH[order], expert.down_HI[:, order], swiglu, expert.gate_IH[order])
    for point, other in zip(curve(expert, tokens), curve(mixed, tokens), strict=True):
        assert other.candidate == point.candidate
        assert other.damage == pytest.approx(point.damage, rel=1e-3, abs=1e-4)


def test_an_expert_without_tokens_goes_first_and_comes_back_last():
    unseen = curve(make_expert(), make_tokens(tokens=0))
    assert [(point.bytes, point.damage) for point in unseen] == [(0, 0.0), (3 * HIDDEN * INNER, 0.0)]
    seen = curve(make_expert(1), make_tokens(1))
    chosen = allocate([unseen, seen], seen[-1].bytes)
    assert chosen == [unseen[0], seen[-1]]
    empty = build_expert(make_expert(), make_tokens(tokens=0), candidate(0))
    assert empty.numbers == empty.width == 0


def test_zero_gradients_cost_nothing_and_give_no_nan():
    tokens = make_tokens()
    tokens = ExpertTokens(tokens.input_PH, tokens.weight_P, torch.zeros(TOKENS, HIDDEN))
    points = curve(make_expert(), tokens)
    assert {point.damage for point in points} == {0.0}
    factors = build_expert(make_expert(), tokens, candidate(16, 8))
    assert all(matrix.densified().isfinite().all() for matrix in factors.matrices.values())


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_singular_grams(tokens):
    expert, seen = make_expert(), make_tokens(tokens=tokens)
    points = curve(expert, seen)
    assert is_convex(points)
    for point in points:
        factors = build_expert(expert, seen, point.candidate)
        assert all(matrix.densified().isfinite().all() for matrix in factors.matrices.values())
        if point.candidate.neurons > 0:
            # So few tokens are reproduced by a few neurons.
            assert measured(expert, seen, factors) < 1e-2 * measured(
                expert, seen, build_expert(expert, seen, candidate(0))
            )


def test_dead_neurons_are_free():
    expert, tokens = make_expert(), make_tokens()
    expert.down_HI[:, 8:] = 0
    points = curve(expert, tokens)
    assert points[-2].damage < 1e-8 * points[0].damage
    factors = build_expert(expert, tokens, candidate(8))
    assert factors.neurons.tolist() == list(range(8))
    assert torch.allclose(factors.down.densified(), expert.down_HI[:, :8], atol=1e-5)


def test_refused():
    expert, tokens = make_expert(), make_tokens()
    with pytest.raises(ValueError, match=r"must be 0 or more"):
        hull([Point(0, float("nan"), candidate(0))])
    broken = tokens.gradient_JPH.clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"gradient_JPH holds NaN"):
        curve(expert, ExpertTokens(tokens.input_PH, tokens.weight_P, broken))
    expert.up_IH[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN"):
        curve(expert, tokens)
    with pytest.raises(ValueError, match=r"Pass \(P, H\)"):
        ExpertTokens(tokens.input_PH, tokens.weight_P[1:], tokens.gradient_JPH)
    with pytest.raises(ValueError, match=r"below the least"):
        allocate([[Point(8, 0.0, candidate(8))]], 7)
    with pytest.raises(ValueError, match=r"does not fit an expert of 32 neurons"):
        build_expert(make_expert(), tokens, candidate(40))
    with pytest.raises(ValueError, match=r"without tokens can be empty or whole"):
        build_expert(make_expert(), make_tokens(tokens=0), candidate(8))


def test_other_experts_try_what_the_first_ones_cannot_do_without():
    """For experts of low rank a few ranks, with which they lose hardly more at any size; for others none."""
    whole_experts = [make_expert(seed) for seed in range(4)]
    factors = [torch.randn(2 * INNER, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    narrow = [
        Expert(made[INNER:] @ expert.up_IH[:4], expert.down_HI, swiglu, made[:INNER] @ expert.up_IH[:4])
        for expert, made in zip(whole_experts, factors, strict=True)
    ]
    tokens = [make_tokens(seed, 400) for seed in range(4)]
    points = [
        candidates(expert, seen, formats=["narrow", "low_rank"]) for expert, seen in zip(narrow, tokens, strict=True)
    ]
    tried = worth_trying(points)
    ranks = {point.candidate for own in points for point in own if point.candidate.format == "low_rank"}
    assert 0 < len(tried) < len(ranks)
    for expert, seen, own in zip(narrow, tokens, points, strict=True):
        again = candidates(expert, seen, formats=["narrow", "low_rank"], among=tried)
        expected = [point for point in own if point.candidate not in ranks - tried]
        assert [(p.candidate, p.bytes) for p in again] == [(p.candidate, p.bytes) for p in expected]
        # Factors that are cut from a decomposition of a lower rank differ by rounding errors.
        assert [p.damage for p in again] == pytest.approx([p.damage for p in expected], rel=1e-5, abs=1e-6)
    everything, few = (
        frontier([hull([p for p in own if p.candidate not in left_out]) for own in points])
        for left_out in (set(), ranks - tried)
    )
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75):
        budget = everything[0][0] + share * (everything[-1][0] - everything[0][0])
        least, more = (float(np.interp(budget, *zip(*found, strict=True))) for found in (everything, few))
        assert least <= more <= 1.02 * least
    for point_lists in ([own[:1] + own[-1:] for own in points], [[own[0]] for own in points]):
        assert worth_trying(point_lists) == frozenset()
    assert candidates(narrow[0], tokens[0], formats=["low_rank"], among=[])[1:-1] == []


def test_the_frontier_passes_through_every_allocation():
    """At the bytes of each of its points the allocation does that damage, and no choice of points does less."""
    generator = torch.Generator().manual_seed(0)
    curves = []
    for _ in range(3):
        sizes, losses = (torch.rand(5, generator=generator).sort(descending=down).values for down in (False, True))
        points = [
            Point(100 * size, loss, Candidate("narrow", 8))
            for size, loss in zip(sizes.tolist(), losses.tolist(), strict=True)
        ]
        curves.append(hull(points))
    found = frontier(curves)
    assert len(found) == 1 + sum(len(curve) - 1 for curve in curves)
    for size, damage in found:
        chosen = allocate(curves, size + 1e-9)
        assert sum(point.bytes for point in chosen) == pytest.approx(size)
        assert sum(point.damage for point in chosen) == pytest.approx(damage)
    for choice in itertools.product(*curves):
        size, damage = sum(point.bytes for point in choice), sum(point.damage for point in choice)
        best = min(lost for other, lost in found if other <= size + 1e-9)
        within = [pair for pair in found if pair[0] <= size + 1e-9]
        assert best == within[-1][1]
        if len(within) < len(found):
            (low, above), (high, below) = within[-1], found[len(within)]
            assert damage >= above + (below - above) * (size - low) / (high - low) - 1e-9
