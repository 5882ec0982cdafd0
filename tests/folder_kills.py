"""Run by tests/test_destination.py in a process of its own: runs that get in each other's way on one folder.

In every round up to three runs start at random moments, each with or without `overwrite`, and some are killed at a
random moment by SIGKILL, SIGTERM or SIGINT. After each round, and again after a last run that nothing disturbs, the
folder is looked at. Every run is a fork of this process, which has imported everything and computed nothing.

    python -m tests.folder_kills CHECKPOINT FOLDER ROUNDS memory streaming both
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from optimum_moe import CalibrationConfig, MoECompressor, MSMoE, verify
from tests.tiny_models import inputs_for

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
REFUSALS = ("Another run is writing to", "is not empty", "was created by another program")
REFUSED, BROKEN = 3, 4
ENGINES = {"memory": ("memory",), "streaming": ("streaming",), "both": ("memory", "streaming")}


def run(checkpoint: Path, out: Path, engine: str, overwrite: bool) -> None:
    data = CalibrationConfig([inputs_for("qwen3_moe", seed=seed) for seed in range(3)])
    settings = {"engine": engine, "output_dir": out, "overwrite": overwrite, "progress": False}
    MoECompressor.from_pretrained(checkpoint, MSMoE(num_experts=4), data, **settings).apply()


def look(checkpoint: Path, out: Path) -> None:
    AutoModelForCausalLM.from_pretrained(out)
    report = verify(out, checkpoint)
    if not report.passed:
        raise RuntimeError(str(report))


def start(call: Callable[..., None], *arguments: Any, wait: float = 0.0) -> int:
    """A process that waits and then calls; its id."""
    process = os.fork()
    if process:
        return process
    status = BROKEN
    try:
        time.sleep(wait)
        call(*arguments)
        status = 0
    except ValueError as error:
        if any(refusal in str(error) for refusal in REFUSALS):
            status = REFUSED
        else:
            print("broken:", error, flush=True)
    except (KeyboardInterrupt, SystemExit):
        status = 128
    except BaseException as error:
        print("broken:", type(error).__name__, error, flush=True)
    finally:
        os._exit(status)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended(process: int) -> str:
    """How a process ended."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status != BROKEN
    return {0: "finished", REFUSED: "refused"}.get(status, "killed")


def one_round(
    rng: random.Random, checkpoint: Path, out: Path, engines: tuple[str, ...], seconds: float, results: list[object]
) -> Counter[str]:
    counts: Counter[str] = Counter()
    processes = []
    if rng.random() < 0.5:
        # Else the result of the round before is in the way.
        shutil.rmtree(out, ignore_errors=True)
    for _ in range(rng.randint(1, 3)):
        arguments = checkpoint, out, rng.choice(engines), rng.random() < 0.5
        processes.append(start(run, *arguments, wait=rng.uniform(0, seconds)))
    for _ in range(rng.randint(1, 3)):
        time.sleep(rng.uniform(0, seconds))
        os.kill(rng.choice(processes), rng.choice(SIGNALS))
    counts.update(ended(process) for process in processes)
    if out.exists():
        assert contents(out) in results, f"half a checkpoint: {sorted(contents(out))}"
        counts["looked at"] += 1
    there = out.exists()
    last = ended(start(run, checkpoint, out, rng.choice(engines), there))
    # What was killed between its last two steps is finished by the run that follows, which then finds its work done.
    assert last == "finished" or (last == "refused" and not there), last
    assert os.listdir(out.parent) == [out.name], os.listdir(out.parent)
    assert contents(out) in results
    assert ended(start(look, checkpoint, out)) == "finished"
    counts[f"last {last}"] += 1
    return counts


def main(checkpoint: Path, folder: Path, rounds: int, *kinds: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results: list[object] = []
    began = time.monotonic()
    for engine in ENGINES["both"]:
        out = folder / engine / "undisturbed" / "out"
        assert ended(start(run, checkpoint, out, engine, False)) == "finished"
        results.append(contents(out))
    seconds = (time.monotonic() - began) / 2
    for kind in kinds:
        rng, counts = random.Random(f"{kind} {rounds}"), Counter[str]()
        for _ in range(rounds):
            out = folder / kind / "disturbed" / "out"
            counts += one_round(rng, checkpoint, out, ENGINES[kind], seconds, results)
        print(kind, rounds, dict(sorted(counts.items())), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
