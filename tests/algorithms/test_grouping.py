import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from optimum_moe.algorithms.grouping import (
    adaptive_dominants,
    dominant_experts,
    join_dominants,
    linkage_groups,
    random_groups,
    take_nearest,
)


def check_block(parity, statistics, expected, block, dominants_G):
    assert dominants_G == tuple(parity[f"{expected}/{block}/core"].tolist())
    labels_E = join_dominants(parity[f"{statistics}/{block}/similarity"], dominants_G)
    assert labels_E.dtype == torch.int64
    assert labels_E.tolist() == parity[f"{expected}/{block}/labels"].tolist()


@pytest.mark.parametrize(
    ("statistics", "expected", "num_groups", "num_blocks"),
    [
        ("given/switch32", "given/switch32_perlayer8_correct", 8, 12),
        ("stats/switch", "group/perlayer3_correct", 3, 4),
    ],
)
def test_uniform_groups_match_reference(parity, blocks, statistics, expected, num_groups, num_blocks):
    names = blocks(f"{expected}/")
    assert len(names) == num_blocks
    for block in names:
        dominants_G = dominant_experts(parity[f"{statistics}/{block}/usage"], num_groups)
        check_block(parity, statistics, expected, block, dominants_G)


@pytest.mark.parametrize(
    ("statistics", "expected", "average", "num_blocks"),
    [
        ("given/switch32", "given/switch32_global_avg8", 8, 11),
        ("stats/mixtral", "group/mixtral_global_avg4", 4, 3),
    ],
)
def test_adaptive_groups_match_public_code(parity, blocks, statistics, expected, average, num_blocks):
    # The stored run left one block of 32 experts out of the merge.
    names = [block for block in blocks(f"{expected}/") if parity[f"{expected}/{block}/core"].numel() != 32]
    assert len(names) == num_blocks
    kept = adaptive_dominants([parity[f"{statistics}/{block}/usage"] for block in names], average * num_blocks)
    assert sum(map(len, kept)) == average * num_blocks
    for block, dominants_G in zip(names, kept, strict=True):
        check_block(parity, statistics, expected, block, dominants_G)


def test_ties_take_the_lower_index():
    assert dominant_experts(torch.tensor([1.0, 3.0, 3.0, 0.0, 1.0]), 3) == (1, 2, 0)
    similarity_EE = torch.full((5, 5), 0.5)
    assert join_dominants(similarity_EE, (3, 1)).tolist() == [0, 1, 0, 0, 0]


def test_dominant_keeps_its_label_when_more_similar_to_another():
    similarity_EE = torch.tensor([[0.1, 0.9, 0.2], [0.9, 0.1, 0.3], [0.2, 0.3, 0.1]])
    assert join_dominants(similarity_EE, (1, 0)).tolist() == [1, 0, 0]


def test_router_groups_keep_their_order_and_stay_apart():
    frequency_E = torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0, 60.0, 70.0, 80.0])
    dominants_G = dominant_experts(frequency_E, 4, router_groups=2)
    assert dominants_G == (3, 2, 7, 6)
    similarity_EE = torch.zeros(8, 8)
    similarity_EE[0, 7] = similarity_EE[5, 2] = 1
    similarity_EE[0, 2] = similarity_EE[5, 6] = 0.5
    assert join_dominants(similarity_EE, dominants_G, router_groups=2).tolist() == [1, 0, 1, 0, 2, 3, 3, 2]


def test_adaptive_takes_exactly_the_budget_on_ties():
    even_E = torch.full((4,), 0.25)
    assert adaptive_dominants([even_E, even_E, even_E], 5) == [(0, 1, 2), (0,), (0,)]


def test_adaptive_every_block_keeps_its_floor():
    blocks = [torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.001, 0.997, 0.002, 0.0])]
    assert adaptive_dominants(blocks, 4) == [(0, 1, 2), (1,)]
    assert adaptive_dominants(blocks, 4, floor=2) == [(0, 1), (1, 2)]
    assert adaptive_dominants(blocks, 8) == [(0, 1, 2, 3), (1, 2, 0, 3)]


def test_centroids_take_in_turn_what_is_left():
    similarity_EE = torch.zeros(7, 7)
    similarity_EE[4] = torch.tensor([0.9, 0.8, 0.95, 0.1, 1.0, 0.2, 0.3])
    similarity_EE[2] = torch.tensor([0.9, 0.1, 1.0, 0.5, 0.9, 0.5, 0.4])
    # Expert 4 takes 0 and 1, not the centroid 2, which takes 3 and 5 of the rest.
    assert take_nearest(similarity_EE, (4, 2, 6), 2).tolist() == [0, 0, 1, 1, 0, 1, 2]
    assert take_nearest(similarity_EE, (4, 2, 6), 15).tolist() == [0, 0, 1, 0, 0, 0, 2]
    # In two router groups of four, each centroid takes its own.
    similarity_EE = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    assert take_nearest(similarity_EE, (1, 0, 6, 7), 15, router_groups=2).tolist() == [1, 0, 0, 0, 2, 2, 2, 3]


