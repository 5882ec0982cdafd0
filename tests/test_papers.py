"""The page of papers has what the code cites: every number of arXiv on both sides, each at its stage or setting."""

from __future__ import annotations

import re
from pathlib import Path

from optimum_moe.reporting.papers import papers
from optimum_moe.stages import registered_stages
from optimum_moe.stages.merge_choices import GROUPINGS, ROUTER_ROWS, SIMILARITIES, WEIGHTINGS
from optimum_moe.stages.saliency import SALIENCIES

ROOT = Path(__file__).parents[1]
NUMBER = r"\d{4}\.\d{4,5}"
ROWS = [line for line in (ROOT / "docs/source/papers.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
CHOICES = {
    "saliency": SALIENCIES,
    "similarity": SIMILARITIES,
    "grouping": GROUPINGS,
    "weighting": WEIGHTINGS,
    "router_rows": ROUTER_ROWS,
}


def numbers(row: str, before: str) -> list[str]:
    """The papers of a row; "the same" is the paper of the row before."""
    return re.findall(NUMBER, row) or ([before] if "the same" in row else [])


def papers_by_row() -> list[tuple[str, list[str]]]:
    found, before = [], ""
    for row in ROWS:
        cited = numbers(row, before)
        before = cited[0] if cited else ""
        found.append((row, cited))
    return found


def test_the_page_has_every_paper_that_the_code_cites_and_no_other():
    files = [*(ROOT / "optimum_moe").rglob("*.py"), *(ROOT / "optimum_moe").rglob("*.yaml")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    cited = set(re.findall(rf"arXiv[:\s]\s*({NUMBER})", code))
    assert set(re.findall(NUMBER, "\n".join(ROWS))) == cited
    links = re.findall(rf"\[({NUMBER})\]\(https://arxiv\.org/abs/({NUMBER})\)", "\n".join(ROWS))
    assert {shown for shown, _ in links} == cited
    assert all(shown == linked for shown, linked in links)


def test_what_a_stage_or_a_function_cites_stands_in_a_row_that_names_it():
    # `expert-merging` cites M-SMoE, whose settings are its defaults.
    cited = {name: papers([{"stage": name}]) for name in registered_stages() if name != "expert-merging"}
    for setting, choice in CHOICES.items():
        for name in choice.functions:
            cited[name] = cited.get(name, ()) + papers([{"stage": "", setting: name}])
    assert sum(map(bool, cited.values())) > 10
    named = {name: {n for row, found in papers_by_row() if f"`{name}`" in row for n in found} for name in cited}
    assert {name: numbers for name, numbers in cited.items() if not named[name].issuperset(numbers)} == {}
