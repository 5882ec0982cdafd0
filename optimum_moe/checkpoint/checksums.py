"""Digests of the files beside the weights of a checkpoint, to detect changed and missing files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from optimum_moe.checkpoint.headers import INDEX_FILE
from optimum_moe.checkpoint.location import raw_config
from optimum_moe.checkpoint.names import WEIGHTS
from optimum_moe.hf.modeling_optimum_moe import ARCHIVE
from optimum_moe.hf.structure import CARRIED_MODULE
from optimum_moe.plan import PLAN_NAME

CHECKSUMS_FILE = "checksums.json"
_CHECKED_OTHERWISE = {"config.json", INDEX_FILE, CHECKSUMS_FILE, f"{PLAN_NAME}.json"}
_FREE = {"README.md", "report.html", ".gitattributes"}
"""Files that the Hub and its users edit, or that can be written again."""
_SAVED_AGAIN = (
    *("generation_config.json", "*token*.json", "vocab*", "merges.txt", "chat_template*", "*processor_config.json"),
    *(f"{CARRIED_MODULE}.py", ARCHIVE),
)
"""Files that saving a loaded model, its tokenizer or its processor writes again."""


def write_checksums(directory: Path) -> None:
    """Write the digests of all files of a finished checkpoint that no other check covers."""
    record = {"auto_map": raw_config(directory).get("auto_map"), "files": dict(_digests(directory))}
    (directory / CHECKSUMS_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def side_file_failures(directory: Path, saved_again: bool) -> tuple[list[str], str]:
    """Failures for changed files beside the weights, and a description of what was checked.

    Args:
        directory: The checkpoint.
        saved_again: Whether the model was loaded and saved since, which writes some files again and drops others.
    """
    path = directory / CHECKSUMS_FILE
    if not path.is_file():
        if saved_again:
            return [], f"no {CHECKSUMS_FILE}: it was saved again without"
        return [f"{CHECKSUMS_FILE} is missing, so the files beside the weights cannot be checked"], ""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        auto_map, files = record["auto_map"], dict(record["files"])
    except (ValueError, KeyError, TypeError) as error:
        return [f"{CHECKSUMS_FILE} is broken ({error})"], ""
    here = dict(_digests(directory))
    failures = []
    for name, before in files.items():
        if here.get(name) == before or (saved_again and any(fnmatch(name, pattern) for pattern in _SAVED_AGAIN)):
            continue
        failures.append(f"{name} is {'not what was written' if name in here else 'missing'}")
    named = raw_config(directory).get("auto_map")
    if named != auto_map and not (saved_again and named is None):
        failures.append(f"config.json runs other code: auto_map is {named}, and was {auto_map}")
    return failures, f"{len(files)} files"


def _digests(directory: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        ours = name not in _CHECKED_OTHERWISE | _FREE and not name.startswith((f"{PLAN_NAME}/", ".cache/"))
        if path.is_file() and ours and path.suffix not in WEIGHTS:
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
