import pytest
import torch
from scipy.optimize import linear_sum_assignment

from optimum_moe.algorithms import alignment
from optimum_moe.algorithms.alignment import align_experts, alignment_permutation
from optimum_moe.algorithms.experts import ExpertTensors


def random_expert(size, hidden, generator, gated=True, scale_I=None):
    shapes = [(size, hidden), (hidden, size), (size, hidden)]
    up, down, gate = (torch.randn(shape, generator=generator) for shape in shapes)
    if scale_I is not None:
        up, down, gate = up * scale_I[:, None], down * scale_I, gate * scale_I[:, None]
    return (up, down, gate if gated else None)


def permuted_copy(expert, order, noise, generator):
    copy = []
    for axis, matrix in zip((0, 1, 0), expert, strict=True):
        if matrix is not None:
            matrix = matrix.index_select(axis, order)
            matrix = matrix + noise * matrix.abs().mean() * torch.randn(matrix.shape, generator=generator)
        copy.append(matrix)
    return tuple(copy)


def align(reference, member):
    return alignment_permutation(reference[0], reference[1], member[0], member[1], reference[2], member[2])


def full_cost(reference, member):
    cost = reference[0].double() @ member[0].double().T + reference[1].double().T @ member[1].double()
    return cost if reference[2] is None else cost + reference[2].double() @ member[2].double().T


def assert_optimal(reference, member, perm_I):
    cost = full_cost(reference, member)
    rows, best_I = linear_sum_assignment(cost.numpy(), maximize=True)
    assert perm_I.dtype == torch.int64
    assert perm_I.sort().values.tolist() == list(range(cost.shape[0]))
    ours, best = cost[rows, perm_I].sum().item(), cost[rows, best_I].sum().item()
    assert ours == pytest.approx(best, rel=1e-7, abs=1e-6)
    return best_I


@pytest.fixture
def solver_calls(monkeypatch):
    calls = []
    solve = alignment._assign
    monkeypatch.setattr(alignment, "_assign", lambda *args: calls.append(1) or solve(*args))
    return calls


@pytest.fixture
def product_share(monkeypatch):
    """Share of the cost's products that was computed."""
    done = []
    accumulate = alignment._accumulate

    def counted(cost, reference, member, rows, segments):
        columns = sum(part.stop - part.start for s in segments for _, part in reference.segments[s])
        done.append((rows.stop - rows.start) * columns / sum(p.numel() for p in reference.pieces))
        accumulate(cost, reference, member, rows, segments)

    monkeypatch.setattr(alignment, "_accumulate", counted)
    return lambda: sum(done)


@pytest.mark.parametrize("include_down", [True, False])
def test_pair_matches_public_code(parity, include_down):
    up_EIH = parity["switch/in/encoder.block.1.layer.1.mlp/wi"]
    down_EHI = parity["switch/in/encoder.block.1.layer.1.mlp/wo"] * float(include_down)
    perm_I = alignment_permutation(up_EIH[0], down_EHI[0], up_EIH[3], down_EHI[3])
    assert perm_I.tolist() == parity[f"perm/switch_pair/include_wo_{include_down}"].tolist()


def test_aligned_experts_match_public_code(parity, blocks):
    names = blocks("perm/aligned/")
    assert len(names) == 3
    for block in names:
        up_EIH, down_EHI = (parity[f"switch/in/{block}/{name}"] for name in ("wi", "wo"))
        perm_EI = align_experts(ExpertTensors(up_EIH, down_EHI), torch.zeros(8, dtype=torch.int64), (0,))
        for expert, perm_I in enumerate(perm_EI):
            assert torch.equal(up_EIH[expert][perm_I], parity[f"perm/aligned/{block}/wi"][expert])
            assert torch.equal(down_EHI[expert][:, perm_I], parity[f"perm/aligned/{block}/wo"][expert])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", [1, 24, 400])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_noisy_permuted_copies_are_aligned_exactly(size, noise, gated, solver_calls):
    generator = torch.Generator().manual_seed(size)
    reference = random_expert(size, 96, generator, gated)
    order = torch.randperm(size, generator=generator)
    member = permuted_copy(reference, order, noise, generator)
    assert torch.equal(order[align(reference, member)], torch.arange(size))
    assert not solver_calls