def test_what_centroids_may_take_bounds_every_group():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        similarity_EE, order = torch.rand(40, 40, generator=generator), torch.randperm(40, generator=generator)
        centroids = tuple(order[:7].tolist())
        labels_E = take_nearest(similarity_EE, centroids, 5)
        sizes = torch.bincount(labels_E, minlength=7).tolist()
        assert sizes == [6, 6, 6, 6, 6, 6, 4]
        assert labels_E[list(centroids)].tolist() == list(range(7))
        # What an earlier centroid left is not nearer to it than what it took.
        first = similarity_EE[centroids[0]]
        others = [e for e in range(40) if labels_E[e] != 0 and e not in centroids]
        taken = [e for e in range(40) if labels_E[e] == 0 and e != centroids[0]]
        assert first[others].max() <= first[taken].min()


@pytest.mark.parametrize("router_groups", [1, 2, 4])
def test_random_groups_fill_every_group(router_groups):
    for seed in range(20):
        labels_E = random_groups(16, 8, torch.Generator().manual_seed(seed), router_groups)
        assert torch.bincount(labels_E, minlength=8).min() >= 1
        labels = labels_E.view(router_groups, -1) // (8 // router_groups)
        assert torch.equal(labels, torch.arange(router_groups)[:, None].expand_as(labels))


def test_random_groups_depend_on_the_seed_only():
    draws = [random_groups(16, 4, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert random_groups(5, 5, torch.Generator().manual_seed(3)).sort().values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["single", "complete", "average", "ward"])
def test_linkage_groups_are_those_of_scipy(method):
    points_ED = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance_EE = torch.cdist(points_ED, points_ED)
    for num_groups in range(1, 13):
        labels_E = linkage_groups(-distance_EE, num_groups, method)
        expected_E = fcluster(linkage(points_ED.numpy(), method), num_groups, "maxclust")
        same_EE = torch.from_numpy(expected_E[:, None] == expected_E)
        assert torch.equal(labels_E[:, None] == labels_E, same_EE)
        assert labels_E.unique().tolist() == list(range(num_groups))


def test_linkage_groups_stay_within_router_groups():
    # The nearest experts lie in different router groups.
    points_E = torch.tensor([0.0, 5.0, 6.0, 20.0, 0.1, 5.1, 30.0, 31.0])
    similarity_EE = -(points_E[:, None] - points_E).abs()
    assert linkage_groups(similarity_EE, 4, "average", router_groups=2).tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    # All equally far: as many groups as asked for.
    assert sorted(linkage_groups(torch.eye(6), 4, "complete").unique().tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dominant_experts(torch.ones(4), 5), "num_groups=5 is outside 1..4"),
        (lambda: dominant_experts(torch.ones(4), 0), "num_groups=0 is outside 1..4"),
        (lambda: dominant_experts(torch.ones(4), 3, router_groups=2), "num_groups=3 is not a multiple"),
        (lambda: dominant_experts(torch.ones(4), 3, router_groups=3), "router_groups=3 does not divide 4"),
        (lambda: dominant_experts(torch.tensor([1.0, torch.nan]), 1), "NaN"),
        (lambda: adaptive_dominants([torch.ones(4)] * 3, 2), "num_groups_total=2 is outside 3..12"),
        (lambda: adaptive_dominants([torch.ones(4)] * 3, 13), "num_groups_total=13 is outside 3..12"),
        (lambda: adaptive_dominants([torch.ones(4)] * 3, 5, floor=2), "num_groups_total=5 is outside 6..12"),
        (lambda: adaptive_dominants([torch.ones(4)], 4, floor=5), "floor=5 is outside 1..4"),
        (lambda: adaptive_dominants([], 1), "frequencies is empty"),
        (lambda: join_dominants(torch.ones(4, 4), (0, 4)), r"distinct experts in 0..3"),
        (lambda: join_dominants(torch.ones(4, 4), (0, 0)), r"distinct experts"),
        (lambda: join_dominants(torch.ones(4, 4), (0, 1), router_groups=2), "without a dominant"),
        (lambda: join_dominants(torch.full((2, 2), torch.nan), (0,)), "NaN"),
        (lambda: take_nearest(torch.ones(4, 4), (0, 4), 3), r"distinct experts in 0..3"),
        (lambda: take_nearest(torch.ones(6, 6), (0, 1), 1), r"leaves experts \[4, 5\] without a group: .* at least 2"),
        (lambda: random_groups(4, 5, None), "num_groups=5 is outside 1..4"),
        (lambda: linkage_groups(torch.eye(4), 5, "average"), "num_groups=5 is outside 1..4"),
    ],
)
def test_errors_state_rule_and_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
