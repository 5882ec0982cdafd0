"""The rules of the house that a machine can check: imports point down, names are documented."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import optimum_moe

PACKAGE = Path(optimum_moe.__file__).parent
LAYERS = {
    "algorithms": 0,
    "formats": 1,
    "kernels": 0,
    "memory_errors": 0,
    "model_info": 2,
    "plan": 2,
    "ranks": 0,
    "records": 2,
    "recovery_settings": 2,
    "runtimes": 1,
    "settings": 0,
    "statistics": 2,
    "nn": 2,
    "stages": 3,
    "surgeons": 3,
    "autoload": 4,
    "calibration": 4,
    "checkpoint": 4,
    "hf": 4,
    "hf/__init__": 0,
    "hf/compat": 0,
    "recipe": 4,
    "engine": 5,
    "reporting": 5,
    "compressor": 6,
    "look": 6,
    "evaluation": 6,
    "exporting": 6,
    "recovery": 6,
    "verification": 6,
    "sweep": 7,
    "report": 7,
    "domain_guard": 7,
    "cli": 8,
    "vllm_plugin": 8,
    "vllm_plugin/blocks": 2,
    "__init__": 9,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The entry of `LAYERS` for a file: its own, or that of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts) if "/".join(parts) in LAYERS else parts[0]


def modules_of(name: str) -> str:
    """The entry of `LAYERS` for an imported module."""
    parts = name.split(".")[1:]
    return "/".join(parts[:2]) if "/".join(parts[:2]) in LAYERS else parts[0]


def imported_names(path: Path) -> set[str]:
    """Everything that a file imports at any depth, but not what it imports for type checkers only."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    own = module_of(path)
    for name in imported_names(path):
        if not name.startswith("optimum_moe."):
            continue
        other = modules_of(name)
        assert LAYERS[other] <= LAYERS[own], f"{path.name} (layer {LAYERS[own]}) imports {name} ({LAYERS[other]})"
        assert {own, other} != {"stages", "surgeons"}, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lower_layers_do_not_import_transformers(path: Path) -> None:
    if module_of(path) in (
        "algorithms",
        "formats",
        "plan",
        "model_info",
        "records",
        "statistics",
        "nn",
        "stages",
        "hf/compat",
    ):
        assert not {n for n in imported_names(path) if n.split(".")[0] in ("transformers", "optimum", "accelerate")}


def test_every_public_name_exists_and_is_documented() -> None:
    assert set(optimum_moe.__all__) == set(optimum_moe._HOMES)
    for name in optimum_moe.__all__:
        assert (getattr(optimum_moe, name).__doc__ or "").strip(), name


def test_every_file_is_listed_in_the_layers() -> None:
    assert {module_of(path) for path in FILES} == set(LAYERS)


DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "lm_eval": "lm-eval"}


RUNTIMES = {"conversion", "llama_cpp", "mlx", "mlx_lm", "triton", "vllm"}
"""What scripts and plugins import in the environment of another runtime."""


def third_party(nodes: Iterable[ast.AST]) -> set[str]:
    """The distributions that import statements name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    found = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"optimum_moe"} - RUNTIMES
    return {DISTRIBUTIONS.get(name, name) for name in found}


def test_the_vllm_plugin_needs_little_of_this_package() -> None:
    for path in (PACKAGE / "vllm_plugin").rglob("*.py"):
        own = {name for name in imported_names(path) if name.startswith("optimum_moe.")}
        others = {modules_of(name).partition("/")[0] for name in own - {"optimum_moe.hf.structure"}}
        assert others <= {"formats", "kernels", "vllm_plugin"}, path


def test_only_the_plugin_kernels_and_scripts_of_runtimes_import_them() -> None:
    allowed = {"vllm_plugin", "runners", "kernels"}
    elsewhere = [path for path in FILES if not allowed & set(path.relative_to(PACKAGE).parts)]
    for path in elsewhere:
        assert not {name.partition(".")[0] for name in imported_names(path)} & RUNTIMES, path


def requirements() -> tuple[set[str], set[str]]:
    """The distributions of setup.py that are required, and those of its extras."""
    call = next(
        node.value
        for node in ast.parse((PACKAGE.parent / "setup.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    required, extras = ast.literal_eval(said["install_requires"]), re.findall(r"'([\w>=.-]+)'", said["extras_require"])
    return {re.match(r"[\w-]+", name)[0] for name in required}, {re.match(r"[\w-]+", name)[0] for name in extras}


def test_what_is_imported_is_declared_and_what_is_required_is_imported() -> None:
    required, extras = requirements()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    in_functions = {
        id(node)
        for tree in trees
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    every = third_party(node for tree in trees for node in ast.walk(tree))
    always = third_party(node for tree in trees for node in ast.walk(tree) if id(node) not in in_functions)
    assert always <= required
    assert every - required <= extras
    assert required <= every
