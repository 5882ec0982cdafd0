"""Factorizing what cannot be factorized is refused with the rule, the values and the remedy; few tokens are enough."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from optimum_moe import CalibrationConfig, CompressionPlan, LowRankSparse, MoECompressor, MSMoE, Statistics
from optimum_moe.algorithms.low_rank import decompose
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.stages.base import BlockContext
from optimum_moe.surgeons import find_blocks
from tests.expert_order import edited
from tests.factor_methods import METHODS, compressor_for
from tests.mtp_checkpoints import save_with_mtp
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong") / "qwen3_moe"
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ModelSource) -> None:
        raise AssertionError("weights were read before the input was checked")

    monkeypatch.setattr(ModelSource, "load", fail)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankSparse(), r"Give exactly one of rank, rank_ratio, energy.*got none of them"),
        (lambda: LowRankSparse(rank=8, energy=0.9), r"exactly one .*got rank=8, energy=0.9"),
        (lambda: LowRankSparse(rank=8, rank_ratio=0.5), r"exactly one .*got rank=8, rank_ratio=0.5"),
        (lambda: LowRankSparse(rank=8.0), r"rank=8.0 must be an integer. .* use rank_ratio"),
        (lambda: LowRankSparse(rank=True), r"rank=True must be an integer"),
        (lambda: LowRankSparse(rank_ratio=1.5), r"rank_ratio=1.5 must be a number in \(0, 1\]"),
        (lambda: LowRankSparse(energy=float("nan")), r"energy=nan must be a number in \(0, 1\]"),
        (lambda: LowRankSparse(rank=8, density=0.0), r"density=0.0 must be .* Use None for no sparse part"),
        (lambda: LowRankSparse(rank=8, density="0.1"), r"density='0.1' must be a number"),
    ],
)
def test_impossible_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LowRankSparse(rank=72), r"rank=72 must be in 1..24 for a matrix of shape \(24, 64\). Use at most 24, or keep"),
        (LowRankSparse(rank=0), r"rank=0 must be in 1..24"),
        (LowRankSparse(rank=-8), r"rank=-8 must be in 1..24"),
        (LowRankSparse(rank=12), r"rank=12 must be a multiple of 8, which grouped matmuls need. Use 8 or 16"),
        (LowRankSparse(rank=8, density=0.001), r"density=0.001 of 24 rows keeps 0: .* or None for no sparse part"),
        (LowRankSparse(rank=8, layers=[3]), r"layers=\[3\] do not exist: the model has MoE blocks 0 to 2"),
        ([MSMoE(num_experts=4), LowRankSparse(rank=12)], r"rank=12 must be a multiple of 8"),
        ([LowRankSparse(rank=8), MSMoE(num_experts=4)], r"m-smoe cannot follow low-rank-sparse, which stores"),
        ([LowRankSparse(rank=8), LowRankSparse(rank=8)], r"low-rank-sparse cannot follow low-rank-sparse"),
    ],
)
def test_what_the_matrices_do_not_have(original: Path, never_loaded: None, method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoECompressor.from_pretrained(original, method, progress=False)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"stage": "low-rank-sparse", "rnak": 8}, r"Unknown field 'rnak'; did you mean 'rank'\?"),
        ({"stage": "low-rank", "rank": 8}, r"stage='low-rank' is unknown; did you mean 'low-rank-sparse'"),
        (
            {"stage": "m-smoe", "num_experts": 2},
            r"m-smoe cannot follow m-smoe: .* Use only one stage that merges",
        ),
        ({"rank": 8}, r"A recipe needs a field 'stage'"),
        ("low-rank-sparse", r"field 'stages' must be a list of mappings with a field 'stage', got .*'low-rank-sparse'"),
        ({"stage": "low-rank-sparse"}, r"exactly one of rank, rank_ratio, energy.*got none of them"),
    ],
)
def test_wrong_second_stages_of_a_recipe(
    original: Path, never_loaded: None, tmp_path: Path, second: Any, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    stages = [{"stage": "m-smoe", "num_experts": 4}, second]
    recipe.write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        MoECompressor.from_pretrained(original, recipe, progress=False)


def test_a_plan_without_its_factors(original: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Whether it was read back or kept by the compressor that made it."""
    first = compressor_for(build("qwen3_moe"), METHODS["map"], "qwen3_moe")
    first.apply()
    first.save_pretrained(tmp_path / "out")
    request.getfixturevalue("never_loaded")
    for plan in (first.plan, CompressionPlan.from_pretrained(tmp_path / "out")):
        second = MoECompressor.from_pretrained(original, METHODS["map"], progress=False)
        with pytest.raises(ValueError, match=r"factors themselves are in the checkpoint .* or pass statistics="):
            second.apply(plan=replace(plan, source={}))


def test_mtp_layers_cannot_be_cut_into_factors(never_loaded: None, tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "in", "deepseek_v3")
    for kind in ("uniform", "map"):
        with pytest.raises(
            ValueError, match=r'mtp="cut" merges or removes experts, and .* Pass mtp="copy" or mtp="dro'
        ):
            MoECompressor.from_pretrained(tmp_path / "in", METHODS[kind], mtp="cut", progress=False)


