"""Wall seconds of one run in one process and in two, which share the calibration batches and the blocks.

    python benchmarks/process_speed.py [--runs 3] [--output benchmarks/results/process_speed.md]

The byte budgets and M-SMoE on the bundled model, from the first call until the model is cut; imports and the start of
the processes are not counted. The three ways alternate, and their medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from reference import CALIBRATION, REFERENCES

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor, MSMoE

RECIPES = {
    "byte budget, any runtime, 50%": ByteBudget(share=0.5),
    "byte budget, transformers, 25%": ByteBudget(share=0.25, runs_in="transformers"),
    "M-SMoE, 50%": MSMoE(keep_ratio=0.5),
}
WAYS = {"one process, one thread": (1, 1), "one process, two threads": (1, 2), "two processes, one thread": (2, 1)}
"""Processes and threads of each."""
BASE = "one process, one thread"


def worker(tokens: int) -> None:
    """Time every recipe in this process, with the others that were started; the first one prints."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    seconds = {}
    for name, recipe in RECIPES.items():
        data = CalibrationConfig(str(CALIBRATION), max_tokens=tokens)
        start = time.perf_counter()
        compressor = MoECompressor.from_pretrained(REFERENCES["reference"].model, recipe, data, progress=False)
        compressor.apply()
        seconds[name] = time.perf_counter() - start
    if compressor.ranks.writes:
        print(json.dumps(seconds))


def timed(processes: int, threads: int, tokens: int) -> dict[str, float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--worker", "--tokens", str(tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each way")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--output", type=Path, help="also write the table there (.md)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.tokens)
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.runs):
        for way, (processes, threads) in WAYS.items():
            found[way].append(timed(processes, threads, arguments.tokens))
    lines = [f"| recipe | {' | '.join(WAYS)} |", "|---" * (1 + len(WAYS)) + "|"]
    for name in RECIPES:
        medians = {way: statistics.median(run[name] for run in runs) for way, runs in found.items()}
        cells = [f"{seconds:.1f} s ({medians[BASE] / seconds:.2f}x)" for seconds in medians.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
