"""What the installed package adds to `import torch`: alternating fresh processes, with our entry point on and off.

Both variants let torch look for entry points; only `OPTIMUM_MOE_AUTOLOAD` differs.

Example:
    python benchmarks/startup_cost.py --runs 20
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from optimum_moe.autoload import SWITCH

CODE = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"


def seconds(switch: str) -> float:
    environment = os.environ | {SWITCH: switch}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="processes of each kind")
    runs = parser.parse_args().runs
    # The first ones fill the caches of the disk.
    seconds("0"), seconds("1")
    off, on = [], []
    for run in range(runs):
        for switch in ("01", "10")[run % 2]:
            (off, on)[int(switch)].append(seconds(switch))
    ratio = statistics.median(b / a for a, b in zip(off, on, strict=True))
    print("| `import torch` | median ms | quartiles ms |")
    print("|---|---|---|")
    for name, times in (("autoload off", off), ("autoload on", on)):
        low, middle, high = (1000 * t for t in statistics.quantiles(times, n=4))
        print(f"| {name} | {middle:.1f} | {low:.1f} - {high:.1f} |")
    print(f"\nRatio of neighboring runs, median of {runs}: {ratio:.4f}")


if __name__ == "__main__":
    main()
