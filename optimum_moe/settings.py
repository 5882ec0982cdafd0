"""Parsing and checks of settings: scalars of Python and numpy, ranges, shares in percent. Standard library only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

MAX_SEED = 2**32 - 1
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_DIGITS = {2: 3, 4: 7}
"""Decimal digits of a floating-point number, by its bytes."""


def plain(value: Any) -> Any:
    """A setting as JSON and YAML values: scalars of numpy and torch become Python's, ranges and arrays lists."""
    if isinstance(value, range | set | frozenset):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value) if type(value) in (list, tuple) else value
    if not hasattr(value, "tolist"):
        return value
    found = value.tolist()
    if isinstance(found, float):
        # A float32 of 0.07 is 0.0700000003; take the shortest decimal number that rounds to it.
        digits = _DIGITS.get(value.dtype.itemsize)
        return found if digits is None else float(f"{found:.{digits}g}")
    return found


def make_plain(settings: Any, shares: Iterable[str] = ()) -> None:
    """Make the fields of a frozen dataclass `plain`, and convert `shares` that are given in percent to numbers."""
    for name in settings.__dataclass_fields__:
        value = plain(getattr(settings, name))
        object.__setattr__(settings, name, percent(value) if name in shares else value)


def percent(value: Any) -> Any:
    """The share of a text such as `"50%"`; other values are returned unchanged."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", value) if isinstance(value, str) else None
    return value if match is None else float(Decimal(match[1]) / 100)


def token_count(value: Any) -> Any:
    """The number of a text such as `"300k"`, `"1.5M"` or `"2_048"`; other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)", value.strip().lower().replace("_", "").replace(",", ""))
    return value if match is None else round(Decimal(match[1]) * _MULTIPLES[match[2]])


def product(share: float, number: int) -> float:
    """A share of a number without rounding errors: 0.07 of 100 is 7, and 5/6 of 6 is 5."""
    return round(share * number, 6)


def check_count(name: str, value: Any, least: int, other: str = "") -> None:
    """Raise a `ValueError` unless a setting is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is out of range. Pass an integer of at least {least}{other}.")


def check_seed(value: Any) -> None:
    """Raise a `ValueError` unless a value is a valid random seed."""
    check_count("seed", value, 0)
    if value > MAX_SEED:
        raise ValueError(f"seed={value} is out of range. Pass an integer of at most {MAX_SEED}.")


def nearest(value: Any, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to a mistyped one; None if no similarity, from 0 to 1, reaches the cutoff."""
    found = difflib.get_close_matches(str(value), list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def choose_one(name: str, value: Any, allowed: Iterable[str], more: str = "") -> None:
    """Raise a `ValueError` with the nearest match unless `value` is one of `allowed`; `more` ends its remedy."""
    allowed = sorted(allowed)
    if value not in allowed:
        near = nearest(value, allowed)
        hint = f"; did you mean {near!r}?" if near else "."
        raise ValueError(f"{name}={value!r} is unknown{hint} Choose one of {', '.join(map(repr, allowed))}{more}.")


def check_fields(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a `ValueError` with the nearest match for an unknown field."""
    for name in given:
        if name not in known:
            raise unknown_field(name, known)


def unknown_field(name: str, known: Sequence[str]) -> ValueError:
    """The error for an unknown field, with the nearest match."""
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else f". Known: {', '.join(sorted(set(known)))}."
    return ValueError(f"Unknown field {name!r}{hint}")


def check_free(name: str, known: Any, new: Any) -> None:
    """Raise a `ValueError` if a name is registered for another definition than the new one.

    A cell of a notebook that is run again defines the same function or class, with the change that it was run for.
    """
    if known is not None and _origin(known) != _origin(new):
        raise ValueError(f"{name} is already registered, by {'.'.join(_origin(known))}. Choose another name.")


def _origin(defined: Any) -> tuple[str, str]:
    """Module and name of a definition."""
    return str(getattr(defined, "__module__", "")), str(getattr(defined, "__qualname__", id(defined)))


def exactly_one(**alternatives: Any) -> None:
    """Raise a `ValueError` unless exactly one of the alternatives is given."""
    given = {name: value for name, value in alternatives.items() if value is not None}
    if len(given) != 1:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
        raise ValueError(f"Give exactly one of {', '.join(alternatives)}; got {shown}.")
