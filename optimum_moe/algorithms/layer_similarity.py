"""How little a layer, or a run of layers, changes the residual stream.

He et al., "Demystifying the Compression of Mixture-of-Experts Through a Unified Framework" (TMLR 2025,
arXiv:2406.02500), section 4.2: what leaves the cosine of its input and output near 1 is dropped.
"""

from __future__ import annotations

import torch


def importance_of_run(before_SH: torch.Tensor, after_SH: torch.Tensor) -> float:
    """1 minus the mean cosine of the residual stream before the first layer of a run and after its last one.

    Args:
        before_SH: (S, H) residual stream of sampled tokens before the run.
        after_SH: (S, H) residual stream of the same tokens after it.
    """
    cosine_S = torch.nn.functional.cosine_similarity(before_SH.double(), after_SH.double(), dim=-1)
    return float(1 - cosine_S.mean())


def importance_of_layer(cosine_sum: torch.Tensor, num_tokens: torch.Tensor) -> float:
    """1 minus the mean cosine, from its sum over tokens and their number."""
    return 1 - float(cosine_sum) / float(num_tokens)
