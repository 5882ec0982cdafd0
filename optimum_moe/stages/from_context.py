"""Registered functions of pruning and merging: their parameter names say which parts of a block they read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optimum_moe.settings import check_free, choose_one
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.results import Returned, WrongResult
from optimum_moe.statistics import OBSERVATION_OF

Function = Callable[..., Any]

_OF_THE_CONTEXT = ("experts", "info", "router", "generator")
_SAMPLES = ("sample", "reservoir", "loss_sample", "rerouter", "residual_SH")
"""`sample` is on the device of the experts, `reservoir` is the same data as observed; `loss_sample` also has gradients
of the loss, where a backward pass is possible; `rerouter` is the router's rule on these tokens, and `residual_SH` their
residual stream before the block."""
READABLE = (*_OF_THE_CONTEXT, *_SAMPLES, *OBSERVATION_OF)
"""What a function of any kind may read of a block."""


@dataclass(frozen=True)
class FromContext:
    """A function whose parameters are parts of a `BlockContext`, by name.

    Args:
        function: The function.
        parts: Names of its parameters that come from the context or its statistics.
        title: Kind and name of the function, for errors.
        check: Check of what it returns, which gives the value that is used.
    """

    function: Callable[..., Any]
    parts: frozenset[str]
    title: str
    check: Callable[[Returned], Any]

    @property
    def observations(self) -> frozenset[str]:
        """Names of the observations that the function reads."""
        found = {OBSERVATION_OF[part] for part in self.parts if part in OBSERVATION_OF}
        found |= {"sample"} if self.parts.intersection(_SAMPLES) else set()
        found |= {"gradients"} if "loss_sample" in self.parts else set()
        return frozenset(found | ({"residual"} if "residual_SH" in self.parts else set()))

    def reads(self, parameter: str) -> bool:
        """Whether the function has a parameter of that name."""
        return parameter in inspect.signature(self.function).parameters

    def __call__(self, context: BlockContext, **more: Any) -> Any:
        """The checked result of the function for a block; `more` are arguments that the context does not have.

        Raises:
            WrongResult: If the function returns what its kind does not allow.
        """
        given = {part: getattr(context, part) for part in self.parts if part in _OF_THE_CONTEXT}
        given |= {part: context.sample() for part in self.parts.intersection(("sample", "loss_sample"))}
        if "reservoir" in self.parts:
            given["reservoir"] = context.observed().reservoir
        if "rerouter" in self.parts:
            given["rerouter"] = context.rerouter()
        if "residual_SH" in self.parts:
            given["residual_SH"] = self._residual(context)
        given |= {part: getattr(context.observed(), part) for part in self.parts if part in OBSERVATION_OF}
        given |= {name: value for name, value in more.items() if name not in self.parts and self.reads(name)}
        try:
            value = self.function(**given)
        except WrongResult:
            # Of a similarity that a grouping called, and named there.
            raise
        except Exception as error:
            if not hasattr(error, "__notes__"):
                error.add_note(f"It was raised in the {self.title} for {context.info.name}.")
            raise
        return self.check(Returned(self.title, context, value, more))

    def _residual(self, context: BlockContext) -> torch.Tensor:
        found, name = context.observed().reservoir.residual_SH, context.info.name
        if found is None:
            raise ValueError(
                f"{self.title} reads the residual stream before {name}, which the statistics do not have: they were "
                "observed without it, or no module of the layer gives what the experts get. Observe again with "
                f'calibrate(), use another function, or leave the block out with protect=["{name}"].'
            )
        return found


class Choice:
    """A registry of functions of which a setting of a stage names one.

    Args:
        kind: Name of the setting, for errors.
        check: Check of what a function returns, which gives the value that is used.
        given: Names of further arguments of the functions, beside the parts of a `BlockContext`.
    """

    def __init__(self, kind: str, check: Callable[[Returned], Any], *given: str) -> None:
        self.kind, self.given = kind, given
        self._check = check
        self._functions: dict[str, FromContext] = {}

    def register(self, name: str) -> Callable[[Function], Function]:
        """Decorator that makes a function available under a name; a function that is defined again replaces itself.

        Raises:
            ValueError: If the name is no text or that of another function, or a parameter of the function is unknown.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(
                f'{self.kind} functions are registered by a name, got {name!r}. Write @register_{self.kind}("name").'
            )

        def register(function: Function) -> Function:
            check_free(f"{self.kind} {name!r}", self.functions.get(name), function)
            self._functions[name] = self._wrapped(name, function)
            return function

        return register

    def _wrapped(self, name: str, function: Function) -> FromContext:
        """The function after a check of its parameter names."""
        title = f"{self.kind} {name!r}"
        parameters = list(inspect.signature(function).parameters)
        for parameter in parameters:
            choose_one(f"{title}: parameter", parameter, [*READABLE, *self.given])
        return FromContext(function, frozenset(parameters) - set(self.given), title, self._check)

    def __getitem__(self, name: str) -> FromContext:
        """The function of that name; a `ValueError` with the nearest match if there is none."""
        remedy = f", or register it first, with register_{self.kind} (for a command, in a file: --import FILE)"
        choose_one(self.kind, name, self._functions, remedy)
        return self._functions[name]

    @property
    def functions(self) -> Mapping[str, Function]:
        """All registered functions by name."""
        return {name: found.function for name, found in self._functions.items()}
