"""Canonical view of the routed experts of one block.

Shape letters: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

PerExpert = Sequence[torch.Tensor] | torch.Tensor
Activate: TypeAlias = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
"""From gate (P, I), None for non-gated experts, and up (P, I) to hidden neurons (P, I), each from its own two."""

NEURON_AXIS = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0, "down_bias": None}
"""Axis of an expert's matrix (or bias) along which its intermediate neurons lie."""


@dataclass(frozen=True, eq=False)
class ExpertTensors:
    """Weights of a block's routed experts, independent of how the architecture stores them.

    Every field is indexed by expert and may be a tensor with a leading expert axis or a sequence of one tensor per
    expert. The tensors may be strided views (transposed, interleaved) of the model's own storage: nothing is copied.

    Args:
        up: `up[e]` of shape (I, H); the only input projection of non-gated experts.
        down: `down[e]` of shape (H, I).
        gate: `gate[e]` of shape (I, H), or None for non-gated experts.
        gate_bias: `gate_bias[e]` of shape (I,), or None.
        up_bias: `up_bias[e]` of shape (I,), or None.
        down_bias: `down_bias[e]` of shape (H,), or None.
        fixed_neurons: Whether the order of the neurons is given from outside the experts (query channels that meet
            the keys of all experts, a hidden layer that all share), so that they cannot be permuted. `down` may then
            have fewer rows than H.
        activate: The experts' own gate function, differentiable; None where an architecture does not give it.
        finish: What follows down (a norm), None for nothing.
        scales_input: Whether routing weights scale the input of an expert, E(w x), instead of its output, w E(x).

    Raises:
        ValueError: if a field has another number of experts than `up`, or expert 0 another shape than the above.
    """

    up: PerExpert
    down: PerExpert
    gate: PerExpert | None = None
    gate_bias: PerExpert | None = None
    up_bias: PerExpert | None = None
    down_bias: PerExpert | None = None
    fixed_neurons: bool = False
    activate: Activate | None = None
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None
    scales_input: bool = False

    def __post_init__(self) -> None:
        """Check the layout once, so that no later step has to guess an axis."""
        if len(self.up) == 0 or self.up[0].ndim != 2:
            raise ValueError("up must hold at least one (I, H) matrix. Pass the experts' up projection per expert.")
        inner, hidden = self.up[0].shape
        written = len(self.down[0]) if self.fixed_neurons and len(self.down) else hidden
        expected: dict[str, tuple[PerExpert | None, tuple[int, ...]]] = {
            "down": (self.down, (written, inner)),
            "gate": (self.gate, (inner, hidden)),
            "gate_bias": (self.gate_bias, (inner,)),
            "up_bias": (self.up_bias, (inner,)),
            "down_bias": (self.down_bias, (written,)),
        }
        for name, (values, shape) in expected.items():
            if values is None:
                continue
            if len(values) != len(self.up):
                raise ValueError(
                    f"{name} has {len(values)} experts and up has {len(self.up)}: they must agree. "
                    "Pass the same experts in every field."
                )
            if tuple(values[0].shape) != shape:
                raise ValueError(
                    f"{name}[0] has shape {tuple(values[0].shape)}, but up[0] of shape {(inner, hidden)} asks for "
                    f"{shape}. Pass a view in the canonical orientation."
                )

    def no_refit(self, top_k: int) -> str:
        """Why down projections cannot be fitted to what experts gave that were merged; empty if they can.

        Args:
            top_k: Experts that the router selects for a token.
        """
        reasons = (
            (self.activate is None, "their surgeon does not give their gate function"),
            (self.fixed_neurons, "their neurons have a meaning outside of them"),
            (self.finish is not None, "a norm follows each of their outputs"),
            (
                self.scales_input and top_k > 1,
                "weights scale their inputs, so that a merged one runs for each of its members that a token selects",
            ),
        )
        return next((reason for holds, reason in reasons if holds), "")

    @property
    def num_experts(self) -> int:
        """Number of routed experts E."""
        return len(self.up)

    @property
    def intermediate_size(self) -> int:
        """Number of intermediate neurons I of each expert."""
        return int(self.up[0].shape[0])

    @property
    def hidden_size(self) -> int:
        """Width H of the residual stream."""
        return int(self.up[0].shape[1])
