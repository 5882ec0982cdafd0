"""Sparse rows by calibration energy and by trained importance: parity with LoSparse and exact properties."""

import math

import pytest
import torch

from optimum_moe.algorithms.factors import MatrixFactors
from optimum_moe.algorithms.low_rank import decompose
from optimum_moe.algorithms.structured_sparse import (
    CubicSchedule,
    RowImportance,
    add_rows,
    global_masks,
    residual,
    row_energy,
    rows_from_density,
)

PUBLIC_SCHEDULE = CubicSchedule(30, 3, 1, 4, 1.0, 0.25)


def test_residual_matches_losparse(parity):
    factors = MatrixFactors(u_RO=parity["losparse/svd/L"].T, v_RX=parity["losparse/svd/R"])
    assert torch.equal(residual(parity["losparse/svd/W"], factors), parity["losparse/svd/residual"])
    own = decompose(parity["losparse/svd/W"]).truncated(5)
    torch.testing.assert_close(
        residual(parity["losparse/svd/W"], own), parity["losparse/svd/residual"], rtol=0, atol=1e-6
    )


def test_schedule_matches_losparse(parity):
    for step, (ratio, masked) in enumerate(parity["losparse/schedule"].tolist()):
        assert PUBLIC_SCHEDULE.at(step) == (pytest.approx(ratio, rel=1e-12), bool(masked))


def test_pruning_matches_losparse(parity):
    rows = {name: parity[f"losparse/prune/{name}/S0"].clone() for name in "ab"}
    state = {name: RowImportance.start(rows[name]) for name in "ab"}
    for step in range(30):
        ratio, masked = PUBLIC_SCHEDULE.at(step)
        for name in "ab":
            state[name] = state[name].advanced(rows[name], parity[f"losparse/prune/{name}/grads"][step])
        if masked:
            masks, threshold = global_masks([state[name].average for name in "ab"], [24, 40], ratio)
            assert threshold == pytest.approx(float(parity["losparse/prune/thresholds"][step, 1]), rel=1e-6)
            for name, mask in zip("ab", masks, strict=True):
                rows[name][~mask] = 0
        for name in "ab":
            assert torch.equal(rows[name], parity[f"losparse/prune/{name}/S_hist"][step]), (step, name)
    # 480 of 1920 numbers are a quarter; the row at the threshold stays.
    assert [int(rows[name].any(1).sum()) for name in "ab"] == [16, 3]


def test_with_the_ridge_the_energies_of_all_rows_are_the_dropped_energy():
    """Also where the low rank reproduces every token, so that the tokens alone tell no row from another."""
    matrix_OX, rows_PX = torch.randn(12, 20).double(), torch.randn(3, 20).double()
    spectrum = decompose(matrix_OX, input_rows_PX=rows_PX)
    left_OX = residual(matrix_OX, spectrum.truncated(4))
    energy_O = row_energy(left_OX, input_rows_PX=rows_PX, ridge=spectrum.input_ridge)
    assert float(energy_O.sum()) == pytest.approx(spectrum.dropped_energy(4), rel=1e-9)
    alone_O = row_energy(left_OX, input_rows_PX=rows_PX)
    assert float(alone_O.sum()) < 1e-3 * float(energy_O.sum())


@pytest.mark.parametrize("tokens", [5, 60])
def test_energy_is_the_output_of_each_row(tokens):
    residual_OX, rows_PX = torch.randn(12, 20), torch.randn(tokens, 20).double()
    expected_O = (rows_PX @ residual_OX.double().T).square().sum(0)
    torch.testing.assert_close(row_energy(residual_OX, input_rows_PX=rows_PX), expected_O)
    torch.testing.assert_close(row_energy(residual_OX, rows_PX.T @ rows_PX), expected_O)
    torch.testing.assert_close(row_energy(residual_OX), residual_OX.double().square().sum(1))
    gram_OO = torch.diag(torch.arange(12.0))
    torch.testing.assert_close(
        row_energy(residual_OX, input_rows_PX=rows_PX, output_gram_OO=gram_OO), expected_O * torch.arange(12)
    )


def test_the_rows_of_most_energy_are_kept_and_remove_exactly_that():
    matrix_OX, rows_PX = torch.randn(16, 24).double(), torch.randn(100, 24).double()
    factors = decompose(matrix_OX, input_rows_PX=rows_PX).truncated(4)
    energy_O = row_energy(residual(matrix_OX, factors), input_rows_PX=rows_PX)
    for num_rows in (0, 3, 16):
        sparse = add_rows(matrix_OX, factors, energy_O, num_rows)
        assert (sparse.num_rows, sparse.numbers) == (num_rows, 4 * 40 + num_rows * 25)
        assert sparse.row_index_M.tolist() == sorted(energy_O.argsort(descending=True)[:num_rows].tolist())
        left = (rows_PX @ (matrix_OX - sparse.densified()).T).square().sum()
        assert float(left) == pytest.approx(float(energy_O.sort().values[: 16 - num_rows].sum()), rel=1e-9, abs=1e-20)


