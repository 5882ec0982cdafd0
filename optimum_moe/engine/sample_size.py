"""How many tokens are sampled at each block: as many as are observed, within the memory and the disk at hand."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optimum_moe.engine.working_folder import recorded_identity
from optimum_moe.model_info import BlockInfo
from optimum_moe.recipe import Recipe

SAMPLE_SETTING = "number of sampled tokens"
"""Name of the number in the identity of a streaming run."""

# Part of what is free that samples may take.
_SHARE = 0.25

_ID_BYTES, _FLOAT_BYTES = 8, 4
# Rows of the hidden size that a device holds for each token, beside the sample: outputs of a block and their errors.
_WORKING_ROWS = 4


@dataclass(frozen=True)
class Room:
    """What is free for samples.

    Args:
        memory: Bytes of memory, for the samples of all blocks, or with `disk` for those of one block at a time.
        disk: Bytes of the disk that holds the samples of all blocks; None if they are in memory.
        device: Bytes of the accelerator that computes on the sample of one block at a time; None for the CPU.
    """

    memory: int
    disk: int | None = None
    device: int | None = None


def choose_sample_size(
    recipe: Recipe, blocks: Sequence[BlockInfo], observed: int, room: Room, needs: Collection[str]
) -> int:
    """The number of tokens to sample at each block, where the user gives none.

    It is what the recipe needs, doubled until all tokens are sampled, the recipe wants no more, or there is no room.
    Machines with about as much memory so choose the same number.

    Args:
        recipe: The recipe.
        blocks: The blocks of the model.
        observed: Number of tokens of the calibration data.
        room: What is free.
        needs: Names of the observations to collect.
    """
    size = recipe.sample_size
    wanted = min(observed, recipe.largest_sample)
    fitting = fitting_tokens(blocks, 1 + recipe.gradient_draws + ("residual" in needs), room)
    while size < wanted and 2 * size <= fitting:
        size *= 2
    return size


def fitting_tokens(blocks: Sequence[BlockInfo], rows: int, room: Room) -> int:
    """The number of tokens whose samples take a quarter of what is free.

    Args:
        blocks: The blocks.
        rows: Rows of the hidden size that are sampled with each token: its input, which the router and the experts
            mostly share, its gradients, and the residual stream.
        room: What is free.
    """
    sizes = [
        # Beside the rows the ids and weights of the choices.
        rows * block.hidden_size * block.expert_itemsize + block.top_k * (_ID_BYTES + block.expert_itemsize)
        for block in blocks
    ]
    largest = max(sizes)
    bounds = [room.memory / sum(sizes)] if room.disk is None else [room.memory / largest, room.disk / sum(sizes)]
    if room.device is not None:
        working = _WORKING_ROWS * _FLOAT_BYTES * max(block.hidden_size for block in blocks)
        bounds.append(room.device / (largest + working))
    return max(0, int(_SHARE * min(bounds)))


def free_on(devices: Collection[torch.device]) -> int | None:
    """Free bytes of the fullest CUDA device among some devices; None if there is none."""
    return min((torch.cuda.mem_get_info(device)[0] for device in devices if device.type == "cuda"), default=None)


def recorded_sample_size(destination: Path) -> int | None:
    """The number with which an interrupted streaming run to this folder is resumed; None if there is none."""
    return recorded_identity(destination).get(SAMPLE_SETTING)
