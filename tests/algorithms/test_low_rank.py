"""Truncated SVD, plain and whitened: parity, the closed form of the error, and what is refused."""

import pytest
import torch

from optimum_moe.algorithms.low_rank import decompose, estimated_stable_rank, singular_values, stable_rank
from optimum_moe.algorithms.ranks import rank_from_energy, rank_from_number, rank_from_ratio

SHAPES = [(24, 40), (40, 24), (24, 24)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gram(rows_PX: torch.Tensor) -> torch.Tensor:
    return rows_PX.T @ rows_PX


def damage(change_OX, rows_PX, input_ridge, gradients_PO=None, output_ridge=0.0):
    """tr((B + output ridge) dW (A + input ridge) dW^T) from the rows, without any decomposition."""
    metric_XX = gram(rows_PX) + input_ridge * torch.eye(rows_PX.shape[1], dtype=torch.float64)
    if gradients_PO is None:
        return float((change_OX @ metric_XX * change_OX).sum())
    other_OO = gram(gradients_PO) + output_ridge * torch.eye(gradients_PO.shape[1], dtype=torch.float64)
    return float(((other_OO @ change_OX @ metric_XX) * change_OX).sum())


def test_plain_svd_matches_losparse(parity):
    matrix_OX, rank = parity["losparse/svd/W"], int(parity["losparse/svd/rank"])
    spectrum = decompose(matrix_OX)
    factors = spectrum.truncated(rank)
    expected = parity["losparse/svd/L"], parity["losparse/svd/R"]
    assert (factors.shape, factors.rank, factors.numbers) == ((40, 24), 5, 5 * 64)
    torch.testing.assert_close(spectrum.singular_values.float(), parity["losparse/svd/S_singular"], rtol=0, atol=1e-6)
    torch.testing.assert_close(factors.densified(), expected[0] @ expected[1], rtol=0, atol=1e-6)
    # The sign of a singular pair is free; its norms are not. The public factors are those of a float32 SVD.
    sign_R = (factors.v_RX * expected[1]).sum(1).sign()
    torch.testing.assert_close(factors.v_RX * sign_R[:, None], expected[1], rtol=0, atol=5e-6)
    torch.testing.assert_close(factors.u_RO.T * sign_R, expected[0], rtol=0, atol=5e-6)


def test_stable_rank_matches_losparse(parity):
    assert stable_rank(parity["losparse/svd/W"]) == pytest.approx(float(parity["losparse/stable_rank/W"]), rel=1e-6)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 0.0]))) == pytest.approx(1.25)
    assert stable_rank(torch.zeros(3, 4)) == 0.0


@pytest.mark.parametrize("shape", [(3, 4), (24, 64), (200, 100)])
def test_estimated_stable_rank(shape):
    for matrix_OX in (random(*shape), random(*shape) + 3 * random(shape[0], 1) @ random(1, shape[1])):
        exact, estimated = stable_rank(matrix_OX), estimated_stable_rank(matrix_OX)
        assert exact * (1 - 1e-5) <= estimated <= 1.01 * exact
    assert estimated_stable_rank(torch.zeros(shape)) == 0.0


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_whitened_svd_matches_the_closed_form_of_d2moe(criteria, rank):
    matrix_OX, rows_PX = criteria["d2moe_svd/in/W"], criteria["d2moe_svd/in/X"]
    expected = criteria[f"d2moe_svd/chk/W_whitened_r{rank}"]
    for statistics in ({"input_gram_XX": gram(rows_PX.double())}, {"input_rows_PX": rows_PX}):
        factors = decompose(matrix_OX, **statistics, damping=0).truncated(rank)
        torch.testing.assert_close(factors.densified(), expected, rtol=1e-6, atol=3e-6)
    # The public output is the same matrix in bfloat16.
    public = criteria[f"d2moe_svd/out/u_r{rank}"].float() @ criteria[f"d2moe_svd/out/v_r{rank}"].float()
    torch.testing.assert_close(factors.densified(), public, rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [7, 200])
