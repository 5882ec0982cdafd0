"""Merged experts with refitted down projections, and those that are made of their members' neurons."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertMerging, LowRankSparse, MoECompressor, Statistics, verify
from optimum_moe.stages import Stage
from optimum_moe.surgeons import find_blocks
from tests.block_output import output_of
from tests.expert_order import edited, make_copies, permute_experts, reordered
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient")

LABELS = [0, 1, 2, 0, 3, 2, 1, 3]
UNCHANGED = list(range(8))
NEURONS = ExpertMerging(num_experts=4, merge="neurons", refit="block")


def data_for(target: Target | str, order_E: list[int] = UNCHANGED) -> list[dict[str, torch.Tensor]]:
    return [reordered(inputs_for(target, rows=8, length=64, seed=seed), order_E) for seed in range(3)]


def compressor_for(model, method: Stage | list[Stage], target: Target | str, order_E=UNCHANGED) -> MoECompressor:
    return MoECompressor.from_pretrained(model, method, CalibrationConfig(data_for(target, order_E)), progress=False)


def grouped(statistics: Statistics, **fields) -> Statistics:
    """Statistics that make the copies the groups of M-SMoE."""
    same_EE = (torch.tensor(LABELS)[:, None] == torch.tensor(LABELS)).double()
    frequency_E = torch.tensor([9.0, 2.0, 8.0, 1.0, 7.0, 3.0, 6.0, 4.0], dtype=torch.float64)
    return edited(statistics, router_gram_EE=same_EE, token_count_E=frequency_E, **fields)


def refuses_refit(target: Target) -> bool:
    model = build(target)
    for found in find_blocks(model):
        experts = found.surgeon.experts(found.module(model))
        scaled = experts.scales_input and found.info.top_k > 1
        if scaled or experts.fixed_neurons or experts.finish is not None or found.info.no_factors:
            return True
    return False


def fewest_tokens(statistics: Statistics) -> int:
    """Sampled tokens of the group that has the fewest."""
    found = []
    for block in statistics.blocks.values():
        labels_N = torch.tensor([*LABELS, -1])[block.reservoir.index_SK.clamp(max=len(LABELS))]
        found += [int((labels_N == group).any(-1).sum()) for group in range(4)]
    return min(found)


@pytest.mark.parametrize("target", every_target())
@pytest.mark.parametrize("merge", ["mean", "neurons"])
def test_copies_of_experts_merge_without_loss(target: Target, merge) -> None:
    if refuses_refit(target):
        with pytest.raises(ValueError, match="cannot be refitted"):
            compressor_for(build(target), dataclasses.replace(NEURONS, merge=merge), target)
        return
    if not target.curvature:
        with pytest.raises(ValueError, match="through which no backward pass can go"):
            compressor_for(build(target), dataclasses.replace(NEURONS, merge=merge), target).apply()
        return
    model = build(target)
    make_copies(model, LABELS)
    # A neuron that no calibration token activates may go with its copy.
    inputs = data_for(target)[0]
    expected = logits_of(model, inputs)
    compressor = compressor_for(model, dataclasses.replace(NEURONS, merge=merge), target)
    statistics = grouped(compressor.calibrate())
    if merge == "neurons" and fewest_tokens(statistics) < 2 * compressor.source.blocks[0].info.intermediate_size:
        pytest.skip("of a group with few tokens for its neurons it is not determined which of them are needed")
    model = compressor.apply(statistics)
    assert all(block.num_groups == 4 and block.refits_down for block in compressor.plan.blocks.values())
    # Least squares of a target that the experts give already.
    assert (logits_of(model, inputs) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("method", [NEURONS, dataclasses.replace(NEURONS, merge="mean")], ids=["neurons", "mean"])
@pytest.mark.parametrize("target", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_each_refit_lowers_the_error_on_the_tokens_that_it_was_fitted_to(target: str, method) -> None:
    inputs, errors = inputs_for(target, rows=16, length=64), {}
    original = build(target)
    name = find_blocks(original)[0].info.name
    expected = output_of(original, name, inputs)
    data = CalibrationConfig([inputs])
    statistics = MoECompressor.from_pretrained(original, method, data, progress=False).calibrate()
    # Without gradients all tokens count the same.
    sample = dataclasses.replace(statistics.blocks[name].reservoir, gradient_SJH=None)
    statistics = edited(
        statistics, reservoir=lambda block: sample if block == name else statistics.blocks[block].reservoir
    )
    for refit in ("group", "block"):
        changed = dataclasses.replace(method, refit=refit)
        model = MoECompressor.from_pretrained(build(target), changed, data, progress=False).apply(statistics)
        errors[refit] = float((output_of(model, name, inputs) - expected).square().sum())
    if method.merge == "mean":
        model = MoECompressor.from_pretrained(build(target), ExpertMerging(num_experts=4), data, progress=False)
        errors["none"] = float((output_of(model.apply(statistics), name, inputs) - expected).square().sum())
        assert errors["group"] < errors["none"]
    assert errors["block"] < errors["group"]


@pytest.mark.parametrize("target", ["qwen3_moe", "deepseek_v3", "gpt_oss", "aria", "dbrx", "switch_transformers"])
def test_saved_equals_loaded_and_verifies(target: str, tmp_path) -> None:
    build(target).save_pretrained(tmp_path / "original")
    data = CalibrationConfig(data_for(target))
    compressor = MoECompressor.from_pretrained(tmp_path / "original", NEURONS, data, progress=False)
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "merged")
    loaded = type(build(target)).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(loaded, inputs_for(target)), logits_of(model, inputs_for(target)))
    report = verify(tmp_path / "merged", against=tmp_path / "original")
    assert report.passed, report.failures


def test_streaming_writes_the_same_tensors(tmp_path) -> None:
    build("gpt_oss").save_pretrained(tmp_path / "original")
    method, tensors = dataclasses.replace(NEURONS, similarity="router_weights"), []
    for engine in ("memory", "streaming"):
        folder = tmp_path / engine
        compressor = MoECompressor.from_pretrained(
            tmp_path / "original",
            method,
            CalibrationConfig(data_for("gpt_oss")),
            engine=engine,
            output_dir=folder if engine == "streaming" else None,
            progress=False,
        )
        statistics = compressor.calibrate()
        sampled = {n: dataclasses.replace(b.reservoir, gradient_SJH=None) for n, b in statistics.blocks.items()}
        compressor.apply(edited(statistics, reservoir=sampled.__getitem__))
        if engine == "memory":
            compressor.save_pretrained(folder)
        tensors.append(type(build("gpt_oss")).from_pretrained(folder).state_dict())
    assert all(torch.equal(tensors[0][name], tensor) for name, tensor in tensors[1].items())


def test_merged_neurons_keep_gate_up_and_biases(tmp_path) -> None:
    """Each neuron of a merged expert is one of a member, and all of an expert that is alone stay."""
    model = build("gpt_oss")
    found = find_blocks(model)[0]
    before = found.surgeon.experts(found.module(model))
    before = {n: [v.clone() for v in getattr(before, n)] for n in ("gate", "up", "gate_bias", "up_bias")}
    compressor = compressor_for(model, NEURONS, "gpt_oss")
    merged = compressor.apply()
    plan = compressor.plan.blocks[found.info.name]
    after = found.surgeon.experts(found.module(merged))
    assert plan.sources_GI is not None
    for group, row_I in enumerate(plan.sources_GI.tolist()):
        for place, source in enumerate(row_I):
            expert, neuron = divmod(source, found.info.intermediate_size)
            assert plan.labels_E[expert] == group
            for name, values in before.items():
                assert torch.equal(getattr(after, name)[group][place], values[expert][neuron])


def test_the_order_of_experts_does_not_matter() -> None:
    order_E, results = [2, 0, 3, 1, 5, 7, 4, 6], []
    for order in (UNCHANGED, order_E):
        model = build("qwen3_moe")
        permute_experts(model, order)
        method = dataclasses.replace(NEURONS, similarity="damage", grouping="complete_linkage")
        results.append(logits_of(compressor_for(model, method, "qwen3_moe", order).apply(), inputs_for("qwen3_moe")))
    assert (results[1] - results[0]).abs().max() <= 1e-3 * results[0].abs().max()


def test_a_stage_after_the_merge_sees_the_refitted_experts() -> None:
    model = build("qwen3_moe")
    alone = compressor_for(model, NEURONS, "qwen3_moe").apply()
    expected = logits_of(alone, inputs_for("qwen3_moe"))
    whole = [NEURONS, LowRankSparse(energy=1.0, density=None, whiten=False)]
    then = compressor_for(build("qwen3_moe"), whole, "qwen3_moe").apply()
    assert (logits_of(then, inputs_for("qwen3_moe")) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refit": "block", "routing": "reduce"}, 'Pass routing="map"'),
        ({"merge": "neurons"}, 'Pass refit="block"'),
        ({"merge": "median"}, "merge"),
        ({"refit": "down"}, "refit"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertMerging(num_experts=4, **settings)


def test_differences_from_experts_of_other_neurons_are_refused() -> None:
    with pytest.raises(ValueError, match='Pass merge="mean"'):
        compressor_for(build("qwen3_moe"), [NEURONS, LowRankSparse(rank=8, density=None, base="group")], "qwen3_moe")


def test_experts_with_fixed_neurons_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r'protect=\["model.layers.0.self_attention.experts"\]'):
        compressor_for(build("jetmoe"), NEURONS, "jetmoe").apply()
