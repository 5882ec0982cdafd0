"""The random numbers of an observation."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch


def generator_for(purpose: Literal["sample", "labels"], seed: int, batch: int) -> torch.Generator:
    """A generator on the CPU for one batch, which does not depend on the batches before it.

    Purposes have unrelated numbers: the tokens with the smallest keys are sampled, and if keys were also what draws the
    labels, those of sampled tokens would be the first ones of the vocabulary.

    Args:
        purpose: Which tokens are sampled, or which labels the loss has.
        seed: Seed of the calibration data.
        batch: Number of the batch.
    """
    digest = hashlib.sha256(f"{purpose} {seed} {batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
