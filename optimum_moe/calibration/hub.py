"""Calibration data from the Hub: `org/name`, `org/name:split` or `org/name:config:split`."""

from __future__ import annotations

from typing import Any

from optimum_moe.checkpoint.names import data_set_name


def load_hub_data_set(source: str) -> Any:
    """Stream the rows of a dataset in its order: only rows that are read are downloaded, and none of its code is run.

    Raises:
        ValueError: If `datasets` is not installed, or there is no such dataset, config or split.
    """
    found = data_set_name(source)
    assert found is not None
    name, config, split = found
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"Reading the dataset {name} needs the package datasets. Run `pip install datasets`, or give a file."
        ) from error
    try:
        return load_dataset(name, config, split=split, streaming=True)
    # Network errors, access errors and unknown names have no narrower common base class.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The dataset {source!r} could not be read ({type(error).__name__}: {reason:.300}). Check the network and "
            "your token, and write org/name:split or org/name:config:split; or give a .txt, .jsonl or .parquet file."
        ) from error