def test_density_one_reproduces_the_matrix():
    for dtype, tolerance in ((torch.float32, 5e-7), (torch.bfloat16, 2e-2)):
        matrix_OX = torch.randn(16, 24).to(dtype)
        factors = decompose(matrix_OX).truncated(8)
        full = add_rows(matrix_OX, factors, row_energy(residual(matrix_OX, factors)), rows_from_density(16, 1.0))
        assert full.rows_MX.dtype == dtype
        torch.testing.assert_close(full.densified(), matrix_OX, rtol=0, atol=tolerance)


def test_a_density_keeps_a_row_at_least():
    assert [rows_from_density(32, density) for density in (1 / 32, 0.1, 0.29, 1.0)] == [1, 3, 9, 32]
    with pytest.raises(ValueError, match=r"density=0.01 of 32 rows keeps 0.*Use 0.031 or more, or None"):
        rows_from_density(32, 0.01)
    for density in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match=f"density={density} of 32 rows"):
            rows_from_density(32, density)


def test_wrong_input_is_named():
    matrix_OX = torch.randn(4, 6)
    factors = decompose(matrix_OX).truncated(2)
    with pytest.raises(ValueError, match="Pass one"):
        row_energy(matrix_OX, torch.eye(6), torch.ones(3, 6))
    with pytest.raises(ValueError, match="energy of 4 of 4 rows is not finite"):
        row_energy(matrix_OX, torch.full((6, 6), torch.nan))
    with pytest.raises(ValueError, match=r"num_rows=5 must be in 0\.\.4"):
        add_rows(matrix_OX, factors, torch.ones(4), 5)
    with pytest.raises(ValueError, match="no rows yet"):
        add_rows(matrix_OX, add_rows(matrix_OX, factors, torch.ones(4), 1), torch.ones(4), 1)


def test_schedule_bounds():
    schedule = CubicSchedule(10, 0, final_ratio=0.1)
    assert schedule.at(0) == (1.0, False)
    assert schedule.at(5) == (pytest.approx(0.1 + 0.9 / 8), True)
    assert schedule.at(10) == (pytest.approx(0.1), True)
    with pytest.raises(ValueError, match=r"total_steps=30 the warm-ups \(1 \+ 4\) x warmup_steps=6 leave 0 steps"):
        CubicSchedule(30, 6)
    for final in (0.0, 1.2):
        with pytest.raises(ValueError, match=f"falls from 1.0 to {final}"):
            CubicSchedule(30, 1, final_ratio=final)


def test_importance_lags_one_step_and_keeps_one_number_a_row():
    rows = torch.tensor([[[1.0, -2.0], [0.5, 0.0]]])
    gradient = torch.tensor([[[4.0, 1.0], [2.0, 9.0]]])
    first = RowImportance.start(rows).advanced(rows, gradient)
    assert first.average.tolist() == [[0.0, 0.0]]
    assert first.latest.tolist() == [[3.0, 0.5]]
    second = first.advanced(rows, None)
    torch.testing.assert_close(second.average, torch.tensor([[0.45, 0.075]]))
    assert second.latest.tolist() == [[0.0, 0.0]]


def test_one_threshold_over_matrices_of_different_widths():
    # 4 rows of 10 numbers and 2 x 2 rows of 5: 60 numbers, of which 30 stay.
    importances = [torch.tensor([0.1, 0.9, 0.2, 0.8]), torch.tensor([[0.3, 0.7], [0.05, 0.6]])]
    masks, threshold = global_masks(importances, [10, 5], 0.5)
    assert [mask.tolist() for mask in masks] == [[False, True, False, True], [[True, True], [False, True]]]
    # 5 + 10 + 10 numbers lie below 0.3, whose row holds the thirtieth.
    assert threshold == pytest.approx(0.3)
    masks, threshold = global_masks(importances, [10, 5], 1.0)
    assert all(bool(mask.all()) for mask in masks)
    assert math.isinf(threshold)


def test_numbers_that_are_gone_already_count_as_gone():
    importances = [torch.tensor([0.4, 0.3, 0.2, 0.1])]
    assert global_masks(importances, [10], 0.5, absent=20)[0][0].tolist() == [True, True, True, True]
    assert global_masks(importances, [10], 0.4, absent=20)[0][0].tolist() == [True, True, True, False]


def test_a_tie_keeps_no_more_than_the_ratio():
    masks, threshold = global_masks([torch.zeros(8), torch.zeros(8)], [4, 4], 0.25)
    assert [int(mask.sum()) for mask in masks] == [5, 0]
    assert threshold == 0.0
