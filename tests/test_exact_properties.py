"""Properties that hold exactly, on every supported architecture; none needs a reference implementation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.recipe import load_recipe
from optimum_moe.surgeons import find_blocks
from tests.expert_order import edited, make_copies, permute_experts, reordered, silence
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = [
    pytest.mark.parametrize("target", every_target()),
    pytest.mark.filterwarnings("ignore:Calibration gave no token"),
]

REFUSALS = ("does not follow from its", "meet what all experts share")
"""Of routers whose rule is not known, and of experts whose outputs depend on more than their weights."""
UNCHANGED = list(range(8))
REAM = dataclasses.replace(load_recipe("ream").stages[0], num_experts=4, keep_ratio=None)
LABELS = [0, 1, 2, 0, 3, 2, 1, 3]
# Two router groups of four experts: no group crosses them.
GROUPED_LABELS = [0, 1, 1, 0, 2, 3, 2, 3]


def compressor_for(model, method, target: Target, order_E: list[int] = UNCHANGED) -> MoECompressor:
    data = [reordered(inputs_for(target, rows=4, length=32, seed=seed), order_E) for seed in range(3)]
    return MoECompressor.from_pretrained(model, method, CalibrationConfig(data), progress=False)


def assert_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of float32 sums in another order."""
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("align_by", ["weights", "activations", "both"])
def test_copies_of_experts_merge_without_loss(target: Target, align_by) -> None:
    model = build(target)
    make_copies(model, LABELS)
    expected = logits_of(model, inputs_for(target))
    compressor = compressor_for(model, MSMoE(num_experts=4, align_by=align_by), target)
    statistics = compressor.calibrate()
    same_EE = (torch.tensor(LABELS)[:, None] == torch.tensor(LABELS)).double()
    frequency_E = torch.tensor([9.0, 2.0, 8.0, 1.0, 7.0, 3.0, 6.0, 4.0], dtype=torch.float64)
    model = compressor.apply(edited(statistics, router_gram_EE=same_EE, token_count_E=frequency_E))
    assert all(block.num_groups == 4 for block in compressor.plan.blocks.values())
    assert_rounding(logits_of(model, inputs_for(target)), expected)


def test_merging_copies_without_alignment_is_not_lossless(target: Target) -> None:
    """The negative control: what makes the test above pass is the alignment."""
    if target.fixed_neurons:
        pytest.skip(target.fixed_neurons)
    model = build(target)
    make_copies(model, LABELS)
    expected = logits_of(model, inputs_for(target))
    compressor = compressor_for(model, MSMoE(num_experts=4, align=False), target)
    same_EE = (torch.tensor(LABELS)[:, None] == torch.tensor(LABELS)).double()
    counts_E = torch.arange(8, 0, -1, dtype=torch.float64)
    statistics = edited(compressor.calibrate(), router_gram_EE=same_EE, token_count_E=counts_E)
    merged = logits_of(compressor.apply(statistics), inputs_for(target))
    assert (merged - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    "method", [MSMoE(num_experts=8), MSMoE(keep_ratio=1.0, routing="reduce"), ExpertPruning(num_experts=8)]
)
def test_keeping_every_expert_changes_nothing(target: Target, method) -> None:
    model = build(target)
    expected = logits_of(model, inputs_for(target))
    compressor = compressor_for(model, method, target)
    assert torch.equal(logits_of(compressor.apply(), inputs_for(target)), expected)
    assert compressor.plan.is_plain


def test_pruning_experts_that_never_win_changes_nothing(target: Target) -> None:
    if target.refuses_pruning:
        pytest.skip(target.refuses_pruning)
    model = build(target)
    # Fewer tokens than channels, so that a router row with a given logit on all of them exists.
    inputs = inputs_for(target, rows=2, length=16)
    silent = [1, 6] if target.router_groups == 1 else [1, 2, 5, 6]
    silence(model, silent, inputs)
    expected = logits_of(model, inputs)
    compressor = MoECompressor.from_pretrained(
        model,
        ExpertPruning(num_experts=8 - len(silent), saliency="frequency"),
        CalibrationConfig([inputs]),
        progress=False,
    )
    statistics = compressor.calibrate()
    for block in statistics.blocks.values():
        assert block.token_count_E[silent].tolist() == [0] * len(silent)
    counts_E = torch.ones(8, dtype=torch.float64)
    counts_E[silent] = 0
    pruned = compressor.apply(edited(statistics, token_count_E=counts_E))
    assert [found.info.num_experts for found in find_blocks(pruned)] == [8 - len(silent)] * len(compressor.plan.blocks)
    assert_rounding(logits_of(pruned, inputs), expected)