@pytest.mark.parametrize("option", ["copy", "drop"])
def test_mtp_layers_beside_factors(option: str, tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "in", "deepseek_v3")
    compressor = compressor_for(tmp_path / "in", METHODS["map"], "deepseek_v3", mtp=option, output_dir=tmp_path / "out")
    compressor.apply()
    assert (tmp_path / "out" / "model-mtp.safetensors").is_file() == (option == "copy")


def test_architectures_without_factors(never_loaded: None) -> None:
    model = build("vitpose_backbone")
    with pytest.raises(
        ValueError, match=r"cannot be factorized: each of its experts is one linear layer .* Merge them"
    ):
        MoECompressor.from_pretrained(model, LowRankSparse(rank=8), progress=False)


def with_tokens(statistics: Statistics, change: Callable[[torch.Tensor], torch.Tensor]) -> Statistics:
    observed = statistics.blocks
    return edited(
        statistics,
        reservoir=lambda name: replace(
            observed[name].reservoir, experts_input_SH=change(observed[name].reservoir.experts_input_SH.clone())
        ),
    )


def test_tokens_and_weights_that_are_not_finite() -> None:
    compressor = compressor_for(build("qwen3_moe"), LowRankSparse(rank=8), "qwen3_moe")
    broken = with_tokens(compressor.calibrate(), lambda tokens: tokens.index_fill_(0, torch.tensor([3]), float("nan")))
    with pytest.raises(
        ValueError, match=r"Expert \d of model.layers.0.mlp cannot be factorized. input_(rows_PX|gram_XX) holds NaN"
    ):
        compressor.apply(broken)
    model = build("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 2, 3] = torch.inf
    compressor = MoECompressor.from_pretrained(model, LowRankSparse(rank=8, whiten=False), progress=False)
    with pytest.raises(ValueError, match=r"down_proj \(block model.layers.1.mlp, expert 5\) holds infinity"):
        compressor.apply()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "switch_transformers"])
def test_few_tokens_make_singular_grams_and_finite_factors(family: str) -> None:
    data = CalibrationConfig([inputs_for(family, rows=1, length=5)], unseen="keep")
    compressor = MoECompressor.from_pretrained(build(family), LowRankSparse(rank=8), data, progress=False)
    model = compressor.apply()
    assert any(0 < count < 8 for b in compressor.statistics.blocks.values() for count in b.token_count_E.tolist())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert logits_of(model, inputs_for(family)).isfinite().all()


def test_an_expert_without_tokens_gets_the_plain_svd() -> None:
    model = build("qwen3_moe")
    compressor = compressor_for(model, LowRankSparse(rank=8), "qwen3_moe")
    statistics, found = compressor.calibrate(), find_blocks(model)[1]
    index_SK = statistics.blocks[found.info.name].reservoir.index_SK.clone()
    unseen = replace(statistics.blocks[found.info.name].reservoir, index_SK=index_SK.masked_fill(index_SK == 6, 8))
    block = found.module(model)
    context = BlockContext(
        info=found.info,
        experts=found.surgeon.experts(block),
        router=found.surgeon.router(block),
        generator=torch.Generator(),
        statistics=replace(statistics.blocks[found.info.name], reservoir=unseen),
        num_blocks=3,
    )
    with torch.no_grad():
        factors = compressor.recipe.stages[0].decide(context, None).factors
        seen, unseen_expert = factors.experts[5], factors.experts[6]
        for name, matrices in (("up", context.experts.up), ("down", context.experts.down)):
            plain = [decompose(matrices[expert].float()).truncated(8).densified() for expert in (5, 6)]
            form = unseen_expert.matrices[name]
            low_rank = form.tensors["u"].T @ form.tensors["v"]
            assert (low_rank - plain[1]).abs().max() <= 1e-5 * plain[1].abs().max()
            form = seen.matrices[name]
            assert (form.tensors["u"].T @ form.tensors["v"] - plain[0]).abs().max() > 1e-2 * plain[0].abs().max()


def test_out_of_memory_in_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt falls back to the CPU with the same result; where that fails too the error says what to do."""
    expected = compressor_for(build("qwen3_moe"), METHODS["uniform"], "qwen3_moe").apply().state_dict()
    real, calls = torch.linalg.eigh, [0]

    def sometimes(matrix: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", sometimes)
    actual = compressor_for(build("qwen3_moe"), METHODS["uniform"], "qwen3_moe").apply().state_dict()
    assert calls[0] == 2 * 3 * 8 * 3
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())

    def never(matrix: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", never)
    compressor = compressor_for(build("qwen3_moe"), METHODS["uniform"], "qwen3_moe")
    with pytest.raises(MemoryError, match=r"SVD of a 24 x 64 matrix needs about .* on cpu and on the CPU. Free memory"):
        compressor.apply()


def test_error_propagation_needs_an_observed_method(original: Path, never_loaded: None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    with pytest.raises(
        ValueError, match=r"error_propagation=True needs a recipe that observes layers, but low-rank-sparse needs no"
    ):
        MoECompressor.from_pretrained(folder, LowRankSparse(rank=8, whiten=False), error_propagation=True)
