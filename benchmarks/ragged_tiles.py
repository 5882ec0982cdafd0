"""Which blocks of rows and columns suit launches for experts of any size, by the rows that an expert gets.

    python benchmarks/ragged_tiles.py [--best 5]

The layer and the mixture of `ragged_experts.py` on a GPU, in CUDA graphs. All candidates are compiled first, side by
side in several processes. For each number of tokens the fastest tiles, with their time over that of the present choice.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, product
from multiprocessing import get_context

import torch
import triton
from gpu_timing import captured, milliseconds
from ragged_experts import FULL, Routed, mixture, random_packed, routed

from optimum_moe.kernels.ragged_matmul import Tiles
from optimum_moe.vllm_plugin.packed_experts import PackedExperts
from optimum_moe.vllm_plugin.ragged_experts import RaggedExperts

TOKENS = (1, 8, 64, 256, 1024, 4096)
PROCESSES = 12
FEW = [
    Tiles(*sizes)
    for sizes in product((16,), (16, 32, 64), (64, 128, 256), (2, 4, 8), (3, 5))
    if sizes[1] * sizes[2] <= 8192
]
MANY = [
    Tiles(*sizes)
    for sizes in product((32, 64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4))
    # Deeper and wider ones want more shared memory than a multiprocessor has.
    if (sizes[0] + 2 * sizes[1]) * sizes[2] * 2 * sizes[4] <= 230_000
]


def candidates(tokens: int) -> list[Tiles]:
    """Tiles that are worth a try: blocks of few rows for few tokens."""
    pairs = tokens * FULL.top_k / FULL.experts
    return FEW if pairs <= 4 else FEW + MANY if pairs <= 16 else MANY


def compile_all(own: list[Tiles]) -> None:
    """Leave the compiled kernels in Triton's cache on disk."""
    torch.manual_seed(0)
    device, dtype = torch.device("cuda"), torch.bfloat16
    packed, _ = random_packed(mixture(FULL), FULL, device, dtype)
    for tiles in own:
        for tokens in TOKENS:
            if tiles in candidates(tokens):
                try:
                    RaggedExperts(packed, tiles)(*routed(FULL, tokens, device, dtype))
                    torch.cuda.synchronize()
                except Exception as error:
                    print(f"{tiles}: {type(error).__name__} {' '.join(str(error).split())[:80]}", flush=True)
                    break


def seconds_of(tiles: Tiles | None, packed: PackedExperts, given: Routed) -> float:
    """Of a replay; infinity where the device has not enough shared memory."""
    experts = RaggedExperts(packed, tiles)
    graph = captured(lambda: experts(*given))
    return milliseconds(graph, packed.flat.device, least=5, most=20, limit=0.05) / 1e3 if callable(graph) else math.inf


def times() -> Iterator[tuple[int, Tiles, float, float]]:
    """For every number of tokens and tiles the seconds, and these over those of the present choice."""
    every = FEW + MANY
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_all, [every[start::PROCESSES] for start in range(PROCESSES)]))
    torch.manual_seed(0)
    device, dtype = torch.device("cuda"), torch.bfloat16
    packed, _ = random_packed(mixture(FULL), FULL, device, dtype)
    for tokens in TOKENS:
        given = routed(FULL, tokens, device, dtype)
        present = seconds_of(None, packed, given)
        for tiles in candidates(tokens):
            seconds = seconds_of(tiles, packed, given)
            yield tokens, tiles, seconds, seconds / present


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--best", type=int, default=5, help="tiles that are printed for each number of tokens")
    best = parser.parse_args().best
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("| tokens | rows | columns | depth | warps | stages | us | of the present choice |")
    print("|---" * 8 + "|", flush=True)
    for tokens, found in groupby(times(), key=lambda row: row[0]):
        for _, tiles, seconds, ratio in sorted(found, key=lambda row: row[2])[:best]:
            sizes = f"{tiles.rows} | {tiles.columns} | {tiles.depth} | {tiles.warps} | {tiles.stages}"
            print(f"| {tokens:,} | {sizes} | {1e6 * seconds:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