def test_a_pruned_model_is_the_original_with_experts_masked_out_of_the_router(target: Target) -> None:
    """Other experts in every block, of logits so low that they never win and take no share of a softmax."""
    if target.refuses_pruning:
        pytest.skip(target.refuses_pruning)
    inputs = inputs_for(target, rows=2, length=16)
    compressor = MoECompressor.from_pretrained(
        build(target), ExpertPruning(num_experts=6, saliency="random"), progress=False
    )
    pruned = compressor.apply()
    plans = compressor.plan.blocks.items()
    removed = {name: [e for e in UNCHANGED if plan.labels_E[e] < 0] for name, plan in plans}
    assert {len(experts) for experts in removed.values()} == {2}
    masked = build(target)
    before = logits_of(masked, inputs)
    silence(masked, removed, inputs)
    expected = logits_of(masked, inputs)
    assert (expected - before).abs().max() > 1e-4 * before.abs().max()
    assert_rounding(logits_of(pruned, inputs), expected)


@pytest.mark.parametrize(
    "method",
    [
        MSMoE(num_experts=4),
        MSMoE(num_experts=4, routing="reduce", router_rows="mean"),
        MSMoE(num_experts=4, routing="reduce", router_rows="fit"),
        MSMoE(num_experts=4, allocation="adaptive"),
        REAM,
        ExpertPruning(num_experts=4, saliency="reap"),
        ExpertPruning(num_experts=4, saliency="razor", allocation="global"),
        ExpertPruning(num_experts=4, saliency="reconstruction"),
        ExpertPruning(num_experts=4, saliency="mone", leaves="low_rank", rank=4),
    ],
    ids=["map", "mean", "fit", "adaptive", "ream", "prune", "global", "reconstruction", "low_rank"],
)
def test_the_order_of_experts_does_not_matter(target: Target, method) -> None:
    if target.refuses_pruning and isinstance(method, ExpertPruning):
        pytest.skip(target.refuses_pruning)
    if target.fixed_router and method.routing == "reduce":
        pytest.skip(target.fixed_router)
    if target.fixed_router:
        # One-hot logits make all experts equally similar, and equals would be joined by index.
        method = dataclasses.replace(method, similarity="expert_weights")
    # Within router groups, where the architecture has them.
    order_E = [2, 0, 3, 1, 5, 7, 4, 6]
    results = []
    # Sums that tie in float would be broken by index; a little more for each expert breaks them by expert.
    extra_E = torch.linspace(0.01, 0.05, 8, dtype=torch.float64)
    for order in (UNCHANGED, order_E):
        model = build(target)
        permute_experts(model, order)
        compressor = compressor_for(model, method, target, order)
        statistics = compressor.calibrate()
        observed = statistics.blocks
        statistics = edited(
            statistics,
            token_count_E=lambda name, observed=observed, order=order: observed[name].token_count_E + extra_E[order],
        )
        try:
            compressed = compressor.apply(statistics)
        except ValueError as refusal:
            if not any(reason in str(refusal) for reason in REFUSALS):
                raise
            pytest.skip(str(refusal))
        results.append(logits_of(compressed, reordered(inputs_for(target), order)))
    assert_rounding(results[1], results[0])


@pytest.mark.parametrize("routing", ["map", "reduce"])
def test_every_experts_implementation_computes_the_same(target: Target, routing) -> None:
    if not target.implementations:
        pytest.skip("its experts have no choice of an implementation")
    model = compressor_for(build(target), MSMoE(num_experts=4, routing=routing), target).apply()
    results = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        results[implementation] = logits_of(model, inputs_for(target))
    assert_rounding(results["grouped_mm"], results["eager"])
    assert_rounding(results["batched_mm"], results["eager"])
