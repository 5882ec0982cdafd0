"""Times of runs on a GPU or a CPU, and runs captured in a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(
    run: Callable[[], Any], device: torch.device, least: int = 5, most: int = 50, limit: float = 0.6
) -> float:
    """Median over runs, each waited for; the first two do not count."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        run()
    synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < least or (len(times) < most and time.perf_counter() - started < limit):
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def captured(run: Callable[[], Any]) -> Callable[[], Any] | str:
    """The run as a CUDA graph, or why there is none."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    except Exception as error:
        torch.cuda.synchronize()
        return type(error).__name__
