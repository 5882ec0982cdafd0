"""Peak anonymous memory and seconds of the streaming engine, next to the one in memory, by number of layers.

    python benchmarks/streaming.py --folder /data/scratch                    # four small sizes
    python benchmarks/streaming.py --folder /data/scratch --large            # also more than 30 GB, streaming only

Each run is a process of its own, whose anonymous memory is sampled from outside; seconds are without imports. The row
`copy` copies the files of the original.
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
import sys, time, torch
import transformers.models.qwen3_moe.modeling_qwen3_moe
from transformers.utils import logging
from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
model, out, engine, kind = sys.argv[1:]
data, saliency = None, "random"
if kind == "calibrated":
    generator, saliency = torch.Generator().manual_seed(0), "reap"
    data = [{"input_ids": torch.randint(0, 2048, (4, 256), generator=generator)} for _ in range(8)]
    data = CalibrationConfig(data, reservoir_tokens=256, unseen="keep")
elif kind == "aimer":
    saliency = "aimer"
logging.disable_progress_bar()
began = time.monotonic()
MoECompressor.from_pretrained(
    model, ExpertPruning(keep_ratio=0.5, saliency=saliency), data, engine=engine, output_dir=out, progress=False
).apply()
print(time.monotonic() - began)
"""
COPY = """
import shutil, sys, time
began = time.monotonic()
shutil.copytree(sys.argv[1], sys.argv[2])
print(time.monotonic() - began)
"""


def anonymous(process: int) -> int:
    """Anonymous bytes of a process now."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous")), 0)


def measured(code: str, *arguments: str) -> tuple[float, int]:
    """What a process printed, its seconds without imports, and the peak of its anonymous memory."""
    peak = 0
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{arguments} failed")
    return float(printed), peak


def rows_for(original: Path, size: int, layers: int, engines: list[str], kinds: list[str]) -> None:
    """Print what each engine takes on one checkpoint."""
    out = original.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    copy, peak = measured(COPY, str(original), str(out))
    for kind, engine in [("", "copy"), *((kind, engine) for kind in kinds for engine in engines)]:
        seconds = copy
        if kind:
            seconds, peak = measured(RUN, str(original), str(out), engine, kind)
        shutil.rmtree(out)
        row = f"{layers:6d}  {size / 1e9:9.2f}  {engine:9}  {kind:10}  {seconds:7.1f}  {peak / 1e9:7.2f}"
        print(f"{row}  {copy / seconds:16.2f}", flush=True)


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
    print("layers  GB before  engine     saliency    seconds  GB peak  speed over copy")
    for number, hidden, width, engines in sizes:
        original = args.folder / "original"
        size = write(original, number, hidden, width)
        rows_for(original, size, number, engines, args.kinds)
        shutil.rmtree(original)


if __name__ == "__main__":
    main()
