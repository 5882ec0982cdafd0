"""Activations of experts, given gate and up apart: stored formats keep gate rows first, never interleaved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

SWISH, GELU, GELU_TANH, RELU_SQUARED = "swish", "gelu", "gelu_tanh", "relu_squared"

_KINDS = {
    "silu": SWISH,
    "swigluoai": SWISH,
    "swigluoai_uninterleave": SWISH,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "relu2": RELU_SQUARED,
}
# What vLLM's kernel of this activation has built in: limit, alpha, beta.
_GPT_OSS = 7.0, 1.702, 1.0


@dataclass(frozen=True)
class Activation:
    """act(gate) * (up + beta), or act(up) for experts without a gate.

    Args:
        kind: `swish` (x sigmoid(alpha x)), `gelu`, `gelu_tanh` or `relu_squared`.
        is_gated: Whether there is a gate.
        limit: Gate is at most this, and up between minus this and this; None for no limit.
        alpha: Of `swish`.
        beta: Added to up.
    """

    kind: str
    is_gated: bool
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def __call__(self, gate_Pn: torch.Tensor | None, up_Pn: torch.Tensor) -> torch.Tensor:
        """(P, n) hidden neurons."""
        if gate_Pn is None:
            return self._curve(up_Pn)
        if self.limit is not None:
            gate_Pn, up_Pn = gate_Pn.clamp(max=self.limit), up_Pn.clamp(min=-self.limit, max=self.limit)
        return self._curve(gate_Pn) * (up_Pn + self.beta if self.beta else up_Pn)

    def _curve(self, input_Pn: torch.Tensor) -> torch.Tensor:
        if self.kind == SWISH:
            return functional.silu(input_Pn) if self.alpha == 1 else input_Pn * torch.sigmoid(self.alpha * input_Pn)
        if self.kind == RELU_SQUARED:
            return functional.relu(input_Pn).square()
        return functional.gelu(input_Pn, approximate="tanh" if self.kind == GELU_TANH else "none")


def activation_of(block: str, name: str, limit: float | None, alpha: float | None, beta: float | None) -> Activation:
    """The activation that vLLM calls `name`.

    Args:
        block: Name of the block, for the message.
        name: Value of vLLM's `MoEActivation`.
        limit: `swiglu_limit` of the layer.
        alpha: `swiglu_alpha` of the layer.
        beta: `swiglu_beta` of the layer.

    Raises:
        ValueError: If the plugin does not run it.
    """
    kind, is_gated = _KINDS.get(name.removesuffix("_no_mul")), not name.endswith("_no_mul")
    if kind is None or (kind == RELU_SQUARED and is_gated):
        raise ValueError(
            f"{block} has the activation {name!r}, which the vLLM plugin does not run for experts in formats of their "
            f"own; it runs {', '.join(sorted(_KINDS))}. Serve the checkpoint with transformers, or compress again with "
            "runs_in='any'."
        )
    if name == "swigluoai":
        limit, alpha, beta = _GPT_OSS
    if name == "silu" and limit is None:
        alpha = beta = None
    return Activation(kind, is_gated, limit, 1.0 if alpha is None else alpha, beta or 0.0)