def test_certificate_skips_most_of_the_product(solver_calls, product_share):
    generator = torch.Generator().manual_seed(0)
    # Neurons of very different size: only the nearest-neighbor form of the bound proves these.
    scale_I = torch.randn(600, generator=generator).mul(0.7).exp()
    reference = random_expert(600, 512, generator, scale_I=scale_I)
    order = torch.randperm(600, generator=generator)
    member = permuted_copy(reference, order, 0.02, generator)
    assert torch.equal(order[align(reference, member)], torch.arange(600))
    assert product_share() < 0.3
    assert not solver_calls


def test_nothing_is_computed_twice_without_certificate(solver_calls, product_share):
    generator = torch.Generator().manual_seed(1)
    reference, member = random_expert(500, 64, generator), random_expert(500, 64, generator)
    assert_optimal(reference, member, align(reference, member))
    assert product_share() == pytest.approx(1)
    assert len(solver_calls) == 1


def test_certified_rows_are_completed_when_others_need_the_solver(solver_calls, product_share):
    generator = torch.Generator().manual_seed(2)
    reference, member = random_expert(700, 256, generator), random_expert(700, 256, generator)
    # The first half are copies, so their chunks are certified before an unrelated one is met.
    mixed = tuple(
        torch.cat([a.narrow(x, 0, 350), b.narrow(x, 350, 350)], x)
        for a, b, x in zip(reference, member, (0, 1, 0), strict=True)
    )
    assert_optimal(reference, mixed, align(reference, mixed))
    assert product_share() == pytest.approx(1)
    assert len(solver_calls) == 1


@pytest.mark.parametrize("size", [100, 129, 450])
@pytest.mark.parametrize("kind", ["independent", "heavy", "offset", "tiny"])
def test_objective_equals_scipy(size, kind):
    generator = torch.Generator().manual_seed(size)
    scale_I = torch.randn(size, generator=generator).exp() if kind == "heavy" else None
    reference, member = (random_expert(size, 48, generator, scale_I=scale_I) for _ in range(2))
    if kind == "offset":
        reference, member = (tuple(m + 0.5 for m in expert) for expert in (reference, member))
    if kind == "tiny":
        reference, member = (tuple(m * 1e-6 for m in expert) for expert in (reference, member))
    perm_I = align(reference, member)
    best_I = assert_optimal(reference, member, perm_I)
    assert perm_I.tolist() == best_I.tolist()


@pytest.mark.parametrize("size", [60, 300])
def test_ties_still_give_an_optimal_permutation(size):
    generator = torch.Generator().manual_seed(3)
    reference, member = (
        tuple(torch.randint(-1, 2, shape, generator=generator).float() for shape in ((size, 4), (4, size), (size, 4)))
        for _ in range(2)
    )
    assert_optimal(reference, member, align(reference, member))
    zeros = (torch.zeros(size, 4), torch.zeros(4, size), None)
    assert align(zeros, zeros).sort().values.tolist() == list(range(size))


def test_gate_takes_part_in_the_cost():
    generator = torch.Generator().manual_seed(4)
    gate, order = torch.randn(40, 16, generator=generator), torch.randperm(40, generator=generator)
    same = (torch.ones(40, 16), torch.ones(16, 40))
    assert torch.equal(align((*same, gate), (*same, gate[order])), order.argsort())


