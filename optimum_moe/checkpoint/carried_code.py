"""Code that a structured checkpoint carries, so that `trust_remote_code=True` loads it without this package.

`auto_map` in config.json names a class of the carried module for each Auto class. transformers reads it only where
the user trusts the checkpoint's code; an installed optimum_moe wins even then.
"""

from __future__ import annotations

import inspect
import json
import zipfile
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from optimum_moe.checkpoint import modeling_optimum_moe
from optimum_moe.checkpoint.quantizer import CARRIED_MODULE

CARRIED = (
    *("__init__.py", "arming.py", "blocks.py", "plan.py", "records.py", "algorithms/*.py", "nn/*.py", "surgeons/*.py"),
    *("checkpoint/__init__.py", "checkpoint/quantizer.py"),
)
"""What of the package rebuilds a structure and runs it."""


def carry_code(directory: Path, config: PreTrainedConfig) -> None:
    """Add the carried module, an archive of our own sources and `auto_map` to a checkpoint just written.

    Left as they are: plain checkpoints, which stock transformers loads, and models that bring code of their own.

    Args:
        directory: The checkpoint, with its config.json.
        config: The model's config, by whose class transformers chooses the model's.
    """
    path = directory / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" not in saved or "auto_map" in saved:
        return
    saved["auto_map"] = {name: f"{CARRIED_MODULE}.{name}" for name in _auto_classes(config)}
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / f"{CARRIED_MODULE}.py").write_text(inspect.getsource(modeling_optimum_moe), encoding="utf-8")
    package = Path(__file__).parents[1]
    with zipfile.ZipFile(directory / modeling_optimum_moe.ARCHIVE, "w") as archive:
        for pattern in CARRIED:
            for source in sorted(package.glob(pattern)):
                # ZipInfo has a fixed date: the same package writes the same bytes.
                entry = zipfile.ZipInfo(f"optimum_moe/{source.relative_to(package).as_posix()}")
                archive.writestr(entry, source.read_bytes(), zipfile.ZIP_DEFLATED)


def _auto_classes(config: Any) -> list[str]:
    """Names of the Auto classes that load a model of this config."""
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    mappings = {name: getattr(getattr(transformers, name), "_model_mapping", None) for name in names}
    return [name for name, mapping in mappings.items() if mapping is not None and type(config) in mapping]
