"""Backward passes over calibration data: the gradient of the loss at what the experts give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

IGNORED = -100


@contextmanager
def differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Let gradients flow through a model, to none of its parameters.

    Raises:
        ValueError: If the model has no input embeddings, from which they would start.
    """
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no input embeddings, so no backward pass can be made. Pass curvature=False."
        )
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in learning:
            parameter.requires_grad_(True)


def summed_loss(model: PreTrainedModel, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Sum over all tokens of the negative log-likelihood of the next one; padding does not count.

    Args:
        model: The model.
        output: What it gave.
        inputs: What it was given.

    Raises:
        ValueError: If it gave no logits of its tokens.
    """
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    ids_BT, mask_BT = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}attention_mask")
    logits_BTV = getattr(output, "logits", None)
    if logits_BTV is None or ids_BT is None or logits_BTV.shape[:2] != ids_BT.shape:
        raise ValueError(
            f"{type(model).__name__} gives no logits for the ids that it reads, so there is no loss to go back from. "
            "Load it with the head that predicts its next token, or pass curvature=False."
        )
    labels_BT = ids_BT if mask_BT is None else ids_BT.masked_fill(mask_BT == 0, IGNORED)
    flat = logits_BTV[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(flat, labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
