"""Executes the code blocks of a page of the documentation, in order, in the current folder; run by test_docs.py.

    python -m tests.run_page README.md

Python blocks share their names, as in one session; shell blocks run through optimum's own entry point; YAML blocks are
read as recipes. A block under `<!-- not run: why -->` is left out.
"""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from optimum.commands import optimum_cli

from optimum_moe.recipe import parse_recipe

BLOCK = re.compile(r"(?P<skip><!-- not run: .+? -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of every block that is run."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(match["language"], match["code"]) for match in found if not match["skip"]]


def run_shell(code: str) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        sys.argv = shlex.split(line, comments=True)
        assert sys.argv[:2] == ["optimum-cli", "moe"], line
        try:
            optimum_cli.main()
        except SystemExit as ending:
            if ending.code:
                raise AssertionError(f"{line} ended with {ending.code}") from ending


def main(page: Path) -> None:
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    names: dict[str, Any] = {"__name__": "page"}
    for language, code in blocks(page):
        print(f"--- {language}\n{code}", flush=True)
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "bash":
            run_shell(code)
        elif language == "yaml":
            parse_recipe(yaml.safe_load(code))
        else:
            raise AssertionError(f"{page.name} has a block of {language!r}, which nothing runs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
