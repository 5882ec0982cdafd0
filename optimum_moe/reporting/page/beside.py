"""What the checkpoint and its original write after the same prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from shlex import quote

from optimum_moe.reporting.page.elements import Continuation, Element, Missing, Section, Text, Words
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.scores import SIDE_BY_SIDE, measured_on

_WORD = re.compile(r"\s*\S+|\s+$")


def beside(run: RunRecord) -> Section:
    """Continuations of both models, with their differences marked."""
    found = run.report.get(SIDE_BY_SIDE)
    if found is None:
        missing = Missing(
            "This checkpoint was not run beside its original, so its error by layer and what both write are not here.",
            "Run both on text that it was not calibrated on:",
            run.command(f"--original {quote(run.original)} --text HELD_OUT"),
        )
        return Section("beside", "Beside the original", [missing])
    elements: list[Element] = [
        Text("Greedy continuations by both models; words that the other model did not write are underlined.")
    ]
    elements += [continuation(number, sample) for number, sample in enumerate(found["samples"], 1)]
    elements.append(Text(measured_on(found["data"]).partition(". ")[0] + "."))
    return Section("beside", "Beside the original", elements)


def continuation(number: int, sample: Mapping[str, str]) -> Continuation:
    """One prompt with both continuations, compared word by word."""
    was, now = (_WORD.findall(sample[name]) for name in ("original", "model"))
    matcher = SequenceMatcher(None, [word.strip() for word in was], [word.strip() for word in now], autojunk=False)
    blocks = matcher.get_opcodes()
    same = sum(end - start for kind, start, end, _, _ in blocks if kind == "equal")
    first = next((start for kind, start, _, _, _ in blocks if kind != "equal"), None)
    shared = f"{same} of the original's {len(was)} words are in both, in their order."
    if first is None:
        summary = "Both wrote the same."
    elif first == 0:
        summary = f"They differ from the first word on; {shared}"
    else:
        summary = f"The same up to word {first}; {shared}"
    return Continuation(
        title=f"Prompt {number}",
        prompt=sample["prompt"].strip(),
        original=tuple(Words("".join(was[a:b]), kind != "equal") for kind, a, b, _, _ in blocks if a < b),
        model=tuple(Words("".join(now[a:b]), kind != "equal") for kind, _, _, a, b in blocks if a < b),
        summary=summary,
    )
