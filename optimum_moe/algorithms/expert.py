"""One routed expert by itself, and the sampled tokens that were routed to it.

Shape letters: P routed tokens of the expert, J draws of labels, H hidden, I intermediate, N kept neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Activate = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Expert:
    """The matrices of one routed expert.

    Args:
        up_IH: (I, H) any float dtype.
        down_HI: (H, I).
        activate: hidden activations of (gate_PI or None, up_PI), neuron by neuron and differentiable.
        gate_IH: (I, H), None for non-gated experts.
        up_bias_I: (I,) or None.
        gate_bias_I: (I,) or None. A down bias stays in every format and changes nothing here.
    """

    up_IH: torch.Tensor
    down_HI: torch.Tensor
    activate: Activate
    gate_IH: torch.Tensor | None = None
    up_bias_I: torch.Tensor | None = None
    gate_bias_I: torch.Tensor | None = None

    @property
    def inner(self) -> int:
        """Number of neurons I."""
        return len(self.up_IH)

    @property
    def stacked(self) -> torch.Tensor:
        """(I or 2I, H) up, or gate above up."""
        return self.up_IH if self.gate_IH is None else torch.cat([self.gate_IH, self.up_IH])

    def float(self) -> Expert:
        """The same in float32 (or float64 if it is that already)."""
        return Expert(
            _wide(self.up_IH),
            _wide(self.down_HI),
            self.activate,
            None if self.gate_IH is None else _wide(self.gate_IH),
            None if self.up_bias_I is None else _wide(self.up_bias_I),
            None if self.gate_bias_I is None else _wide(self.gate_bias_I),
        )

    def narrowed(self, kept_N: torch.Tensor) -> Expert:
        """With these neurons only."""
        return Expert(
            self.up_IH[kept_N],
            self.down_HI[:, kept_N],
            self.activate,
            None if self.gate_IH is None else self.gate_IH[kept_N],
            None if self.up_bias_I is None else self.up_bias_I[kept_N],
            None if self.gate_bias_I is None else self.gate_bias_I[kept_N],
        )

    def preactivations(self, input_PH: torch.Tensor) -> torch.Tensor:
        """(P, I or 2I) outputs of `stacked`, without biases."""
        if self.gate_IH is None:
            return input_PH @ self.up_IH.T
        # Stacking the outputs copies less than stacking the matrices.
        return torch.cat([input_PH @ self.gate_IH.T, input_PH @ self.up_IH.T], dim=1)

    def activated(self, stacked_PS: torch.Tensor) -> torch.Tensor:
        """(P, I) hidden activations of the outputs of `stacked`."""
        up_PI = stacked_PS[:, -self.inner :]
        up_PI = up_PI if self.up_bias_I is None else up_PI + self.up_bias_I
        if self.gate_IH is None:
            return self.activate(None, up_PI)
        gate_PI = stacked_PS[:, : self.inner]
        return self.activate(gate_PI if self.gate_bias_I is None else gate_PI + self.gate_bias_I, up_PI)


@dataclass(frozen=True, eq=False)
class ExpertTokens:
    """The sampled tokens that were routed to one expert.

    Args:
        input_PH: (P, H) inputs of the experts call.
        weight_P: (P,) routing weights.
        gradient_JPH: (J, P, H) gradients of the loss summed over tokens with respect to the output of the whole
            experts call, one for each draw of labels; (P, H) is one draw. None where no backward pass ran: damage is
            then the squared error of the weighted output, in a unit of its own.

    Raises:
        ValueError: If the shapes do not fit.
    """

    input_PH: torch.Tensor
    weight_P: torch.Tensor
    gradient_JPH: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(self.weight_P.shape)]
        shapes += [] if self.gradient_JPH is None else [tuple(self.gradient_JPH.shape[-2:])]
        if shapes != [tuple(self.input_PH.shape[:1]), tuple(self.input_PH.shape)][: len(shapes)]:
            raise ValueError(
                f"Tokens of shape {tuple(self.input_PH.shape)} have weights and gradients of shapes {shapes}. "
                "Pass (P, H), (P,) and (J, P, H) of the same tokens."
            )

    def __len__(self) -> int:
        return len(self.input_PH)

    def halves(self) -> tuple[ExpertTokens, ExpertTokens]:
        """Every other token, and the rest; a single token is both."""
        if len(self) == 1:
            return self, self
        return self._every_other(0), self._every_other(1)

    def _every_other(self, first: int) -> ExpertTokens:
        gradient_JPH = None if self.gradient_JPH is None else self.gradient_JPH[..., first::2, :]
        return ExpertTokens(self.input_PH[first::2], self.weight_P[first::2], gradient_JPH)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
