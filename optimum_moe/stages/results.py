"""What a registered function returns, and the one place that checks it, whoever wrote the function.

Shape letters: E experts, G groups, X width of the router's last linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from optimum_moe.algorithms.router_fit import RouterFit
from optimum_moe.stages.context import BlockContext

T = TypeVar("T")

_ROUNDING = 1e-2
"""Largest difference of two mirrored similarities, as a share of the largest value: a rounding step of bfloat16."""
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Groups:
    """Which experts are merged.

    Args:
        labels_E: (E,) integer group of each expert; each of 0..G-1 has at least one expert.
        dominants: The dominant expert of each group, in the order of the labels; None for the most frequent expert of
            each group.
    """

    labels_E: torch.Tensor
    dominants: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class RouterRows:
    """The rows of a router with one row for each group.

    Args:
        weights_E: (E,) nonnegative weight of each expert's row in the row of its group. They are divided by their sum
            in each group; a group whose weights are all 0 takes the plain mean of its rows.
        fit: Fitted rows, which replace the weighted ones.
    """

    weights_E: torch.Tensor
    fit: RouterFit | None = None


class WrongResult(ValueError):
    """A registered function returned what no stage can use; the message names the function."""


@dataclass(frozen=True, eq=False)
class Returned:
    """The value that a registered function returned for a block, and its checks.

    Args:
        function: Kind and name of the function, for errors.
        context: The block.
        value: What it returned.
        given: Arguments beside the parts of the context.
    """

    function: str
    context: BlockContext
    value: Any
    given: Mapping[str, Any]

    def saliencies(self) -> torch.Tensor:
        """(E,) float64: a finite value for each expert."""
        return self._one_for_each_expert(self.value)

    def similarities(self) -> torch.Tensor:
        """(E, E) float64: a finite, symmetric matrix."""
        experts = self.context.info.num_experts
        rule = f"a symmetric ({experts}, {experts}) tensor of finite values"
        remedy = f"Return the similarity of each pair of the {experts} experts, in their order."
        found_EE = self._finite(self.value, (experts, experts), rule, remedy)
        apart_EE = (found_EE - found_EE.T).abs()
        if float(apart_EE.max()) > _ROUNDING * float(found_EE.abs().max()):
            i, j = sorted(divmod(int(apart_EE.argmax()), experts))
            got = f"{float(found_EE[i, j]):.6g} for experts {i} and {j}, {float(found_EE[j, i]):.6g} for {j} and {i}"
            raise self._wrong(rule, got, "Return the mean of the matrix and its transpose, (s + s.T) / 2.")
        return found_EE

    def groups(self) -> Groups:
        """A label in 0..G-1 for each expert, every group used, and dominant experts that are members of theirs."""
        found = self._is_a(Groups, self.value, "Return Groups(labels_E), from optimum_moe.stages.")
        experts, count = self.context.info.num_experts, int(self.given["num_groups"])
        rule = f"labels_E of shape ({experts},) with each of the {count} labels 0..{count - 1}"
        remedy = "Give each of the num_groups groups an expert, and number the groups without a gap."
        labels_E = self._tensor(found.labels_E, (experts,), rule, remedy)
        if labels_E.dtype.is_floating_point or labels_E.dtype == torch.bool:
            raise self._wrong(rule, f"dtype {labels_E.dtype}", "Return integers: labels_E.long().")
        labels_E = labels_E.cpu().long()
        used = set(labels_E.tolist())
        absent, others = sorted(set(range(count)) - used), sorted(used - set(range(count)))
        if absent or others:
            said = (("", others), ("none of ", absent))
            got = [f"{start}{_these('label', labels)}" for start, labels in said if labels]
            raise self._wrong(rule, " and ".join(got), remedy)
        self._check_router_groups(labels_E, count)
        return Groups(labels_E, self._dominants(found.dominants, labels_E, count))

    def merge_weights(self) -> torch.Tensor:
        """(E,) float64: a finite, nonnegative weight for each expert."""
        return self._one_for_each_expert(self.value, nonnegative=True)

    def router_rows(self) -> RouterRows:
        """A finite, nonnegative weight for each expert, and finite fitted rows if there are any."""
        found = self._is_a(RouterRows, self.value, "Return RouterRows(weights_E), from optimum_moe.stages.")
        weights_E = self._one_for_each_expert(found.weights_E, "weights_E", nonnegative=True)
        if found.fit is not None:
            fit = self._is_a(RouterFit, found.fit, "Return RouterRows(weights_E, RouterFit(rows_GX)).")
            shape = (len(self.given["dominants_G"]), self.context.router.rows_NX.shape[-1])
            remedy = "Return a row for each group, as wide as those of the original router."
            self._finite(fit.rows_GX, shape, f"rows_GX of shape {shape} with finite values", remedy, "group")
        return RouterRows(weights_E, found.fit)

    def _wrong(self, rule: str, got: str, remedy: str) -> WrongResult:
        where = self.context.info.name
        return WrongResult(f"{self.function} must return {rule}; for {where} it returned {got}. {remedy}")

    def _is_a(self, kind: type[T], value: Any, remedy: str) -> T:
        if not isinstance(value, kind):
            raise self._wrong(kind.__name__, _described(value), remedy)
        return value

    def _tensor(self, value: Any, shape: tuple[int, ...], rule: str, remedy: str) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise self._wrong(rule, _described(value), "Return a torch.Tensor.")
        if tuple(value.shape) != shape:
            raise self._wrong(rule, f"shape {tuple(value.shape)}", remedy)
        if value.is_complex():
            raise self._wrong(rule, f"dtype {value.dtype}", "Return real values.")
        return value.detach()

    def _finite(self, value: Any, shape: tuple[int, ...], rule: str, remedy: str, row: str = "expert") -> torch.Tensor:
        # On the CPU, where the statistics are, so that a function may compute on the device of the experts.
        found = self._tensor(value, shape, rule, remedy).double().cpu()
        broken = (~found.isfinite()).nonzero()[:, 0].unique().tolist()
        if broken:
            remedy = (
                "Weights and statistics are finite, and an expert without tokens has sums of 0: divide by "
                "token_count_E.clamp(min=1)."
            )
            raise self._wrong(rule, f"NaN or infinity for {_these(row, broken)}", remedy)
        return found

    def _one_for_each_expert(self, value: Any, what: str = "a tensor", nonnegative: bool = False) -> torch.Tensor:
        experts = self.context.info.num_experts
        rule = f"{what} of {experts} finite{', nonnegative' * nonnegative} values"
        found_E = self._finite(value, (experts,), rule, f"Return a value for each of the {experts} experts, in order.")
        negative = (found_E < 0).nonzero()[:, 0].tolist()
        if nonnegative and negative:
            worst = int(found_E.argmin())
            got = f"{float(found_E[worst]):.6g} for expert {worst}"
            raise self._wrong(rule, got, "Clamp the values at 0, or shift them.")
        return found_E

    def _check_router_groups(self, labels_E: torch.Tensor, count: int) -> None:
        """Groups of a reduced router lie in one router group each, the same number in all."""
        router_groups = int(self.given["router_groups"])
        rows = labels_E.reshape(router_groups, -1)
        share = count // router_groups
        counts = [len(row.unique()) for row in rows]
        if sum(counts) == count and set(counts) == {share}:
            return
        rule = f"{share} groups of experts in each of the {router_groups} router groups, and none across two of them"
        size = rows.shape[1]
        remedy = f"Read router_groups, and group each {size} consecutive experts by themselves."
        raise self._wrong(rule, f"{', '.join(map(str, counts))} groups that have experts in them", remedy)

    def _dominants(self, dominants: Any, labels_E: torch.Tensor, count: int) -> tuple[int, ...] | None:
        if dominants is None:
            return None
        rule = f"as dominants an expert of each of the {count} groups, in the order of the labels"
        remedy = "Correct them, or leave them out: the most frequent expert of each group is taken then."
        if not isinstance(dominants, Sequence | torch.Tensor):
            raise self._wrong(rule, _described(dominants), remedy)
        found = tuple(int(expert) for expert in dominants)
        if len(found) != count:
            raise self._wrong(rule, f"{len(found)} experts", remedy)
        for label, expert in enumerate(found):
            if not 0 <= expert < len(labels_E):
                raise self._wrong(rule, f"{expert} for label {label}, which is no expert", remedy)
            if int(labels_E[expert]) != label:
                raise self._wrong(rule, f"expert {expert} with label {int(labels_E[expert])} for label {label}", remedy)
        return found


def _described(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _these(name: str, numbers: Sequence[int]) -> str:
    """The first of some experts, groups or labels."""
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"{name}{'s' * (len(numbers) > 1)} {shown}{', ...' if len(numbers) > _SHOWN else ''}"
