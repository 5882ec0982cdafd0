"""Whole numbers of few bits: how they lie, that they are their own rounding, and what fitting them to inputs gains."""

import pytest
import torch

from optimum_moe.algorithms import rounding


def made(outputs=24, columns=96, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, columns, generator=generator).to(dtype)


def rounded(matrix_OX, bits, group, dtype=torch.float32, gram_XX=None):
    scale_OG = rounding.group_scales(matrix_OX.float(), bits, group, dtype)
    if gram_XX is None:
        number_OX = rounding.nearest(matrix_OX, scale_OG, bits, group)
    else:
        number_OX = rounding.fitted(matrix_OX, scale_OG, bits, group, gram_XX)
    return number_OX * rounding.by_column(scale_OG, matrix_OX.shape[1], group).float()


def test_the_first_number_has_the_lowest_bits():
    words = rounding.packed(torch.tensor([[-8, -7, 0, 7, 1, 2, 3, 7], [7] * 8]), 4)
    assert words.dtype == torch.int32
    assert words.tolist() == [[0xFBA9F810 - 2**32], [-1]]
    assert rounding.packed(torch.tensor([[-128, 127, 0, 1]]), 8).tolist() == [[0x8180FF00 - 2**32]]


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_come_back(bits):
    number_OX = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounding.unpacked(rounding.packed(number_OX, bits), bits), number_OX)


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 128)])
def test_a_rounded_matrix_is_its_own_rounding(bits, group):
    once = rounded(made(columns=200), bits, group, torch.bfloat16)
    assert torch.equal(rounded(once, bits, group, torch.bfloat16), once)
    assert not rounded(torch.zeros(3, 64), bits, group, torch.bfloat16).any()


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 128)])
def test_no_scale_of_the_largest_weight_is_better(bits, group):
    matrix_OX, top = made(columns=128), 2 ** (bits - 1)
    error_OG = (rounded(matrix_OX, bits, group) - matrix_OX).square().unflatten(1, (-1, group)).sum(-1)
    for steps in (top - 1, top - 0.5, top):
        scale_OG = matrix_OX.unflatten(1, (-1, group)).abs().amax(-1) / steps
        plain = rounding.nearest(matrix_OX, scale_OG, bits, group) * rounding.by_column(scale_OG, 128, group)
        plain_OG = (plain - matrix_OX).square().unflatten(1, (-1, group)).sum(-1)
        assert (error_OG <= plain_OG * (1 + 1e-5)).all()


def test_fitted_numbers_lose_less_of_the_outputs():
    matrix_OX, generator = made(columns=96), torch.Generator().manual_seed(1)
    # Inputs that have much in common.
    input_PX = torch.randn(300, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    input_PX += 0.1 * torch.randn(300, 96, generator=generator)
    errors = [
        float((input_PX @ (rounded(matrix_OX, 4, 64, gram_XX=gram) - matrix_OX).T).square().sum())
        for gram in (None, input_PX.T @ input_PX)
    ]
    assert errors[1] < 0.5 * errors[0]
    # Inputs that have nothing in common leave nothing to take over.
    alike = rounded(matrix_OX, 4, 64, gram_XX=torch.eye(96))
    assert torch.equal(alike, rounded(matrix_OX, 4, 64))
    assert torch.equal(rounded(matrix_OX, 4, 64, gram_XX=torch.zeros(96, 96)), alike)
