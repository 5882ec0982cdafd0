"""Memory that runs out while a model is observed or compressed: smaller batches, then an error with the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.calibration.data import build_batches
from optimum_moe.memory_errors import explained, ran_out
from tests.tiny_models import build

# The address space of the process is limited, so that its allocator refuses what would be too much on a device.
LIMITED = """
import resource, sys, warnings
import torch
from tests.calibration.test_out_of_memory import compressed

torch.set_num_threads(1)
compressed(1, 512)
# What one row of 512 takes, the threads and kernels of a first run, and what Python makes of the text are there.
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]), -1))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        record = compressed(int(sys.argv[1]), int(sys.argv[2])).plan.calibration
        print("batch_size", record["batch_size"], record["num_batches"], record["hash"])
    except ValueError as error:
        print("error", error)
print(*[str(w.message) for w in caught if "ran out of memory" in str(w.message)], sep="\\n")
"""


TOKENS = 64 * 512


def rows(number: int, length: int = 512) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 60, (number, length), generator=generator).tolist()


def compressed(batch_size: int, length: int) -> MoECompressor:
    model = build("qwen3_moe", hidden_size=128, vocab_size=64, max_position_embeddings=length)
    text = rows(TOKENS // length, length)
    data = CalibrationConfig(text, batch_size=batch_size, sequence_length=length, packing=False)
    compressor = MoECompressor.from_pretrained(model, ExpertPruning(keep_ratio=0.5), data, progress=False)
    compressor.apply()
    return compressor


def limited(batch_size: int, length: int, room: int) -> str:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(batch_size), str(length), str(room)],
        env={**environment, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited by a system call of Linux")
def test_batches_that_do_not_fit_are_halved_until_they_do() -> None:
    said = limited(64, 512, room=50 << 20)
    word, size, number, digest = said.splitlines()[0].split()
    assert word == "batch_size"
    assert int(size) < 64
    assert int(number) == 64 // int(size)
    assert digest == build_batches(CalibrationConfig(rows(64), sequence_length=512, packing=False)).hash
    assert said.count("ran out of memory") == (64 // int(size)).bit_length() - 1
    assert "Observing batches of batch_size=64 on cpu ran out of memory (DefaultCPUAllocator: can't allocate" in said
    assert "Pass batch_size=32. All text is observed again with that." in said


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited by a system call of Linux")
def test_single_rows_that_do_not_fit_end_with_the_remedy() -> None:
    said = limited(2, TOKENS // 2, room=4 << 20)
    assert said.startswith("error Observing batches of batch_size=1 on cpu ran out of memory (")
    assert "Pass a sequence_length below 16384, or spread the model over more devices with device_map='auto'." in said


def test_halved_batches_have_the_same_rows() -> None:
    batches = build_batches(CalibrationConfig(rows(11), batch_size=5, sequence_length=512, packing=False))
    halves = batches.halved()
    assert halves is not None
    assert [len(batch["input_ids"]) for batch in halves] == [3, 2, 3, 2, 1]
    ours, theirs = (torch.cat([batch["input_ids"] for batch in some]) for some in (halves, batches))
    assert torch.equal(ours, theirs)
    assert (halves.hash, halves.num_tokens) == (batches.hash, batches.num_tokens)
    assert (halves.description["batch_size"], halves.description["num_batches"]) == (3, 5)
    again = halves.halved()
    assert again is not None
    single = again.halved()
    assert single is not None
    assert single.halved() is None
    own = build_batches(CalibrationConfig([{"input_ids": torch.tensor(rows(4))}]))
    assert own.halved() is None


def test_errors_of_this_allocator_are_known_and_others_pass() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    assert ran_out(caught.value)
    message = r"Doing it ran out of memory \(DefaultCPUAllocator: .* bytes\)\. Stop\."
    with pytest.raises(ValueError, match=message), explained("Doing it", "Stop."):
        torch.empty(10**14)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), explained("Doing it", "Stop."):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_a_streamed_run_names_the_device_that_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("qwen3_moe", vocab_size=64).save_pretrained(tmp_path / "model")
    data = CalibrationConfig(rows(2), batch_size=1, sequence_length=512, packing=False)
    compressor = MoECompressor.from_pretrained(
        tmp_path / "model",
        ExpertPruning(keep_ratio=0.5),
        data,
        engine="streaming",
        output_dir=tmp_path / "out",
        progress=False,
    )
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: torch.empty(10**14))
    message = r"batch_size=1 on cpu ran out of memory .*\. Pass a sequence_length below 512\.$"
    with pytest.raises(ValueError, match=message):
        compressor.apply()
