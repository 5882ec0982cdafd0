"""Numbers in words: sizes, ratios and shares."""

from __future__ import annotations

import re

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(number: float, unit: str = "") -> str:
    """A number with three significant digits and a decimal prefix, such as "5.54 MB"."""
    for step, prefix in _STEPS:
        if abs(number) >= step:
            return f"{_digits(number / step)} {prefix}{unit}"
    return f"{_digits(number)} {unit}".strip()


def byte_unit(most: float) -> tuple[float, str]:
    """Factor and name of the unit for an axis of bytes that ends at `most`."""
    return next(((step, f"{prefix}B") for step, prefix in _STEPS if most >= step), (1.0, "B"))


def _digits(number: float) -> str:
    if number == int(number) and abs(number) < 1000:
        return str(int(number))
    places = 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
    return f"{number:,.{places}f}"


def ratio(after: float, before: float) -> str:
    """A ratio with three decimals; a dash where there is none."""
    return f"{after / before:.3f}" if before else "–"


def share(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}%"


def brief(value: float) -> str:
    """A round number as short as it can be, such as "0.25" or "2e-7"."""
    return re.sub(r"e([-+])0*", lambda found: f"e{found[1].strip('+')}", f"{value:g}")


def nats(value: float) -> str:
    """A loss with four decimals, or with two significant digits where these would be zeros."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else brief(float(f"{value:.1e}"))


def short_name(block: str) -> str:
    """The number of the layer in a module path, else the whole path."""
    numbers = [part for part in block.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else block
