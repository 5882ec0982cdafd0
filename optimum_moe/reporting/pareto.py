"""The picture of a sweep: what each recipe loses at each size of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optimum_moe.reporting.pictures import check_drawing, write_picture


@dataclass(frozen=True)
class Dot:
    """One result.

    Args:
        label: What it is a result of; results of one label are joined by a line.
        bytes: Of the checkpoint.
        loss: KL to the original in nats a token.
    """

    label: str
    bytes: int
    loss: float


def draw_pareto(dots: Sequence[Dot], front: Sequence[tuple[int, float]], path: Path) -> list[Path]:
    """Draw loss against bytes, the front of the best ones as a step line.

    Args:
        dots: All results.
        front: (bytes, loss) that no other result beats in both, by bytes.
        path: Of the pictures, without suffix.

    Returns:
        The files: PNG and SVG.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    check_drawing()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot()
    for label in dict.fromkeys(dot.label for dot in dots):
        own = sorted((dot.bytes, dot.loss) for dot in dots if dot.label == label)
        axis.plot([b / 1e6 for b, _ in own], [loss for _, loss in own], marker="o", linewidth=1, label=label)
    if front:
        axis.step(
            [b / 1e6 for b, _ in front],
            [loss for _, loss in front],
            where="post",
            color="black",
            linewidth=2.5,
            alpha=0.3,
            label="best of all",
        )
    axis.set(xlabel="checkpoint (MB)", ylabel="KL to the original (nats a token)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return write_picture(figure, path)
