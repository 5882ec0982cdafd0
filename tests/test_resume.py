"""Streaming runs that are killed, run out of space or are repeated otherwise: they go on, or say why not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE, records
from optimum_moe.checkpoint import destination, shards
from optimum_moe.engine import streaming
from optimum_moe.engine.lockstep import Runner
from optimum_moe.surgeons.generic import GenericSurgeon
from tests.tiny_models import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

METHOD = MSMoE(num_experts=4)
COPYING = ExpertPruning(num_experts=4, saliency="random")
"""Its experts go from file to file."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "qwen3_moe"
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(stream(checkpoint, tmp_path_factory.mktemp("undisturbed") / "out"))


def data(batches: int = 3) -> CalibrationConfig:
    return CalibrationConfig([inputs_for("qwen3_moe", seed=seed) for seed in range(batches)])


def stream(checkpoint: Path, out: Path, method: Any = METHOD, calibration: Any = None, **settings: Any) -> Path:
    given = {"engine": "streaming", "output_dir": out, "progress": False} | settings
    used = data() if calibration is None and method.needs else calibration
    return MoECompressor.from_pretrained(checkpoint, method, used, **given).apply()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def progress(out: Path) -> dict[str, Any]:
    return json.loads((out.parent / f".{out.name}.streaming" / "state" / "progress.json").read_text(encoding="utf-8"))


