"""Backward passes over calibration data, for gradients of the loss with respect to expert outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

IGNORED = -100


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let autograd record the model after a tensor that requires gradients; parameters get no gradients."""
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in learning:
        model.get_parameter(name).requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        # By name, since a streamed model replaces its parameters as it loads them.
        for name in learning:
            model.get_parameter(name).requires_grad_(True)


def gives_logits(output: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the output has logits for the input ids, so that a loss can be computed."""
    ids_BT = inputs.get(f"{_prefix(inputs)}input_ids")
    logits_BTV = getattr(output, "logits", None)
    return logits_BTV is not None and ids_BT is not None and logits_BTV.shape[:2] == ids_BT.shape


def _prefix(inputs: Mapping[str, Any]) -> str:
    return "decoder_" if "decoder_input_ids" in inputs else ""


def sampled_loss(
    model: PreTrainedModel, output: Any, inputs: Mapping[str, Any], generator: torch.Generator
) -> torch.Tensor:
    """Sum over all tokens of the negative log-likelihood of a next token sampled from the model's prediction.

    The mean square of its gradients is the curvature of the KL divergence from the model itself (the true Fisher
    matrix); with the labels of the text it would be the empirical Fisher matrix instead. Padding does not count.

    Args:
        model: The model.
        output: Output of its forward pass.
        inputs: Inputs of its forward pass.
        generator: Random generator of the labels, on the CPU.

    Raises:
        ValueError: If the output has no logits for the input ids.
    """
    mask_BT = inputs.get(f"{_prefix(inputs)}attention_mask")
    if not gives_logits(output, inputs):
        raise ValueError(
            f"{type(model).__name__} returns no logits for its input ids, so there is no loss for a backward pass. "
            "Load it with its language modeling head, or pass curvature=False."
        )
    flat = output.logits.flatten(0, 1).float()
    # One random number per token on the CPU, so that the labels are the same on every device.
    uniform_T1 = torch.rand(len(flat), 1, generator=generator, dtype=torch.float64).to(flat.device, torch.float32)
    cumulated_TV = flat.detach().softmax(-1).cumsum(-1)
    labels_T = torch.searchsorted(cumulated_TV, uniform_T1 * cumulated_TV[:, -1:])[:, 0].clamp(max=flat.shape[-1] - 1)
    if mask_BT is not None:
        labels_T = labels_T.masked_fill(mask_BT.flatten() == 0, IGNORED)
    return nn.functional.cross_entropy(flat, labels_T, ignore_index=IGNORED, reduction="sum")
