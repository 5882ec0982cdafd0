"""Registered functions of pruning and merging: their parameter names say which parts of a block they read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optimum_moe.settings import choose_one
from optimum_moe.stages.context import BlockContext
from optimum_moe.statistics import OBSERVATION_OF

Function = Callable[..., Any]

_OF_THE_CONTEXT = ("experts", "info", "router", "generator")
_SAMPLES = ("sample", "reservoir")
"""`sample` is on the device of the experts, `reservoir` is the same data as observed."""


@dataclass(frozen=True)
class FromContext:
    """A function whose parameters are parts of a `BlockContext`, by name.

    Args:
        function: The function.
        parts: Names of its parameters that come from the context or its statistics.
    """

    function: Callable[..., Any]
    parts: frozenset[str]

    @property
    def observations(self) -> frozenset[str]:
        """Names of the observations that the function reads."""
        found = {OBSERVATION_OF[part] for part in self.parts if part in OBSERVATION_OF}
        return frozenset(found | ({"sample"} if self.parts.intersection(_SAMPLES) else set()))

    def __call__(self, context: BlockContext, **more: Any) -> Any:
        """Call the function for a block; `more` are arguments that the context does not have."""
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


def _from_context(kind: str, name: str, function: Callable[..., Any], *more: str) -> FromContext:
    """Wrap a registered function after a check of its parameter names.

    Args:
        kind: Kind of function in errors, for example `"similarity"`.
        name: Registered name in errors.
        function: The function.
        more: Names of arguments that the caller passes, beside the parts of a context.

    Raises:
        ValueError: If a parameter has an unknown name.
    """
    parameters = list(inspect.signature(function).parameters)
    known = [*_OF_THE_CONTEXT, *_SAMPLES, *OBSERVATION_OF, *more]
    for parameter in parameters:
        choose_one(f"{kind} {name!r}: parameter", parameter, known)
    return FromContext(function, frozenset(parameters) - set(more))


class Choice:
    """A registry of functions of which a setting of a stage names one.

    Args:
        kind: Name of the setting, for errors.
        given: Names of further arguments of the functions, beside the parts of a `BlockContext`.
    """

    def __init__(self, kind: str, *given: str) -> None:
        self.kind, self.given = kind, given
        self._functions: dict[str, FromContext] = {}

    def register(self, name: str) -> Callable[[Function], Function]:
        """Decorator that makes a function available under a name.

        Raises:
            ValueError: If the name is already registered, or a parameter of the function is unknown.
        """
        if name in self._functions:
            raise ValueError(f"A {self.kind} named {name!r} is already registered. Choose another name.")

        def register(function: Function) -> Function:
            self._functions[name] = _from_context(self.kind, name, function, *self.given)
            return function

        return register

    def __getitem__(self, name: str) -> FromContext:
        """The function of that name; a `ValueError` with the nearest match if there is none."""
        choose_one(self.kind, name, self._functions)
        return self._functions[name]

    @property
    def functions(self) -> Mapping[str, Function]:
        """All registered functions by name."""
        return {name: found.function for name, found in self._functions.items()}
