"""What tests of stages share: data for layers that were made silent, and one run with each engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optimum_moe import CalibrationConfig, MoECompressor, verify
from optimum_moe.stages import Stage
from tests.test_streaming import assert_same
from tests.tiny_models import Target, build, inputs_for

WARNINGS = ("ignore:Calibration gave no token", "ignore:All outputs are zero", "ignore:These weights are all zeros")
"""Of tiny models with layers that were made silent, to be ignored."""


def data_for(target: Target | str) -> CalibrationConfig:
    return CalibrationConfig([inputs_for(target, seed=seed) for seed in range(2)])


@dataclass(frozen=True)
class Written:
    """A checkpoint that both engines write alike.

    Args:
        folder: The one written from memory.
        compressor: What wrote it.
    """

    folder: Path
    compressor: MoECompressor


def write_with_both_engines(name: str, stage: Stage, folder: Path) -> Written:
    """Compress a tiny model in memory and streaming; the checkpoints are equal, and they verify."""
    build(name).save_pretrained(folder / "original")
    runs = {}
    for engine in ("memory", "streaming"):
        compressor = MoECompressor.from_pretrained(
            folder / "original",
            stage,
            data_for(name),
            engine=engine,
            output_dir=folder / engine / "out",
            progress=False,
        )
        runs[engine] = Written(compressor.apply(), compressor)
    assert_same(runs["memory"].folder, runs["streaming"].folder)
    report = verify(runs["memory"].folder, folder / "original")
    assert report.passed, str(report)
    return runs["memory"]
