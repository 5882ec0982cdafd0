"""`BlockLook`: what the statistics and the weights of one MoE block say about its experts and its router."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optimum_moe.algorithms.expert_usage import busiest_share, effective_experts, imbalance, shared_tokens
from optimum_moe.algorithms.grouping import dendrogram
from optimum_moe.algorithms.router_choice import NormChoice
from optimum_moe.algorithms.similarity import pair_correlation
from optimum_moe.statistics import MODALITIES, BlockStatistics

CORRELATED = (
    ("router_rows", "expert_weights"),
    ("router_rows", "outputs"),
    ("router_logits", "outputs"),
    ("expert_weights", "outputs"),
)
"""Similarities that are compared with each other over all pairs of experts."""
DIGITS = 6
"""Significant digits of the numbers in `BlockLook.to_dict`."""


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Each expert beside the one whose outputs are most like its own, neuron by neuron.

    Args:
        nearest_E: (E,) int64, that other expert; by the router's rows where outputs cannot be computed.
        unaligned_E: (E,) float64 mean cosine in [-1, 1] between their neurons in the same place.
        aligned_E: (E,) float64 mean cosine between their neurons after the best assignment.
    """

    nearest_E: torch.Tensor
    unaligned_E: torch.Tensor
    aligned_E: torch.Tensor


@dataclass(frozen=True, eq=False)
class BlockLook:
    """One MoE block of E routed experts, seen from inside ("A Closer Look into Mixture-of-Experts", arXiv:2406.18219).

    Args:
        name: Module path of the block.
        top_k: Experts that the router selects for a token.
        observed: Sums over the tokens that were routed to each expert.
        router_entropy: Mean over the sampled tokens of the entropy of the router's scores in nats, at most log E; NaN
            without tokens.
        similarities: (E, E) float64 in [0, 1], each (cosine + 1) / 2 between two experts' `router_rows`,
            `router_logits` over all tokens, `expert_weights` (all matrices, neurons in their own order) and `outputs`
            for the same tokens. Outputs are missing where they do not follow from an expert's own weights.
        choice: Whether the router selects experts with large outputs; None where outputs are missing.
        neighbors: Neurons of similar experts; None for a block of one expert.
    """

    name: str
    top_k: int
    observed: BlockStatistics
    router_entropy: float
    similarities: Mapping[str, torch.Tensor]
    choice: NormChoice | None
    neighbors: Neighbors | None

    @property
    def num_experts(self) -> int:
        """Number of routed experts (E)."""
        return self.observed.num_experts

    @property
    def coactivation_EE(self) -> torch.Tensor:
        """(E, E) share of the tokens that selected both of two experts, of those that selected either."""
        assert self.observed.coactivation_EE is not None
        return shared_tokens(self.observed.coactivation_EE)

    @property
    def output_norm_E(self) -> torch.Tensor:
        """(E,) mean norm of an expert's outputs over its own tokens; NaN for an expert without tokens."""
        return self.observed.output_norm_sum_E / self.observed.token_count_E

    @property
    def routing_weight_E(self) -> torch.Tensor:
        """(E,) mean routing weight of an expert over its own tokens; NaN for an expert without tokens."""
        assert self.observed.gate_sum_E is not None
        return self.observed.gate_sum_E / self.observed.token_count_E

    @property
    def dendrograms(self) -> dict[str, torch.Tensor]:
        """(E - 1, 4) tree of the experts for each similarity, by average linkage; see `algorithms.grouping`."""
        finite = {name: values_EE for name, values_EE in self.similarities.items() if values_EE.isfinite().all()}
        return {name: torch.from_numpy(dendrogram(values_EE, "average")) for name, values_EE in finite.items()}

    @property
    def modality_share_VE(self) -> torch.Tensor | None:
        """(V, E) share of each modality's routed tokens that each expert serves, NaN for a modality without tokens;
        None without media.
        """
        count_VE = self.observed.modality_count_VE
        return None if count_VE is None else count_VE / count_VE.sum(1, keepdim=True)

    @property
    def summary(self) -> dict[str, float]:
        """One number for each question, the columns of the table; NaN where there is none."""
        count_E, choice, neighbors = self.observed.token_count_E, self.choice, self.neighbors
        aligned = torch.nan if neighbors is None else float(neighbors.aligned_E.mean())
        found = {
            "effective_experts": effective_experts(count_E),
            "busiest_quarter": busiest_share(count_E),
            "imbalance": imbalance(count_E),
            "router_entropy": self.router_entropy,
            "relative_entropy": self.router_entropy / math.log(self.num_experts) if self.num_experts > 1 else torch.nan,
            "norm_rank_correlation": torch.nan if choice is None else choice.rank_correlation,
            "first_is_largest": torch.nan if choice is None else choice.first_is_largest,
            "neurons_unaligned": torch.nan if neighbors is None else float(neighbors.unaligned_E.mean()),
            "neurons_aligned": aligned,
        }
        for first, second in CORRELATED:
            pair = self.similarities.get(first), self.similarities.get(second)
            known = pair[0] is not None and pair[1] is not None
            found[f"{first}_and_{second}"] = pair_correlation(*pair) if known else torch.nan  # type: ignore[arg-type]
        return found

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON values of 6 significant digits, None for those that do not exist."""
        observed, share_VE = self.observed, self.modality_share_VE
        record: dict[str, Any] = {
            "name": self.name,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "num_tokens": observed.num_tokens,
            "experts_without_tokens": list(observed.unseen),
            "summary": plain(self.summary),
            "token_count": plain(observed.token_count_E),
            "frequency": plain(observed.frequency_E if observed.num_tokens else observed.frequency_E * torch.nan),
            "output_norm": plain(self.output_norm_E),
            "routing_weight": plain(self.routing_weight_E),
            "coactivation": plain(self.coactivation_EE),
            "norm_rank_of_first": None if self.choice is None else plain(self.choice.norm_rank_E),
            "similarities": plain(self.similarities),
            "dendrograms": plain(self.dendrograms),
        }
        if self.neighbors is not None:
            found = self.neighbors
            record |= {"nearest": found.nearest_E.tolist(), "neurons_unaligned": plain(found.unaligned_E)}
            record |= {"neurons_aligned": plain(found.aligned_E)}
        if share_VE is not None:
            assert observed.modality_count_VE is not None
            assert observed.modality_gated_norm_VE is not None
            reap_VE = observed.modality_gated_norm_VE / observed.modality_count_VE
            record["modalities"] = {
                name: {
                    "token_count": plain(observed.modality_count_VE[place]),
                    "share": plain(share_VE[place]),
                    "weighted_output_norm": plain(reap_VE[place]),
                }
                for place, name in enumerate(MODALITIES)
                if observed.modality_count_VE[place].any()
            }
        return record


def plain(value: Any) -> Any:
    """Tensors, numbers and mappings of them as JSON values, NaN as None."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")
