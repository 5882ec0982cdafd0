"""The list of sources that a checkpoint carries: whole, and with nothing that is not there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import optimum_moe
from optimum_moe.hf.carried_code import CARRIED

PACKAGE = Path(optimum_moe.__file__).parent
SOURCES = sorted({source for pattern in CARRIED for source in PACKAGE.glob(pattern)})


@pytest.mark.parametrize("pattern", CARRIED)
def test_there_is_such_a_file(pattern: str) -> None:
    assert list(PACKAGE.glob(pattern))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_a_carried_file_imports_is_carried(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and id(n) not in for_types]
    for statement in statements:
        module = statement.module or ""
        for name in [module, *(f"{module}.{alias.name}" for alias in statement.names)]:
            place = PACKAGE.parent.joinpath(*name.split("."))
            files = {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
            assert files <= set(SOURCES), f"{path.name} imports {name}, which is not carried"
