"""Peak anonymous memory and seconds of the streaming engine, next to the one in memory, by number of layers.

    python benchmarks/streaming.py --folder /data/scratch                    # four small sizes
    python benchmarks/streaming.py --folder /data/scratch --large            # also more than 30 GB, streaming only
    python benchmarks/streaming.py --folder /data/scratch --layers 8 16 32 --kinds gradients --engines streaming

Half of the experts remain: `random` and `aimer` prune without data, `merge` merges by statistics that are given
(without alignment), `calibrated` prunes by what it observes, `gradients` by the loss, with a backward pass. Each run is
a process of its own, whose anonymous memory is sampled from outside; seconds are without imports. `copy` copies the
files of the original right before the run that it is compared with, `synced` also waits for the disk, as every run does
for every shard. What is checked stands at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from synthetic_checkpoint import layer_bytes, write

LARGE = {"layers": 49, "hidden": 2048, "intermediate": 384}
DATA_FREE = ("random", "aimer")
LEAST_SPEED, MOST_GROWTH = 0.5, 1.05
RUN = """
import sys, time, torch
import transformers.models.qwen3_moe.modeling_qwen3_moe
from transformers.utils import logging
from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
model, out, engine, kind, batches, sequences = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
data = [{"input_ids": torch.randint(0, 2048, (int(sequences), 256), generator=generator)} for _ in range(int(batches))]
data = CalibrationConfig(data, reservoir_tokens=256, unseen="keep")
saliency = {"calibrated": "reap", "gradients": "fisher"}.get(kind, kind)
method = MSMoE(keep_ratio=0.5, align=False) if kind == "merge" else ExpertPruning(keep_ratio=0.5, saliency=saliency)
logging.disable_progress_bar()
began = time.monotonic()
compressor = MoECompressor.from_pretrained(
    model, method, data if method.needs else None, engine=engine, output_dir=out, progress=False
)
opened = time.monotonic() - began
statistics = compressor.calibrate() if kind == "merge" else None
began = time.monotonic()
compressor.apply(statistics)
print(opened + time.monotonic() - began)
"""
COPY = """
import os, shutil, sys, time
began = time.monotonic()
shutil.copytree(sys.argv[1], sys.argv[2])
for name in os.listdir(sys.argv[2]) if sys.argv[3] == "synced" else []:
    descriptor = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
print(time.monotonic() - began)
"""


@dataclass(frozen=True)
class Row:
    """Measurements of one run."""

    layers: int
    size: int
    engine: str
    kind: str
    seconds: float
    peak: int
    limit: float
    copy: float

    def __str__(self) -> str:
        text = f"{self.layers:6d}  {self.size / 1e9:9.2f}  {self.engine:9}  {self.kind:10}  {self.seconds:7.1f}"
        text += f"  {self.peak / 1e9:7.2f}"
        text += f"  {self.limit / 1e9:8.2f}  {self.peak / self.limit:10.2f}" if self.limit else " " * 22
        return f"{text}  {self.copy / self.seconds:16.2f}"


def anonymous(process: int) -> int:
    """Anonymous bytes of a process now."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
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


def rows_for(
    original: Path, size: int, shape: tuple[int, int, int], engines: list[str], kinds: list[str], data: tuple[str, str]
) -> list[Row]:
    """What each engine takes on one checkpoint; printed as they come."""
    layers, hidden, intermediate = shape
    out, rows = original.parent / "out", []
    shutil.rmtree(out, ignore_errors=True)
    limit = 1.5 * layer_bytes(layers, hidden, intermediate) + 1e9

    def run(engine: str, kind: str, copy: float) -> float:
        code, arguments = (RUN, (engine, kind, *data)) if kind in kinds else (COPY, (kind,))
        seconds, peak = measured(code, str(original), str(out), *arguments)
        shutil.rmtree(out)
        rows.append(Row(layers, size, engine, kind, seconds, peak, limit * (engine == "streaming"), copy or seconds))
        return seconds

    if size < psutil.virtual_memory().total / 4:
        # Not shown: memory that was never used is slow the first time.
        run("copy", "plain", 0.0)
        rows.clear()
    for kind in kinds:
        for engine in engines:
            copy = run("copy", "plain", 0.0)
            print(rows[-1], flush=True)
            run(engine, kind, copy)
            print(rows[-1], flush=True)
    run("copy", "synced", copy)
    print(rows[-1], flush=True)
    return rows


