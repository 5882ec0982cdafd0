"""Public text uses American spelling, the field's terms and plain sentences: banned words name file and line."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimum_moe.recipe import preset_names, recipe_record, size_fields

ROOT = Path(__file__).parent.parent
PATHS = ("optimum_moe", "docs", "examples", "benchmarks/*.py", "README.md", "CONTRIBUTING.md")
SUFFIXES = (".py", ".md", ".yaml", ".toml")

VERBS = (
    "factor|quant|dequant|normal|initial|optim|regular|serial|deserial|parametr|recogn|minim|maxim|organ|summar|"
    "general|special|token|visual|random|util|penal|prior|standard|categor|local|linear|material|real|stabil|"
    "synchron|vector|equal|central|general|final|emphas|apolog|character"
)
BRITISH = (
    rf"\b(?:de|re|un|pre)?(?:{VERBS})is(?:e|es|ed|er|ers|ing|ation|ations)\b",
    r"\b(?:anal|paral|catal)ys(?:e|es|ed|er|ers|ing)\b",
    r"\w*(?:behaviour|colour|neighbour|favour|honour|catalogue|labell|modell(?:ed|ing)|cancelled|travell|judgement)\w*",
    r"\b\w*(?:centre|centred|defence|programme|grey|artefact|fulfil|whilst|amongst)\b",
    r"\blicence",
)
ALLOWED = (r'"licence\*"', r"LICENCE")
"""File names of licenses that are copied with a checkpoint."""
DIALECT = (
    r"\bwhat (?:goes|stays|is handed over)\b",
    r"\bnothing goes\b",
    r"\blet(?:s|ting)? go\b",
    r"\bof so many\b",
    r"\b(?:was|is|were|are) made of (?:it|them)\b",
    r"\bmakes? anew\b|\banew\b",
    r"\bspared\b",
    r"\bCutter\b",
    r"\bJudge\b|\bjudge\(",
    r"\barming\b",
    r"\bsurvey\b",
    r"\bsettled\b",
    r"\bComposed\b",
    r"\bMETHODS\b",
    r"\bone_expert\b",
    r"\bexpert_evidence\b",
    r"\bexpert_curves\b",
    r'"The first\'s\."',
    r"\bAs set\.",
    r"\bIt always (?:is|can)\.",
    # The command line shows flags in the place of names, so that every value needs its name.
    r"""\w="\w+" or "\w""",
    # Installed is enough: an entry point of torch tells transformers how to load (`tests/test_autoload.py`).
    r"\boptimum_moe imported\b",
)
ENOUGH = re.compile(r"\([A-Z0-9.][^()]*\)|`[\w.]+`")
"""A shape in parentheses, or a reference to another docstring."""


def tracked() -> list[Path]:
    """All tracked text files of the package, its documentation, examples and benchmarks."""
    listed = subprocess.run(["git", "ls-files", "--", *PATHS], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if name.endswith(SUFFIXES) and (ROOT / name).is_file()]


FILES = tracked()


def found(path: Path, patterns: tuple[str, ...], flags: int = 0) -> list[str]:
    """File, line and match of every banned word in a file."""
    banned = re.compile("|".join(f"(?:{pattern})" for pattern in patterns), flags)
    allowed = re.compile("|".join(ALLOWED))
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r} in {line.strip()!r}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in banned.finditer(allowed.sub("", line))
    ]


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of modules, classes and functions in a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text is not None:
            yield getattr(node, "lineno", 1), text


def test_a_preset_that_only_names_the_size_of_a_stage_has_its_name() -> None:
    alone = {name: record for name in preset_names() if "stage" in (record := recipe_record(name))}
    only_sizes = {
        name: record["stage"] for name, record in alone.items() if record.keys() <= {"stage", *size_fields(name)}
    }
    assert only_sizes == {name: name for name in ("byte-budget", "low-rank-sparse", "m-smoe")}


def test_files_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "optimum_moe/recipe.py"} <= {str(path.relative_to(ROOT)) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path: Path) -> None:
    assert not (hits := found(path, BRITISH, re.IGNORECASE)), "American spelling:\n" + "\n".join(hits)
    assert not (hits := found(path, DIALECT)), "standard terms and plain words:\n" + "\n".join(hits)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".py"], ids=lambda path: path.stem)
def test_docstrings_say_something(path: Path) -> None:
    short = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for line, text in docstrings(path)
        if len(text.split()) < 3 and not ENOUGH.search(text)
    ]
    assert not short, "a docstring needs at least three words, a shape or a reference:\n" + "\n".join(short)


@pytest.mark.parametrize(
    ("text", "is_banned"),
    [
        ("It factorises and normalised; quantisation.", True),
        ("The behaviour of labelled neighbours.", True),
        ("Precise noise, otherwise raised; a promise.", False),
        ("It initializes and analyzes the center.", False),
    ],
)
def test_british_spellings_are_recognized(text: str, is_banned: bool) -> None:
    assert bool(re.search("|".join(BRITISH), text, re.IGNORECASE)) is is_banned
