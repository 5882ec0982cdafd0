"""The byte budget as a method: sizes, fallbacks, order, reload, streaming and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.surgeons import find_blocks
from tests.expert_order import edited, permute_experts, reordered
from tests.test_reload import assert_same_tensors, move_out_of_the_file
from tests.tiny_models import TARGETS, Target, build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")

LANGUAGE = [pytest.param(target, id=target.name) for target in TARGETS if target.inputs == "input_ids"]
SIZES = {"intermediate_size": 48, "moe_intermediate_size": 48}


def compressor_for(model, method, target: Target | str, order_E=None, **kwargs) -> MoECompressor:
    data = [inputs_for(target, rows=4, length=32, seed=seed) for seed in range(3)]
    data = data if order_E is None else [reordered(batch, order_E) for batch in data]
    return MoECompressor.from_pretrained(model, method, CalibrationConfig(data), progress=False, **kwargs)


def stored(compressor: MoECompressor) -> int:
    """Numbers of all expert matrices after the cut."""
    hidden = {found.info.name: found.info.hidden_size for found in compressor.source.blocks}
    return sum(
        plan.sizes.numbers(expert, hidden[name])
        for name, plan in compressor.plan.blocks.items()
        for expert in range(plan.num_groups)
    )


def original(compressor: MoECompressor) -> int:
    return sum(f.info.num_experts * f.info.expert_multiply_adds for f in compressor.source.blocks)


@pytest.mark.parametrize("target", LANGUAGE)
def test_the_whole_budget_changes_nothing(target: Target) -> None:
    model = build(target)
    expected = logits_of(model, inputs_for(target))
    compressor = compressor_for(model, ByteBudget(runs_in="transformers", share=1.0), target)
    actual = logits_of(compressor.apply(), inputs_for(target))
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert stored(compressor) == original(compressor)


@pytest.mark.parametrize("target", LANGUAGE)
def test_neurons_that_give_nothing_go_and_change_nothing(target: Target) -> None:
    """Two thirds of each expert's neurons, with a down projection of zeros; nothing is refitted."""
    model = build(target, **SIZES)
    blocks = {found.info.name: found.surgeon.experts(found.module(model)) for found in find_blocks(model)}
    if any(experts.fixed_neurons for experts in blocks.values()):
        pytest.skip("the neurons of its experts cannot go")
    with torch.no_grad():
        for experts in blocks.values():
            for down_HI in experts.down:
                down_HI[:, torch.randperm(experts.intermediate_size)[experts.intermediate_size // 3 :]] = 0.0
    # Of the calibration data: a neuron that none of its tokens activates may go too.
    inputs = inputs_for(target, rows=4, length=32, seed=0)
    expected = logits_of(model, inputs)
    stage = ByteBudget(runs_in="transformers", share=0.36, formats=["narrow"], refit=False)
    compressor = compressor_for(model, stage, target)
    actual = logits_of(compressor.apply(), inputs)
    assert stored(compressor) <= 0.36 * original(compressor)
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("target", LANGUAGE)
def test_the_budget_is_kept_and_nearly_spent(target: Target, tmp_path: Path) -> None:
    model = build(target)
    compressor = compressor_for(model, ByteBudget(runs_in="transformers", share=0.5), target)
    model = compressor.apply()
    # What is left over is less than the largest single step, from empty to untouched.
    largest = max(found.info.expert_multiply_adds for found in compressor.source.blocks)
    assert 0.5 * original(compressor) - largest < stored(compressor) <= 0.5 * original(compressor)
    expected = logits_of(model, inputs_for(target))
    compressor.save_pretrained(tmp_path / "out")
    loaded = getattr(transformers, target.architecture).from_pretrained(tmp_path / "out")
    assert_same_tensors(loaded, model)
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, inputs_for(target)), expected)


