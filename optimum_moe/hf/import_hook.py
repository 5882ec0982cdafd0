"""Make transformers know our checkpoints as soon as, and only if, transformers itself is imported.

Standard library only: registration imports torch and transformers, which takes seconds, so it waits for an import
hook on the module that holds the registry of quantizers.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
USER_OF_REGISTRY = "transformers.modeling_utils"
"""Imported after the registry and before any model: watched too, because `import torch` installs the hook and may be
called from the middle of the registry, whose import can then no longer be seen."""


def install_import_hook() -> None:
    """Register with transformers now if it is loaded, else once it is; calling again changes nothing."""
    if _registry_is_ready():
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _registry_is_ready() -> bool:
    return hasattr(sys.modules.get(REGISTRY), "register_quantizer")


def _register() -> None:
    # It registers when it is complete: what brought transformers here may be its own import.
    importlib.import_module("optimum_moe.hf.quantizer")


class _Finder(MetaPathFinder):
    """Sees the imports to wait for, lets the others find them, and has us registered behind them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (REGISTRY, USER_OF_REGISTRY):
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, finder: _Finder) -> None:
        self._inner = inner
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        if not _registry_is_ready() or self._finder not in sys.meta_path:
            return
        sys.meta_path.remove(self._finder)
        try:
            _register()
        except Exception:
            # The import of transformers goes on; a compressed checkpoint still refuses to load without us.
            logging.getLogger(__name__).exception("optimum_moe could not register with transformers. Reinstall both.")
