"""Saliency criteria: how much an expert is worth; higher means keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain

import torch

from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.merging import in_parts
from optimum_moe.blocks import BlockInfo
from optimum_moe.methods.base import BlockContext
from optimum_moe.methods.counts import choose_one
from optimum_moe.statistics import BlockStatistics

NEEDS = ("statistics", "experts", "info", "generator")


@dataclass(frozen=True)
class Saliency:
    """A registered criterion: `function` is called with the parts of the `BlockContext` named in `needs`."""

    name: str
    needs: frozenset[str]
    function: Callable[..., torch.Tensor]

    def __call__(self, context: BlockContext) -> torch.Tensor:
        """(E,) float64 saliency of one block; an expert without tokens gets what the criterion's sums give: 0."""
        try:
            values_E = self.function(**{need: getattr(context, need) for need in sorted(self.needs)}).double()
        except AttributeError as error:
            if error.obj is not context.statistics:
                raise
            known = ", ".join(field.name for field in fields(BlockStatistics))
            raise ValueError(
                f"saliency {self.name!r} reads {error.name!r}, which statistics do not have. They have {known}."
            ) from error
        wanted, found = (context.info.num_experts,), tuple(values_E.shape)
        broken = [] if found != wanted else (~values_E.isfinite()).nonzero()[:, 0].tolist()
        if found != wanted or broken:
            got = f"NaN or infinity for experts {broken}" if broken else f"shape {found}"
            raise ValueError(
                f"saliency {self.name!r} must return {wanted[0]} finite values for {context.info.name}, got {got}. "
                "Weights and statistics are finite, so correct the registered function."
            )
        return values_E


_SALIENCIES: dict[str, Saliency] = {}


def register_saliency(
    name: str, needs: set[str] | frozenset[str] = frozenset({"statistics"})
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Decorator that makes a criterion available as `ExpertPruning(saliency=name)`.

    Args:
        name: Its name.
        needs: What the function takes as keyword arguments: `"statistics"` (a `BlockStatistics`), `"experts"` (an
            `ExpertTensors`), `"info"` (a `BlockInfo`), `"generator"` (a seeded `torch.Generator`). Without
            `"statistics"` it is data-free; without `"experts"` a streaming run does not read experts that go.

    Raises:
        ValueError: If the name is taken or a need is unknown.
    """
    if name in _SALIENCIES:
        raise ValueError(f"A saliency named {name!r} is already registered. Choose another name.")
    for need in needs:
        choose_one("needs", need, NEEDS)

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        _SALIENCIES[name] = Saliency(name, frozenset(needs), function)
        return function

    return register


def saliency_names() -> list[str]:
    """Names of all registered criteria."""
    return sorted(_SALIENCIES)


def get_saliency(name: str) -> Saliency:
    """The criterion of that name; a `ValueError` with the nearest match if there is none."""
    choose_one("saliency", name, _SALIENCIES)
    return _SALIENCIES[name]


def _mean(sum_E: torch.Tensor, statistics: BlockStatistics) -> torch.Tensor:
    return sum_E / statistics.token_count_E.clamp(min=1)


@register_saliency("frequency")
def frequency(statistics: BlockStatistics) -> torch.Tensor:
    """Share of the routed pairs."""
    return statistics.frequency_E


@register_saliency("gate_sum")
def gate_sum(statistics: BlockStatistics) -> torch.Tensor:
    """Sum of routing weights ("soft count")."""
    return statistics.gate_sum_E


@register_saliency("ean")
def expert_activation_norm(statistics: BlockStatistics) -> torch.Tensor:
    """Sum of output norms."""
    return statistics.output_norm_sum_E


@register_saliency("output_norm")
def mean_activation_norm(statistics: BlockStatistics) -> torch.Tensor:
    """Mean output norm over the expert's tokens."""
    return _mean(statistics.output_norm_sum_E, statistics)


@register_saliency("output_norm_squared")
def mean_squared_activation_norm(statistics: BlockStatistics) -> torch.Tensor:
    """Mean squared output norm over the expert's tokens."""
    return _mean(statistics.output_sq_sum_E, statistics)


@register_saliency("reap")
def router_weighted_activation(statistics: BlockStatistics) -> torch.Tensor:
    """Mean of g ||f(x)|| over the expert's tokens (REAP, arXiv:2510.13999)."""
    return _mean(statistics.gated_norm_sum_E, statistics)


@register_saliency("aimer", needs={"experts"})
def absolute_mean_over_rms(experts: ExpertTensors) -> torch.Tensor:
    """Minus mean|w| / rms(w) over all matrices of the expert; data-free.

    That is at least -1. An expert with a matrix of zeros is dead, and worth less than any other.
    """
    values = []
    for e in range(experts.num_experts):
        matrices = [m[e] for m in (experts.gate, experts.up, experts.down) if m is not None]
        sums = [[_sums(part) for part in in_parts(matrix)] for matrix in matrices]
        count = sum(m.numel() for m in matrices)
        mean, rms = (torch.stack([*chain.from_iterable(sums)]).sum(0) / count).tolist()
        is_dead = any(not any(float(total) for total, _ in parts) for parts in sums)
        values.append(_DEAD if is_dead else -mean / rms**0.5)
    return torch.tensor(values, dtype=torch.float64)


_DEAD = -2.0


def _sums(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of absolute values, and of squares, in float64; single rows are summed in float32."""
    rows = matrix.float()
    return torch.stack([rows.abs().sum(-1), rows.square().sum(-1)]).sum(-1, dtype=torch.float64)


@register_saliency("random", needs={"info", "generator"})
def random_saliency(info: BlockInfo, generator: torch.Generator) -> torch.Tensor:
    """Uniform random numbers: the baseline."""
    return torch.rand(info.num_experts, generator=generator, dtype=torch.float64)
