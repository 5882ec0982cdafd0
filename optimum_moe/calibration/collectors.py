"""Collectors of statistics of an MoE block, one class for each observation; a run only uses those that a stage needs.

All sums are float64 on the CPU; padding never counts. Shape letters as in `BlockStatistics`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from optimum_moe.statistics import MODALITIES, OBSERVATIONS


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of a block: E experts of I neurons each, on a residual stream of width H."""

    num_experts: int
    intermediate_size: int
    hidden_size: int


@dataclass(frozen=True, eq=False)
class ExpertCall:
    """The call of one expert on its P routed tokens.

    Args:
        keep_P: (P,) bool, False for padding.
        gate_P: float64 routing weights of the tokens that are not padding.
        norm_P: float64 norms of the expert's outputs for these tokens.
        all_input_PH: (P, H) inputs of all tokens.
        all_hidden_PI: (P, I) hidden activations of all tokens.
        modality_P: int64 positions in `MODALITIES` of the tokens that are not padding; None if they are unknown.
    """

    keep_P: torch.Tensor
    gate_P: torch.Tensor
    norm_P: torch.Tensor
    all_input_PH: torch.Tensor
    all_hidden_PI: torch.Tensor
    modality_P: torch.Tensor | None = None

    @property
    def input_PH(self) -> torch.Tensor:
        """Inputs of the tokens that are not padding."""
        return self.all_input_PH[self.keep_P]

    @property
    def hidden_PI(self) -> torch.Tensor:
        """Hidden activations of the tokens that are not padding."""
        return self.all_hidden_PI[self.keep_P]


class Collector:
    """Accumulates one observation over all calls of a block; its attributes are fields of `BlockStatistics`."""

    name: ClassVar[str]

    def router(self, logits_TE: torch.Tensor) -> None:
        """Add the float64 router logits of one call's tokens."""

    def choices(self, chosen_TE: torch.Tensor) -> None:
        """Add the selections of one call: 1 for each selected expert, else 0, float64."""

    def expert(self, expert: int, call: ExpertCall) -> None:
        """Add the tokens of one expert."""

    def fields(self) -> dict[str, torch.Tensor]:
        """The accumulated tensors by field name."""
        return {field: getattr(self, field) for field in OBSERVATIONS[self.name]}


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


class Frequency(Collector):
    """Number of tokens that are routed to each expert."""

    name = "frequency"

    def __init__(self, sizes: BlockSizes) -> None:
        self.token_count_E = _zeros(sizes.num_experts)

    def expert(self, expert: int, call: ExpertCall) -> None:
        """See `Collector.expert`."""
        self.token_count_E[expert] += len(call.gate_P)


class RoutingWeights(Collector):
    """Sum of the routing weights of each expert."""

    name = "routing_weights"

    def __init__(self, sizes: BlockSizes) -> None:
        self.gate_sum_E = _zeros(sizes.num_experts)

    def expert(self, expert: int, call: ExpertCall) -> None:
        """See `Collector.expert`."""
        self.gate_sum_E[expert] += call.gate_P.sum().cpu()


class Outputs(Collector):
    """Sums of each expert's output norms, plain, squared and weighted by the router."""

    name = "outputs"

    def __init__(self, sizes: BlockSizes) -> None:
        self.output_norm_sum_E, self.output_sq_sum_E = _zeros(sizes.num_experts), _zeros(sizes.num_experts)
        self.gated_norm_sum_E, self.gated_sq_sum_E = _zeros(sizes.num_experts), _zeros(sizes.num_experts)

    def expert(self, expert: int, call: ExpertCall) -> None:
        """See `Collector.expert`."""
        gate_P, norm_P = call.gate_P, call.norm_P
        self.output_norm_sum_E[expert] += norm_P.sum().cpu()
        self.output_sq_sum_E[expert] += norm_P.square().sum().cpu()
        self.gated_norm_sum_E[expert] += (gate_P * norm_P).sum().cpu()
        self.gated_sq_sum_E[expert] += (gate_P * norm_P).square().sum().cpu()


class Inputs(Collector):
    """Sum of squares of each input channel, by expert."""

    name = "inputs"

    def __init__(self, sizes: BlockSizes) -> None:
        self.input_sq_EH = _zeros(sizes.num_experts, sizes.hidden_size)

    def expert(self, expert: int, call: ExpertCall) -> None:
        """See `Collector.expert`."""
        self.input_sq_EH[expert] += call.input_PH.float().square().sum(0, dtype=torch.float64).cpu()


class Neurons(Collector):
    """Sum of squares of each hidden neuron, by expert."""

    name = "neurons"

    def __init__(self, sizes: BlockSizes) -> None:
        self.hidden_sq_EI = _zeros(sizes.num_experts, sizes.intermediate_size)

    def expert(self, expert: int, call: ExpertCall) -> None:
        """See `Collector.expert`."""
        self.hidden_sq_EI[expert] += call.hidden_PI.float().square().sum(0, dtype=torch.float64).cpu()


class Coactivation(Collector):
    """How often two experts are selected for the same token."""

    name = "coactivation"

    def __init__(self, sizes: BlockSizes) -> None:
        self.coactivation_EE = _zeros(sizes.num_experts, sizes.num_experts)

    def choices(self, chosen_TE: torch.Tensor) -> None:
        """See `Collector.choices`."""
        self.coactivation_EE += chosen_TE.T @ chosen_TE


class RouterLogits(Collector):
    """Gram matrix and sum of the router logits."""

    name = "router_logits"

    def __init__(self, sizes: BlockSizes) -> None:
        self.router_gram_EE = _zeros(sizes.num_experts, sizes.num_experts)
        self.router_sum_E = _zeros(sizes.num_experts)

    def router(self, logits_TE: torch.Tensor) -> None:
        """See `Collector.router`."""
        self.router_gram_EE += logits_TE.T @ logits_TE
        self.router_sum_E += logits_TE.sum(0)


class Modalities(Collector):
    """Tokens and weighted output norms of each expert by the modality of the token."""

    name = "modalities"

    def __init__(self, sizes: BlockSizes) -> None:
        self.modality_count_VE = _zeros(len(MODALITIES), sizes.num_experts)
        self.modality_gated_norm_VE = _zeros(len(MODALITIES), sizes.num_experts)

    def expert(self, expert: int, call: ExpertCall) -> None:
        """See `Collector.expert`."""
        if call.modality_P is None:
            return
        modality_P, gated_P = call.modality_P.cpu(), (call.gate_P * call.norm_P).cpu()
        self.modality_count_VE[:, expert].index_add_(0, modality_P, torch.ones_like(gated_P))
        self.modality_gated_norm_VE[:, expert].index_add_(0, modality_P, gated_P)


_COLLECTORS = (Frequency, RoutingWeights, Outputs, Inputs, Neurons, Coactivation, RouterLogits, Modalities)
_ALWAYS = frozenset({"frequency", "outputs"})
"""Always collected, to detect experts without tokens and activations that overflow."""


def make_collectors(sizes: BlockSizes, needs: Collection[str]) -> list[Collector]:
    """Create a collector for each observation in `needs`, and for those that every run needs."""
    return [collector(sizes) for collector in _COLLECTORS if collector.name in _ALWAYS.union(needs)]
