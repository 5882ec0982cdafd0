"""Results of a verification, as a table."""

from __future__ import annotations

from dataclasses import dataclass

SHOWN = 3
"""Maximum number of failures that are shown for a check."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        name: Name of the check.
        failures: Messages of failures; empty if it passed.
        note: What was compared, or why the check could not run.
        ran: Whether the check ran.
        trained: Differences from the plan because the model was trained since it was written.
    """

    name: str
    failures: tuple[str, ...] = ()
    note: str = ""
    ran: bool = True
    trained: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the check ran and found no failure."""
        return self.ran and not self.failures


@dataclass(frozen=True)
class VerificationReport:
    """The checks of one checkpoint; `str()` gives a table.

    Args:
        checkpoint: The folder.
        checks: All checks, including those that could not run.
        against: The original.
    """

    checkpoint: str
    checks: tuple[Check, ...]
    against: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all checks ran and passed."""
        return all(check.passed for check in self.checks)

    @property
    def trained(self) -> tuple[str, ...]:
        """Differences from the plan because the model was trained since it was written."""
        return tuple(text for check in self.checks for text in check.trained)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            fine = f"trained ({len(check.trained)})" if check.trained else "ok"
            state = fine if check.passed else f"FAILED ({len(check.failures)})" if check.ran else "not checked"
            lines.append(f"{check.name.ljust(width)}  {state.ljust(11)}  {check.note}".rstrip())
            lines += [f"{' ' * width}    {failure}" for failure in (check.failures or check.trained)[:SHOWN]]
        return "\n".join(lines)