@pytest.mark.parametrize("two_sided", [False, True])
def test_the_error_is_the_dropped_energy(shape, tokens, two_sided):
    matrix_OX, rows_PX, gradients_PO = random(*shape), random(tokens, shape[1]), random(50, shape[0])
    output = {"output_gram_OO": gram(gradients_PO)} if two_sided else {}
    for statistics in ({"input_gram_XX": gram(rows_PX)}, {"input_rows_PX": rows_PX}):
        spectrum = decompose(matrix_OX, **statistics, **output, damping=1e-3)
        assert spectrum.input_ridge == pytest.approx(1e-3 * float(rows_PX.square().sum()) / shape[1])
        for rank in (1, 5, 8, 16, 23):
            change_OX = matrix_OX - spectrum.truncated(rank).densified()
            actual = damage(
                change_OX, rows_PX, spectrum.input_ridge, gradients_PO if two_sided else None, spectrum.output_ridge
            )
            assert actual == pytest.approx(spectrum.dropped_energy(rank), rel=1e-9)


def test_no_other_matrix_of_the_rank_does_better():
    matrix_OX, rows_PX, gradients_PO = random(16, 24), random(60, 24) * torch.linspace(0.1, 3, 24), random(60, 16)
    spectrum = decompose(matrix_OX, input_gram_XX=gram(rows_PX), output_gram_OO=gram(gradients_PO))
    factors = spectrum.truncated(4)
    ridges = spectrum.input_ridge, spectrum.output_ridge

    def cost(u_RO, v_RX):
        return damage(matrix_OX - u_RO.T @ v_RX, rows_PX, ridges[0], gradients_PO, ridges[1])

    best = cost(factors.u_RO, factors.v_RX)
    for _ in range(20):
        for size in (1e-3, 1e-1):
            assert cost(factors.u_RO + size * random(4, 16), factors.v_RX + size * random(4, 24)) > best
    plain = decompose(matrix_OX).truncated(4)
    assert cost(plain.u_RO, plain.v_RX) > 1.05 * best


@pytest.mark.parametrize("rank", range(1, 24))
def test_whitened_beats_plain_on_the_calibration_tokens_at_every_rank(rank):
    matrix_OX, rows_PX = random(24, 40), random(300, 40) * torch.linspace(0.1, 2, 40)
    errors = [
        (rows_PX @ (matrix_OX - spectrum.truncated(rank).densified()).T).square().sum()
        for spectrum in (decompose(matrix_OX, input_gram_XX=gram(rows_PX), damping=1e-9), decompose(matrix_OX))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 6e-2)]
)
def test_full_rank_reproduces_the_matrix(shape, dtype, tolerance):
    matrix_OX = random(*shape).to(dtype)
    # Seven tokens: the Grams are singular.
    for statistics in (
        {},
        {"input_gram_XX": gram(random(7, shape[1]))},
        {"input_rows_PX": random(7, shape[1])},
        {"input_rows_PX": random(7, shape[1]), "output_gram_OO": gram(random(7, shape[0]))},
    ):
        factors = decompose(matrix_OX, **statistics).truncated(min(shape))
        assert {factors.u_RO.dtype, factors.v_RX.dtype} == {dtype}
        assert (factors.densified().double() - matrix_OX.double()).abs().max() < tolerance * matrix_OX.abs().max()


