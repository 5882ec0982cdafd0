"""Elimination of neurons with refit, against its definition."""

import pytest
import torch

from optimum_moe.algorithms import neurons
from optimum_moe.algorithms.neurons import (
    damped,
    elimination,
    gram,
    is_finite,
    refitted,
    root,
    taken_over,
    times_triangular,
)

HIDDEN, INNER = 6, 10


def problem(seed=0, tokens=50):
    generator = torch.Generator().manual_seed(seed)
    hidden_PI = torch.randn(tokens, INNER, generator=generator, dtype=torch.float64)
    down_HI = torch.randn(HIDDEN, INNER, generator=generator, dtype=torch.float64)
    root_HH = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden_PI.T @ hidden_PI, down_HI, root_HH @ root_HH.T


def narrowed(down_HI, gram_II, kept_N, damping=neurons.DAMPING):
    """(H, N) what the kept neurons are mapped to, to do what all of them did."""
    dropped_D = torch.tensor([neuron for neuron in range(len(gram_II)) if neuron not in kept_N.tolist()])
    order_I = torch.cat([kept_N, dropped_D])
    taken_DN = taken_over(root(gram_II[order_I][:, order_I], damping), len(kept_N))
    return down_HI[:, kept_N] + down_HI[:, dropped_D] @ taken_DN


def cost(gram_II, down_HI, metric_HH, kept):
    change_HI = -down_HI.clone()
    change_HI[:, kept] += narrowed(down_HI, gram_II, torch.tensor(kept), damping=0.0)
    return float(torch.trace(metric_HH @ change_HI @ gram_II @ change_HI.T))


@pytest.fixture(params=[3, 32], autouse=True)
def block(request, monkeypatch):
    """So many neurons go between two updates; the answer does not depend on it."""
    monkeypatch.setattr(neurons, "_BLOCK", request.param)


@pytest.mark.parametrize("seed", range(3))
def test_each_step_is_the_cheapest_after_a_refit(seed):
    gram_II, down_HI, metric_HH = problem(seed)
    found = elimination(gram_II, down_HI.T @ metric_HH @ down_HI, damping=0.0)
    order_I, damage_I = found.order_D, found.damage_K
    assert sorted(order_I.tolist()) == list(range(INNER))
    kept = list(range(INNER))
    for step, neuron in enumerate(order_I.tolist()[:-1]):
        costs = {j: cost(gram_II, down_HI, metric_HH, [k for k in kept if k != j]) for j in kept}
        assert min(costs, key=costs.get) == neuron
        assert float(damage_I[step + 1]) == pytest.approx(costs[neuron], rel=1e-6)
        kept.remove(neuron)
    total = float(torch.trace(metric_HH @ down_HI @ gram_II @ down_HI.T))
    assert float(damage_I[-1]) == pytest.approx(total, rel=1e-6)


def test_fewer_steps_are_the_first_ones():
    gram_II, down_HI, metric_HH = problem()
    found = elimination(gram_II, down_HI.T @ metric_HH @ down_HI)
    order_I, damage_I = found.order_D, found.damage_K
    for drop in range(INNER + 1):
        fewer = elimination(gram_II, down_HI.T @ metric_HH @ down_HI, drop=drop)
        assert torch.equal(fewer.order_D, order_I[:drop])
        assert torch.equal(fewer.damage_K, damage_I[: drop + 1])
        assert torch.equal(fewer.root_DI, found.root_DI[:drop])


def test_what_goes_leaves_the_root_of_the_inverse_gram():
    gram_II, down_HI, metric_HH = problem()
    found = elimination(gram_II, down_HI.T @ metric_HH @ down_HI)
    inverse_II = torch.linalg.inv(damped(gram_II))
    torch.testing.assert_close(found.root_DI.T @ found.root_DI, inverse_II, rtol=1e-8, atol=1e-10)
    # A neuron that has gone takes no part in those after it.
    later_II = found.root_DI[:, found.order_D].tril(-1)
    assert float(later_II.abs().max()) < 1e-9 * float(found.root_DI.abs().max())


