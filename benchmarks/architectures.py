"""Writes the table of supported architectures, from the registry, into the README.

    python benchmarks/architectures.py [--check]

With `--check` nothing is written, and the exit status says whether the README is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from optimum_moe.reporting.support import support_markdown

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- architectures: make docs -->\n", "\n<!-- end -->"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END, 1)
    written = f"{before}{START}{support_markdown()}{END}{after}"
    if "--check" in sys.argv[1:]:
        sys.exit(text != written)
    README.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
