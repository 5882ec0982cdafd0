"""Writes the table of supported architectures, from the registry, into the documentation.

    python benchmarks/architectures.py [--check]

With `--check` nothing is written, and the exit status says whether the page is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from optimum_moe.reporting.support import support_markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "source" / "architectures.md"
START, END = "<!-- architectures: make docs -->\n", "\n<!-- end -->"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END, 1)
    written = f"{before}{START}{support_markdown()}{END}{after}"
    if "--check" in sys.argv[1:]:
        sys.exit(text != written)
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