def test_a_copy_of_a_neuron_goes_for_nothing():
    gram_II, down_HI, metric_HH = problem()
    copy = torch.eye(INNER, dtype=torch.float64)
    copy[3] = copy[7]
    found = elimination(copy @ gram_II @ copy.T, down_HI.T @ metric_HH @ down_HI, damping=1e-9)
    order_I, damage_I = found.order_D, found.damage_K
    assert order_I[0].item() in (3, 7)
    assert float(damage_I[1]) < 1e-6 * float(damage_I[-1])


def test_singular_grams_give_finite_numbers():
    gram_II, down_HI, metric_HH = problem(tokens=2)
    found = elimination(gram_II, down_HI.T @ metric_HH @ down_HI)
    order_I, damage_I = found.order_D, found.damage_K
    assert damage_I.isfinite().all()
    assert narrowed(down_HI, gram_II, order_I[-3:]).isfinite().all()
    zero_II = torch.zeros_like(gram_II)
    assert torch.equal(damped(zero_II), torch.eye(INNER, dtype=torch.float64))
    assert torch.equal(narrowed(down_HI, zero_II, torch.tensor([1, 4])), down_HI[:, [1, 4]])


def test_refit_finds_what_made_the_target_and_else_the_prior():
    gram_NN, down_HN, _ = problem()
    found_HN = refitted(down_HN @ gram_NN, gram_NN, torch.zeros_like(down_HN), damping=1e-12)
    assert torch.allclose(found_HN, down_HN, atol=1e-8)
    zero_NN = torch.zeros_like(gram_NN)
    assert torch.equal(refitted(torch.zeros_like(down_HN), zero_NN, down_HN), down_HN)


def test_nan_is_refused():
    gram_II, down_HI, _ = problem()
    gram_II[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Gram holds NaN"):
        elimination(gram_II, down_HI.T @ down_HI)
    with pytest.raises(ValueError, match=r"effect_II holds NaN"):
        elimination(torch.eye(INNER), torch.full((INNER, INNER), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_taken_over_is_a_least_squares_fit_for_every_number_of_neurons(dtype):
    gram_II, _, _ = problem()
    lower_II = root(gram_II.to(dtype))
    ridged_II = damped(gram_II.to(dtype))
    for kept in range(INNER + 1):
        expected_DN = torch.linalg.solve(ridged_II[:kept, :kept], ridged_II[kept:, :kept], left=False)
        torch.testing.assert_close(taken_over(lower_II, kept), expected_DN, rtol=0, atol=1e-12)


def test_a_gram_that_rounding_left_negative_gets_the_ridge_that_mends_it():
    gram_II = problem(tokens=3)[0] - 1e-7 * torch.eye(INNER, dtype=torch.float64)
    lower_II = root(gram_II, damping=0.0)
    torch.testing.assert_close(lower_II @ lower_II.T, gram_II, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inner", [1, 255, 256, 300, 513])
def test_a_gram_in_blocks_is_the_product_and_symmetric(inner):
    rows_PI = torch.randn(20, inner, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found_II = gram(rows_PI)
    assert torch.equal(found_II, found_II.T)
    torch.testing.assert_close(found_II, rows_PI.T @ rows_PI)


@pytest.mark.parametrize("inner", [1, 255, 256, 300, 513])
def test_products_with_half_a_matrix_are_the_products(inner):
    generator = torch.Generator().manual_seed(0)
    rows_PI = torch.randn(20, inner, generator=generator, dtype=torch.float64)
    factor_II = torch.randn(inner, inner, generator=generator, dtype=torch.float64)
    for half_II, upper in ((factor_II.tril(), False), (factor_II.triu(), True)):
        torch.testing.assert_close(times_triangular(rows_PI, half_II, upper), rows_PI @ half_II)


def test_numbers_whose_sum_overflows_are_finite():
    assert is_finite(torch.full((8,), 3e38))
    assert not is_finite(torch.tensor([1.0, torch.inf, -torch.inf]))
    assert not is_finite(torch.tensor([1.0, torch.nan]))