def test_a_rank_is_a_slice_of_one_decomposition():
    spectrum = decompose(random(16, 24).float(), input_gram_XX=gram(random(30, 24)))
    small, large = spectrum.truncated(8), spectrum.truncated(12)
    assert torch.equal(large.u_RO[:8], small.u_RO)
    assert torch.equal(large.v_RX[:8], small.v_RX)
    # Nothing of the decomposition is kept alive, and both factors are ready for a matmul.
    for factor in (small.u_RO, small.v_RX):
        assert factor.is_contiguous()
        assert factor.untyped_storage().nbytes() == factor.numel() * 4
    torch.testing.assert_close(small.u_RO.norm(dim=1), small.v_RX.norm(dim=1))
    assert spectrum.truncated(0).densified().abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_values_alone_are_the_same(shape):
    statistics = {"input_rows_PX": random(9, shape[1]), "output_gram_OO": gram(random(90, shape[0]))}
    matrix_OX = random(*shape)
    spectrum = decompose(matrix_OX, **statistics)
    torch.testing.assert_close(singular_values(matrix_OX, **statistics), spectrum.singular_values, rtol=1e-6, atol=0)
    assert spectrum.singular_values.diff().max() <= 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_few_tokens_give_no_nan(shape, damping):
    matrix_OX = random(*shape).float()
    for tokens in (1, 3):
        rows_PX, gradients_PO = random(tokens, shape[1]), random(tokens, shape[0])
        for statistics in ({"input_gram_XX": gram(rows_PX)}, {"input_rows_PX": rows_PX}):
            spectrum = decompose(matrix_OX, **statistics, output_gram_OO=gram(gradients_PO), damping=damping)
            densified = spectrum.truncated(8).densified()
            assert bool(densified.isfinite().all())
            # Eight dimensions are enough for three tokens.
            change_PO = rows_PX @ (matrix_OX - densified).double().T
            assert change_PO.norm() < 1e-3 * (rows_PX @ matrix_OX.double().T).norm()


def test_a_gram_without_tokens_leaves_the_plain_svd():
    matrix_OX = random(16, 24)
    for statistics in (
        {"input_gram_XX": torch.zeros(24, 24)},
        {"input_rows_PX": torch.zeros(0, 24)},
        {"output_gram_OO": torch.zeros(16, 16)},
    ):
        spectrum = decompose(matrix_OX, **statistics)
        assert spectrum.singular_values.tolist() == [0.0] * 16
        torch.testing.assert_close(spectrum.truncated(8).densified(), decompose(matrix_OX).truncated(8).densified())


