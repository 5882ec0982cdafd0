"""Padding masks of the tokens that each block sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_moe.model_info import BlockInfo
from optimum_moe.surgeons import FoundBlock

_POOLS = {"text_moe": False, "vision_moe": True}
"""Name of the vision block in Ernie 4.5 VL, which routes text and vision tokens through separate blocks."""
_POOL_IDS = "moe_mm_token_type_ids"


def text_blocks(model: PreTrainedModel, blocks: Sequence[FoundBlock]) -> set[str]:
    """Names of the blocks that see the tokens of `input_ids`; blocks of other towers see patches or frames."""
    text: nn.Module = model
    if model.config.get_text_config() is not model.config and not getattr(model.config, "is_encoder_decoder", False):
        text = model.get_decoder() or model
    inside = set(text.modules())
    return {found.info.name for found in blocks if found.module(model) in inside}


def padding_mask(inputs: Mapping[str, Any], block: BlockInfo, in_text: bool) -> torch.Tensor | None:
    """The mask of the tokens that a block sees in one forward pass.

    Args:
        inputs: Inputs of the forward pass.
        block: The block.
        in_text: Whether it is one of the `text_blocks`.

    Returns:
        (T,) bool, False for padding; None if no token is padding.
    """
    if not in_text:
        return None
    prefix = "decoder_" if block.stack == "decoder" and "decoder_input_ids" in inputs else ""
    mask = inputs.get(f"{prefix}attention_mask")
    return None if mask is None else seen_tokens(inputs, block, mask.reshape(-1).bool())


def seen_tokens(inputs: Mapping[str, Any], block: BlockInfo, values_T: torch.Tensor) -> torch.Tensor:
    """Of one value for each token of a forward pass, those of the tokens that a text block sees."""
    rows_T = rows_in_layer(inputs, block)
    return values_T if rows_T is None else values_T[rows_T]


def rows_in_layer(inputs: Mapping[str, Any], block: BlockInfo) -> torch.Tensor | None:
    """(T,) bool, which tokens of its layer a block sees in one forward pass; None for all."""
    pool, kinds = _POOLS.get(block.name.rpartition(".")[2]), inputs.get(_POOL_IDS)
    return None if pool is None or kinds is None else kinds.reshape(-1).bool() == pool
