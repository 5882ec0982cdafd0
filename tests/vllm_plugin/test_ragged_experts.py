"""In the interpreter of Triton on a CPU; runs in an environment that has Triton (`make test-serving`)."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed; make test-serving has it")

from optimum_moe.kernels.ragged_matmul import UNSORTED_SLOTS, Tiles
from optimum_moe.vllm_plugin.activations import activation_of
from optimum_moe.vllm_plugin.ragged_experts import RaggedExperts
from tests.vllm_plugin.random_experts import SPECS, load, packed, random_tensors, routed

TILES = Tiles(rows=16, columns=16, depth=16, warps=4, stages=2)


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize(
    ("name", "activation", "limit"),
    [
        *((name, "silu", None) for name in SPECS if name != "without a gate"),
        ("joint", "swigluoai", None),
        ("apart", "gelu", None),
        ("apart", "gelu_tanh", None),
        ("joint", "silu", 1.0),
        ("without a gate", "relu2_no_mul", None),
        ("without a gate", "silu_no_mul", None),
    ],
)
def test_launches_give_what_torch_gives(name: str, activation: str, limit: float | None, with_biases: bool) -> None:
    spec = SPECS[name]
    biases = ("gate", "up", "down") if spec.has_gate else ("up", "down")
    experts = packed(spec, activation_of("block", activation, limit, None, None), biases if with_biases else ())
    load(experts, random_tensors(experts))
    for tokens in (7, UNSORTED_SLOTS):
        given = routed(len(spec.widths), tokens)
        torch.testing.assert_close(RaggedExperts(experts, TILES)(*given), experts(*given), rtol=0, atol=2e-5)


def test_experts_that_all_are_empty_give_zeros() -> None:
    spec = type(SPECS["narrow"])((0, 0, 0), ("gate", "up", "down"))
    experts = packed(spec, activation_of("block", "silu", None, None, None))
    given = routed(3, top_k=2)
    found = RaggedExperts(experts, TILES)(*given)
    assert not found.any()


def test_weights_can_scale_the_input() -> None:
    experts = packed(SPECS["narrow"], activation_of("block", "silu", None, None, None))
    load(experts, random_tensors(experts))
    given = routed(4, top_k=1)
    expected = experts(*given, scales_input=True)
    torch.testing.assert_close(RaggedExperts(experts, TILES)(*given, scales_input=True), expected, rtol=0, atol=2e-5)
