"""Loads this compressed checkpoint on machines without optimum_moe; transformers runs it with `trust_remote_code=True`.

The sources of optimum_moe that are needed lie beside it in an archive. An installed optimum_moe is used instead.
"""

import importlib
import sys
from importlib.util import find_spec
from typing import Any

import transformers
from transformers.utils import cached_file

ARCHIVE = "optimum_moe.zip"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def __getattr__(name: str) -> Any:
    """A loader for any Auto class, by the name of the Auto class: `auto_map` refers to them."""
    if not name.startswith("AutoModel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (_Loader,), {})


class _Loader:
    """Stands for one Auto class: has the package registered, then hands over to the real one."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: transformers asks every class from a checkpoint for it."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """The model, of the stock class of its architecture."""
        if find_spec("optimum_moe") is None:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            sys.path.append(str(cached_file(path, ARCHIVE, **hub)))
        importlib.import_module("optimum_moe").install_import_hook()
        return getattr(transformers, cls.__name__).from_pretrained(
            path, *args, **{**kwargs, "trust_remote_code": False}
        )
