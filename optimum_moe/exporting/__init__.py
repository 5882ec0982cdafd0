"""Export of checkpoints to other runtimes, with the runtimes' own converters."""

from optimum_moe.exporting.exporter import export

__all__ = ["export"]
