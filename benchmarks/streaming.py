"""Peak anonymous memory and seconds of the streaming engine, next to the one in memory, by number of layers.

    python benchmarks/streaming.py --folder /data/scratch                    # four small sizes
    python benchmarks/streaming.py --folder /data/scratch --large            # also more than 30 GB, streaming only

Each run is a process of its own, whose anonymous memory is sampled from outside. `cp` copies the original's files.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from synthetic_checkpoint import write

LARGE = {"layers": 52, "hidden": 2048, "intermediate": 384}
RUN = """
import sys, torch
from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
model, out, engine, kind = sys.argv[1:]
data, saliency = None, "random"
if kind == "calibrated":
    generator, saliency = torch.Generator().manual_seed(0), "reap"
    data = [{"input_ids": torch.randint(0, 2048, (4, 256), generator=generator)} for _ in range(8)]
    data = CalibrationConfig(data, reservoir_tokens=256, unseen="keep")
elif kind == "aimer":
    saliency = "aimer"
MoECompressor.from_pretrained(
    model, ExpertPruning(keep_ratio=0.5, saliency=saliency), data, engine=engine, output_dir=out, progress=False
).apply()
"""


def anonymous(process: int) -> int:
    """Anonymous bytes of a process now."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous")), 0)


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the peak of its anonymous memory."""
    began, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{command[-2:]} failed")
    return time.monotonic() - began, peak


def start_up() -> tuple[float, int]:
    """What importing takes, which no row can do without."""
    imports = (
        "import torch; from optimum_moe import MoECompressor; import transformers.models.qwen3_moe.modeling_qwen3_moe"
    )
    return measured([sys.executable, "-c", imports])


def rows_for(original: Path, size: int, layers: int, engines: list[str], kinds: list[str], base: float) -> None:
    """Print what each engine takes on one checkpoint."""
    out = original.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    copy, _ = measured(["cp", "-r", str(original), str(out)])
    shutil.rmtree(out)
    print(f"{layers:6d}  {size / 1e9:8.2f}  {'cp':10}  {'':10}  {copy:8.1f}  {'':8}  {1:6.2f}", flush=True)
    for kind in kinds:
        for engine in engines:
            seconds, peak = measured([sys.executable, "-c", RUN, str(original), str(out), engine, kind])
            shutil.rmtree(out)
            speed = copy / max(seconds - base, 1e-9)
            row = f"{layers:6d}  {size / 1e9:8.2f}  {engine:10}  {kind:10}  {seconds - base:8.1f}  {peak / 1e9:8.2f}"
            print(f"{row}  {speed:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Where checkpoints are written and removed again.")
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--kinds", nargs="*", default=["random", "aimer", "calibrated"])
    parser.add_argument("--large", action="store_true", help="Also a checkpoint of more than 30 GB, streaming only.")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    sizes = [(number, args.hidden, args.intermediate, ["memory", "streaming"]) for number in args.layers]
    if args.large:
        sizes.append((*LARGE.values(), ["streaming"]))
    # The original beside a copy of it.
    needed = max(2 * 2 * number * 128 * 3 * hidden * width for number, hidden, width, _ in sizes) * 1.1
    free = shutil.disk_usage(args.folder).free
    if free < needed:
        raise SystemExit(f"{args.folder} has {free / 1e9:.1f} GB left, this takes {needed / 1e9:.1f}.")
    base, least = start_up()
    print(f"Imports take {base:.1f} s, which is taken off, and {least / 1e9:.2f} GB, which is not.")
    print("layers  GB before  engine      saliency     seconds  GB peak  cp / s")
    for number, hidden, width, engines in sizes:
        original = args.folder / "original"
        size = write(original, number, hidden, width)
        rows_for(original, size, number, engines, args.kinds, base)
        shutil.rmtree(original)


if __name__ == "__main__":
    main()
