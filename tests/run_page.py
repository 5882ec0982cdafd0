"""Executes the code blocks of pages of the documentation, in order, in the current folder; run by test_docs.py.

    python -m tests.run_page README.md

Python blocks of a page share their names, as in one session; shell blocks run through optimum's own entry point; YAML
blocks are read as recipes. A block under `<!-- file: name -->` is written to that file too. A block under
`<!-- not run: why -->` is left out.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from optimum.commands import optimum_cli

from optimum_moe.recipe import parse_recipe

BLOCK = re.compile(
    r"(?P<skip><!-- not run: .+? -->\n+)?(?:<!-- file: (?P<file>[\w.-]+) -->\n+)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


def blocks(page: Path) -> list[tuple[str, str, str | None]]:
    """Language, code and file of every block that is run."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(match["language"], match["code"], match["file"]) for match in found if not match["skip"]]


def run_shell(code: str) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        sys.argv = shlex.split(line, comments=True)
        assert sys.argv[:2] == ["optimum-cli", "moe"], line
        if "--import" in sys.argv:
            # This process has registered the functions of the file already, under the name of the page.
            subprocess.run([sys.executable, "-m", "optimum.commands.optimum_cli", *sys.argv[1:]], check=True)
            continue
        try:
            optimum_cli.main()
        except SystemExit as ending:
            if ending.code:
                raise AssertionError(f"{line} ended with {ending.code}") from ending


def main(page: Path) -> None:
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    names: dict[str, Any] = {"__name__": "page"}
    for language, code, file in blocks(page):
        print(f"--- {page.name}: {language}\n{code}", flush=True)
        if file:
            Path(file).write_text(code, encoding="utf-8")
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "bash":
            run_shell(code)
        elif language == "yaml":
            parse_recipe(yaml.safe_load(code))
        else:
            raise AssertionError(f"{page.name} has a block of {language!r}, which nothing runs")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(Path(name))