def stop_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int, error: BaseException) -> list[int]:
    """Make a function raise at one of its calls; returns the count of calls."""
    real, calls = getattr(place, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, counted)
    return calls


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_random_moments(checkpoint: Path, tmp_path: Path, kills: int) -> None:
    script = Path(__file__).with_name("streaming_kills.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), str(checkpoint), str(tmp_path), str(kills)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    for kind in ("uniform", "adaptive", "gradients"):
        expected = contents(tmp_path / f"{kind}-undisturbed" / "out")
        for number in range(kills):
            folder = tmp_path / f"{kind}-{number}"
            assert contents(folder / "out") == expected
            assert [path.name for path in folder.iterdir()] == ["out"]


FULL = OSError(errno.ENOSPC, "No space left on device")


def assert_stops_and_resumes(
    patch_disk: Callable[[pytest.MonkeyPatch], Any],
    out: Path,
    run: Callable[[Path], Path],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch_disk(patch)
        with pytest.raises(
            ValueError, match=r"The disk is full; (\d parts are finished and kept in .*out.stream|no part)"
        ):
            run(out)
    assert not out.exists()
    assert not list(out.parent.rglob("*.part"))
    assert contents(run(out)) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("method", [METHOD, COPYING], ids=["merged", "copied"])
@pytest.mark.parametrize(
    ("place", "name", "step"),
    [
        (shards, "write_all", 11),
        (shards, "put_in_place", 3),
        pytest.param(shards, "write_all", 1, marks=pytest.mark.full),
        pytest.param(shards, "put_in_place", 1, marks=pytest.mark.full),
        pytest.param(os, "fsync", 1, marks=pytest.mark.full),
        pytest.param(records, "save_file", 1, marks=pytest.mark.full),
        pytest.param(Path, "write_text", 1, marks=pytest.mark.full),
    ],
    ids=["writes", "renames", "every write", "every rename", "every flush", "every record", "every text"],
)
def test_a_full_disk_at_every_write(
    place: Any, name: str, step: int, method: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> Path:
        return stream(checkpoint, out, method)

    with monkeypatch.context() as patch:
        calls = stop_at(patch, place, name, 0, ValueError())
        expected = contents(run(tmp_path / "count" / "out"))
    assert calls[0] > 2
    for call in range(1, calls[0] + 1, step):
        disk = partial(stop_at, place=place, name=name, call=call, error=FULL)
        assert_stops_and_resumes(disk, tmp_path / str(call) / "out", run, expected, monkeypatch)


@pytest.mark.parametrize("method", [METHOD, COPYING], ids=["merged", "copied"])
def test_a_disk_that_is_full_in_the_middle_of_a_tensor(
    method: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> Path:
        return stream(checkpoint, out, method)

    expected = contents(run(tmp_path / "whole" / "out"))
    real = os.write

    def limited(patch: pytest.MonkeyPatch, room: int) -> None:
        left = [room]

        def write(descriptor: int, data: memoryview) -> int:
            if not left[0]:
                raise FULL
            done = real(descriptor, data[: left[0]])
            left[0] -= done
            return done

        patch.setattr(shards.os, "write", write)

    for room in (1, 70_001, 150_003):
        assert_stops_and_resumes(partial(limited, room=room), tmp_path / str(room) / "out", run, expected, monkeypatch)


@pytest.mark.parametrize("method", [METHOD, COPYING], ids=["merged", "copied"])
def test_a_disk_that_is_really_full(
    method: Any, checkpoint: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "out"
    with pytest.raises(ValueError, match=r"disk has [\d,]+ bytes left, the checkpoint needs [\d,]+. Free some space"):
        stream(checkpoint, out, method)
    monkeypatch.setattr(streaming, "check_space", lambda *_: None)
    with pytest.raises(ValueError, match=r"The disk is full; [12] parts are finished and kept in .*out.stream"):
        stream(checkpoint, out, method)
    assert not out.exists()
    assert not list(small_disk.rglob("*.part"))
    # What was finished there is of use on a larger disk.
    shutil.copytree(small_disk / ".out.streaming", tmp_path / "larger" / ".out.streaming")
    expected = contents(stream(checkpoint, tmp_path / "whole" / "out", method))
    assert contents(stream(checkpoint, tmp_path / "larger" / "out", method)) == expected


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_interrupted_between_layers(
    allocation: str, propagate: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, settings = MSMoE(num_experts=4, allocation=allocation), {"error_propagation": propagate}
    with monkeypatch.context() as patch:
        advances = stop_at(patch, Runner, "advance", 0, ValueError())
        expected = contents(stream(checkpoint, tmp_path / "count" / "out", method, **settings))
    for call in range(2, advances[0], 4):
        out = tmp_path / str(call) / "out"
        with monkeypatch.context() as patch:
            stop_at(patch, Runner, "advance", call, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                stream(checkpoint, out, method, **settings)
        assert contents(stream(checkpoint, out, method, **settings)) == expected


def test_finished_layers_are_not_cut_again(
    checkpoint: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, GenericSurgeon, "cut", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stream(checkpoint, out)
    assert list(progress(out)["finished"]) == ["model.layers.0", "model.layers.1"]
    with monkeypatch.context() as patch:
        cuts = stop_at(patch, GenericSurgeon, "cut", 0, ValueError())
        assert contents(stream(checkpoint, out)) == undisturbed
    assert cuts == [1]


def interrupted(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, GenericSurgeon, "cut", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stream(checkpoint, out, **settings)


OTHERS: dict[str, dict[str, Any]] = {
    "recipe": {"method": MSMoE(num_experts=5)},
    "seed": {"seed": 1},
    "data": {"calibration": data(2)},
    "dtype": {"dtype": "bfloat16"},
    "error propagation": {"error_propagation": True},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_in_the_same_folder_is_refused(
    what: str, checkpoint: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(checkpoint, out, monkeypatch)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds an unfinished run with another {what}: .* to start again"):
        stream(checkpoint, out, **OTHERS[what])
    assert contents(tmp_path) == before
    if what == "recipe":
        other = contents(stream(checkpoint, out, overwrite=True, **OTHERS[what]))
        assert other == contents(stream(checkpoint, tmp_path / "again" / "out", **OTHERS[what]))
    else:
        assert contents(stream(checkpoint, out)) == undisturbed


def test_statistics_of_other_data_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressors = [
        MoECompressor.from_pretrained(
            checkpoint, METHOD, data(batches), engine="streaming", output_dir=tmp_path / "out", progress=False
        )
        for batches in (2, 3)
    ]
    first, second = (compressor.calibrate() for compressor in compressors)
    with monkeypatch.context() as patch:
        stop_at(patch, GenericSurgeon, "cut", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compressors[0].apply(first)
    with pytest.raises(ValueError, match="another statistics"):
        compressors[1].apply(second)
    assert compressors[0].apply(first) == tmp_path / "out"


def touch_shard(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def other_model(folder: Path) -> None:
    build("qwen3_moe", seed=1).save_pretrained(folder)


def test_a_source_that_changes_between_two_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "result" / "out"
    build("qwen3_moe").save_pretrained(source)
    interrupted(source, out, monkeypatch)
    other_model(source)
    with pytest.raises(ValueError, match="unfinished run with another model"):
        stream(source, out)


def test_a_source_that_changes_during_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "result" / "out"
    build("qwen3_moe").save_pretrained(source)
    real = GenericSurgeon.cut

    def cut(*arguments: Any) -> None:
        touch_shard(source)
        real(*arguments)

    monkeypatch.setattr(GenericSurgeon, "cut", cut)
    with pytest.raises(ValueError, match="was changed while it was compressed"):
        stream(source, out)
    assert not out.exists()


@pytest.mark.parametrize("damage", ["short", "gone", "record"])
def test_damaged_finished_layers_are_made_again(
    damage: str, checkpoint: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(checkpoint, out, monkeypatch)
    working = tmp_path / ".out.streaming"
    shard = working / "checkpoint" / "model-00001-of-00004.safetensors"
    if damage == "short":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "gone":
        shard.unlink()
    else:
        shutil.rmtree(working / "state" / "layer-00000")
    assert contents(stream(checkpoint, out)) == undisturbed


def test_two_runs_at_once_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    real = GenericSurgeon.cut

    def cut(*arguments: Any) -> None:
        with pytest.raises(ValueError, match="Another run is writing to"):
            stream(checkpoint, out)
        real(*arguments)

    monkeypatch.setattr(GenericSurgeon, "cut", cut)
    assert stream(checkpoint, out) == out


def test_broken_progress_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(checkpoint, tmp_path / "out", monkeypatch)
    (tmp_path / ".out.streaming" / "state" / "progress.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"progress.json is broken. Pass overwrite=True"):
        stream(checkpoint, tmp_path / "out")
    assert stream(checkpoint, tmp_path / "out", overwrite=True) == tmp_path / "out"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="No permission to write in"):
        stream(checkpoint, tmp_path / "out", COPYING)


def test_output_that_turns_out_to_be_read_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so the system's answer is replaced.
    with monkeypatch.context() as patch:
        patch.setattr(destination.os, "access", lambda path, mode: False)
        with pytest.raises(ValueError, match=r"No permission to write in .*. Choose another folder"):
            stream(checkpoint, tmp_path / "out", COPYING)
    for error in (PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only file system")):
        with monkeypatch.context() as patch:
            stop_at(patch, shards, "write_all", 5, error)
            with pytest.raises(ValueError, match=r"refused to write or read \(.*(denied|Read-only).*\); no part is"):
                stream(checkpoint, tmp_path / "out", COPYING)
        assert not list(tmp_path.rglob("*.part"))
    assert stream(checkpoint, tmp_path / "out", COPYING) == tmp_path / "out"


def test_a_failed_run_can_be_repeated_by_the_same_compressor(
    checkpoint: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = MoECompressor.from_pretrained(
        checkpoint, METHOD, data(), engine="streaming", output_dir=tmp_path / "out", progress=False
    )
    with monkeypatch.context() as patch:
        stop_at(patch, shards, "put_in_place", 4, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(ValueError, match="The disk is full"):
            compressor.apply()
    assert contents(compressor.apply()) == undisturbed


def test_shards_are_safetensors(tmp_path: Path) -> None:
    given = {
        "b": torch.arange(5, dtype=torch.int64),
        "a": torch.randn(3, 4, dtype=torch.bfloat16),
        "c": torch.tensor(True),
        "d": torch.randn(4, 6)[:, ::2],
        "e": torch.empty(0, 3),
        "f": torch.tensor(2.5, dtype=torch.float16),
    }
    size = shards.write_shard(tmp_path / "x.safetensors", given)
    assert size == (tmp_path / "x.safetensors").stat().st_size
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == given.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in given.items())
