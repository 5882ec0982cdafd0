"""The modality of each token: text, or the image, video or audio that a placeholder stands for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from optimum_moe.calibration.masks import seen_tokens
from optimum_moe.model_info import BlockInfo
from optimum_moe.statistics import MODALITIES

Placeholders = Mapping[int, int]
"""Position in `MODALITIES` by token id of a placeholder."""


def placeholders(config: PreTrainedConfig) -> Placeholders:
    """The placeholders of a model that takes media; empty for others."""
    found: dict[int, int] = {}
    for part in _parts(config):
        for place, modality in enumerate(MODALITIES):
            for name in (f"{modality}_token_id", f"{modality}_token_index"):
                token = getattr(part, name, None)
                if isinstance(token, int):
                    found[token] = place
    return found


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside of it, the outer ones last: these are what the processor goes by."""
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _parts(inner)
    yield config


def with_modalities(
    needs: Collection[str], batches: Iterable[Mapping[str, Any]], known: Placeholders
) -> frozenset[str]:
    """The observations to collect: also those by modality, if any batch has a placeholder."""
    ids = torch.tensor(sorted(known))
    has_media = known and any("input_ids" in b and torch.isin(b["input_ids"].cpu(), ids).any() for b in batches)
    return frozenset(needs) | ({"modalities"} if has_media else frozenset())


def token_modalities(
    inputs: Mapping[str, Any], block: BlockInfo, in_text: bool, known: Placeholders
) -> torch.Tensor | None:
    """The modality of the tokens that a block sees in one forward pass.

    Args:
        inputs: Inputs of the forward pass.
        block: The block.
        in_text: Whether it sees the tokens of `input_ids`.
        known: The model's placeholders.

    Returns:
        (T,) int64 positions in `MODALITIES`; None for a block that sees no ids, such as one of a vision tower.
    """
    ids = inputs.get("decoder_input_ids" if block.stack == "decoder" and "decoder_input_ids" in inputs else "input_ids")
    if not in_text or ids is None:
        return None
    modality = torch.zeros_like(ids)
    for token, place in known.items():
        modality[ids == token] = place
    return seen_tokens(inputs, block, modality.reshape(-1))
