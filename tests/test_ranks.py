"""Processes on gloo that compress one model together reach the plan, statistics and checkpoint of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optimum_moe import (
    ByteBudget,
    CalibrationConfig,
    CompressionPlan,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    Statistics,
)
from optimum_moe.calibration.token_sample import TokenSample
from optimum_moe.ranks import SINGLE, Ranks, current_ranks
from tests.tiny_checkpoints import documents, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

RECIPES: dict[str, Any] = {
    "m-smoe": MSMoE(keep_ratio=0.5, allocation="adaptive"),
    "hc-smoe": "hc-smoe",
    "mc-smoe": [MSMoE(keep_ratio=0.5), LowRankSparse(rank=8)],
    "budget": ByteBudget(share=0.5),
    "forms": ByteBudget(share=0.4, runs_in="transformers"),
}
SETTINGS = {"sequence_length": 32, "batch_size": 1, "max_tokens": 700, "reservoir_tokens": 300}

WORKER = """
import sys, warnings
from pathlib import Path
import torch
from tests.test_ranks import RECIPES, compress
warnings.simplefilter("ignore")
torch.set_num_threads(1)
for name in sys.argv[3:]:
    compress(Path(sys.argv[1]), name, Path(sys.argv[2]))
"""


def compress(model: Path, name: str, output: Path) -> None:
    """Run a recipe to a folder of its name; the first process also saves the statistics."""
    data = CalibrationConfig(documents(), **SETTINGS)
    run = MoECompressor.from_pretrained(model, RECIPES[name], data, output_dir=output / name, progress=False)
    statistics = run.calibrate()
    run.apply()
    if run.ranks.writes:
        statistics.save_pretrained(output / f"{name}-statistics")


def launch(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*command, *arguments], env=shared, capture_output=True, text=True, cwd=root)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("ranks") / "model", num_hidden_layers=4)


def check_processes(processes: int, model: Path, place: Path, names: list[str]) -> None:
    worker = place / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    done = launch(processes, str(worker), str(model), str(place / "several"), *names)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        compress(model, name, place / "single")
        one, several = (
            Statistics.from_pretrained(place / kind / f"{name}-statistics") for kind in ("single", "several")
        )
        assert one.calibration == several.calibration
        for block, found in several.blocks.items():
            before = one.blocks[block]
            assert found.num_tokens == before.num_tokens
            for field in before.sums:
                torch.testing.assert_close(getattr(found, field), getattr(before, field), rtol=1e-12, atol=1e-12)
            for field in ("router_input_SH", "index_SK", "weights_SK", "gradient_SJH"):
                ours, its = getattr(found.reservoir, field), getattr(before.reservoir, field)
                assert (ours is None) == (its is None)
                assert ours is None or torch.equal(ours, its), (name, block, field)
        plans = [CompressionPlan.from_pretrained(place / kind / name) for kind in ("single", "several")]
        for block in plans[0].blocks:
            first, second = (plan.blocks[block] for plan in plans)
            assert (first.labels_E, first.dominants_G, first.sizes) == (
                second.labels_E,
                second.dominants_G,
                second.sizes,
            )
        tensors = [load_file(place / kind / name / "model.safetensors") for kind in ("single", "several")]
        assert tensors[0].keys() == tensors[1].keys()
        for key, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][key], tensor, rtol=1e-4, atol=1e-5)


def test_two_processes_reach_what_one_does(model: Path, tmp_path: Path) -> None:
    check_processes(2, model, tmp_path, ["m-smoe", "budget"])


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_reach_what_one_does(processes: int, model: Path, tmp_path: Path) -> None:
    check_processes(processes, model, tmp_path, list(RECIPES))


def test_a_launcher_that_is_half_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert current_ranks() is SINGLE
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert current_ranks() is SINGLE
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR are set, but WORLD_SIZE, MASTER_PORT are not"):
        current_ranks()


def test_processes_without_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 processes share the work, but there are 3 MoE blocks\. Start fewer"):
        Ranks(0, 4).check_work(3, "MoE blocks", "Start fewer processes")
    with pytest.raises(ValueError, match=r'engine="streaming" loads each layer before the next .* 2 processes'):
        Ranks(0, 2).check_engine(streams=True, propagates=False)
    with pytest.raises(ValueError, match="error_propagation=True cuts each layer before"):
        Ranks(0, 2).check_engine(streams=False, propagates=True)


def test_joined_samples_are_the_sample_of_all_batches() -> None:
    whole, parts = TokenSample(50), [TokenSample(50) for _ in range(3)]
    for batch in range(7):
        value_TH = torch.arange(30.0).unsqueeze(-1) + 30 * batch
        keys_T = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
        for sample in (whole, parts[batch % 3]):
            sample.add(batch, keys_T, value_TH, None)
    joined = TokenSample.joined([*parts, TokenSample(50)])
    assert len(joined.keys_S) == 50
    assert torch.equal(joined.keys_S, whole.keys_S)
    assert torch.equal(joined.columns[0], whole.columns[0])


OTHER_SEEDS = """
import os, sys, torch
from optimum_moe import MoECompressor, MSMoE
from tests.tiny_checkpoints import documents
rank = int(os.environ["RANK"])
run = MoECompressor.from_pretrained(sys.argv[1], MSMoE(keep_ratio=0.5), documents(), seed=rank, progress=False)
try:
    run.apply()
except ValueError as error:
    print(error, flush=True)
"""


@pytest.mark.full
def test_processes_that_were_started_differently_are_refused(model: Path, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(OTHER_SEEDS, encoding="utf-8")
    done = launch(2, str(worker), str(model))
    message = "Processes that work together need equal seeds: process 0 has 0, process 1 has 1."
    assert done.stdout.count(message) == 2, done.stderr[-3000:]


DIES = """
import os, sys
from optimum_moe import MoECompressor, MSMoE
from tests.tiny_checkpoints import documents
run = MoECompressor.from_pretrained(
    sys.argv[1], MSMoE(keep_ratio=0.5), documents(), output_dir=sys.argv[2], progress=False)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), 9)
run.apply()
"""


@pytest.mark.full
def test_a_process_that_dies_ends_the_run(model: Path, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(DIES, encoding="utf-8")
    done = launch(2, str(worker), str(model), str(tmp_path / "out"))
    assert done.returncode != 0
    assert "rank      : 1" in done.stderr
    assert "SIGKILL" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["worker.py"]


def test_what_one_process_does_alone_is_refused_in_several() -> None:
    SINGLE.check_single("A sweep")
    with pytest.raises(ValueError, match="A sweep runs in one process, and 3 were started"):
        Ranks(1, 3).check_single("A sweep")
