"""Private names of transformers and torch: the installed versions have them, and only `optimum_moe/hf` writes them."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import optimum_moe
from optimum_moe.checkpoint.source import loads_with
from optimum_moe.hf import compat
from tests.tiny_models import build

PACKAGE = Path(optimum_moe.__file__).parent
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "hf"]
UNSTABLE_MODULES = {
    *(module for module, _ in compat.INTERNALS.values()),
    *("transformers.core_model_loading", "transformers.conversion_mapping", "transformers.integrations"),
    *("transformers.initialization", "transformers.modeling_utils"),
}


def names_in(source: str) -> set[str]:
    """Every identifier, attribute and string of a source."""
    values = (
        getattr(node, field, None) for node in ast.walk(ast.parse(source)) for field in ("attr", "id", "name", "value")
    )
    return {value for value in values if isinstance(value, str)}


def lacking_attribute(name: str, home: str) -> str | None:
    """What is wrong with the entry of an attribute: None if its class has it, or the code of its module sets it."""
    module, _, owner = home.partition(":")
    found = importlib.import_module(module)
    cls = getattr(found, owner) if owner else None
    # What is set on instances stands in the code of the class.
    source = inspect.getsource(found if cls is None else inspect.getmodule(cls))
    return (
        None
        if hasattr(cls, name) or name in names_in(source)
        else f"transformers {transformers.__version__} has no {name} in {home}"
    )


@pytest.mark.parametrize("name", compat.INTERNALS)
def test_the_installed_transformers_has_the_internals(name: str) -> None:
    module, reason = compat.INTERNALS[name]
    assert getattr(compat, name) is getattr(importlib.import_module(module), name)
    assert reason


@pytest.mark.parametrize("name", compat.ATTRIBUTES)
def test_the_installed_versions_have_the_attributes(name: str) -> None:
    home, reason = compat.ATTRIBUTES[name]
    assert lacking_attribute(name, home) is None
    assert reason


def test_a_name_that_a_version_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"went_away": ("transformers.core_model_loading", "a test")}
    monkeypatch.setattr(compat, "INTERNALS", gone)
    with pytest.raises(AttributeError, match="went_away"):
        _ = compat.went_away
    with pytest.raises(AttributeError, match="never_there"):
        _ = compat.never_there
    assert "_went_away" in str(lacking_attribute("_went_away", "transformers:PreTrainedModel"))
    assert "_went_away" in str(lacking_attribute("_went_away", "transformers.quantizers.base"))


def test_every_name_of_the_lists_is_used_in_hf() -> None:
    used = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "hf" and path.name != "compat.py":
            used |= names_in(path.read_text(encoding="utf-8"))
    tree = ast.parse((PACKAGE / "hf" / "compat.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            used |= names_in(ast.unparse(node))
    assert set(compat.ATTRIBUTES) <= used
    imported = {
        alias.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "optimum_moe.hf.compat"
        for alias in node.names
    }
    assert set(compat.INTERNALS) <= imported


def defined_names(tree: ast.AST) -> Iterator[str]:
    """What a file defines: functions, classes, variables, parameters, fields, and attributes set on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private and undocumented names of other packages that a file uses, each with its line.

    Args:
        tree: The file.
        own: Private names that the package defines.
    """
    forbidden = {*compat.ATTRIBUTES, *compat.INTERNALS}
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Attribute):
            if is_private(node.attr) and (node.attr in forbidden or node.attr not in own):
                yield f"{line}{ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # For getattr, hasattr, vars and the like.
            if node.value in compat.ATTRIBUTES:
                yield f"{line}{node.value!r}"
        elif isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
            yield from (f"{line}def {part.name}" for part in methods if part.name in compat.ATTRIBUTES)
        elif isinstance(node, ast.Import):
            yield from (f"{line}import {a.name}" for a in node.names if is_unstable(a.name))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("optimum_moe"):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            if is_unstable(node.module) or any(map(is_unstable, full)):
                yield f"{line}{ast.unparse(node)}"


def is_unstable(module: str) -> bool:
    """Whether a dotted name is one that transformers and torch may change: an internal module, or a private part."""
    internal = any(module == name or module.startswith(f"{name}.") for name in UNSTABLE_MODULES)
    return internal or any(is_private(part) for part in module.split("."))


OWN = {
    name
    for path in sorted(PACKAGE.rglob("*.py"))
    for name in defined_names(ast.parse(path.read_text(encoding="utf-8")))
    if is_private(name)
} - set(compat.ATTRIBUTES)


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_of_others_stands_outside_of_hf(path: Path) -> None:
    assert not list(foreign_names(ast.parse(path.read_text(encoding="utf-8")), OWN))


@pytest.mark.parametrize(
    "code",
    [
        "model._tied_weights_keys",
        "model.layers[0]._parameters['weight']",
        "self._modules['0']",
        "getattr(config, '_experts_implementation', None)",
        "experts._is_expert_parallel = True",
        "class A(B):\n    def _dequantize_one(self):\n        pass",
        "from transformers.core_model_loading import WeightRenaming",
        "from transformers import core_model_loading",
        "import transformers.integrations.moe",
        "from torch._dynamo import eval_frame",
        "from torch import _dynamo",
        "torch._grouped_mm(a, b)",
    ],
)
def test_private_names_are_seen(code: str) -> None:
    assert list(foreign_names(ast.parse(code), OWN))


def test_own_names_and_public_ones_are_not() -> None:
    code = "from transformers import Cache\nfrom optimum_moe.hf.compat import WeightRenaming\nself._sizes.__class__"
    assert not list(foreign_names(ast.parse(code), {"_sizes"}))


def test_auto_classes_are_found_by_their_public_mappings() -> None:
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    mappings = {name: getattr(getattr(transformers, name), "_model_mapping", None) for name in names}
    configs = [config() for config in (transformers.Qwen3MoeConfig, transformers.SwitchTransformersConfig)]
    for name, mapping in mappings.items():
        if mapping is None:
            continue
        some = next(iter(mapping.keys()), None)
        for config in [*configs, *([object.__new__(some)] if some is not None else [])]:
            assert compat.auto_class_knows(name, config) == (type(config) in mapping), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_moe", "AutoModelForCausalLM"),
        ("gpt_oss", "AutoModelForCausalLM"),
        ("switch_transformers", "AutoModelForSeq2SeqLM"),
        ("openai_privacy_filter", "AutoModelForTokenClassification"),
        ("vitpose_backbone", "VitPoseBackbone"),
    ],
)
def test_a_model_is_loaded_by_the_auto_class_that_gives_its_class(name: str, expected: str) -> None:
    model = build(name)
    assert loads_with(model) == expected
    if expected.startswith("Auto"):
        with torch.device("meta"):
            assert type(getattr(transformers, expected).from_config(model.config)) is type(model)


def test_compat_imports_neither_transformers_nor_torch() -> None:
    tree = ast.parse((PACKAGE / "hf" / "compat.py").read_text(encoding="utf-8"))
    imported = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "contextlib", "functools", "importlib", "re", "sys", "typing"}
