"""Pictures of results, drawn with matplotlib and written as PNG and SVG."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_drawing() -> None:
    """Check that pictures can be drawn.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("Pictures need matplotlib. Install it with: pip install matplotlib.")


def write_picture(figure: Any, path: Path) -> list[Path]:
    """Write a figure beside itself in two formats; equal figures give equal files.

    Args:
        figure: A figure of matplotlib.
        path: Of the pictures, without suffix.

    Returns:
        The files: PNG and SVG.
    """
    import matplotlib

    files = [path.parent / f"{path.name}{suffix}" for suffix in (".png", ".svg")]
    with matplotlib.rc_context({"svg.hashsalt": "optimum_moe"}):
        for file in files:
            figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
