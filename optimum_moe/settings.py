"""Numbers as users give them: Python's or numpy's, ranges, shares in percent. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

MAX_SEED = 2**32 - 1
_DIGITS = {2: 3, 4: 7}
"""Decimal digits that a floating number of so many bytes holds."""


def plain(value: Any) -> Any:
    """A setting as JSON and YAML can write it: scalars of numpy and torch become Python's, ranges and arrays lists."""
    if isinstance(value, range | set | frozenset):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value) if type(value) in (list, tuple) else value
    if not hasattr(value, "tolist"):
        return value
    found = value.tolist()
    if isinstance(found, float):
        # A float32 of 0.07 is 0.0700000003; what was meant is the shortest number that becomes it.
        digits = _DIGITS.get(value.dtype.itemsize)
        return found if digits is None else float(f"{found:.{digits}g}")
    return found


def make_plain(settings: Any, shares: Iterable[str] = ()) -> None:
    """Make the fields of a frozen dataclass `plain`, and numbers of those shares that are given in percent."""
    for name in settings.__dataclass_fields__:
        value = plain(getattr(settings, name))
        object.__setattr__(settings, name, percent(value) if name in shares else value)


def percent(value: Any) -> Any:
    """The share that a text such as `"50%"` names; anything else as it is."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", value) if isinstance(value, str) else None
    return value if match is None else float(Decimal(match[1]) / 100)


def product(share: float, number: int) -> float:
    """A share of a number without the error of rounding: 0.07 of 100 is 7, and 5/6 of 6 is 5."""
    return round(share * number, 6)


def check_count(name: str, value: Any, least: int, other: str = "") -> None:
    """Raise a `ValueError` unless a setting is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is out of range. Pass an integer of at least {least}{other}.")


def check_seed(value: Any) -> None:
    """Raise a `ValueError` unless a value can seed everything random."""
    check_count("seed", value, 0)
    if value > MAX_SEED:
        raise ValueError(f"seed={value} is out of range. Pass an integer of at most {MAX_SEED}.")
