"""A block's experts and its sampled tokens, one expert at a time.

Shape letters: E experts, H hidden, J draws of labels, K top-k, P tokens of one expert, S sampled tokens of the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_moe.algorithms.expert_curves import Expert, ExpertTokens
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
    """

    input_SH: torch.Tensor
    index_SK: torch.Tensor
    weights_SK: torch.Tensor
    gradient_SJH: torch.Tensor | None = None
    scales_input: bool = False
    share: float = 1.0

    def of_expert(self, expert: int) -> ExpertTokens:
        """The tokens of one expert in float32, in order."""
        token_P, slot_P = ((self.index_SK == expert) & (self.weights_SK != 0)).nonzero(as_tuple=True)
        input_PH, weight_P = self.input_SH[token_P].float(), self.weights_SK[token_P, slot_P].float()
        if self.scales_input:
            input_PH, weight_P = input_PH * weight_P[:, None], torch.ones_like(weight_P)
        gradient_SJH = self.gradient_SJH
        gradient_JPH = None if gradient_SJH is None else gradient_SJH[token_P].transpose(0, 1).float()
        return ExpertTokens(input_PH, weight_P, gradient_JPH)


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
