"""Zeros among weights: how many there are and where, and what the weights that stay make up for."""

from __future__ import annotations

import pytest
import torch

from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.neurons import gram
from optimum_moe.algorithms.weight_pruning import (
    CRITERIA,
    Sparsity,
    by_magnitude,
    by_sparsegpt,
    by_wanda,
    inverse_root,
    pruned_expert,
)

PATTERNS = [Sparsity(0.5), Sparsity(0.3), Sparsity(0.5, 4), Sparsity(0.5, 8), Sparsity(2 / 3, 3), Sparsity(0.75, 4)]


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(tokens: int = 600, columns: int = 96, seed: int = 1) -> torch.Tensor:
    """Gaussian inputs that have much in common, with channels of unlike sizes."""
    mixed = made(tokens, 20, seed=seed) @ made(20, columns, seed=seed + 1) + 0.5 * made(tokens, columns, seed=seed + 2)
    return mixed * torch.linspace(0.2, 3, columns)


def pruned(method: str, matrix_OX: torch.Tensor, input_PX: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    if method == "magnitude":
        return by_magnitude(matrix_OX, sparsity)
    if method == "wanda":
        return by_wanda(matrix_OX, input_PX.norm(dim=0), sparsity)
    return by_sparsegpt(matrix_OX, inverse_root(gram(input_PX)), sparsity)


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("method", CRITERIA)
def test_the_number_of_zeros_is_exact(method: str, sparsity: Sparsity) -> None:
    found_OX = pruned(method, made(40, 312), inputs(columns=312), sparsity)
    zero_OX = found_OX == 0
    if sparsity.group:
        zeros = zero_OX.unflatten(1, (-1, sparsity.group)).sum(-1)
        assert set(zeros.flatten().tolist()) == {round(sparsity.zeros * sparsity.group)}
    elif method == "wanda":
        assert set(zero_OX.sum(1).tolist()) == {round(sparsity.zeros * 312)}
    else:
        assert int(zero_OX.sum()) == round(sparsity.zeros * zero_OX.numel())


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", CRITERIA)
def test_no_zeros_change_no_bit(method: str, dtype: torch.dtype, group: int) -> None:
    matrix_OX = made(24, 96, dtype=dtype)
    found_OX = pruned(method, matrix_OX, inputs(), Sparsity(0.0, group))
    assert found_OX.dtype == dtype
    assert torch.equal(found_OX, matrix_OX)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_masks_change_no_other_weight(method: str) -> None:
    matrix_OX = made(24, 96, dtype=torch.bfloat16)
    found_OX = pruned(method, matrix_OX, inputs(), Sparsity(0.5, 4))
    assert torch.equal(found_OX[found_OX != 0], matrix_OX[found_OX != 0])


def test_wanda_is_its_loop() -> None:
    matrix_OX, input_PX = made(9, 24), inputs(columns=24)
    found_OX, found_of_4_OX = (pruned("wanda", matrix_OX, input_PX, Sparsity(0.5, group)) for group in (0, 4))
    for row in range(9):
        scores = [abs(float(matrix_OX[row, j])) * float(input_PX[:, j].square().sum()) ** 0.5 for j in range(24)]
        kept = sorted(range(24), key=lambda j: scores[j])[12:]
        assert found_OX[row].nonzero()[:, 0].tolist() == sorted(kept)
        for start in range(0, 24, 4):
            kept = sorted(range(start, start + 4), key=lambda j: scores[j])[2:]
            assert (start + found_of_4_OX[row, start : start + 4].nonzero()[:, 0]).tolist() == sorted(kept)


def test_magnitude_keeps_the_largest_of_the_matrix() -> None:
    matrix_OX = made(9, 24)
    found_OX = by_magnitude(matrix_OX, Sparsity(0.75))
    assert float(found_OX[found_OX != 0].abs().min()) > float(matrix_OX[found_OX == 0].abs().max())


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
def test_updated_weights_lose_less_of_the_outputs(sparsity: Sparsity) -> None:
    matrix_OX, input_PX = made(48, 312), inputs(tokens=1000, columns=312)
    error = {
        method: float((input_PX @ (pruned(method, matrix_OX, input_PX, sparsity) - matrix_OX).T).square().sum())
        for method in CRITERIA
    }
    assert error["sparsegpt"] < 0.5 * error["wanda"] < 0.5 * error["magnitude"]


def test_one_column_is_taken_over_as_least_squares_says() -> None:
    """Where one weight of each row goes, the columns after it are refitted exactly, up to the ridge."""
    columns = 12
    matrix_OX, input_PX = made(5, columns), inputs(tokens=4000, columns=columns)
    matrix_OX[:, 0] = 1e-6
    gram_XX = gram(input_PX).double()
    ridged_XX = gram_XX + 0.01 * gram_XX.diagonal().mean() * torch.eye(columns)
    found_OX = by_sparsegpt(matrix_OX, inverse_root(gram_XX), Sparsity(1 / columns))
    assert set((found_OX == 0).sum(1).tolist()) == {1}
    assert not found_OX[:, 0].any()
    gained_OX = matrix_OX[:, :1].double() @ torch.linalg.solve(ridged_XX[1:, 1:], ridged_XX[1:, :1]).T
    torch.testing.assert_close(found_OX[:, 1:].double(), matrix_OX[:, 1:].double() + gained_OX, rtol=1e-6, atol=1e-9)


def test_inputs_that_have_nothing_in_common_leave_nothing_to_take_over() -> None:
    matrix_OX = made(24, 96)
    found_OX = by_sparsegpt(matrix_OX, inverse_root(torch.eye(96)), Sparsity(0.5))
    assert torch.equal(found_OX, by_magnitude(matrix_OX, Sparsity(0.5)))
    assert torch.equal(by_sparsegpt(matrix_OX, inverse_root(torch.zeros(96, 96)), Sparsity(0.5)), found_OX)


def expert_of(inner: int = 40, hidden: int = 24) -> Expert:
    def activate(gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate_PI) * up_PI

    return Expert(made(inner, hidden, seed=3), made(hidden, inner, seed=4), activate, made(inner, hidden, seed=5))


@pytest.mark.parametrize("method", CRITERIA)
def test_an_expert_without_tokens_is_pruned_by_magnitude(method: str) -> None:
    expert, sparsity = expert_of(), Sparsity(0.5)
    for tokens in (None, ExpertTokens(torch.zeros(0, 24), torch.zeros(0))):
        found = pruned_expert(expert, tokens, method, sparsity)
        for name in ("gate_IH", "up_IH", "down_HI"):
            assert torch.equal(getattr(found, name), by_magnitude(getattr(expert, name), sparsity))


def test_down_is_pruned_for_what_the_pruned_neurons_give() -> None:
    expert, input_PH = expert_of(), inputs(tokens=300, columns=24)
    tokens = ExpertTokens(input_PH, torch.linspace(0.1, 1, 300))
    found = pruned_expert(expert, tokens, "wanda", Sparsity(0.5))
    gate_IH, up_IH = (
        by_wanda(matrix, input_PH.norm(dim=0), Sparsity(0.5)) for matrix in (expert.gate_IH, expert.up_IH)
    )
    hidden_PI = torch.nn.functional.silu(input_PH @ gate_IH.T) * (input_PH @ up_IH.T)
    expected_HI = by_wanda(expert.down_HI, hidden_PI.norm(dim=0), Sparsity(0.5))
    assert torch.equal(found.down_HI, expected_HI)
    unknown = pruned_expert(expert, tokens, "wanda", Sparsity(0.5), knows_hidden=False)
    assert torch.equal(unknown.up_IH, found.up_IH)
    assert torch.equal(unknown.down_HI, by_magnitude(expert.down_HI, Sparsity(0.5)))
