import pytest
import torch

from optimum_moe.formats import ExpertsSpec
from optimum_moe.vllm_plugin.activations import Activation, activation_of
from optimum_moe.vllm_plugin.packed_experts import Shard
from tests.vllm_plugin.random_experts import HIDDEN, SPECS, expected, load, packed, random_tensors, routed


def activation_for(spec: ExpertsSpec, name: str = "silu", limit: float | None = None) -> Activation:
    return activation_of("block", name if spec.has_gate else "relu2_no_mul", limit, None, None)


def biases_of(spec: ExpertsSpec) -> tuple[str, ...]:
    return ("gate", "up", "down") if spec.has_gate else ("up", "down")


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_experts_give_what_their_formats_say(name: str, with_biases: bool) -> None:
    spec = SPECS[name]
    activation = activation_for(spec)
    experts = packed(spec, activation, biases_of(spec) if with_biases else ())
    tensors = random_tensors(experts)
    load(experts, tensors)
    given = routed(len(spec.widths))
    torch.testing.assert_close(experts(*given).double(), expected(spec, tensors, activation, *given), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_processes_add_up_to_the_whole(name: str) -> None:
    spec = SPECS[name]
    activation, biases = activation_for(spec), biases_of(spec)
    whole = packed(spec, activation, biases)
    tensors = random_tensors(whole)
    load(whole, tensors)
    given = routed(len(spec.widths))
    parts = [load(packed(spec, activation, biases, Shard(rank, 4)), tensors)(*given) for rank in range(4)]
    torch.testing.assert_close(sum(parts), whole(*given), rtol=0, atol=2e-5)


def test_widths_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match=r"experts of 8, 16, 40 neurons do not divide by tensor_parallel_size=3"):
        packed(ExpertsSpec((24, 8, 40, 16), ("gate", "up", "down")), activation_for(SPECS["joint"]), shard=Shard(0, 3))


def test_weights_can_scale_the_input() -> None:
    spec = SPECS["narrow"]
    activation = activation_for(spec)
    experts = packed(spec, activation)
    tensors = random_tensors(experts)
    load(experts, tensors)
    input_TH, weights_TK, index_TK = routed(len(spec.widths), top_k=1)
    scaled = expected(spec, tensors, activation, input_TH * weights_TK, torch.ones_like(weights_TK), index_TK)
    found = experts(input_TH, weights_TK, index_TK, scales_input=True)
    torch.testing.assert_close(found.double(), scaled, rtol=0, atol=2e-5)


def test_activations_are_those_of_the_literature() -> None:
    gate, up = torch.randn(2, 5, HIDDEN, dtype=torch.float64) * 6

    def given(name: str, limit: float | None = None) -> torch.Tensor:
        return activation_of("block", name, limit, None, None)(gate, up)

    torch.testing.assert_close(given("silu"), gate * torch.sigmoid(gate) * up)
    low, mid = gate.clamp(max=7), up.clamp(-7, 7)
    torch.testing.assert_close(given("swigluoai"), low * torch.sigmoid(1.702 * low) * (mid + 1))
    torch.testing.assert_close(given("silu", 2.0), torch.nn.functional.silu(gate.clamp(max=2)) * up.clamp(-2, 2))
    torch.testing.assert_close(given("gelu"), torch.nn.functional.gelu(gate) * up)
    alone = activation_of("block", "relu2_no_mul", None, None, None)
    torch.testing.assert_close(alone(None, up), up.clamp(min=0) ** 2)


@pytest.mark.parametrize("name", ["situ", "swiglustep", "relu2"])
def test_other_activations_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"block has the activation '{name}', which the vLLM plugin does not run"):
        activation_of("block", name, None, None, None)
