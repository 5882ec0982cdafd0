"""The supported architectures and operations, as one table for the docs and the command line."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_moe.surgeons import registered_surgeons
from optimum_moe.surgeons.refused import REFUSED


@dataclass(frozen=True)
class Support:
    """One architecture.

    Args:
        name: Name of the family, as in transformers.
        methods: Supported operations on its experts.
        plain: Whether a result with the same number of experts in each block loads without this package.
        remarks: Limitations, or the reason of a refusal.
    """

    name: str
    methods: tuple[str, ...]
    plain: bool
    remarks: str


def support() -> list[Support]:
    """All registered architectures by name, then the refused ones."""
    found = [
        Support(
            name,
            ("merge", *(() if surgeon.fixed_router else ("prune",)), *(() if surgeon.no_factors else ("factorize",))),
            not surgeon.fixed_router,
            "; ".join(filter(None, (surgeon.remark, surgeon.fixed_router and f"map only: {surgeon.fixed_router}"))),
        )
        for name, surgeon in sorted(registered_surgeons().items())
    ]
    return found + [Support(block, (), False, f"refused: {reason}") for block, reason in sorted(REFUSED.items())]


def support_markdown() -> str:
    """The table of the docs, in Markdown."""
    rows = [(f"`{r.name}`", ", ".join(r.methods) or "none", "yes" if r.plain else "no", r.remarks) for r in support()]
    header = [("architecture", "methods", "plain checkpoint", "remarks"), ("---",) * 4]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (*header, *rows))
