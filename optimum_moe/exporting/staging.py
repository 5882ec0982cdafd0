"""A folder with those files of a checkpoint that a converter may read: no code, no pickled objects.

Converters load tokenizers with `trust_remote_code=True`, and some read pickled weights: in this folder they find
neither.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_moe.checkpoint.carried_files import carried_files
from optimum_moe.exporting.exported import Exported

_CODE = (".py", ".pyc", ".so", ".zip")
_REMOTE = ("auto_map", "custom_pipelines")


def stage(checkpoint: Exported, folder: Path, config: Mapping[str, Any], *, link: bool) -> None:
    """Put config, tokenizer and weights of a checkpoint into an empty folder, without code.

    Args:
        checkpoint: The checkpoint.
        folder: The empty folder.
        config: The content of the new `config.json`.
        link: Whether weights become symbolic links, for a folder that is read and removed; else they are hard links,
            or copies where the file system has none.
    """
    stage_beside_weights(checkpoint, folder, config)
    for file in (*checkpoint.headers.files, *checkpoint.directory.glob("*.safetensors.index.json")):
        target = folder / file.name
        if link:
            target.symlink_to(file.resolve())
            continue
        try:
            os.link(file.resolve(), target)
        except OSError:
            shutil.copyfile(file, target)


def stage_beside_weights(checkpoint: Exported, folder: Path, config: Mapping[str, Any]) -> None:
    """Put the new config and the tokenizer of a checkpoint into an empty folder, without code."""
    for file in carried_files(checkpoint.directory):
        if file.suffix in _CODE or file.name in ("plan.json", "checksums.json"):
            continue
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            _copy_json(checkpoint.directory / file, folder / file)
        else:
            shutil.copyfile(checkpoint.directory / file, folder / file)
    write_json(folder / "config.json", {key: value for key, value in config.items() if key not in _REMOTE})


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    file.write_text(json.dumps(dict(values), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_json(file: Path, target: Path) -> None:
    """Copy a JSON file without the fields that name code."""
    text = file.read_text(encoding="utf-8")
    values = json.loads(text)
    if isinstance(values, dict) and not set(_REMOTE).isdisjoint(values):
        write_json(target, {key: value for key, value in values.items() if key not in _REMOTE})
    else:
        shutil.copyfile(file, target)
