import pytest
import torch

from optimum_moe.algorithms.merging import merge_matrices, merge_weights


def merged_experts(matrices_E, weights_E, labels_E):
    """Every original slot holds its group's matrix, as the public code leaves it."""
    merged_E = torch.empty_like(matrices_E)
    for group in labels_E.unique().tolist():
        members = (labels_E == group).nonzero().flatten().tolist()
        out = torch.empty_like(matrices_E[0])
        merge_matrices(
            [matrices_E[e] for e in members], [float(weights_E[e]) for e in members], [None] * len(members), 0, out
        )
        merged_E[members] = out
    return merged_E


@pytest.mark.parametrize(
    ("source", "expected", "groups", "usage", "num_blocks"),
    [
        ("perm/aligned", "merge/switch_freq_prealigned", "group/switch_global_avg3", "stats/switch", 3),
        ("mixtral/in", "merge/mixtral_freq", "group/mixtral_global_avg4", "stats/mixtral", 2),
    ],
)
def test_frequency_merge_matches_public_code(parity, blocks, source, expected, groups, usage, num_blocks):
    names = blocks(f"{expected}/")
    assert len(names) == num_blocks
    for block in names:
        labels_E = parity[f"{groups}/{block}/labels"]
        weights_E = merge_weights(parity[f"{usage}/{block}/usage"], labels_E, int(labels_E.max()) + 1)
        projections = [key.rsplit("/", 1)[1] for key in parity if key.startswith(f"{expected}/{block}/")]
        assert len(projections) >= 2
        for projection in projections:
            merged_E = merged_experts(parity[f"{source}/{block}/{projection}"], weights_E, labels_E)
            torch.testing.assert_close(merged_E, parity[f"{expected}/{block}/{projection}"], rtol=0, atol=1e-6)


def test_weights_sum_to_one_in_every_group():
    weights_E = merge_weights(torch.tensor([3.0, 1.0, 0.0, 0.0, 7.0, 2.0]), torch.tensor([0, 0, 1, 1, -1, 2]), 3)
    assert weights_E.dtype == torch.float64
    assert weights_E.tolist() == [0.75, 0.25, 0.5, 0.5, 0.0, 1.0]


def test_weight_errors():
    with pytest.raises(ValueError, match=r"Groups \[1\] of 3 have no expert"):
        merge_weights(torch.ones(3), torch.tensor([0, 2, 2]), 3)
    with pytest.raises(ValueError, match=r"must lie in -1..1"):
        merge_weights(torch.ones(3), torch.tensor([0, 1, 2]), 2)
    with pytest.raises(ValueError, match="negative"):
        merge_weights(torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), 1)
    with pytest.raises(ValueError, match=r"\(2,\) and labels_E \(3,\)"):
        merge_weights(torch.ones(2), torch.tensor([0, 0, 0]), 1)


@pytest.mark.parametrize("shape", [(700, 900), (900, 700)])
@pytest.mark.parametrize("neuron_axis", [0, 1, -1])
def test_permuted_weighted_sum(shape, neuron_axis):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for _ in range(3)]
    orders = [None, *(torch.randperm(shape[neuron_axis], generator=generator) for _ in range(2))]
    weights = [0.5, 0.2, 0.3]
    out = torch.empty(shape)
    merge_matrices(matrices, weights, orders, neuron_axis, out)
    expected = sum(
        w * (m.double() if o is None else m.double().index_select(neuron_axis, o))
        for m, w, o in zip(matrices, weights, orders, strict=True)
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


def test_biases_follow_their_neurons():
    out = torch.empty(4)
    biases = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([40.0, 10.0, 20.0, 30.0])]
    merge_matrices(biases, [0.5, 0.5], [None, torch.tensor([1, 2, 3, 0])], 0, out)
    assert out.tolist() == [5.5, 11.0, 16.5, 22.0]
    merge_matrices(biases, [0.5, 0.5], [None, torch.tensor([1, 2, 3, 0])], None, out)
    assert out.tolist() == [20.5, 6.0, 11.5, 17.0]


def test_bfloat16_accumulates_in_float32():
    members = [torch.full((8, 8), 1.0, dtype=torch.bfloat16)] + [torch.full((8, 8), 2.0**-9, dtype=torch.bfloat16)] * 64
    out = torch.empty(8, 8, dtype=torch.bfloat16)
    merge_matrices(members, [1.0] * 65, [None] * 65, 0, out)
    # Each addend alone is lost in bfloat16, together they add 1/8.
    assert out.unique().tolist() == [1.125]


def test_float64_accumulates_in_float64():
    out = torch.empty(2, 2, dtype=torch.float64)
    merge_matrices([torch.ones(2, 2).double(), torch.full((2, 2), 2.0**-40).double()], [1.0, 1.0], [None] * 2, 0, out)
    assert out.unique().tolist() == [1 + 2.0**-40]


def test_single_member_is_copied_bit_for_bit():
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    out = torch.empty(64, 8)
    merge_matrices([bits.view(torch.float32)], [1.0], [torch.arange(64)], 0, out)
    assert torch.equal(out.view(torch.int32), bits)


def test_member_without_weight_is_not_read():
    out = torch.empty(3, 3)
    merge_matrices([torch.ones(3, 3), torch.full((3, 3), torch.nan)], [1.0, 0.0], [None, None], 0, out)
    assert out.unique().tolist() == [1.0]


def test_writes_views_and_the_dominants_own_storage():
    generator = torch.Generator().manual_seed(1)
    stored = torch.randn(3, 600, 800, generator=generator)
    views = [stored[e].T for e in range(3)]
    order = torch.randperm(800, generator=generator)
    expected = (views[1][order] * 0.5 + views[0] * 0.25 + views[2] * 0.25).clone()
    merge_matrices([views[1], views[0], views[2]], [0.5, 0.25, 0.25], [order, None, None], 0, views[0])
    torch.testing.assert_close(stored[0].T, expected)


def test_merge_errors():
    one = torch.ones(2, 2)
    with pytest.raises(ValueError, match="2 matrices, 1 weights and 2 permutations"):
        merge_matrices([one, one], [1.0], [None, None], 0, torch.empty(2, 2))
    with pytest.raises(ValueError, match=r"\(2, 2\), \(2, 3\)"):
        merge_matrices([one], [1.0], [None], 0, torch.empty(2, 3))
    with pytest.raises(ValueError, match="not all 0"):
        merge_matrices([one], [0.0], [None], 0, torch.empty(2, 2))
    with pytest.raises(ValueError, match="finite"):
        merge_matrices([one], [float("nan")], [None], 0, torch.empty(2, 2))
