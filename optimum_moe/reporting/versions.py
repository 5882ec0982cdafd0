"""Package versions to record in a compressed checkpoint."""

from __future__ import annotations

import torch
import transformers

import optimum_moe


def versions() -> dict[str, str]:
    """Versions of the packages that affect the values of a compressed checkpoint."""
    return {
        "optimum_moe": optimum_moe.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
