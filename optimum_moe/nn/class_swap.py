"""Give a live module new behavior by swapping its class: parameters, names and hooks stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class SwappedModule(nn.Module):
    """Base of the mixins put in front of a stock class; `original_class` is that class.

    With `keeps_name` the new class is called like the original one.
    """

    original_class: type[nn.Module]
    keeps_name = False

    def __reduce__(self) -> tuple[Callable[..., nn.Module], tuple[type, type], dict[str, Any]]:
        return _blank_instance, (type(self).__mro__[1], self.original_class), self.__dict__


def swapped_class(mixin: type[SwappedModule], original: type[nn.Module]) -> type[nn.Module]:
    """The class that behaves like `original` with `mixin` in front; the same object for the same pair.

    Raises:
        ValueError: If `original` has the mixin already.
    """
    if issubclass(original, mixin):
        raise ValueError(
            f"{original.__name__} has {mixin.__name__} in front already: a block is cut once. "
            "Start from the original checkpoint."
        )
    if (mixin, original) not in _CLASSES:
        # A hub kernel chosen by its layer name would replace forward() and with it the mixin.
        namespace = {"original_class": original, "kernel_layer_name": None, "__module__": mixin.__module__}
        name = original.__name__ if mixin.keeps_name else f"{mixin.__name__}{original.__name__}"
        if mixin.keeps_name:
            namespace["__module__"] = original.__module__
        _CLASSES[mixin, original] = type(name, (mixin, original), namespace)
    return _CLASSES[mixin, original]


_CLASSES: dict[tuple[type[SwappedModule], type[nn.Module]], type[nn.Module]] = {}


def _blank_instance(mixin: type[SwappedModule], original: type[nn.Module]) -> nn.Module:
    """What pickle and deepcopy call: classes made at run time cannot be looked up by name."""
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)
