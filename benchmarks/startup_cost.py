"""What a command takes until it answers, and what the installed package adds to `import torch`.

Fresh processes run in turn, so that all rows see the same machine. Both variants of `import torch` let torch look for
entry points; only `OPTIMUM_MOE_AUTOLOAD` differs.

Example:
    python benchmarks/startup_cost.py --runs 20
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from optimum_moe.autoload import SWITCH

MODEL = Path(__file__).parents[1] / "tests" / "data" / "reference" / "model"
CODE = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"
MOE = ("-m", "optimum.commands.optimum_cli", "moe")
COMMANDS = {
    "`python -c pass`": ("-c", "pass"),
    "`optimum-cli moe --help`": (*MOE, "--help"),
    "`optimum-cli moe inspect MODEL`": (*MOE, "inspect", str(MODEL)),
    "`import torch`": ("-c", "import torch"),
    "`from transformers import PreTrainedModel`": ("-c", "from transformers import PreTrainedModel"),
    "`optimum-cli moe inspect MODEL --dtype float32`, which builds its class": (
        *(*MOE, "inspect", str(MODEL)),
        *("--dtype", "float32"),
    ),
}


def of_process(arguments: tuple[str, ...]) -> float:
    """Seconds of a process from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - began


def of_import(switch: str) -> float:
    """Seconds of `import torch` within a process."""
    environment = os.environ | {SWITCH: switch}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def row(name: str, times: list[float]) -> str:
    low, middle, high = (1000 * t for t in statistics.quantiles(times, n=4))
    return f"| {name} | {middle:.0f} | {low:.0f} - {high:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="processes of each kind")
    runs = parser.parse_args().runs
    # The first ones fill the caches of the disk.
    for arguments in COMMANDS.values():
        of_process(arguments)
    of_import("0"), of_import("1")
    whole: dict[str, list[float]] = {name: [] for name in COMMANDS}
    off, on = [], []
    for run in range(runs):
        for name, arguments in COMMANDS.items():
            whole[name].append(of_process(arguments))
        for switch in ("01", "10")[run % 2]:
            (off, on)[int(switch)].append(of_import(switch))
    print(f"Median of {runs} processes each, in turn.\n")
    print("| process | median ms | quartiles ms |")
    print("|---|---|---|")
    for name, times in whole.items():
        print(row(name, times))
    print("\n| `import torch` within a process | median ms | quartiles ms |")
    print("|---|---|---|")
    print(row("autoload off", off))
    print(row("autoload on", on))
    ratio = statistics.median(b / a for a, b in zip(off, on, strict=True))
    print(f"\nRatio of neighboring runs, median of {runs}: {ratio:.4f}")


if __name__ == "__main__":
    main()
