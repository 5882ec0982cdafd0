"""The engine: loop over the blocks of a source, decide each one, cut it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_moe.blocks import ModelInfo
from optimum_moe.methods import BlockContext, Method
from optimum_moe.plan import BlockPlan, CompressionPlan
from optimum_moe.statistics import Statistics
from optimum_moe.surgeons import FoundBlock


class BlockSource(Protocol):
    """Where the tensors of blocks come from, and where they go once a block is cut."""

    blocks: Sequence[FoundBlock]

    def opened(self, found: FoundBlock) -> Any:
        """Context manager that gives the block with its tensors; what was changed stays changed."""


class MemorySource:
    """The blocks of a model in memory."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[FoundBlock]) -> None:
        self.model = model
        self.blocks = blocks

    @contextmanager
    def opened(self, found: FoundBlock) -> Iterator[nn.Module]:
        """The block itself."""
        yield found.module(self.model)


def decide_and_cut(
    source: BlockSource,
    info: ModelInfo,
    method: Method,
    statistics: Statistics | None,
    seed: int,
    identity: Mapping[str, Any],
    progress: bool = True,
) -> CompressionPlan:
    """Decide and cut block by block.

    Every plan is decided on the block's original weights, and a block is cut only when its plan is complete.

    Returns:
        The plan that was carried out.
    """
    counts = method.allocate(info, statistics)
    plans: dict[str, BlockPlan] = {}
    for found in tqdm(source.blocks, desc=method.name, disable=not progress):
        name = found.info.name
        with source.opened(found) as block:
            context = BlockContext(
                info=found.info,
                experts=found.surgeon.experts(block),
                router_rows=found.surgeon.router_rows(block).detach(),
                generator=torch.Generator().manual_seed(seed * 100_003 + found.info.index),
                statistics=None if statistics is None else statistics.blocks[name],
                unseen="warn" if statistics is None else statistics.unseen,
            )
            with torch.no_grad():
                plans[name] = method.decide(context, counts[name])
            # The context views the old tensors, which must be free to go while the new ones are made.
            del context
            if not plans[name].is_identity:
                found.surgeon.cut(block, plans[name])
    calibration = None if statistics is None else statistics.calibration
    return CompressionPlan(plans, method.settings(), identity, calibration, seed)


def carry_out(source: BlockSource, plan: CompressionPlan) -> None:
    """Cut the blocks of a source as a finished plan says."""
    for found in source.blocks:
        block_plan = plan.blocks[found.info.name]
        if not block_plan.is_identity:
            with source.opened(found) as block:
                found.surgeon.cut(block, block_plan)
