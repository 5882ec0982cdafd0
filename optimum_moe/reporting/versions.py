"""The versions that a compressed checkpoint was made with."""

from __future__ import annotations

import torch
import transformers

import optimum_moe


def versions() -> dict[str, str]:
    """What decides the numbers of a compressed checkpoint, beside its recipe and its data."""
    return {
        "optimum_moe": optimum_moe.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
