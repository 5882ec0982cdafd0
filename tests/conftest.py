import pytest
import torch

import optimum_moe  # noqa: F401  (arms loading)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
