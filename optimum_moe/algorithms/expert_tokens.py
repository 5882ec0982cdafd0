"""The calibration tokens of one expert, and one expert by itself.

Shape letters: E experts, H hidden, I intermediate, K top-k, P tokens of one expert, S sampled tokens of the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_moe.algorithms.experts import ExpertTensors


@dataclass(frozen=True, eq=False)
class ExpertTokens:
    """The P sampled tokens that were routed to one expert; all float32.

    Args:
        input_PH: (P, H) what the expert saw.
        weight_P: (P,) routing weights; ones where they scale the inputs.
        gradient_JPH: (J, P, H) gradients of the loss at the block's weighted sum of experts, one for each draw of labels;
            None without a backward pass.
    """

    input_PH: torch.Tensor
    weight_P: torch.Tensor
    gradient_JPH: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """A block's sample of S tokens, with the ids of the experts as they are now.

    Args:
        input_SH: (S, H) input of the experts.
        index_SK: (S, K) selected experts; an id outside of [0, E) is none.
        weights_SK: (S, K) routing weights; 0 is none either.
        gradient_SJH: (S, J, H) gradients of the loss at the weighted sum of experts, or None.
        scales_input: as in `ExpertTensors`.
    """

    input_SH: torch.Tensor
    index_SK: torch.Tensor
    weights_SK: torch.Tensor
    gradient_SJH: torch.Tensor | None = None
    scales_input: bool = False

    def of_expert(self, expert: int) -> ExpertTokens:
        """The tokens of one expert, in order."""
        token_P, slot_P = ((self.index_SK == expert) & (self.weights_SK != 0)).nonzero(as_tuple=True)
        input_PH, weight_P = self.input_SH[token_P].float(), self.weights_SK[token_P, slot_P].float()
        if self.scales_input:
            input_PH, weight_P = input_PH * weight_P[:, None], torch.ones_like(weight_P)
        gradient_SJH = self.gradient_SJH
        gradient_JPH = None if gradient_SJH is None else gradient_SJH[token_P].transpose(0, 1).float()
        return ExpertTokens(input_PH, weight_P, gradient_JPH)


@dataclass(frozen=True, eq=False)
class SingleExpert:
    """One expert's matrices and biases in float32, and what it computes.

    Args:
        experts: The block's experts.
        index: Which one.
    """

    experts: ExpertTensors
    index: int

    def matrix(self, name: str) -> torch.Tensor:
        """(O, X) gate, up or down."""
        return getattr(self.experts, name)[self.index].detach().float()

    @property
    def names(self) -> tuple[str, ...]:
        """Its projections."""
        return ("up", "down") if self.experts.gate is None else ("gate", "up", "down")

    def bias(self, name: str) -> torch.Tensor | None:
        """(O,) bias of a projection, or None."""
        biases = getattr(self.experts, f"{name}_bias")
        return None if biases is None else biases[self.index].detach().float()

    def project(self, name: str, input_PX: torch.Tensor) -> torch.Tensor:
        """(P, O) output of a projection."""
        return torch.nn.functional.linear(input_PX, self.matrix(name), self.bias(name))

    def activate(self, gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
        """(P, I) hidden neurons.

        Raises:
            ValueError: If the architecture does not give its gate function.
        """
        if self.experts.activate is None:
            raise ValueError(
                "These experts do not give their gate function, which says what their hidden neurons are. "
                "Add `activate` to the surgeon, or pass whiten=False."
            )
        # Stock gate functions may work in the model's dtype only.
        return self.experts.activate(gate_PI, up_PI).float()

    def hidden(self, input_PH: torch.Tensor) -> torch.Tensor:
        """(P, I) hidden neurons of its tokens."""
        gate_PI = None if self.experts.gate is None else self.project("gate", input_PH)
        return self.activate(gate_PI, self.project("up", input_PH))
