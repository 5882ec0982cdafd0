"""Export to MLX, with `mlx_lm.convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from optimum_moe.exporting.environment import has_module, run_script
from optimum_moe.exporting.exported import Exported
from optimum_moe.exporting.staging import stage
from optimum_moe.exporting.targets import MLX

_GROUPS = (64, 32)
"""Numbers of values that share a scale in MLX's quantized matrices; rows must be multiples of it."""


@dataclass(frozen=True)
class MLXExport:
    """A checked export to MLX.

    Args:
        checkpoint: The checkpoint.
        python: Interpreter that has mlx-lm.
        bits: Bits of quantized values; None to keep the checkpoint's own.
        group: Values that share a scale.
    """

    checkpoint: Exported
    python: str
    bits: int | None
    group: int

    def write(self, output: Path) -> None:
        """Write the folder."""
        with TemporaryDirectory(prefix="optimum_moe_", dir=output.parent) as folder:
            staged = Path(folder) / "checkpoint"
            staged.mkdir()
            stage(self.checkpoint, staged, self.checkpoint.spelled_config(), link=True)
            made = Path(folder) / "mlx"
            request = {"checkpoint": str(staged), "output": str(made), "bits": self.bits, "group": self.group}
            run_script(self.python, "convert_to_mlx", request, "convert the checkpoint with mlx_lm.convert")
            made.rename(output)


def plan_mlx(checkpoint: Exported, quantize: str | None, python: str) -> MLXExport:
    """Check an export to MLX before any tensor is read.

    Raises:
        ValueError: If mlx-lm is missing, or no group of values divides all rows.
    """
    if not has_module(python, "mlx_lm"):
        raise ValueError(
            f"MLX checkpoints are written by mlx_lm.convert, and {python} has no mlx_lm. {MLX}, and pass "
            "that environment as python= (--python ENVIRONMENT/bin/python)."
        )
    if quantize is None:
        return MLXExport(checkpoint, python, None, _GROUPS[0])
    rows = sorted({shape[-1] for name, (_, shape, _) in checkpoint.headers.tensors.items() if len(shape) > 1})
    fitting = [group for group in _GROUPS if all(row % group == 0 for row in rows)]
    if not fitting:
        odd = next(row for row in rows if row % _GROUPS[-1])
        raise ValueError(
            f"MLX quantizes groups of {' or '.join(map(str, _GROUPS))} values of a row, and {checkpoint.directory} has "
            f"rows of {odd}. Compress again with widths that are multiples of {_GROUPS[-1]} (--runs-in any chooses "
            "them where the original's is one), or leave quantize= out."
        )
    return MLXExport(checkpoint, python, int(quantize.removesuffix("bit")), fitting[0])