@pytest.mark.parametrize("method", [[MSMoE(num_experts=6)], [ExpertPruning(num_experts=6)]], ids=["map", "prune"])
def test_it_composes_after_merging_and_pruning(method) -> None:
    compressor = compressor_for(
        build("qwen3_moe"), [*method, ByteBudget(runs_in="transformers", share=0.5)], "qwen3_moe"
    )
    compressor.apply()
    assert all(plan.num_groups == 6 for plan in compressor.plan.blocks.values())
    assert stored(compressor) <= 0.5 * original(compressor)


def test_the_order_of_experts_does_not_matter() -> None:
    order_E, results, widths = [2, 0, 3, 1, 5, 7, 4, 6], [], []
    for order in (list(range(8)), order_E):
        model = build("mixtral")
        permute_experts(model, order)
        compressor = compressor_for(model, ByteBudget(runs_in="transformers", share=0.4), "mixtral", order)
        results.append(logits_of(compressor.apply(), inputs_for("mixtral")))
        widths.append([plan.sizes.widths for plan in compressor.plan.blocks.values()])
    assert widths[1] == [tuple(before[e] for e in order_E) for before in widths[0]]
    assert (results[1] - results[0]).abs().max() <= 2e-4 * results[0].abs().max()


def test_a_target_size_is_the_size_of_the_file(tmp_path: Path) -> None:
    model = build("mixtral", hidden_size=256, intermediate_size=512)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    compressor = compressor_for(model, ByteBudget(runs_in="transformers", target_size=size // 2), "mixtral")
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    largest = 4 * compressor.source.blocks[0].info.expert_multiply_adds
    assert size // 2 - largest < written <= size // 2
    assert compressor.measured().after.bytes <= size // 2
    # The rest is for the headers.
    assert 0 < size // 2 - compressor.preview().after.bytes < 0.0013 * size


@pytest.mark.parametrize("share", [0.9, 0.5])
@pytest.mark.parametrize("layers", [[1], None], ids=["one", "all"])
def test_a_budget_counts_what_an_earlier_stage_removed(layers: list[int] | None, share: float) -> None:
    stages = [
        ExpertPruning(num_experts=2, saliency="reap", layers=layers),
        ByteBudget(runs_in="transformers", share=share),
    ]
    compressor = compressor_for(build("qwen3_moe", **SIZES), stages, "qwen3_moe")
    foretold = compressor.preview().after.bytes
    compressor.apply()
    assert 0.98 * foretold < compressor.measured().after.bytes <= foretold


def test_unseen_experts_are_kept_or_emptied() -> None:
    for unseen in ("keep", "prune"):
        model = build("qwen3_moe")
        compressor = MoECompressor.from_pretrained(
            model,
            ByteBudget(runs_in="transformers", share=0.6),
            CalibrationConfig([inputs_for("qwen3_moe", rows=1, length=6)], unseen=unseen),
            progress=False,
        )
        statistics = compressor.calibrate()
        compressor.apply(statistics)
        for name, block in statistics.blocks.items():
            widths = compressor.plan.blocks[name].sizes.widths
            assert block.unseen
            full = compressor.source.blocks[0].info.intermediate_size
            assert all(widths[expert] == (full if unseen == "keep" else 0) for expert in block.unseen)


def test_without_gradients_it_says_so_and_measures_output_errors() -> None:
    compressor = compressor_for(build("olmoe"), ByteBudget(runs_in="transformers", share=0.5, curvature=False), "olmoe")
    with pytest.warns(UserWarning, match="No gradient of the loss was observed at 3 of 3 blocks"):
        compressor.apply()
    assert stored(compressor) <= 0.5 * original(compressor)


def test_streaming_equals_memory_without_gradients(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    folders = []
    for engine in ("memory", "streaming"):
        method = ByteBudget(runs_in="transformers", share=0.5, curvature=False)
        folders.append(
            compressor_for(tmp_path / "model", method, "qwen3_moe", engine=engine, output_dir=tmp_path / engine).apply()
        )
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    assert_same_tensors(*models)


def test_equal_damage_is_spent_where_a_byte_saves_the_most() -> None:
    """An expert whose gradients are all zero costs nothing to empty, and is emptied first."""
    compressor = compressor_for(build("mixtral"), ByteBudget(runs_in="transformers", share=0.85), "mixtral")
    statistics = compressor.calibrate()

    def without_expert_3(name):
        sample = statistics.blocks[name].reservoir
        hit_S = (sample.index_SK == 3).any(-1)
        gradient = sample.gradient_SJH.masked_fill(hit_S[:, None, None], 0)
        return type(sample)(**{**vars(sample), "gradient_SJH": gradient})

    compressor.apply(edited(statistics, reservoir=without_expert_3))
    assert all(plan.sizes.widths[3] == 0 for plan in compressor.plan.blocks.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"Give exactly one of share, target_size; got none of them"),
        ({"share": 0.5, "target_size": "1GB"}, r"got share=0.5, target_size='1GB'"),
        ({"share": 0}, r"share=0 must be a number in \(0, 1\]"),
        ({"share": 1.5}, r"share=1.5 must be a number in \(0, 1\]"),
        ({"share": 0.5, "formats": ["narow"]}, r"formats='narow' is unknown; did you mean 'narrow'"),
        ({"share": 0.5, "formats": "narrow"}, r"formats='narrow' must be a list"),
        ({"target_size": "16 elephants"}, r"target_size='16 elephants' is not a size"),
    ],
)
def test_wrong_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        ByteBudget(runs_in="transformers", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"Give exactly one of rank, rank_ratio, energy; got none of them"),
        ({"rank": 8, "energy": 0.5}, r"got rank=8, energy=0.5"),
        ({"rank": 8, "base": "groups"}, r"did you mean 'group'"),
        ({"rank": 8, "density": 0}, r"density=0 must be a number in \(0, 1\]. Use None for no sparse part"),
    ],
)
def test_wrong_settings_of_one_rank(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankSparse(**settings)


def test_wrong_settings_for_a_model() -> None:
    model = build("mixtral")
    with pytest.raises(ValueError, match=r"target_size=1000 cannot be reached: without any expert"):
        compressor_for(model, ByteBudget(runs_in="transformers", target_size=1000), "mixtral")
    with pytest.raises(ValueError, match=r'base="group" keeps experts as differences from merged ones'):
        compressor_for(model, LowRankSparse(rank=8, base="group"), "mixtral")
    with pytest.raises(ValueError, match=r"base=\"group\" keeps every expert, but expert-pruning"):
        compressor_for(model, [ExpertPruning(num_experts=4), LowRankSparse(rank=8, base="group")], "mixtral")
    with pytest.raises(ValueError, match=r"low-rank-sparse cannot follow low-rank-sparse, which stores"):
        compressor_for(model, [LowRankSparse(rank=8), LowRankSparse(rank=8)], "mixtral")


def test_kept_experts_that_take_more_than_the_budget_are_an_error() -> None:
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=1, length=4)], unseen="keep")
    compressor = MoECompressor.from_pretrained(
        build("qwen3_moe"), ByteBudget(runs_in="transformers", share=0.05), data, progress=False
    )
    with pytest.raises(ValueError, match=r"is below the least that the experts can store"):
        compressor.apply()


def test_a_preset_is_what_a_user_gets_who_only_says_a_size() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressor = compressor_for(build("mixtral"), "byte-budget", "mixtral")
    assert compressor.recipe.stages == (ByteBudget(share=0.5),)
    assert compressor.recipe.stages[0].runs_in == "any"


def test_another_size_takes_the_same_survey() -> None:
    def forms(statistics, budget: float):
        compressor = compressor_for(build("mixtral"), ByteBudget(runs_in="transformers", share=budget), "mixtral")
        compressor.apply(statistics)
        return {name: plan.sizes for name, plan in compressor.plan.blocks.items()}

    statistics = compressor_for(build("mixtral"), ByteBudget(runs_in="transformers", share=0.5), "mixtral").calibrate()
    fresh = type(statistics)(statistics.blocks, statistics.calibration, statistics.source)
    forms(statistics, 0.5)
    (surveys,) = statistics.memo.values()
    assert forms(statistics, 0.3) == forms(fresh, 0.3)
    assert statistics.memo == {next(iter(statistics.memo)): surveys}