def test_wrong_input_is_named():
    matrix_OX, poisoned_XX = random(4, 6), torch.eye(6)
    poisoned_XX[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"input_gram_XX holds NaN or infinity \(1 of 36 values\)"):
        decompose(matrix_OX, input_gram_XX=poisoned_XX)
    with pytest.raises(ValueError, match=r"matrix_OX holds NaN or infinity \(24 of 24"):
        singular_values(matrix_OX / 0)
    with pytest.raises(ValueError, match=r"input_gram_XX has shape \(4, 4\), but .*\(4, 6\) asks for \(6, 6\)"):
        decompose(matrix_OX, input_gram_XX=torch.eye(4))
    with pytest.raises(ValueError, match=r"input_rows_PX has shape \(9, 4\), but .* asks for \('P', 6\)"):
        decompose(matrix_OX, input_rows_PX=torch.ones(9, 4))
    with pytest.raises(ValueError, match="Pass one"):
        decompose(matrix_OX, input_rows_PX=torch.ones(9, 6), input_gram_XX=torch.eye(6))
    with pytest.raises(ValueError, match="damping=-1"):
        decompose(matrix_OX, damping=-1)
    with pytest.raises(ValueError, match="at least one number"):
        decompose(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="negative eigenvalues"):
        decompose(random(6, 6), output_gram_OO=torch.diag(torch.tensor([9.0, 1, 1, 1, 1, -5])))
    with pytest.raises(ValueError, match=r"rank=5 must be in 0\.\.4 for a matrix of shape \(4, 6\)"):
        decompose(matrix_OX).truncated(5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_falls_back_and_then_says_so(monkeypatch, error):
    matrix_OX, calls, eigh = random(24, 40), [], torch.linalg.eigh
    expected = decompose(matrix_OX).truncated(8)

    def failing(failures):
        def solve(matrix_SS):
            calls.append(matrix_SS.device.type)
            if len(calls) <= failures:
                raise error
            return eigh(matrix_SS)

        return solve

    monkeypatch.setattr(torch.linalg, "eigh", failing(1))
    assert torch.equal(decompose(matrix_OX).truncated(8).densified(), expected.densified())
    assert calls == ["cpu", "cpu"]
    calls.clear()
    monkeypatch.setattr(torch.linalg, "eigh", failing(2))
    with pytest.raises(MemoryError, match=r"24 x 40 matrix needs about .* GiB and memory ran out.*Free memory"):
        decompose(matrix_OX)


def test_other_errors_of_the_solver_are_not_hidden(monkeypatch):
    def broken(matrix_SS):
        raise RuntimeError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(RuntimeError, match="did not converge"):
        decompose(random(4, 4))


def test_rank_by_number():
    assert [rank_from_number((12, 40), rank) for rank in (8, 12)] == [8, 12]
    with pytest.raises(ValueError, match=r"rank=10 must be a multiple of 8.*Use 8\.$"):
        rank_from_number((12, 40), 10)
    with pytest.raises(ValueError, match="Use 16 or 24"):
        rank_from_number((64, 64), 20)
    with pytest.raises(ValueError, match=r"rank=16 must be in 1\.\.12"):
        rank_from_number((12, 40), 16)
    with pytest.raises(ValueError, match=r"rank=0 must be in 1\.\.12"):
        rank_from_number((12, 40), 0)


@pytest.mark.parametrize(
    ("shape", "ratio", "rank"),
    [
        ((1024, 2048), 0.25, 168),  # 170.7
        ((64, 64), 0.5, 16),
        ((48, 96), 0.75, 24),  # exactly 24, of which float rounding must not make 16
        ((40, 24), 0.01, 8),  # at least 8, 512 of 960 numbers
        ((64, 64), 1.0, None),  # rank 32 stores what the matrix stores
        ((12, 16), 0.5, None),  # 8 x 28 = 224 of 192 numbers
    ],
)
def test_rank_by_ratio(shape, ratio, rank):
    assert rank_from_ratio(shape, ratio) == rank
    if rank is not None and ratio > 0.1:
        assert rank * sum(shape) <= ratio * shape[0] * shape[1] < (rank + 8) * sum(shape)


def test_rank_by_energy():
    sigma_D = torch.tensor([4.0] * 8 + [2.0] * 8 + [1.0] * 8 + [0.0] * 40).double().sqrt()
    assert [rank_from_energy((64, 64), sigma_D, share) for share in (0.1, 32 / 56, 0.6, 48 / 56, 0.9, 1.0)] == [
        8,
        8,
        16,
        16,
        24,
        24,
    ]
    assert rank_from_energy((64, 64), torch.zeros(64), 0.9) == 8
    assert rank_from_energy((64, 64), torch.ones(64), 0.9) is None
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"energy={share}"):
            rank_from_energy((64, 64), sigma_D, share)
        with pytest.raises(ValueError, match=rf"rank_ratio={share}"):
            rank_from_ratio((64, 64), share)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
@pytest.mark.parametrize("tokens", [4, 60])
def test_known_products_and_a_largest_rank_change_nothing(shape, tokens):
    matrix_OX, rows_PX = random(*shape), random(tokens, shape[1])
    statistics = {"input_rows_PX": rows_PX, "output_gram_OO": gram(random(40, shape[0]))}
    expected = decompose(matrix_OX, **statistics)
    found = decompose(matrix_OX, **statistics, product_PO=rows_PX @ matrix_OX.T, rank=4)
    torch.testing.assert_close(found.singular_values, expected.singular_values)
    torch.testing.assert_close(found.truncated(4).densified(), expected.truncated(4).densified())
    assert found.left_OD.shape == (shape[0], 4)
    assert found.right_DX.shape == (4, shape[1])
    with pytest.raises(ValueError, match=r"product_PO has shape"):
        decompose(matrix_OX, **statistics, product_PO=rows_PX)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_products_in_float32_find_the_same_factors(shape):
    matrix_OX, rows_PX = random(*shape), random(60, shape[1])
    statistics = {"input_rows_PX": rows_PX, "output_gram_OO": gram(random(40, shape[0]))}
    exact, single = (decompose(matrix_OX, **statistics, dtype=dtype) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(single.truncated(4).densified(), exact.truncated(4).densified(), rtol=0, atol=1e-5)
