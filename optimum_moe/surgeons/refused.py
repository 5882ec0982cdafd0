"""MoE blocks that are found and refused: a cut of them would not mean what it says."""

from __future__ import annotations

from torch import nn

REFUSED: dict[str, str] = {
    "NllbMoeSparseMLP": (
        "transformers up to 5.24 runs only its first two experts, whatever the router chooses (NllbMoeExperts takes a "
        "mask for ids), so that calibration and the compressed model would not be those of the checkpoint. Wait for a "
        "version of transformers in which all experts run."
    ),
    "DogeCDMoE": (
        "its router mixes the tokens of a batch (router_logits.view(2, tokens, -1)): which experts a token gets "
        "depends on the tokens beside it, so that no statistics hold for another batch. Wait for a version of "
        "transformers in which a token is routed by itself, or use a checkpoint with is_moe=False."
    ),
    "DiffusionGemmaDecoderTextLayer": (
        "its weights are those of the encoder layer, and a cut of one would part the two. Compress another "
        "architecture, or the encoder alone (DiffusionGemmaEncoderTextModel)."
    ),
}
"""Why, and what to do instead, by class name of the block."""


def refuse(module: nn.Module, name: str) -> None:
    """Raise if an MoE block cannot be compressed rightly.

    Raises:
        ValueError: If its class is in `REFUSED`; names block, reason and remedy.
    """
    reason = REFUSED.get(type(module).__name__)
    if reason is not None:
        raise ValueError(f"{name} ({type(module).__name__}) cannot be compressed: {reason}")
