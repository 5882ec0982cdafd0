"""Numbers as users give them: numpy's, ranges, percent, sizes; seeds; and what statistics have to hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from optimum_moe import (
    ByteBudget,
    CalibrationConfig,
    ExpertPruning,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    Statistics,
    register_saliency,
)
from optimum_moe.cli.inspect import inspected
from optimum_moe.recipe import Recipe, calibration_config, parse_recipe
from optimum_moe.records import digest
from optimum_moe.recovery_settings import Recovery
from optimum_moe.settings import percent, plain, token_count
from optimum_moe.stages import Stage
from optimum_moe.stages.counts import parse_size
from tests.tiny_checkpoints import documents, save_checkpoint
from tests.tiny_models import build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("numbers") / "qwen3_moe")


@pytest.fixture(scope="module")
def statistics(checkpoint: Path) -> Statistics:
    return opened(checkpoint, ExpertPruning(num_experts=4), TEXT).calibrate()


TEXT = CalibrationConfig(documents(count=6, words=60), sequence_length=64)


def opened(model: Any, method: Any, calibration: Any = None, **settings: Any) -> MoECompressor:
    return MoECompressor.from_pretrained(model, method, calibration, progress=False, **settings)


def counts(model: Any, method: Stage) -> set[int]:
    return {after for _, after in opened(model, method).preview().counts.values()}


def weight_files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.int64(4), 4),
        (np.float32(0.07), 0.07),
        (np.float64(0.1), 0.1),
        (torch.tensor(3), 3),
        (range(0, 6, 2), [0, 2, 4]),
        (np.arange(2), [0, 1]),
        ({2, 0}, [0, 2]),
        ((np.int8(1), 2), (1, 2)),
        ("*.0.*", "*.0.*"),
    ],
)
def test_settings_become_plain(given: Any, expected: Any) -> None:
    found = plain(given)
    assert found == expected
    assert type(found) is type(expected)
    assert yaml.safe_load(yaml.safe_dump(found)) == json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("method", "same"),
    [
        (ExpertPruning(num_experts=np.int64(4), layers=range(2)), ExpertPruning(num_experts=4, layers=[0, 1])),
        (MSMoE(keep_ratio=np.float32(0.3), layers=np.array([0])), MSMoE(keep_ratio=0.3, layers=[0])),
        (MSMoE(keep_ratio="30%"), MSMoE(keep_ratio=0.3)),
        (LowRankSparse(rank=np.int32(8), density="12.5 %"), LowRankSparse(rank=8, density=0.125)),
        (ByteBudget(runs_in="transformers", share="50%"), ByteBudget(runs_in="transformers", share=0.5)),
        (LowRankSparse(energy=np.float64(0.9)), LowRankSparse(energy=0.9)),
        (LowRankSparse(rank_ratio=torch.tensor(0.25)), LowRankSparse(rank_ratio=0.25)),
    ],
)
def test_methods_take_numpy_ranges_and_percent(method: Stage, same: Stage) -> None:
    assert method == same
    recipe = Recipe((method,)).to_yaml()
    assert recipe == Recipe((same,)).to_yaml()
    assert parse_recipe(yaml.safe_load(recipe)).stages == (same,)


@pytest.mark.parametrize("layers", [[0.5], [True], "0", 1, iter([0]), ["0"]])
def test_layers_are_integers(checkpoint: Path, layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layers=.* must be lists: \[0, 1\]"):
        opened(checkpoint, MSMoE(num_experts=4, layers=layers))


@pytest.mark.parametrize(
    ("experts", "ratio", "kept"), [(100, 0.07, 7), (6, 5 / 6, 5), (100, 0.29, 29), (9, 1 / 3, 3), (8, 1e-9, 1)]
)
def test_a_ratio_is_meant_as_it_is_written(experts: int, ratio: float, kept: int) -> None:
    model = build("qwen3_moe", num_experts=experts, num_hidden_layers=1)
    assert counts(model, MSMoE(keep_ratio=ratio)) == {kept}
    assert counts(model, MSMoE(keep_ratio=np.float32(ratio))) == {kept}


def test_a_ratio_that_rounds_up_to_everything_is_refused(checkpoint: Path) -> None:
    for method in (ExpertPruning, MSMoE):
        for ratio in (0.95, 0.999, "99%"):
            with pytest.raises(ValueError, match=r"keep_ratio=0\.9\d* of 8 experts rounds up to all .* most 0\.875\."):
                opened(checkpoint, method(keep_ratio=ratio))
        assert counts(checkpoint, method(keep_ratio=0.875)) == {7}


@pytest.mark.parametrize(
    "method",
    [
        ExpertPruning(num_experts=8),
        MSMoE(keep_ratio=1.0),
        ByteBudget(runs_in="transformers", share=1.0),
        LowRankSparse(rank_ratio=1.0),
    ],
)
def test_what_removes_nothing_by_request_is_said(checkpoint: Path, method: Stage) -> None:
    with pytest.warns(UserWarning, match=rf"{method.name} with .*=.* removes nothing of [\d,]+ parameters"):
        opened(checkpoint, method)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1.5GB", 1_500_000_000),
        ("1.5GiB", 1_610_612_736),
        ("16G", 16_000_000_000),
        ("2 TB", 2 * 10**12),
        (1e18, 10**18),
        (np.int64(7), 7),
        (np.float32(1e6), 1_000_000),
    ],
)
def test_sizes(size: Any, expected: int) -> None:
    assert parse_size(size) == expected


def test_a_percentage_is_a_share_of_the_model(checkpoint: Path) -> None:
    size = inspected(str(checkpoint))["bytes"]
    for method in (ExpertPruning, MSMoE, ByteBudget):
        share, number = method(target_size="70%"), method(target_size=int(size * 7 / 10))
        assert opened(checkpoint, share).preview() == opened(checkpoint, number).preview()
    with pytest.raises(ValueError, match=r"max_memory='50%' is not a size"):
        opened(checkpoint, MSMoE(num_experts=4), output_dir="x", engine="streaming", max_memory="50%")


@pytest.mark.parametrize("method", [ExpertPruning, MSMoE, ByteBudget])
@pytest.mark.parametrize("size", ["16GB", "100%", "150%"])
def test_a_size_above_the_models_says_so(checkpoint: Path, method: type[Stage], size: str) -> None:
    with pytest.raises(ValueError, match=rf"target_size='{size}' is [\d,]+ bytes, .* only [\d,]+: there is"):
        opened(checkpoint, method(target_size=size))


@pytest.mark.parametrize("engine", ["memory", "streaming"])
@pytest.mark.parametrize("method", [ExpertPruning, MSMoE, ByteBudget])
def test_a_target_size_counts_headers_and_maps(
    checkpoint: Path, tmp_path: Path, method: type[Stage], engine: str
) -> None:
    target = int(0.7 * weight_files(checkpoint))
    opened(checkpoint, method(target_size=target), TEXT, output_dir=tmp_path / "out", engine=engine).apply()
    assert 0.85 * target < weight_files(tmp_path / "out") <= target


def test_inspect_and_preview_agree_on_flops(checkpoint: Path) -> None:
    for folder in (checkpoint, save_checkpoint(checkpoint.parent / "gpt_oss", "gpt_oss")):
        before = opened(folder, MSMoE(num_experts=4)).preview().before
        assert inspected(str(folder))["flops_per_token"] == before.flops_per_token


@pytest.mark.parametrize(
    ("calibration", "seed", "recipe", "expected"),
    [
        (["text"], None, {}, (0, 0)),
        (["text"], 3, {}, (3, 3)),
        (CalibrationConfig(["text"]), 3, {}, (3, 3)),
        (CalibrationConfig(["text"], seed=5), 3, {}, (5, 3)),
        (CalibrationConfig(["text"], seed=0), 3, {}, (0, 3)),
        ({"source": ["text"], "seed": 5}, 3, {}, (5, 3)),
        ({"source": ["text"]}, None, {"seed": 7}, (7, 7)),
        (["text"], None, {"seed": 7, "calibration": {"seed": 8}}, (8, 7)),
        (["text"], np.int64(3), {"seed": 7, "calibration": {"seed": 8}}, (3, 3)),
        (None, 3, {"calibration": {"source": ["text"], "seed": 8}}, (3, 3)),
    ],
)
def test_which_seed_counts(
    checkpoint: Path, calibration: Any, seed: Any, recipe: dict[str, Any], expected: tuple[int, int]
) -> None:
    made = parse_recipe({"stage": "m-smoe", "num_experts": 4, **recipe})
    compressor = opened(checkpoint, made, calibration, seed=seed)
    assert compressor.calibration is not None
    assert (compressor.calibration.seed, compressor.seed) == expected


def test_what_a_user_says_of_calibration_goes_before_the_recipe() -> None:
    recipe = parse_recipe({"stage": "m-smoe", "num_experts": 4, "calibration": {"max_tokens": 5000, "batch_size": 2}})
    config = calibration_config(recipe, {"source": ["text"], "max_tokens": 1000}, None)
    assert config is not None
    assert (config.max_tokens, config.batch_size) == (1000, 2)


def test_the_run_seed_draws_the_calibration_sample(checkpoint: Path) -> None:
    text = CalibrationConfig(documents(), sequence_length=32, max_tokens=64)
    hashes = [
        opened(checkpoint, ExpertPruning(num_experts=4), text, seed=seed).calibrate().calibration["hash"]
        for seed in (None, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("seed", [-1, 1.5, True, "3", 2**32])
def test_a_seed_is_checked_before_anything_is_read(checkpoint: Path, seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed=.* is out of range\. Pass an integer of at (least 0|most 4294967295)"):
        opened(checkpoint, MSMoE(num_experts=4), ["text"], seed=seed)


def test_calibration_takes_numpy_counts() -> None:
    config = CalibrationConfig(["a"], max_tokens=np.int64(64), sequence_length=np.int32(8), seed=np.int64(1))
    assert [type(n) for n in (config.max_tokens, config.sequence_length, config.seed)] == [int] * 3


def rewritten(statistics: Statistics, folder: Path, change: Any) -> Path:
    """Statistics on disk as another version would have written them, digest and all."""
    from safetensors.torch import load_file, save_file

    statistics.save_pretrained(folder)
    path, file = folder / "statistics.json", folder / "statistics" / "tensors.safetensors"
    record, tensors = json.loads(path.read_text(encoding="utf-8")), load_file(file)
    change(record, tensors)
    save_file(tensors, file)
    del record["digest"]
    path.write_text(json.dumps({**record, "digest": digest(record, tensors)}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda record, tensors: tensors.pop("1.router_sum_E"), "1.router_sum_E"),
        (lambda record, tensors: tensors.pop("0.reservoir.router_input_SH"), "0.reservoir.router_input_SH"),
        (lambda record, tensors: tensors.pop("0.reservoir.index_SK"), "index_SK"),
        (lambda record, tensors: record.pop("calibration"), "calibration"),
        (lambda record, tensors: record["blocks"][0].pop("num_tokens"), "num_tokens"),
    ],
)
def test_statistics_of_another_version_name_what_they_lack(
    statistics: Statistics, tmp_path: Path, change: Any, field: str
) -> None:
    with pytest.raises(ValueError, match=rf"statistics in .* lack a field .*{field}.* Observe the model again"):
        Statistics.from_pretrained(rewritten(statistics, tmp_path, change))


def test_statistics_made_by_hand_are_checked(checkpoint: Path, statistics: Statistics) -> None:
    def replaced(**fields: Any) -> Statistics:
        blocks = {name: dataclasses.replace(block, **fields) for name, block in statistics.blocks.items()}
        return dataclasses.replace(statistics, blocks=blocks)

    first = dict(list(statistics.blocks.items())[:1])
    empty = {f.name: torch.empty(0, 2) for f in dataclasses.fields(next(iter(first.values())).reservoir)}
    no_sample = dataclasses.replace(next(iter(first.values())).reservoir, **empty)
    for wrong, method, message in (
        (dataclasses.replace(statistics, blocks=first), ExpertPruning(num_experts=4), r"lack model\.layers\.1\.mlp"),
        (replaced(gated_norm_sum_E=None), ExpertPruning(num_experts=4), r"have no gated_norm_sum_E"),
        (
            replaced(token_count_E=torch.ones(4)),
            ExpertPruning(num_experts=4),
            r"have 4 experts, but .* of its 8",
        ),
        (
            replaced(reservoir=no_sample),
            ByteBudget(runs_in="transformers", share=0.5),
            r"reservoir_tokens=0 keeps none",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            opened(checkpoint, method).apply(wrong)


@pytest.mark.parametrize(
    "method",
    [
        ByteBudget(runs_in="transformers", share=0.5),
        LowRankSparse(rank=8),
        MSMoE(num_experts=4, routing="reduce"),
        [MSMoE(num_experts=4), LowRankSparse(rank=8)],
    ],
)
def test_a_method_that_needs_a_sample_is_given_one(checkpoint: Path, method: Any) -> None:
    with pytest.raises(ValueError, match=r"needs sampled tokens .* reservoir_tokens=0 keeps none"):
        opened(checkpoint, method, CalibrationConfig(["text"], reservoir_tokens=0))


def test_a_criterion_that_reads_what_is_not_observed_is_told_what_is() -> None:
    def absent(output_sum_E: torch.Tensor) -> torch.Tensor:
        return output_sum_E

    message = r"saliency 'of an absent field': parameter='output_sum_E' is unknown; did you mean 'output_\w+_E'"
    with pytest.raises(ValueError, match=message):
        register_saliency("of an absent field")(absent)


def test_percent() -> None:
    assert [percent(text) for text in ("7%", " 12.5 % ", "half", 0.5, None)] == [0.07, 0.125, "half", 0.5, None]


@pytest.mark.parametrize(
    ("given", "tokens"),
    [("300k", 300_000), ("1.5M", 1_500_000), ("2_048", 2048), ("65,536", 65536), (7, 7), (None, None)],
)
def test_numbers_of_tokens_as_texts(given: Any, tokens: int | None) -> None:
    assert token_count(given) == tokens
    assert CalibrationConfig("corpus.txt", sequence_length=2, max_tokens=given).max_tokens == tokens
    if tokens is not None:
        assert Recovery(max_tokens=given).max_tokens == tokens


def test_texts_that_are_no_number_of_tokens() -> None:
    for wrong in ("many", "3 kg", "-5", "1e6"):
        with pytest.raises(ValueError, match=rf"max_tokens='{wrong}' is out of range"):
            CalibrationConfig("corpus.txt", max_tokens=wrong)
