"""Links of README, documentation and examples lead somewhere, on GitHub and where doc-builder puts the pages."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs" / "source"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(SOURCE.rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.ipynb")),
]
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def prose(page: Path) -> str:
    """The text of a page, or of the text cells of a notebook, without blocks of code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCED.sub("", text)


def links(text: str) -> list[str]:
    """Targets of all links and pictures outside of code."""
    return LINK.findall(CODE.sub("code", text))


def headings(text: str) -> list[str]:
    return re.findall(r"^#{1,6} (.+)$", text, re.M)


def github_anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: a heading that comes again gets a number."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in headings(text):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def doc_builder_anchors(text: str) -> set[str]:
    """What doc-builder makes of the headings: no underscores, and the same anchor for the same heading."""
    return {re.sub(r"[^\w-]|_", "", re.sub(r"\s+", "-", heading.strip().lower())) for heading in headings(text)}


def trouble(page: Path, target: str) -> str | None:
    """Why a link leads nowhere; None if it leads somewhere."""
    parts = urlsplit(target)
    if parts.scheme:
        return None if parts.scheme == "https" and "." in parts.netloc else "not a web address"
    aim = (page.parent / parts.path).resolve() if parts.path else page
    if not aim.exists():
        return "no such file"
    if not aim.is_relative_to(ROOT):
        return "outside of the repository"
    if parts.fragment:
        text = prose(aim)
        anchors = github_anchors(text)
        if aim.is_relative_to(SOURCE):
            anchors &= doc_builder_anchors(text)
        if parts.fragment not in anchors:
            return f"no such heading; there are {sorted(anchors)}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert {target: why for target in links(prose(page)) if (why := trouble(page, target))} == {}


def test_links_that_lead_nowhere_are_found(tmp_path: Path):
    page = SOURCE / "index.md"
    assert links("[a](b.md) `[c](d.md)` ![e](f.png)\n[two\nlines](g.md#h)") == ["b.md", "f.png", "g.md#h"]
    assert trouble(page, "none.md") == "no such file"
    assert "no such heading" in str(trouble(page, "stages.md#none"))
    assert trouble(page, "stages.md#merging-m-smoe") is None
    assert trouble(page, "http://arxiv") == "not a web address"
    assert github_anchors("# A b_c: `d.e`\n## F\n## F") == {"a-b_c-de", "f", "f-1"}
    assert doc_builder_anchors("# A b_c: `d.e`\n## F\n## F") == {"a-bc-de", "f"}


def test_the_table_of_contents_names_every_page():
    contents = yaml.safe_load((SOURCE / "_toctree.yml").read_text(encoding="utf-8"))
    listed = sorted(entry["local"] for part in contents for entry in part["sections"])
    assert listed == sorted(page.relative_to(SOURCE).with_suffix("").as_posix() for page in SOURCE.rglob("*.md"))


def test_the_picture_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "flow.py"))
    assert script["PICTURE"].read_text(encoding="utf-8") == script["picture"]()


def test_figures_of_questions_and_gallery_are_in_the_results():
    files = [path for path in (ROOT / "benchmarks" / "results").iterdir() if path.suffix in (".md", ".txt")]
    results = "\n".join(path.read_text(encoding="utf-8") for path in files)
    measured = {number.removeprefix("0") for number in re.findall(r"\d*\.\d{2,}", results)}
    for page in (SOURCE / "gallery.md", *sorted((SOURCE / "questions").glob("*.md"))):
        shown = re.findall(r"(?<![\w.])x?(\d*\.\d{3,4})(?!\d)", prose(page))
        assert {number for number in shown if number.removeprefix("0") not in measured} == set(), page.name


def test_the_gallery_shows_what_its_scripts_printed():
    shown = FENCED.findall((SOURCE / "gallery.md").read_text(encoding="utf-8"))
    results = (ROOT / "benchmarks" / "results" / "gallery.md").read_text(encoding="utf-8")
    assert len(shown) == 4
    assert [block for block in shown if block not in results] == []
