"""Factorized experts layer by layer from disk to disk: the same bits as in memory, also after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from optimum_moe import LowRankSparse, MoECompressor, MSMoE
from optimum_moe.checkpoint import shards
from optimum_moe.engine.lockstep import Runner
from optimum_moe.engine.working_folder import WorkingFolder
from tests.factor_methods import METHODS, calibration, refusal
from tests.test_resume import contents, stop_at
from tests.test_streaming import FAMILIES, assert_same, tensors
from tests.tiny_models import build, by_name, in_full

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("factorized")

    def saved(name: str) -> Path:
        if not (folder / name).is_dir():
            build(name).save_pretrained(folder / name)
        return folder / name

    return saved


def compressed(checkpoint: Path, method: Any, out: Path, engine: str = "streaming", **settings: Any) -> Path:
    given = {"engine": engine, "output_dir": out, "progress": False} | settings
    return MoECompressor.from_pretrained(checkpoint, method, calibration(checkpoint.name), **given).apply()


@pytest.mark.parametrize("kind", ["uniform", "energy", "map", "prune"])
@pytest.mark.parametrize("name", FAMILIES)
def test_streaming_equals_memory(name: str, kind: str, checkpoints: Any, tmp_path: Path) -> None:
    if refusal(by_name(name), kind):
        pytest.skip(refusal(by_name(name), kind))
    written = {
        engine: compressed(checkpoints(name), METHODS[kind], tmp_path / engine / "out", engine)
        for engine in ("memory", "streaming")
    }
    assert_same(written["memory"], written["streaming"])
    structure = json.loads((written["streaming"] / "config.json").read_text(encoding="utf-8"))["quantization_config"][
        "blocks"
    ]
    assert all("factors" in entry for entry in structure.values())
    assert any(key.endswith(".weight_u") for key in tensors(written["streaming"]))


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("kind", ["map", "adaptive", *in_full("uniform")])
def test_interrupted_between_layers(
    kind: str, propagate: bool, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS.get(kind, [MSMoE(num_experts=4, allocation="adaptive"), LowRankSparse(rank=8)])
    checkpoint, settings = checkpoints("qwen3_moe"), {"error_propagation": propagate}
    with monkeypatch.context() as patch:
        advances = stop_at(patch, Runner, "advance", 0, ValueError())
        expected = contents(compressed(checkpoint, method, tmp_path / "count" / "out", **settings))
    assert_same(
        tmp_path / "count" / "out", compressed(checkpoint, method, tmp_path / "m" / "out", "memory", **settings)
    )
    for call in range(2, advances[0], 4):
        out = tmp_path / str(call) / "out"
        with monkeypatch.context() as patch:
            stop_at(patch, Runner, "advance", call, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                compressed(checkpoint, method, out, **settings)
        assert contents(compressed(checkpoint, method, out, **settings)) == expected


@pytest.mark.parametrize("name", ["switch_transformers", "qwen3_vl_moe", "jetmoe"])
def test_finished_units_are_read_from_their_shards(
    name: str, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a unit of an earlier run the next ones see its factors, which no plan holds."""
    checkpoint, settings = checkpoints(name), {"error_propagation": True}
    expected = contents(compressed(checkpoint, METHODS["map"], tmp_path / "whole" / "out", **settings))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, WorkingFolder, "add", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compressed(checkpoint, METHODS["map"], out, **settings)
    shards_before = sorted((tmp_path / ".out.streaming" / "checkpoint").glob("*.safetensors"))
    assert contents(compressed(checkpoint, METHODS["map"], out, **settings)) == expected
    assert len(shards_before) >= 2


def test_a_shard_with_other_factors_is_refused(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out, settings = checkpoints("qwen3_moe"), tmp_path / "out", {"error_propagation": True}
    with monkeypatch.context() as patch:
        stop_at(patch, WorkingFolder, "add", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compressed(checkpoint, METHODS["uniform"], out, **settings)
    shard = tmp_path / ".out.streaming" / "checkpoint" / "model-00001-of-00004.safetensors"
    stored = load_file(shard)
    stored["model.layers.0.mlp.experts.0.up_proj.weight_u"][0, 0] += 1
    shards.write_shard(shard, stored)
    with monkeypatch.context() as patch:
        # As if it were changed after it was looked at.
        patch.setattr(WorkingFolder, "_is_whole", lambda *_: True)
        with pytest.raises(
            ValueError, match=r"does not contain the factors of model.layers.0.mlp that were .* overwrite=True"
        ):
            compressed(checkpoint, METHODS["uniform"], out, **settings)
    expected = compressed(checkpoint, METHODS["uniform"], tmp_path / "undisturbed" / "out", **settings)
    assert contents(compressed(checkpoint, METHODS["uniform"], out, **settings)) == contents(expected)


def test_a_full_disk(checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = checkpoints("mixtral"), tmp_path / "out"
    expected = contents(compressed(checkpoint, METHODS["uniform"], tmp_path / "whole" / "out"))
    with monkeypatch.context() as patch:
        stop_at(patch, shards, "put_in_place", 5, OSError(28, "No space left on device"))
        with pytest.raises(ValueError, match=r"The disk is full; (\d parts are finished|no part is)"):
            compressed(checkpoint, METHODS["uniform"], out)
    assert contents(compressed(checkpoint, METHODS["uniform"], out)) == expected


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.full)])
def test_killed_at_random_moments(kills: int, checkpoints: Any, tmp_path: Path) -> None:
    script = Path(__file__).with_name("streaming_kills.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), str(checkpoints("qwen3_moe")), str(tmp_path), str(kills), "factorized"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    expected = contents(tmp_path / "factorized-undisturbed" / "out")
    for number in range(kills):
        assert contents(tmp_path / f"factorized-{number}" / "out") == expected
        assert [path.name for path in (tmp_path / f"factorized-{number}").iterdir()] == ["out"]
