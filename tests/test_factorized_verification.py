"""Whatever is changed in compressed experts is reported; a good checkpoint of any form passes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_moe import CompressionPlan, verify
from optimum_moe.checkpoint.checksums import write_checksums
from optimum_moe.checkpoint.compatibility import mark_structure
from optimum_moe.checkpoint.source import open_source
from optimum_moe.checkpoint.writer import write_model
from tests.expert_forms import mixture
from tests.factor_methods import METHODS, compressor_for, refusal
from tests.test_factors import factorized
from tests.test_verification import ALL, SHARD, edit, failed
from tests.tiny_models import Target, build, every_target, in_full, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def save_mixture(family: str, folder: Path) -> Path:
    """A checkpoint whose blocks hold every form there is, with its plan and its original."""
    build(family).save_pretrained(folder / "original")
    model = build(family)
    source = open_source(model)
    plan = factorized(model, mixture)
    mark_structure(model, source, plan)
    (folder / "out").mkdir()
    write_model(model, folder / "out", list(source.blocks), "5GB")
    plan.save_pretrained(folder / "out")
    write_checksums(folder / "out")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_mixture(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("target", every_target())
def test_a_good_checkpoint_passes(target: Target, kind: str, tmp_path: Path) -> None:
    if refusal(target, kind):
        pytest.skip(refusal(target, kind))
    build(target).save_pretrained(tmp_path / "original")
    compressor = compressor_for(tmp_path / "original", METHODS[kind], target)
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    report = verify(tmp_path / "out", tmp_path / "original", inputs=inputs_for(target))
    assert report.passed, str(report)
    assert [check.name for check in report.checks] == ALL
    blocks = len(compressor.plan.blocks)
    assert int(report["experts"].note.split()[0]) >= 2 * 2 * blocks


@pytest.mark.parametrize("family", ["qwen3_moe", *in_full("gpt_oss")])
def test_one_bit_of_any_number(family: str, folders: Any, tmp_path: Path) -> None:
    original, good = folders(family) / "original", folders(family) / "out"
    assert verify(good, original).passed
    out = Path(shutil.copytree(good, tmp_path / "out"))
    generator = torch.Generator().manual_seed(4)
    tensors = load_file(good / SHARD)
    # The guard is no number of an expert.
    names = [name for name in tensors if re.search(r"layers\.0\..*\.experts\.\d", name) and tensors[name].shape != (1,)]
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds >= {"weight", "weight_u", "weight_v", "weight_rows", "weight_row_index"}
    assert ("bias" in kinds) == (family == "gpt_oss")
    for name in names:
        changed = tensors[name].clone()
        raw = changed.view(-1).view(torch.uint8)
        place = int(torch.randint(len(raw), (), generator=generator))
        raw[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        save_file(tensors | {name: changed}, out / SHARD, metadata={"format": "pt"})
        report = verify(out, original)
        # A strange index or number may not even run.
        assert {"experts"} <= failed(report) <= {"experts", "reload"}, name
        assert "does not match the digest in the plan" in " ".join(report["experts"].failures), name


def test_dense_experts_are_compared_with_the_original(folders: Any, tmp_path: Path) -> None:
    """Even where somebody made the digest anew, what is kept as it was has to be the original's."""
    folder = folders("qwen3_moe")
    build("qwen3_moe", seed=1).save_pretrained(tmp_path / "other")
    report = verify(folder / "out", tmp_path / "other")
    assert "experts" in failed(report)
    told = [text for text in report["experts"].failures if "is kept dense, but differs from the original" in text]
    # Experts 0 (all neurons) and 5 (some of them), gate and up; the down of 0 too.
    assert len(told) == 5 * len({text.split(".mlp.")[0] for text in told})
    assert any("of expert 5 is kept dense" in text for text in told)


def test_a_missing_factor_and_other_sizes(folders: Any, tmp_path: Path) -> None:
    folder = folders("qwen3_moe")
    out = Path(shutil.copytree(folder / "out", tmp_path / "out"))
    gone = "model.layers.1.mlp.experts.3.up_proj.weight_u"
    edit(out, lambda tensors: tensors.pop(gone))
    report = verify(out, folder / "original")
    assert {"keys", "experts", "reload"} <= failed(report)
    assert report["keys"].failures == (f"{gone} is missing",)
    stack = "model.layers.1.mlp.experts.factors.classes.1.up_stacks.u"
    assert f"{stack} is missing" in report["experts"].failures
    shutil.rmtree(out)
    shutil.copytree(folder / "out", out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    sizes = config["quantization_config"]["blocks"]["model.layers.1.mlp"]["factors"]
    ranks = sizes["low_rank"]["up"].split(" ")
    sizes["low_rank"]["up"] = " ".join([ranks[0], "16", *ranks[2:]])
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = verify(out, folder / "original")
    assert "Sizes of experts are not those that their checksum was made of" in report["config"].failures[0]
    assert not report["experts"].ran
    # Whoever makes the checksum anew contradicts the plan.
    before = CompressionPlan.from_pretrained(out).blocks["model.layers.1.mlp"].sizes
    old = before.parts["low_rank"]
    changed = {**old, "up": (old["up"][0], 16, *old["up"][2:])}
    made = replace(before, parts={**before.parts, "low_rank": changed})
    assert {**made.to_dict(), "checksum": sizes["checksum"]} == sizes
    config["quantization_config"]["blocks"]["model.layers.1.mlp"]["factors"] = made.to_dict()
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = verify(out, folder / "original")
    assert {"config", "shapes", "reload"} <= failed(report)
    assert "the blocks of quantization_config are not those of the plan" in report["config"].failures
