"""Progress of a run: one bar over the layers with the remaining time, and one line per layer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from optimum_moe.engine.layers import Layer
from optimum_moe.plan import BlockPlan

_STATUS = Path("/proc/self/status")


@dataclass
class LayerReport:
    """Results of one layer that its progress line shows.

    Args:
        plans: Plans of its blocks.
        error: Relative error of their outputs, if measured.
        done: What was done with a layer whose blocks were not cut.
    """

    plans: dict[str, BlockPlan] = field(default_factory=dict)
    error: float | None = None
    done: str = "observed"


class Progress:
    """A progress bar and lines on standard error; only lines if that is not a terminal.

    Args:
        total: Number of layers.
        description: Label of the bar.
        show: Whether to print anything.
        lines: Whether to print one line per layer.
    """

    def __init__(self, total: int, description: str, show: bool = True, lines: bool = False) -> None:
        self.show, self.lines, self.total = show, lines, total
        self._done = self._skipped = 0
        self._began = time.monotonic()
        bar = show and not (lines and not sys.stderr.isatty())
        self._bar: Any = tqdm(total=total, desc=description, disable=not bar)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def skip(self) -> None:
        """Count a layer that was finished by an earlier run."""
        self._skipped += 1
        self._done += 1
        self._bar.update()

    @contextmanager
    def layer(self, layer: Layer) -> Iterator[LayerReport]:
        """Time a layer, and print its line on exit."""
        began, report = time.monotonic(), LayerReport()
        yield report
        self._done += 1
        self._bar.update()
        if self.show and self.lines:
            self.say(self._line(layer, report, time.monotonic() - began))

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.show:
            tqdm.write(line, file=sys.stderr)

    def _line(self, layer: Layer, report: LayerReport, seconds: float) -> str:
        experts = [f"{plan.num_experts} -> {plan.num_groups} experts" for plan in report.plans.values()]
        otherwise = report.done if layer.blocks else "no experts"
        parts = [f"[{self._done}/{self.total}] {layer.name}:", ", ".join(experts) or otherwise]
        if report.error is not None:
            parts.append(f"error {report.error:.4f}")
        left = (time.monotonic() - self._began) / max(self._done - self._skipped, 1) * (self.total - self._done)
        parts += [f"{seconds:.1f} s", f"{anonymous_memory() / 1e9:.2f} GB", f"{left:.0f} s left"]
        return "  ".join(parts)


def anonymous_memory() -> int:
    """Bytes of this process that are not backed by a file; 0 if the system does not report them."""
    if not _STATUS.is_file():
        return 0
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
