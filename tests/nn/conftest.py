"""Tiny models whose blocks are cut to a few groups with labels chosen here."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from optimum_moe.plan import BlockPlan
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import build

# Group 0 has four members, so that repeats are common; group 3 has one.
LABELS = (0, 1, 0, 2, 3, 1, 0, 0)
DOMINANTS = (0, 1, 3, 4)


def cut(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(5)
    labels_E = torch.tensor(LABELS)
    for found in find_blocks(model):
        share_E = torch.rand(len(LABELS), dtype=torch.float64, generator=generator) + 0.1
        for group in range(len(DOMINANTS)):
            share_E[labels_E == group] /= share_E[labels_E == group].sum()
        found.surgeon.cut(found.module(model), BlockPlan(found.info.name, LABELS, DOMINANTS, "map", share_E))
    return model


@pytest.fixture
def build_mapped() -> Callable[..., PreTrainedModel]:
    """Build a tiny model and cut each of its blocks from eight experts to four groups; takes what `build` takes."""
    return lambda *args, **kwargs: cut(build(*args, **kwargs))
