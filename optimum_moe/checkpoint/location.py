"""Where the files of a checkpoint are: config and headers of a folder or a Hub model, found without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, is_offline_mode, snapshot_download

from optimum_moe.checkpoint.headers import Headers, headers_from_metadata, read_headers, weight_files
from optimum_moe.checkpoint.names import WEIGHTS, check_checkpoint_name

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
ADAPTER_CONFIG = "adapter_config.json"


def config_and_headers(name: str, kwargs: Mapping[str, Any]) -> tuple[Path, Headers, bool]:
    """Local folder with all files but the weights, headers of the weights, and whether it has the weights too."""
    subfolder, variant = str(kwargs.get("subfolder") or ""), kwargs.get("variant")
    if Path(name).is_dir():
        directory = Path(name) / subfolder
        refuse_adapter(directory)
        if not (directory / "config.json").is_file():
            inside = sorted(path.parent.name for path in directory.glob("*/config.json"))
            hint = f" It has the folders {', '.join(inside[:3])}: pass subfolder={inside[0]!r}." if inside else ""
            raise ValueError(
                f"{directory} has no config.json. Give the folder of a checkpoint in transformers format.{hint}"
            )
        return directory, read_headers(directory, variant), True
    check_checkpoint_name(name, kwargs.get("cache_dir"))
    arguments = {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS}
    ignored = [f"*{suffix}" for suffix in WEIGHTS]
    try:
        directory = Path(snapshot_download(name, ignore_patterns=ignored, **arguments)) / subfolder
        refuse_adapter(directory)
        if kwargs.get("local_files_only") or is_offline_mode() or _has_weights(directory, variant):
            return directory, read_headers(directory, variant), True
        # Fetch only the headers, since a preview must not download the weights.
        if subfolder or variant is not None:
            raise ValueError(
                f"Weights with subfolder={subfolder!r} and variant={variant!r} are only read once they are downloaded. "
                f"Run `hf download {name}` first, or pass the folder of a copy."
            )
        remote = {k: v for k, v in arguments.items() if k in ("revision", "token")}
        return directory, headers_from_metadata(get_safetensors_metadata(name, **remote)), False
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name!r} is neither a local folder nor a Hub model that could be fetched ({type(error).__name__}). "
            "Check the name, the network and your token."
        ) from error


def _has_weights(directory: Path, variant: str | None) -> bool:
    """Whether a folder has all files of the weights."""
    try:
        weight_files(directory, variant)
    except ValueError:
        return False
    return True


def refuse_adapter(directory: Path) -> None:
    """Raise a `ValueError` for a folder with a PEFT adapter, with or without base weights."""
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    if (directory / "config.json").is_file():
        what = f"{directory} holds an adapter ({ADAPTER_CONFIG}) beside the weights, which transformers adds to them"
    else:
        what = f"{directory} holds an adapter ({ADAPTER_CONFIG}) of {base or 'another model'} and no model"
    raise ValueError(
        f"{what}. Merge it first: PeftModel.from_pretrained(model, {str(directory)!r}).merge_and_unload()"
        ".save_pretrained(folder), and compress that folder; or move the adapter's files elsewhere to compress the "
        "weights without it."
    )


def raw_config(directory: Path) -> dict[str, Any]:
    """The unmodified content of `config.json`.

    Raises:
        ValueError: If the file is missing or not a JSON object.
    """
    path = directory / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Give the folder of a checkpoint.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not a JSON object. Copy it again.")
    return record
