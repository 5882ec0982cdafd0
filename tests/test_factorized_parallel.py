"""Compressed experts under FSDP compute what one process does; what would split their tensors is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.test_factorized_verification import save_mixture
from tests.test_parallel import expected, run_processes
from tests.tiny_models import in_full, inputs_for

FSDP = {"fsdp_size": 2}
REFUSED = {
    "tensor": {"tp_size": 2, "tp_plan": "auto"},
    "tensor without a size": {"tp_plan": "auto"},
    "expert": {"tp_size": 2, "ep_size": 2},
    "expert and data": {"fsdp_size": 2, "ep_size": 2},
}

OWN_BATCHES = """
import sys, torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
torch.set_num_threads(1)
folder, arguments, implementation, output = sys.argv[1], eval(sys.argv[2]), sys.argv[3], sys.argv[4]
model = AutoModelForCausalLM.from_pretrained(
    folder, distributed_config=DistributedConfig(**arguments), experts_implementation=implementation)
ids = load_file(folder + "/test_inputs.safetensors")[f"batch_{dist.get_rank()}"]
model(input_ids=ids, labels=ids).loss.backward()
result = {}
for name, parameter in model.named_parameters():
    if parameter.grad is not None:
        gradient = parameter.grad
        result["grad." + name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
if dist.get_rank() == 0:
    save_file({name: tensor.clone() for name, tensor in result.items()}, output)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_mixture(family, tmp_path_factory.mktemp(family)) / "out"
            batches = {"batch_0": torch.full((1, 16), 7), "batch_1": inputs_for(family, seed=5)["input_ids"]}
            save_file(inputs_for(family) | batches, made[family] / "test_inputs.safetensors")
        return made[family]

    return get


@pytest.mark.parametrize("way", ["expert and data", *in_full("tensor", "tensor without a size", "expert")])
def test_what_would_split_experts_is_refused(way: str, folders: Any, tmp_path: Path) -> None:
    done = run_processes(folders("qwen3_moe"), REFUSED[way], "grouped_mm", tmp_path / "result.safetensors")
    for code, printed in done:
        assert code == 1
        assert "ValueError: model.layers.0.mlp keeps its experts in factors with sizes of their own" in printed
        assert "over 2 processes. Use data parallelism (FSDP) or device_map=" in printed


@pytest.mark.parametrize("implementation", ["grouped_mm", *in_full("eager")])
@pytest.mark.parametrize("family", ["qwen3_moe", *in_full("gpt_oss")])
def test_fsdp_computes_what_one_process_does(family: str, implementation: str, folders: Any, tmp_path: Path) -> None:
    done = run_processes(folders(family), FSDP, implementation, tmp_path / "result.safetensors")
    assert [code for code, _ in done] == [0, 0], done[0][1][-3000:]
    result, want = load_file(tmp_path / "result.safetensors"), expected(folders(family), implementation)
    assert result.pop("sharded") > 0
    # Where processes train together every factor has a gradient, where one trains alone only those that were used.
    assert result.keys() >= want.keys()
    for name, tensor in result.items():
        expected_tensor = want.get(name, torch.zeros_like(tensor))
        scale = max(expected_tensor.abs().max().item(), 1e-12)
        assert (tensor - expected_tensor).abs().max().item() <= 2e-5 * scale, name


@pytest.mark.parametrize("family", ["gpt_oss", *in_full("qwen3_moe")])
def test_fsdp_where_experts_of_one_process_get_no_token(
    family: str, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders(family)
    monkeypatch.setattr("tests.test_parallel.WORKER", OWN_BATCHES)
    done = run_processes(folder, FSDP, "eager", tmp_path / "result.safetensors")
    assert [code for code, _ in done] == [0, 0], done[0][1][-3000:]
    result, batches = load_file(tmp_path / "result.safetensors"), load_file(folder / "test_inputs.safetensors")
    wanted: dict[str, torch.Tensor] = {}
    reached = []
    for number in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        ids = batches[f"batch_{number}"]
        model(input_ids=ids, labels=ids).loss.backward()
        found = {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        reached.append({name for name, gradient in found.items() if gradient.any()})
        for name, gradient in found.items():
            wanted[name] = wanted.get(name, 0) + gradient / 2
    assert any(".factors." in name for name in reached[1] - reached[0])
    for name, tensor in wanted.items():
        scale = max(tensor.abs().max().item(), 1e-12)
        assert (result[name] - tensor).abs().max().item() <= 2e-5 * scale, name
