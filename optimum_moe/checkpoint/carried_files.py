"""Files that are copied from the original checkpoint byte for byte: tokenizer, templates, parsers, license.

Saving a tokenizer again would change its files: transformers 5 writes class names that transformers 4 does not know,
and drops entries that it does not use.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import ProcessorMixin

from optimum_moe.checkpoint.names import WEIGHTS
from optimum_moe.checkpoint.system import utf8_path

_PICTURES = {
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".bmp", ".ico", ".avif"),
    *(".mp4", ".mov", ".webm", ".mp3", ".wav", ".flac", ".pdf"),
}
_LEGAL = ("*licen[cs]e*", "*notice*", "*copying*", "*use_policy*", "*usage_policy*")
_NOT_CARRIED = (
    # Written again, or about other weights.
    *("config.json", "params.json", "readme*", "adapter_*", "*.index.json"),
    # Configs of a quantization that was undone, which vLLM and TensorRT-LLM would apply again.
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"),
    # Training state, which contains local paths.
    *("trainer_state.json", "training_args.*", "*_results.json", "events.out.tfevents*"),
)
_TOKENIZER = (
    *("*token*.json", "vocab*", "merges.txt", "*.model", "*.model.*", "*.spm", "*.tiktoken", "chat_template*"),
    *("additional_chat_templates/*",),
)
_PROCESSOR = ("processor_config.json", "*preprocessor_config.json")


def carried_files(directory: Path) -> list[Path]:
    """Files of a checkpoint that describe the compressed one as well, as paths relative to its folder.

    These are all files of the top level except weights, pictures, adapters and training state, and code and templates
    in subfolders.
    """
    found = []
    for folder, below, names in os.walk(directory):
        place = Path(folder).relative_to(directory)
        if place.parts and any(_is_weight(name) for name in names):
            # The subfolder holds another model, such as an adapter or a checkpoint of a trainer.
            below.clear()
            continue
        below[:] = sorted(name for name in below if not name.startswith(".") and name != "__pycache__")
        kept = (name for name in names if not place.parts or Path(name).suffix in (".py", ".jinja"))
        found += [place / name for name in kept if _is_carried(name)]
    return sorted(found)


def carry_files(original: Path | None, tokenizer: Any, load: Callable[[Path], Any], directory: Path) -> None:
    """Copy the files of `carried_files`, and write the tokenizer.

    Args:
        original: Folder of the original, None for a model in memory.
        tokenizer: Tokenizer or processor of the user, None for the original's.
        load: Function that loads the tokenizer or processor of a folder.
        directory: The new checkpoint, with weights and configs already written.
    """
    files = [] if original is None else carried_files(original)
    if tokenizer is not None and (original is None or not _is_unchanged(tokenizer, original, load)):
        files = [file for file in files if not _matches(file.as_posix(), _files_of(tokenizer))]
        _write_tokenizer(tokenizer, load, directory)
    for file in files:
        assert original is not None
        _copy(original / file, directory / file)


def _write_tokenizer(tokenizer: Any, load: Callable[[Path], Any], directory: Path) -> None:
    """Write a tokenizer: the files of its folder are copied, unless it was changed after loading."""
    home = getattr(getattr(tokenizer, "tokenizer", tokenizer), "name_or_path", "")
    if not home or not Path(home).is_dir() or not _is_unchanged(tokenizer, Path(home), load):
        with utf8_path(directory) as beside:
            tokenizer.save_pretrained(beside)
        return
    for file in carried_files(Path(home)):
        if _matches(file.as_posix(), _files_of(tokenizer)):
            _copy(Path(home) / file, directory / file)


def _files_of(tokenizer: Any) -> tuple[str, ...]:
    """Patterns of the files that a tokenizer or processor is loaded from."""
    return _TOKENIZER + (_PROCESSOR if isinstance(tokenizer, ProcessorMixin) else ())


def _is_unchanged(tokenizer: Any, folder: Path, load: Callable[[Path], Any]) -> bool:
    """Whether a tokenizer or processor equals the one in a folder, which is so if both save the same files."""
    try:
        loaded = load(folder)
    except (OSError, ValueError, ImportError):
        return False
    if isinstance(loaded, ProcessorMixin) and not isinstance(tokenizer, ProcessorMixin):
        loaded = getattr(loaded, "tokenizer", None)
    return loaded is not None and _written_by(loaded) == _written_by(tokenizer)


def _written_by(tokenizer: Any) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _copy(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Copy only the content, so that the copy has the permissions of a new file.
    shutil.copyfile(file, place)


def _is_weight(name: str) -> bool:
    return not set(WEIGHTS).isdisjoint(suffix.lower() for suffix in Path(name).suffixes)


def _is_carried(name: str) -> bool:
    if name.startswith(".") or _is_weight(name):
        return False
    if _matches(name, _LEGAL):
        return True
    return Path(name).suffix.lower() not in _PICTURES and not _matches(name, _NOT_CARRIED)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)
