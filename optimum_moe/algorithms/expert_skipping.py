"""Dynamic expert skipping: a token does without the selected experts whose routing weight is small beside its largest.

Lu et al., "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language
Models" (ACL 2024, arXiv:2402.14800), section 3.3: of two experts the second one is skipped where w_2 < beta w_1, with
beta the median of w_2 / w_1 over calibration tokens. For more experts, each rank k >= 2 has a ratio of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_CONSTANT = 0.01
"""Relative spread of the sum of a token's routing weights up to which the router normalizes it; bfloat16 rounds it."""


@dataclass(frozen=True)
class Skipping:
    """Which of its K selected experts a token skips.

    Args:
        ratios: K - 1 numbers in [0, 1]: the expert with the k-th largest routing weight (k >= 2) is skipped where that
            weight is less than `ratios[k - 2]` times the largest.
        renormalize: Whether the remaining weights are scaled to the sum of all, as a router that normalizes its weights
            would do.

    Raises:
        ValueError: If a ratio is out of range.
    """

    ratios: tuple[float, ...]
    renormalize: bool

    def __post_init__(self) -> None:
        if not self.ratios or not all(type(r) in (int, float) and 0 <= r <= 1 for r in self.ratios):
            raise ValueError(f"Ratios of routing weights must be numbers in [0, 1], got {list(self.ratios)!r:.100}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the fields."""
        return {"ratios": list(self.ratios), "renormalize": self.renormalize}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Skipping:
        """From the result of `to_dict`.

        Raises:
            ValueError: If it is none.
        """
        if set(record) != {"ratios", "renormalize"} or type(record["renormalize"]) is not bool:
            raise ValueError(f"Skipping needs the fields ratios and renormalize, got {dict(record)!r:.100}.")
        return cls(tuple(record["ratios"]), record["renormalize"])


def median_ratios(weights_SK: torch.Tensor) -> tuple[float, ...]:
    """K - 1 medians over tokens of the k-th largest routing weight by the largest.

    Half of the tokens skip their expert of each rank. The median of an even number of tokens is the mean of the two in
    the middle.

    Args:
        weights_SK: (S, K) routing weights of sampled tokens.
    """
    ordered_SK = weights_SK.double().sort(dim=-1, descending=True).values
    ratios_SJ = ordered_SK[:, 1:] / ordered_SK[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
    return tuple(ratios_SJ.quantile(0.5, dim=0).clamp(0, 1).tolist())


def is_normalized(weights_SK: torch.Tensor) -> bool:
    """Whether a router gives every token the same sum of routing weights.

    Args:
        weights_SK: (S, K) routing weights of sampled tokens.
    """
    sum_S = weights_SK.double().sum(-1)
    return bool((sum_S - sum_S.mean()).abs().max() <= _CONSTANT * sum_S.mean().abs())


def skip(weights_TK: torch.Tensor, skipping: Skipping) -> torch.Tensor:
    """(T, K) routing weights with 0 for skipped experts; those of a token that skips none keep their bits.

    Args:
        weights_TK: (T, K) routing weights.
        skipping: What is skipped.
    """
    wide_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    ordered_TK, order_TK = wide_TK.sort(dim=-1, descending=True, stable=True)
    # A number is passed to a kernel by value; a tensor of the ratios would be copied to the device on every call.
    floor_TK = torch.stack([ordered_TK[..., 0] * ratio for ratio in (0.0, *skipping.ratios)], dim=-1)
    skips_TK = ordered_TK < floor_TK
    left_TK = wide_TK.masked_fill(torch.zeros_like(skips_TK).scatter(-1, order_TK, skips_TK), 0)
    if skipping.renormalize:
        left_TK = left_TK * (wide_TK.sum(-1, keepdim=True) / left_TK.sum(-1, keepdim=True))
    return left_TK.to(weights_TK.dtype)


def experts_per_token(weights_SK: torch.Tensor, skipping: Skipping) -> float:
    """Mean number of experts that a token runs.

    Args:
        weights_SK: (S, K) routing weights of sampled tokens.
        skipping: What is skipped.
    """
    return float((skip(weights_SK, skipping) != 0).sum(-1).double().mean())
