"""Where the checkpoint loads, and how it is made again."""

from __future__ import annotations

import shlex

from optimum_moe.reporting.loads_in import HOW_KNOWN
from optimum_moe.reporting.page.elements import Code, Element, Section, Table, Text
from optimum_moe.reporting.page.run_record import RECIPE_FILE, RunRecord


def loads_in(run: RunRecord) -> Section:
    """What each runtime does with the checkpoint, and how that is known."""
    rows = tuple((row.title, row.says, HOW_KNOWN[row.known]) for row in run.loads_in)
    table = Table("Runtimes", ("runtime", "what it does", "how it is known"), rows)
    return Section("loads-in", "Where it loads", [table])


def reproduction(run: RunRecord) -> Section:
    """The recipe, the command, and digests of everything that went in and came out."""
    calibration = run.plan.calibration or {}
    rows = [(f"version of {name}", version) for name, version in run.report.get("versions", {}).items()]
    rows += [("seed", str(run.plan.seed)), ("sha256 of the plan", run.plan_digest)]
    if calibration.get("hash"):
        rows.append(("sha256 of the calibration data", str(calibration["hash"])))
    values = run.plan.source.get("values") or ()
    values = [values] if isinstance(values, str) else values
    rows += [("digest of the original's values", str(value)) for value in values]
    elements: list[Element] = [
        Text("The same command on the same machine gives the same bytes."),
        Code("Command", _command(run)),
        Code(RECIPE_FILE, run.recipe.strip() or "none was written"),
        Table("Versions and digests", ("what", "value"), tuple(rows)),
    ]
    return Section("reproduction", "How it is made again", elements)


def _command(run: RunRecord) -> str:
    words = ["optimum-cli", "moe", "compress", run.original, "--recipe", f"{run.name}/{RECIPE_FILE}"]
    for source in (run.plan.calibration or {}).get("sources", ()):
        weight = source.get("weight")
        name = str(source.get("name") or "TEXT")
        words += ["--calibration", name if weight in (None, 1.0) else f"{name}:{weight:g}"]
    return " ".join(shlex.quote(word) for word in [*words, "--output", "again"])
