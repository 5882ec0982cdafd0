"""Functions that name what they read of a block: registered choices of pruning and merging are of this kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optimum_moe.settings import choose_one
from optimum_moe.stages.context import BlockContext
from optimum_moe.statistics import OBSERVATION_OF

_OF_THE_CONTEXT = ("experts", "info", "router", "generator")
_SAMPLES = ("sample", "reservoir")
"""The sampled tokens on the device of the experts, and as they were observed."""


@dataclass(frozen=True)
class FromContext:
    """A function whose parameters are parts of a `BlockContext`, by name.

    Args:
        function: The function.
        parts: Names of its parameters that are parts of the context or fields of its statistics.
    """

    function: Callable[..., Any]
    parts: frozenset[str]

    @property
    def observations(self) -> frozenset[str]:
        """Names of the observations that it reads."""
        found = {OBSERVATION_OF[part] for part in self.parts if part in OBSERVATION_OF}
        return frozenset(found | ({"sample"} if self.parts.intersection(_SAMPLES) else set()))

    def __call__(self, context: BlockContext, **more: Any) -> Any:
        """The function's result for a block, given its other arguments."""
        given = {part: getattr(context, part) for part in self.parts if part in _OF_THE_CONTEXT}
        if "sample" in self.parts:
            given["sample"] = context.sample()
        if "reservoir" in self.parts:
            given["reservoir"] = context.observed().reservoir
        given |= {part: getattr(context.observed(), part) for part in self.parts if part in OBSERVATION_OF}
        return self.function(**given, **{name: value for name, value in more.items() if name in self._others})

    @property
    def _others(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters) - self.parts


def from_context(kind: str, name: str, function: Callable[..., Any], *more: str) -> FromContext:
    """A function that was registered, with the names of what it reads.

    Args:
        kind: What it was registered as, for errors.
        name: Its name, for errors.
        function: The function.
        more: Names of other arguments that it may take.

    Raises:
        ValueError: If a parameter is none of those that exist.
    """
    parameters = list(inspect.signature(function).parameters)
    known = [*_OF_THE_CONTEXT, *_SAMPLES, *OBSERVATION_OF, *more]
    for parameter in parameters:
        choose_one(f"{kind} {name!r}: parameter", parameter, known)
    return FromContext(function, frozenset(parameters) - set(more))