def checks(rows: list[Row]) -> list[str]:
    """What must hold, the figure, and whether it does."""
    streamed = [row for row in rows if row.engine == "streaming"]
    share = max(streamed, key=lambda row: row.peak / row.limit)
    found = [
        f"peak anonymous memory at most 1.5 x the largest layer + 1 GB: largest share {share.peak / share.limit:.2f} "
        f"({share.kind}, {share.size / 1e9:.1f} GB): {_verdict(share.peak <= share.limit)}"
    ]
    small = sorted((row for row in streamed if row.layers != LARGE["layers"]), key=lambda row: row.layers)
    pairs = [(a, b) for a in small for b in small if a.kind == b.kind and b.layers == 2 * a.layers]
    if pairs:
        one, other = max(pairs, key=lambda pair: pair[1].peak / pair[0].peak)
        growth = other.peak / one.peak
        found.append(
            f"memory less than 5% more when the depth doubles: at most x{growth:.3f} ({one.kind}, {one.layers} to "
            f"{other.layers} layers): {_verdict(growth < MOST_GROWTH)}"
        )
    for row in streamed:
        if row.kind in (*DATA_FREE, "merge"):
            speed = row.copy / row.seconds
            found.append(
                f"{row.kind} at least half as fast as a copy: {row.size / 1e9:.2f} GB {speed:.2f}: "
                f"{_verdict(speed >= LEAST_SPEED)}"
            )
    return found


def _verdict(holds: bool) -> str:
    return "yes" if holds else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Where checkpoints are written and removed again.")
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--kinds", nargs="*", default=["random", "aimer", "merge", "calibrated"])
    parser.add_argument("--engines", nargs="*", default=["memory", "streaming"])
    parser.add_argument("--batches", type=int, default=8, help="Batches of 4 x 256 tokens; the large one gets 2 of 1.")
    parser.add_argument("--large", action="store_true", help="Also a checkpoint of more than 30 GB, streaming only.")
    parser.add_argument("--large-kinds", nargs="*", default=["random", "aimer", "calibrated"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data = str(args.batches), "4"
    sizes = [((number, args.hidden, args.intermediate), args.engines, args.kinds, data) for number in args.layers]
    if args.large:
        large = LARGE["layers"], LARGE["hidden"], LARGE["intermediate"]
        sizes.append((large, ["streaming"], args.large_kinds, ("2", "1")))
    # The original beside a copy of it.
    needed = max(2.1 * shape[0] * layer_bytes(*shape) for shape, *_ in sizes)
    free = shutil.disk_usage(args.folder).free
    if free < needed:
        raise SystemExit(f"{args.folder} has {free / 1e9:.1f} GB left, this takes {needed / 1e9:.1f}.")
    memory = psutil.virtual_memory().total
    print(f"{os.cpu_count()} cores, {memory / 2**30:.0f} GB of memory, load {os.getloadavg()[0]:.1f} at the start")
    print("layers  GB before  engine     kind        seconds  GB peak  GB limit  peak/limit  speed over copy")
    rows: list[Row] = []
    for shape, engines, kinds, data in sizes:
        original = args.folder / "original"
        size = write(original, *shape)
        try:
            rows += rows_for(original, size, shape, engines, kinds, data)
        finally:
            shutil.rmtree(original)
            shutil.rmtree(args.folder / "out", ignore_errors=True)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end", *checks(rows), sep="\n")


if __name__ == "__main__":
    main()
