"""Names of checkpoints and datasets: paths and Hub ids are distinguished without the network.

Uses only the standard library, so that the command line refuses a mistyped name before heavy imports.
"""

from __future__ import annotations

import re
from pathlib import Path

from optimum_moe.settings import nearest

DEFAULT_SPLIT = "train"
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack"),
    *(".npz", ".npy", ".pkl", ".pickle", ".joblib", ".distcp", ".tflite", ".ot", ".mlmodel", ".nemo", ".engine"),
)
"""Suffixes of weights, of indices of weights, and of pickled objects."""
_FILES = (".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip")
_HUB_ID = re.compile(r"(\b[\w\-.]+\b/)?\b[\w\-.]{1,96}\b", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id of a model or dataset."""
    return _HUB_ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def check_checkpoint_name(name: str, cache_dir: str | Path | None = None) -> None:
    """Refuse a name that can only be a mistyped path.

    Args:
        name: Folder of a checkpoint, or Hub id.
        cache_dir: Folder of downloaded Hub models; by default the cache of huggingface_hub.

    Raises:
        ValueError: If there is no such folder, and the name is either not a Hub id, or starts with an existing folder
            and is not a downloaded Hub model.
    """
    place = Path(name)
    if name and place.is_dir():
        return
    if not place.exists() and is_hub_id(name):
        if "/" in name and not place.parent.is_dir():
            return
        from huggingface_hub.constants import HF_HUB_CACHE

        if (Path(cache_dir or HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
            return
    raise ValueError(
        f"{name} is not a folder{_nearest(place)} Give a Hub id such as 'org/model', or the folder of a checkpoint."
        f"{_how_to_fetch(name, place)}"
    )


def _nearest(place: Path) -> str:
    """Hint with the most similar name beside a missing folder."""
    try:
        names = [entry.name for entry in place.parent.iterdir() if entry.is_dir()]
    except OSError:
        return f", and neither is {place.parent}."
    near = nearest(place.name, names)
    return f"; did you mean {str(place.with_name(near))!r}?" if near else "."


def _how_to_fetch(name: str, place: Path) -> str:
    if "/" not in name or not is_hub_id(name) or place.exists():
        return ""
    return f" As {place.parent} is a folder here, fetch a Hub model of that name first: hf download {name}"


def data_set_name(source: str) -> tuple[str, str | None, str] | None:
    """Repository, config and split of a Hub dataset; None for anything else, such as the path of a file.

    A name with the suffix of a file, or that starts with an existing folder, counts as a mistyped path.
    """
    name, *rest = source.split(":")
    if "/" not in name or not is_hub_id(name) or name.lower().endswith(_FILES) or len(rest) > 2 or not all(rest):
        return None
    if Path(source).exists() or Path(name).is_file() or (Path(name).parent.is_dir() and not Path(name).is_dir()):
        return None
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else DEFAULT_SPLIT
