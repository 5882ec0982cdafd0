"""A block's experts and its sampled tokens, one expert at a time.

Shape letters: E experts, H hidden, J draws of labels, K top-k, P tokens of one expert, S sampled tokens of the block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.experts import ExpertTensors, PerExpert


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """A block's sample of S tokens, with the ids of the experts as they are now.

    Args:
        input_SH: (S, H) input of the experts.
        index_SK: (S, K) selected experts; an id outside of [0, E) is none.
        weights_SK: (S, K) routing weights; 0 is none either.
        gradient_SJH: (S, J, H) gradients of the loss at the weighted sum of experts, or None.
        scales_input: as in `ExpertTensors`.
        share: S over the tokens that the block saw.

    Raises:
        ValueError: If the shapes do not fit.
    """

    input_SH: torch.Tensor
    index_SK: torch.Tensor
    weights_SK: torch.Tensor
    gradient_SJH: torch.Tensor | None = None
    scales_input: bool = False
    share: float = 1.0

    def __post_init__(self) -> None:
        (sampled, hidden), gradient = self.input_SH.shape, self.gradient_SJH
        fits = self.index_SK.shape == self.weights_SK.shape and len(self.index_SK) == sampled
        if not fits or (gradient is not None and (len(gradient), gradient.shape[-1]) != (sampled, hidden)):
            raise ValueError(
                f"Tokens of shape {(sampled, hidden)} have ids {tuple(self.index_SK.shape)}, weights "
                f"{tuple(self.weights_SK.shape)} and gradients {None if gradient is None else tuple(gradient.shape)}. "
                "Pass (S, H), (S, K), (S, K), (S, J, H)."
            )

    def of_expert(self, expert: int) -> ExpertTokens:
        """The tokens of one expert in float32, in order."""
        return self.routed(expert)[1]

    def routed(self, expert: int) -> tuple[torch.Tensor, ExpertTokens]:
        """(P,) int64 which of the tokens were routed to an expert, and what it saw of them in float32."""
        token_P, slot_P = ((self.index_SK == expert) & (self.weights_SK != 0)).nonzero(as_tuple=True)
        input_PH, weight_P = self.input_SH[token_P].float(), self.weights_SK[token_P, slot_P].float()
        if self.scales_input:
            input_PH, weight_P = input_PH * weight_P[:, None], torch.ones_like(weight_P)
        gradient_SJH = self.gradient_SJH
        gradient_JPH = None if gradient_SJH is None else gradient_SJH[token_P].transpose(0, 1).float()
        return token_P, ExpertTokens(input_PH, weight_P, gradient_JPH)

    def counts(self, num_experts: int) -> list[int]:
        """How many tokens each expert has."""
        chosen = self.index_SK[self.weights_SK != 0].long()
        return torch.bincount(chosen.clamp(max=num_experts), minlength=num_experts)[:num_experts].tolist()

    def every(self, step: int, first: int = 0) -> SampledTokens:
        """Every `step`-th token from the one numbered `first` on."""
        gradient_SJH = self.gradient_SJH
        return replace(
            self,
            input_SH=self.input_SH[first::step],
            index_SK=self.index_SK[first::step],
            weights_SK=self.weights_SK[first::step],
            gradient_SJH=None if gradient_SJH is None else gradient_SJH[first::step],
            share=self.share / step,
        )

    def importance(self) -> torch.Tensor:
        """(S,) float32 squared size of each token's gradient, 1 without gradients."""
        if self.gradient_SJH is None:
            return torch.ones(len(self.input_SH), device=self.input_SH.device)
        return self.gradient_SJH.float().square().sum((1, 2))


def single_expert(experts: ExpertTensors, index: int) -> Expert:
    """One of a block's experts by itself, in float32.

    Raises:
        ValueError: If the architecture does not give its gate function.
    """
    activate = experts.activate
    if activate is None:
        raise ValueError(
            "These experts do not give their gate function, which says what their hidden neurons are. "
            "Add `activate` to the surgeon."
        )

    def own(values: PerExpert | None) -> torch.Tensor | None:
        return None if values is None else values[index].detach().float()

    up_IH, down_HI = own(experts.up), own(experts.down)
    assert up_IH is not None
    assert down_HI is not None
    return Expert(up_IH, down_HI, activate, own(experts.gate), own(experts.up_bias), own(experts.gate_bias))


def routed_output(
    experts: ExpertTensors, index: int, input_SH: torch.Tensor, token_P: torch.Tensor, weight_P: torch.Tensor
) -> torch.Tensor:
    """(P, H) float32 what one expert adds to the block's output, with its down bias and whatever follows down.

    Args:
        experts: The block's experts.
        index: Id of the expert.
        input_SH: (S, H) inputs of the block's experts.
        token_P: (P,) numbers of the tokens, which may repeat with other weights.
        weight_P: (P,) their routing weights.

    Raises:
        ValueError: If something outside of the expert takes part in its output, or it has no gate function.
    """
    if experts.fixed_neurons:
        raise ValueError(
            "The neurons of these experts meet what all experts share, so that the output of one does not follow from "
            "its own weights. Use a criterion that needs no outputs, or leave the block out with protect=."
        )
    weight_P1 = weight_P.float()[:, None]
    if experts.scales_input:
        return _output(experts, index, input_SH[token_P].float() * weight_P1)
    unique_U, place_P = token_P.unique(return_inverse=True)
    return _output(experts, index, input_SH[unique_U].float())[place_P] * weight_P1


def _output(experts: ExpertTensors, index: int, input_PH: torch.Tensor) -> torch.Tensor:
    expert, down_HI = single_expert(experts, index), experts.down[index]
    output_PH = expert.activated(expert.preactivations(input_PH)) @ expert.down_HI.T
    if experts.down_bias is not None:
        output_PH = output_PH + experts.down_bias[index].float()
    return output_PH if experts.finish is None else experts.finish(output_PH.to(down_HI.dtype)).float()
