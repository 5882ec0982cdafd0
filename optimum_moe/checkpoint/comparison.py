"""Comparison of tensors bit for bit: zeros of different sign differ, and a NaN is equal to itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from optimum_moe.plan import BlockPlan

_NAMED = 3
"""Number of differing experts that a message names."""


@dataclass
class Comparison:
    """Results of comparing tensors.

    Args:
        may_be_trained: Whether all floating-point values may differ, because the model was trained since.
        trained_names: The parameters that may differ, where a record says what was trained.
        failures: Messages of failures.
        trained: Messages of differences that are allowed.
        count: Number of compared tensors.
    """

    may_be_trained: bool = False
    trained_names: frozenset[str] = frozenset()
    failures: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    count: int = 0

    def compare(
        self, name: str, actual: torch.Tensor | None, expected: torch.Tensor, plan: BlockPlan | None = None
    ) -> None:
        """Compare one tensor.

        Args:
            name: Name of the tensor in messages.
            actual: The stored tensor, None if it is missing.
            expected: The expected tensor.
            plan: The plan of its block, if the groups are its first axis.
        """
        self.count += 1
        if actual is None:
            self.failures.append(f"{name} is missing")
        elif actual.shape != expected.shape:
            self.failures.append(f"{name} has shape {tuple(actual.shape)}, and should have {tuple(expected.shape)}")
        elif actual.dtype != expected.dtype:
            self.failures.append(f"{name} is stored in {actual.dtype}, and should be in {expected.dtype}")
        elif not same_bits(actual, expected):
            text = _difference(name, actual, expected, plan)
            self.differs(text, name) if actual.is_floating_point() else self.failures.append(text)

    def differs(self, text: str, *names: str) -> None:
        """Record a difference of floating-point values that come from these parameters."""
        allowed = self.may_be_trained or not self.trained_names.isdisjoint(names)
        (self.trained if allowed else self.failures).append(text)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits."""
    return a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, (elements, itemsize) uint8."""
    return tensor.detach().contiguous().view(-1, 1).view(torch.uint8)


def _difference(name: str, actual: torch.Tensor, expected: torch.Tensor, plan: BlockPlan | None) -> str:
    unequal = (_bits(actual) != _bits(expected)).any(1).view(actual.shape)
    apart = (actual.double() - expected.double()).abs().nan_to_num(torch.inf, torch.inf)
    text = f"{name}: {int(unequal.sum()):,} of {actual.numel():,} elements differ, by {float(apart.max()):.3g} at most"
    if plan is not None and len(actual) == plan.num_groups:
        wrong = unequal.flatten(1).any(1).nonzero()[:, 0].tolist()
        members = [f"{group} (was {', '.join(map(str, plan.members(group)))})" for group in wrong[:_NAMED]]
        text += f"; experts {', '.join(members)}"
    return text
