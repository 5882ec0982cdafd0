"""Calibration data from the Hub: `org/name`, `org/name:split` or `org/name:config:split`."""

from __future__ import annotations

from typing import Any

from optimum_moe.checkpoint.names import data_set_name


def load_hub_data_set(source: str) -> Any:
    """A stream of the rows of a data set, in its own order: only what is read is downloaded, and no code of it is run.

    Raises:
        ValueError: If `datasets` is not installed, or there is no such data set, config or split.
    """
    found = data_set_name(source)
    assert found is not None
    name, config, split = found
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"Reading the data set {name} needs the package datasets. Run `pip install datasets`, or give a file."
        ) from error
    try:
        return load_dataset(name, config, split=split, streaming=True)
    # Errors of the network, of access and of names have no common base but this.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The data set {source!r} could not be read ({type(error).__name__}: {reason:.300}). Check the network and "
            "your token, and write org/name:split or org/name:config:split; or give a .txt, .jsonl or .parquet file."
        ) from error
