"""A good checkpoint passes every check, and whatever is changed in it is reported by the right one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_moe import CalibrationConfig, CompressionPlan, MoECompressor, verify
from tests.mtp_checkpoints import PREFIXES, save_with_mtp
from tests.quantized_checkpoints import edit_config, to_fp8, to_mxfp4
from tests.test_reload import METHODS
from tests.tiny_models import Target, build, by_name, every_target, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

ALONE = ["files", "side files", "plan", "config", "keys", "counts", "shapes", "reload"]
ALL = [*ALONE[:-1], "experts", "routers", "other tensors", "mtp layers", "reload"]
SHARD = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
ATTENTION = "model.layers.2.self_attn.q_proj.weight"


def compress(original: Path, out: Path, method: str = "map", target: str = "qwen3_moe", **settings: Any) -> Path:
    data = [inputs_for(by_name(target), rows=4, length=32, seed=seed) for seed in range(3)]
    shard_size = settings.pop("max_shard_size", "5GB")
    compressor = MoECompressor.from_pretrained(
        original, METHODS[method], CalibrationConfig(data), progress=False, **settings
    )
    compressor.apply()
    return compressor.save_pretrained(out, max_shard_size=shard_size)


def failed(report: Any) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original and what four methods make of it."""
    folder = tmp_path_factory.mktemp("verify")
    build("qwen3_moe").save_pretrained(folder / "original")
    for method in ("map", "reduce", "adaptive", "prune"):
        compress(folder / "original", folder / method, method)
    return folder


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda method: Path(shutil.copytree(folders / method, tmp_path / method))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def flip(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change the last bit of one number."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[17] = torch.nextafter(flat[17], torch.tensor(torch.inf))

    return change


@pytest.mark.parametrize("method", ["map", "reduce", "adaptive", "protected", "prune"])
@pytest.mark.parametrize("target", every_target())
def test_a_good_checkpoint_passes(target: Target, method: str, tmp_path: Path) -> None:
    if target.refuses(method):
        pytest.skip(target.refuses(method))
    build(target).save_pretrained(tmp_path / "original")
    out = compress(tmp_path / "original", tmp_path / "out", method, target.name)
    report = verify(out, tmp_path / "original", inputs=inputs_for(target))
    assert report.passed, str(report)
    assert [check.name for check in report.checks] == ALL
    numbers = {name: int(report[name].note.split()[0]) for name in ("experts", "routers", "other tensors")}
    assert min(numbers.values()) >= 2
    assert sum(numbers.values()) >= len(build(target).state_dict()) / 2


@pytest.mark.parametrize("method", ["map", "prune"])
def test_without_the_original_only_what_is_in_the_folder_is_checked(
    method: str, folders: Path, copied: Callable[[str], Path]
) -> None:
    report = verify(folders / method)
    assert report.passed
    assert [check.name for check in report.checks] == ALONE
    out = copied(method)
    edit(out, flip(EXPERT))
    assert verify(out).passed


@pytest.mark.parametrize("method", ["map", "reduce", "adaptive", "prune"])
@pytest.mark.parametrize(
    ("name", "check"),
    [
        (EXPERT, "experts"),
        (ROUTER, "routers"),
        (ATTENTION, "other tensors"),
        ("model.norm.weight", "other tensors"),
        ("lm_head.weight", "other tensors"),
    ],
)
def test_one_bit_of_one_number(
    method: str, name: str, check: str, folders: Path, copied: Callable[[str], Path]
) -> None:
    out = copied(method)
    edit(out, flip(name))
    report = verify(out, folders / "original")
    assert failed(report) == {check}
    assert len(report[check].failures) == 1
    assert "1 of " in report[check].failures[0]
    if check == "experts":
        assert "experts 2 (was " in report[check].failures[0]
    assert not report.passed
    assert "FAILED (1)" in str(report)


@pytest.mark.parametrize("method", ["map", "reduce", "prune"])
def test_swapped_experts(method: str, folders: Path, copied: Callable[[str], Path]) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate", "up", "down"):
            names = [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in (0, 3)]
            tensors[names[0]], tensors[names[1]] = tensors[names[1]].clone(), tensors[names[0]].clone()

    out = copied(method)
    edit(out, swap)
    report = verify(out, folders / "original")
    assert failed(report) == {"experts"}
    assert len(report["experts"].failures) == 2
    for text in report["experts"].failures:
        assert text.startswith("model.layers.0.mlp.experts.")
        assert "experts 0 (was " in text
        assert ", 3 (was " in text
        assert " 1 (was " not in text


def edit_labels(out: Path) -> str:
    """Give two experts that are not dominant each other's group, in a plan that is valid by itself.

    Returns:
        Name of the block.
    """
    plan = CompressionPlan.from_pretrained(out)
    for name, block in plan.blocks.items():
        members = [e for e in range(8) if e not in block.dominants_G]
        pairs = [(a, b) for a in members for b in members if block.labels_E[a] != block.labels_E[b]]
        if pairs:
            order = list(range(8))
            a, b = pairs[0]
            order[a], order[b] = b, a
            labels_E = tuple(block.labels_E[e] for e in order)
            edited = replace(block, labels_E=labels_E, merge_weights_E=block.merge_weights_E[order])
            replace(plan, blocks={**plan.blocks, name: edited}).save_pretrained(out)
            return name
    raise AssertionError("no block has two merged groups")


def test_edited_labels_of_a_plan(folders: Path, copied: Callable[[str], Path]) -> None:
    out = copied("map")
    name = edit_labels(out)
    report = verify(out)
    assert failed(report) == {"plan"}
    assert report["plan"].failures[0].startswith(f"{name}.gate.expert_map says [")
    out = copied("reduce")
    name = edit_labels(out)
    report = verify(out, folders / "original")
    assert failed(report) == {"experts"}
    assert report["experts"].failures[0].startswith(f"{name}.experts.")


def test_a_plan_that_is_no_plan(folders: Path, copied: Callable[[str], Path]) -> None:
    out = copied("prune")
    record = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    record["blocks"][0]["labels"][record["blocks"][0]["dominants"][0]] = 3
    (out / "plan.json").write_text(json.dumps(record), encoding="utf-8")
    report = verify(out, folders / "original")
    assert not report["plan"].passed
    assert report["plan"].failures
    assert not report["experts"].ran
    assert "not checked" in str(report)
    (out / "plan.json").unlink()
    assert "No plan.json" in verify(out)["plan"].failures[0]


def test_another_expert_count_in_the_config(copied: Callable[[str], Path], folders: Path) -> None:
    out = copied("reduce")
    edit_config(out, num_experts=5, num_local_experts=5)
    report = verify(out, folders / "original")
    assert {"config", "counts", "shapes", "reload"} <= failed(report)
    assert report["config"].failures[0] == "model.layers.0.mlp has 5 experts by config.json, 4 by the plan"
    assert report["counts"].failures[0].startswith("model.layers.0.mlp has 4 by plan, 5 by config, 4 by experts.")
    assert len(report["counts"].failures) == 3


def test_spellings_of_the_expert_count_that_disagree(copied: Callable[[str], Path]) -> None:
    out = copied("reduce")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del config["num_local_experts"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = verify(out)
    assert failed(report) == {"config"}
    assert report["config"].failures == ("num_local_experts is None, other spellings say 4",)


def test_a_structure_that_is_not_the_plans(copied: Callable[[str], Path]) -> None:
    out = copied("map")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["blocks"]["model.layers.0.mlp"]["num_groups"] = 3
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = verify(out)
    assert {"config", "counts", "shapes"} <= failed(report)
    assert "the blocks of quantization_config are not those of the plan" in report["config"].failures
    out = copied("adaptive")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del config["fusion_config"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert failed(verify(out)) == {"config"}


def test_missing_and_strange_tensors(copied: Callable[[str], Path], folders: Path) -> None:
    out = copied("prune")
    edit(out, lambda tensors: tensors.pop(ATTENTION))
    report = verify(out, folders / "original")
    assert {"keys", "other tensors", "reload"} == failed(report)
    assert report["keys"].failures == (f"{ATTENTION} is missing",)
    assert report["reload"].failures == (f"{ATTENTION} was missing, and is random",)
    out = copied("reduce")
    edit(out, lambda tensors: tensors.update({"value_head.weight": torch.ones(2)}))
    report = verify(out, folders / "original")
    assert failed(report) == {"keys"}
    assert report["keys"].failures == ("value_head.weight belongs to no tensor of the model",)


def test_a_missing_expert(copied: Callable[[str], Path]) -> None:
    out = copied("reduce")
    edit(out, lambda tensors: [tensors.pop(EXPERT.replace("down", part)) for part in ("gate", "up", "down")])
    report = verify(out)
    assert {"counts", "shapes", "reload"} <= failed(report)
    text = "model.layers.1.mlp has 4 by plan, 4 by config, 3 by experts.gate_up_proj, 3 by experts.down_proj"
    assert report["counts"].failures == (text,)


def test_a_number_that_is_not_finite(copied: Callable[[str], Path], folders: Path) -> None:
    out = copied("map")
    edit(out, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    report = verify(out, folders / "original")
    assert failed(report) == {"other tensors", "reload"}
    assert report["reload"].failures == ("its outputs are not finite",)


def test_shards(folders: Path, tmp_path: Path) -> None:
    out = compress(folders / "original", tmp_path / "out", max_shard_size="100KB")
    assert verify(out, folders / "original").passed
    sorted(out.glob("model-*.safetensors"))[1].unlink()
    report = verify(out, folders / "original")
    assert "names shards that do not exist: model-00002" in report["files"].failures[0]
    assert [check.name for check in report.checks if check.ran] == ["files"]


def test_another_original(folders: Path, tmp_path: Path) -> None:
    build("qwen3_moe", seed=1).save_pretrained(tmp_path / "other")
    assert failed(verify(folders / "map", tmp_path / "other")) == {"plan", "experts", "routers", "other tensors"}
    build("qwen3_moe", num_hidden_layers=2).save_pretrained(tmp_path / "smaller")
    assert "plan" in failed(verify(folders / "map", tmp_path / "smaller"))
    with pytest.raises(ValueError, match=r"already compressed by optimum_moe"):
        verify(folders / "map", folders / "map")
    with pytest.raises(ValueError, match=r"is not a folder. Give the folder of a compressed checkpoint"):
        verify(tmp_path / "nothing")


@pytest.mark.parametrize("method", ["map", "prune"])
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_a_quantized_original(name: str, method: str, tmp_path: Path) -> None:
    fields = {"intermediate_size": 64} if name == "gpt_oss" else {}
    build(name, dtype=torch.bfloat16, **fields).save_pretrained(tmp_path / "plain")
    make = to_mxfp4 if name == "gpt_oss" else to_fp8
    original = make(tmp_path / "plain", tmp_path / "original")
    out = compress(original, tmp_path / "out", method, name, dequantize=True)
    report = verify(out, original)
    assert report.passed, str(report)
    # The values before they were quantized are others.
    assert failed(verify(out, tmp_path / "plain")) >= {"experts"}


def test_another_dtype_than_the_original(folders: Path, tmp_path: Path) -> None:
    out = compress(folders / "original", tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(out / SHARD).values()} == {torch.bfloat16, torch.int64}
    report = verify(out, folders / "original")
    assert report.passed, str(report)


@pytest.mark.parametrize("option", ["copy", "cut", "drop"])
@pytest.mark.parametrize("name", list(PREFIXES))
def test_mtp_layers(name: str, option: str, tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "original", name)
    method = "map" if option == "copy" else "reduce"
    out = compress(tmp_path / "original", tmp_path / "out", method, name, mtp=option)
    report = verify(out, tmp_path / "original")
    assert report.passed, str(report)
    assert report["mtp layers"].note.endswith({"copy": "copied", "cut": "cut", "drop": "dropped"}[option])
    if option == "drop":
        edit_config(out, num_nextn_predict_layers=1)
        assert failed(verify(out, tmp_path / "original")) == {"mtp layers"}
        return
    shard = out / "model-mtp.safetensors"
    tensors = load_file(shard)
    flip(f"{PREFIXES[name]}mlp.experts.2.down_proj.weight")(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    report = verify(out, tmp_path / "original")
    assert failed(report) == {"mtp layers"}
    assert f"{PREFIXES[name]}mlp.experts.2.down_proj.weight: 1 of" in report["mtp layers"].failures[0]
    lost = f"{PREFIXES[name]}self_attn.o_proj.weight"
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    del tensors[lost], index["weight_map"][lost]
    save_file(tensors, shard, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    report = verify(out, tmp_path / "original")
    assert failed(report) == {"mtp layers"}
    assert report["mtp layers"].failures[0] == f"{lost} is missing"
    assert len(report["mtp layers"].failures) == 2
