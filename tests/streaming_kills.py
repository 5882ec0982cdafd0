"""Run by tests/test_resume.py in a process of its own: streams a checkpoint again and again, killed at random moments.

Every run is a fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from optimum_moe import ByteBudget, CalibrationConfig, LowRankSparse, MoECompressor, MSMoE
from tests.tiny_models import inputs_for


def stream(checkpoint: Path, out: Path) -> None:
    data = CalibrationConfig([inputs_for("qwen3_moe", seed=seed) for seed in range(3)])
    kind = out.parts[-2].partition("-")[0]
    method = {
        "uniform": MSMoE(num_experts=4),
        "adaptive": MSMoE(num_experts=4, allocation="adaptive"),
        "gradients": ByteBudget(share=0.5, runs_in="transformers"),
        "factorized": [MSMoE(num_experts=4), LowRankSparse(rank=8)],
    }[kind]
    MoECompressor.from_pretrained(checkpoint, method, data, engine="streaming", output_dir=out, progress=False).apply()


def start(checkpoint: Path, out: Path) -> int:
    """A process that streams; its id."""
    process = os.fork()
    if process == 0:
        try:
            stream(checkpoint, out)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    return process


def main(checkpoint: Path, folder: Path, kills: int, *kinds: str) -> None:
    torch.set_num_threads(1)
    rng = random.Random(kills)
    for kind in kinds or ("uniform", "adaptive", "gradients"):
        began = time.monotonic()
        assert os.waitpid(start(checkpoint, folder / f"{kind}-undisturbed" / "out"), 0)[1] == 0
        seconds = time.monotonic() - began
        for number in range(kills):
            out = folder / f"{kind}-{number}" / "out"
            killed = 0
            while not out.exists():
                process = start(checkpoint, out)
                if killed < 2:
                    time.sleep(rng.uniform(0.1, 1.0) * seconds)
                    os.kill(process, signal.SIGKILL)
                status = os.waitpid(process, 0)[1]
                assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
                killed += 1
            if len(os.listdir(out.parent)) > 1:
                # Killed after the last step: the command finds its work done, and clears up.
                assert os.waitpid(start(checkpoint, out), 0)[1] != 0
            print(kind, number, killed, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
