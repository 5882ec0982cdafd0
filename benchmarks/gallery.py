"""What the scripts of examples/ print on their stand-ins, offline; docs/source/gallery.md shows it.

python benchmarks/gallery.py [--only qwen3_vl_moe]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gallery.md"
RUNS = {
    "qwen3_moe_16gb": ("--tokens", "16384"),
    "deepseek_groups": ("--tokens", "16384"),
    "switch_mc_smoe": ("--tokens", "16384"),
    "qwen3_vl_moe": (),
}


def run(name: str) -> tuple[str, float]:
    """What a script prints, and its seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--stand-in", "--output", f"{folder}/out"]
        done = subprocess.run([*command, *RUNS[name]], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RUNS, help="run one, and print it")
    arguments = parser.parse_args()
    if arguments.only:
        print(run(arguments.only)[0])
        return
    parts = ["# What the gallery prints on stand-ins\n\nWritten by benchmarks/gallery.py, one thread each.\n"]
    for name, settings in RUNS.items():
        printed, seconds = run(name)
        command = " ".join(("python", f"examples/{name}.py", "--stand-in", *settings))
        parts.append(f"## {name}\n\n`{command}`, {seconds:.0f} s:\n\n```\n{printed.rstrip()}\n```\n")
        print(parts[-1], flush=True)
    RESULTS.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