@pytest.mark.parametrize("num_threads", [None, 1, 3])
def test_block_alignment_keeps_dominants_and_pruned_experts(num_threads):
    generator = torch.Generator().manual_seed(5)
    base = random_expert(200, 32, generator)
    orders = [torch.randperm(200, generator=generator) for _ in range(4)]
    copies = [permuted_copy(base, order, 0.1, generator) for order in orders]
    other = random_expert(200, 32, generator)
    ups, downs, gates = zip(*copies, other, other, strict=True)
    finished, threads = [], torch.get_num_threads()
    # Experts 0, 1, 3 around 1; 2 pruned; 4 alone; 5 alone.
    perm_EI = align_experts(
        ExpertTensors(ups, downs, gates), torch.tensor([0, 0, -1, 0, 2, 1]), (1, 5, 4), num_threads, finished.append
    )
    assert finished == [1, 1]
    assert torch.get_num_threads() == threads
    for expert in (1, 2, 4, 5):
        assert perm_EI[expert].tolist() == list(range(200))
    for expert in (0, 3):
        assert torch.equal(orders[expert][perm_EI[expert]], orders[1])


def test_threads_do_not_change_the_result():
    generator = torch.Generator().manual_seed(6)
    ups, downs, gates = zip(*(random_expert(160, 24, generator) for _ in range(6)), strict=True)
    labels_E = torch.tensor([0, 0, 0, 1, 1, 1])
    one, two = (align_experts(ExpertTensors(ups, downs, gates), labels_E, (0, 4), threads) for threads in (1, 2))
    assert torch.equal(one, two)


def test_strided_views_and_bfloat16_align_like_dense_float32():
    generator = torch.Generator().manual_seed(7)
    fused_EHI = torch.randn(2, 64, 2 * 300, generator=generator).bfloat16()
    down_EIH = torch.randn(2, 300, 64, generator=generator).bfloat16()
    gate_EIH, up_EIH, down_EHI = fused_EHI[..., ::2].mT, fused_EHI[..., 1::2].mT, down_EIH.mT
    labels_E = torch.zeros(2, dtype=torch.int64)
    views = align_experts(ExpertTensors(up_EIH, down_EHI, gate_EIH), labels_E, (1,))
    dense = [t.float().contiguous() for t in (up_EIH, down_EHI, gate_EIH)]
    assert torch.equal(views, align_experts(ExpertTensors(*dense), labels_E, (1,)))
    up, down, gate = dense
    assert_optimal((up[1], down[1], gate[1]), (up[0], down[0], gate[0]), views[0])


def test_alignment_makes_the_merge_lossless_with_biases():
    generator = torch.Generator().manual_seed(8)
    up, down, gate = random_expert(150, 20, generator)
    bias_I = torch.randn(150, generator=generator)
    order = torch.randperm(150, generator=generator)
    experts = ExpertTensors(
        [up, up[order]], [down, down[:, order]], [gate, gate[order]], up_bias=[bias_I, bias_I[order]]
    )
    perm_EI = align_experts(experts, torch.tensor([0, 0]), (0,))
    assert torch.equal(experts.up_bias[1][perm_EI[1]], bias_I)
    assert torch.equal(experts.down[1][:, perm_EI[1]], down)


def test_errors_state_rule_and_values():
    up, down, gate = random_expert(8, 4, torch.Generator().manual_seed(9))
    with pytest.raises(ValueError, match="Either both experts have a gate"):
        alignment_permutation(up, down, up, down, reference_gate=gate)
    with pytest.raises(ValueError, match=r"\(8, 4\), \(7, 4\)"):
        alignment_permutation(up, down, up[:7], down[:, :7])
    bad = up.clone()
    bad[3, 2] = torch.nan
    pair = ExpertTensors([up, bad], [down, down])
    with pytest.raises(ValueError, match=r"Expert 1 cannot be aligned to expert 0: .*NaN"):
        align_experts(pair, torch.tensor([0, 0]), (0,))
    with pytest.raises(ValueError, match=r"2 labels in -1..0, got \[0, 1\]"):
        align_experts(pair, torch.tensor([0, 1]), (0,))
    with pytest.raises(ValueError, match="Expert 1 is the dominant of group 0 but not a member"):
        align_experts(pair, torch.tensor([0, -1]), (1,))
