"""Inputs and outputs of the public implementations, see the key names."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def parity():
    return load_file(DATA / "parity_msmoe.safetensors")


@pytest.fixture(scope="session")
def criteria():
    return load_file(DATA / "parity_criteria.safetensors")


@pytest.fixture(scope="session")
def blocks(parity):
    """Names of the blocks stored under a prefix, in the public implementation's order."""

    def names(prefix):
        return list(dict.fromkeys(key[len(prefix) :].split("/")[0] for key in parity if key.startswith(prefix)))

    return names
