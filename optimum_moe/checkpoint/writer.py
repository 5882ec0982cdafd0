"""Writing a compressed checkpoint: beside its place first, then renamed, so that nothing half-written is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_moe.checkpoint.carried_code import carry_code
from optimum_moe.surgeons import FoundBlock, config_at, tower_of

PARTS = "checkpoint"


def check_destination(directory: str | Path, overwrite: bool = False) -> Path:
    """Make sure that a checkpoint can be written to `directory`, before any work is done.

    Raises:
        ValueError: If it holds something and `overwrite` is not set, or it cannot be written.
    """
    # A link stays, and the checkpoint goes where it points.
    directory = Path(directory).expanduser().resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file. Give a folder.")
    if directory.is_dir() and working_folder(directory).is_dir() and not (working_folder(directory) / PARTS).is_dir():
        # A streaming run was killed after its last step.
        shutil.rmtree(working_folder(directory), ignore_errors=True)
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ValueError(f"{directory} is not empty. Choose another folder, or pass overwrite=True (--overwrite).")
    for place, what in ((Path.cwd(), "the working directory"), (Path(os.path.expanduser("~")), "the home directory")):
        if place == directory or directory in place.parents:
            raise ValueError(f"{directory} holds {what}, and would be replaced as a whole. Give a folder inside it.")
    if directory.is_mount():
        raise ValueError(f"{directory} is a mount point, which cannot be replaced. Give a folder inside it.")
    parent = directory.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file, so {directory} cannot be made. Choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"No permission to write in {parent}. Choose another folder, or change its permissions.")
    return directory


def working_folder(directory: Path) -> Path:
    """Where a streaming run to `directory` keeps what is finished; its shards are in `PARTS` there until the end."""
    return directory.parent / f".{directory.name}.streaming"


def check_space(directory: Path, size: int) -> None:
    """Raise a `ValueError` unless the disk of `directory` has `size` bytes left."""
    parent = directory.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ValueError(
            f"{parent} has {free:,} bytes left, the checkpoint takes {size:,}. Free some space, or choose another disk."
        )


@contextmanager
def written_beside(directory: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `directory` when the block ends and vanishes when it fails."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory.parent / f".{directory.name}.writing-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        take_place(beside, directory)
    except Exception as error:
        if disk_is_full(error):
            raise ValueError(
                f"The disk of {directory.parent} is full; nothing was left of the attempt. Free some space, or choose "
                "another disk."
            ) from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def disk_is_full(error: Exception) -> bool:
    """Whether an error says that there is no space left."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and tokenizers report it as an error of their own, with the cause in its text only.
    return "No space left" in str(error) or f"os error {errno.ENOSPC}" in str(error)


def take_place(beside: Path, directory: Path) -> None:
    """Rename a folder to `directory`, which it replaces."""
    old = directory.parent / f".{directory.name}.replaced-{os.getpid()}"
    try:
        if directory.exists():
            directory.rename(old)
        beside.rename(directory)
    except BaseException:
        # Also on Ctrl-C between the two.
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    finally:
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_model(model: PreTrainedModel, directory: Path, blocks: Sequence[FoundBlock], max_shard_size: str) -> None:
    """Weights, config in every spelling that readers of this architecture know, and the code that it needs."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    _spell_out_config(directory, blocks)
    carry_code(directory, model.config)


def describe_model(model: PreTrainedModel, directory: Path, blocks: Sequence[FoundBlock]) -> None:
    """`write_model` without the weights, for a model whose shards are written already."""
    with TemporaryDirectory(dir=directory) as beside, without_bars():
        model.save_pretrained(beside, state_dict={})
        for path in Path(beside).iterdir():
            # Only the empty file of weights is of no use.
            if path.suffix != ".safetensors":
                path.rename(directory / path.name)
    _spell_out_config(directory, blocks)
    carry_code(directory, model.config)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from showing bars of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _spell_out_config(directory: Path, blocks: Sequence[FoundBlock]) -> None:
    path = directory / "config.json"
    fields = {found.surgeon.count_fields for found in blocks}
    path.write_text(json.dumps(spell_out(json.loads(path.read_text()), fields), indent=2, sort_keys=True) + "\n")


def spell_out(config: Mapping[str, Any], count_fields: set[tuple[str, ...]]) -> dict[str, Any]:
    """Add the spellings that other versions and runtimes read: every name of the expert count, flat `rope_theta`.

    transformers 5 writes one spelling; transformers 4 then assumes the class's default, with wrong shapes.
    """
    spelled = {
        key: spell_out(value, count_fields) if isinstance(value, Mapping) and key.endswith("_config") else value
        for key, value in config.items()
    }
    for names in count_fields:
        present = [spelled[name] for name in names if isinstance(spelled.get(name), int)]
        if present:
            spelled |= dict.fromkeys(names, present[0])
    rope = spelled.get("rope_parameters")
    if isinstance(rope, Mapping) and isinstance(rope.get("rope_theta"), (int, float)):
        spelled.setdefault("rope_theta", rope["rope_theta"])
    return spelled


def set_expert_counts(model: PreTrainedModel, blocks: Sequence[FoundBlock], counts: Mapping[str, int]) -> None:
    """Tell the configs of a plain model how many experts their blocks have."""
    towers = {found.info.name: tower_of(model, found) for found in blocks}
    for found in blocks:
        tower = towers[found.info.name]
        if tower is not None:
            setattr(config_at(model.config, tower), found.surgeon.count_fields[0], counts[found.info.name])
