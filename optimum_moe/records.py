"""Frozen data on disk: a JSON file with the structure beside a safetensors file with the tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT_VERSION = 1


def tensors_file(directory: Path, name: str) -> Path:
    """Path of a record's tensors: in a subfolder, because quantizers and servers take every safetensors file beside a
    model for its weights.
    """
    return directory / name / "tensors.safetensors"


def write_record(directory: Path, name: str, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `{name}.json` and `{name}/tensors.safetensors` into an existing folder."""
    tensors_file(directory, name).parent.mkdir(exist_ok=True)
    save_file(dict(tensors), tensors_file(directory, name))
    share_as_new(tensors_file(directory, name).parent)
    versioned = {"format_version": FORMAT_VERSION, **record}
    versioned["digest"] = digest(versioned, tensors)
    (directory / f"{name}.json").write_text(json.dumps(versioned, indent=1) + "\n", encoding="utf-8")


def share_as_new(folder: Path) -> None:
    """Give all files in a folder the default permissions; safetensors creates files that only the owner can read."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def digest(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the whole content of a record."""
    found = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_digest(directory: Path, name: str) -> str:
    """The digest that was saved with the record."""
    return str(json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))["digest"])


def read_record(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a record that `write_record` wrote.

    Raises:
        ValueError: If a file is missing, broken, changed, or of another format version.
    """
    path = directory / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"No {path.name} in {directory}. Give a folder with one that optimum_moe wrote.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, written = record["format_version"], record.pop("digest")
        tensors = load_file(tensors_file(directory, name))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, SafetensorError) as error:
        raise ValueError(f"The {name} in {directory} is broken ({error}). Copy or create it again.") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={version}, this version of optimum_moe reads {FORMAT_VERSION}. "
            "Install the version that wrote it, or create it again."
        )
    if written != digest(record, tensors):
        raise ValueError(
            f"The {name} in {directory} does not match its digest: a file was changed or replaced. Restore "
            f"{path.name} and {name}/tensors.safetensors."
        )
    return record, tensors
