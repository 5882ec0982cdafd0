"""Leading singular directions against a whole decomposition."""

import pytest
import torch

from optimum_moe.algorithms.leading import leading_rows


@pytest.mark.parametrize("shape", [(300, 200), (150, 400), (20, 30)])
def test_directions_of_a_decaying_spectrum_are_those_of_the_decomposition(shape):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for size in shape)
    size = min(shape)
    matrix_OX = left[:, :size] * (0.7 ** torch.arange(size).double()) @ right[:size]
    found_RX = leading_rows(matrix_OX, 8)
    torch.testing.assert_close(found_RX @ found_RX.T, torch.eye(8).double())
    torch.testing.assert_close((found_RX @ right[:8].T).abs(), torch.eye(8).double(), rtol=0, atol=1e-6)
    assert torch.equal(found_RX, leading_rows(matrix_OX, 8))


def test_a_flat_spectrum_loses_little_of_what_the_best_directions_hold():
    matrix_OX = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    best = float(torch.linalg.svdvals(matrix_OX)[:16].square().sum())
    held = float((matrix_OX @ leading_rows(matrix_OX, 16).T).square().sum())
    assert 0.93 * best < held <= best * (1 + 1e-5)


def test_no_more_directions_than_the_smaller_side():
    assert leading_rows(torch.randn(3, 9, generator=torch.Generator().manual_seed(0)), 5).shape == (3, 9)
