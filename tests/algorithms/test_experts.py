import pytest
import torch

from optimum_moe.algorithms.experts import ExpertTensors


def test_sizes_from_tensors_and_sequences():
    stacked = ExpertTensors(torch.zeros(3, 5, 4), torch.zeros(3, 4, 5), down_bias=torch.zeros(3, 4))
    listed = ExpertTensors([torch.zeros(5, 4)] * 3, [torch.zeros(4, 5)] * 3, gate_bias=[torch.zeros(5)] * 3)
    for experts in (stacked, listed):
        assert (experts.num_experts, experts.intermediate_size, experts.hidden_size) == (3, 5, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"up": [], "down": []}, "at least one"),
        ({"up": torch.zeros(3, 5, 4), "down": torch.zeros(2, 4, 5)}, "down has 2 experts and up has 3"),
        ({"up": torch.zeros(3, 5, 4), "down": torch.zeros(3, 5, 4)}, r"down\[0\] has shape \(5, 4\)"),
        (
            {"up": torch.zeros(3, 5, 4), "down": torch.zeros(3, 4, 5), "up_bias": torch.zeros(3, 4)},
            r"up_bias\[0\] has shape \(4,\)",
        ),
    ],
)
def test_wrong_layout_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertTensors(**fields)
