"""Architectures that are refused, since compression of their MoE blocks would be wrong."""

from __future__ import annotations

from torch import nn

REFUSED: dict[str, str] = {
    "NllbMoeSparseMLP": (
        "transformers up to 5.24 runs only its first two experts, whatever the router selects (NllbMoeExperts reads a "
        "mask as ids), so neither calibration nor the compressed model would match the checkpoint. Wait for a version "
        "of transformers in which all experts run."
    ),
    "DogeCDMoE": (
        "its router mixes the tokens of a batch (router_logits.view(2, tokens, -1)): the experts of a token depend on "
        "the other tokens, so that no statistics hold for another batch. Wait for a version of transformers in which "
        "each token is routed by itself, or use a checkpoint with is_moe=False."
    ),
    "DiffusionGemmaDecoderTextLayer": (
        "it shares its weights with the encoder layer, and a cut of one would untie them. Compress another "
        "architecture, or the encoder alone (DiffusionGemmaEncoderTextModel)."
    ),
}
"""Reason and remedy by class name of the block."""


def refuse(module: nn.Module, name: str) -> None:
    """Raise a `ValueError` if an MoE block cannot be compressed correctly.

    Raises:
        ValueError: If its class is in `REFUSED`; with block, reason and remedy.
    """
    reason = REFUSED.get(type(module).__name__)
    if reason is not None:
        raise ValueError(f"{name} ({type(module).__name__}) cannot be compressed: {reason}")
