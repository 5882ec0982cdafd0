"""All experts of a block on the same tokens: how large and how alike their outputs are.

Shape letters: E experts, C tokens of a chunk, H hidden, S sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_moe.algorithms.expert_tokens import routed_output
from optimum_moe.algorithms.experts import ExpertTensors

# Outputs of all experts are held for one chunk of tokens: 64 MiB for 256 experts on a stream of width 2048.
_CHUNK = 32


@dataclass(frozen=True, eq=False)
class OutputComparison:
    """Outputs of all experts for the same tokens.

    Args:
        norm_SE: (S, E) float64 norm of each expert's output for each token.
        similarity_EE: (E, E) float64 in [0, 1], mean over the tokens of (cosine + 1) / 2 between two experts' outputs,
            ones on the diagonal; NaN without tokens.
    """

    norm_SE: torch.Tensor
    similarity_EE: torch.Tensor


@torch.no_grad()
def compare_outputs(experts: ExpertTensors, input_SH: torch.Tensor) -> OutputComparison:
    """Run every expert on every token, as no router does ("A Closer Look into Mixture-of-Experts", arXiv:2406.18219).

    Args:
        experts: The block's routed experts.
        input_SH: (S, H) tokens, with the device of the experts; routing weights do not count.

    Raises:
        ValueError: If something outside of the expert takes part in its output, or it has no gate function.
    """
    number, num_experts = len(input_SH), experts.num_experts
    norm_SE = torch.zeros(number, num_experts, dtype=torch.float64)
    cosine_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for start in range(0, number, _CHUNK):
        input_CH = input_SH[start : start + _CHUNK]
        token_C = torch.arange(len(input_CH), device=input_CH.device)
        every_C = torch.ones(len(input_CH), device=input_CH.device)
        output_ECH = torch.stack([routed_output(experts, e, input_CH, token_C, every_C) for e in range(num_experts)])
        norm_SE[start : start + _CHUNK] = output_ECH.norm(dim=-1).T.double().cpu()
        unit_ECH = torch.nn.functional.normalize(output_ECH, dim=-1)
        cosine_EE += torch.einsum("ech,fch->ef", unit_ECH, unit_ECH).double().cpu()
    similarity_EE = ((cosine_EE / number).clamp(-1, 1) + 1) / 2
    return OutputComparison(norm_SE, similarity_EE.fill_diagonal_(1 if number else torch.nan))
