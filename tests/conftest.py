import signal

import pytest
import torch

import optimum_moe  # noqa: F401  (arms loading)

torch.set_num_threads(1)
# A process that was started in the background ignores Ctrl-C, and so would the tests of it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
