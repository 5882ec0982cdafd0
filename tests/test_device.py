"""What runs on an accelerator gives what the CPU gives: experts in every form, statistics, plans and checkpoints."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_moe import ByteBudget, MoECompressor, MSMoE
from optimum_moe.plan import BlockPlan, keep_all
from optimum_moe.ranks import Parcel
from optimum_moe.surgeons import find_blocks
from tests.expert_forms import joint, mixture
from tests.factor_methods import METHODS, calibration
from tests.nn.conftest import DOMINANTS, LABELS
from tests.tiny_models import build, by_name, inputs_for, logits_of

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator is at hand"),
    pytest.mark.filterwarnings("ignore:Calibration gave no token"),
]

DEVICE = "cuda:0"
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "llama4", "switch_transformers")
"""Gated; top-2; router groups; interleaved with biases; without a gate; dense bmm; encoder-decoder with capacity."""
STOCK_LOOPS = ("eager", "grouped_mm", "batched_mm")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def with_forms(family: str, forms: Any) -> tuple[nn.Module, torch.Tensor]:
    """A tiny model whose first block holds its experts in other forms, and inputs for the block."""
    model = build(family)
    found = find_blocks(model)[0]
    block = found.module(model)
    with torch.no_grad():
        made = forms(found.surgeon.experts(block))
    plan = keep_all(found.info.name, found.info.num_experts)
    found.surgeon.carry_out(block, replace(plan, factors=made))
    experts = next(m for m in block.modules() if hasattr(m, "factors"))
    return experts, torch.randn(64, found.info.hidden_size)


def run(experts: Any, hidden_TH: torch.Tensor, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of routed tokens, and the gradients of all parameters for it."""
    generator = torch.Generator().manual_seed(2)
    device, dtype = next(experts.parameters()).device, next(experts.parameters()).dtype
    index_TK = torch.rand(len(hidden_TH), 8, generator=generator).argsort(-1)[:, :2].to(device)
    weights_TK = (torch.rand(len(hidden_TH), 2, generator=generator) + 0.1).to(device, dtype)
    target_TH = torch.randn(hidden_TH.shape, generator=generator).to(device, dtype)
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    output_TH = experts(hidden_TH.to(device, dtype), index_TK, weights_TK)
    (output_TH * target_TH).sum().backward()
    return output_TH.detach(), {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("forms", [mixture, joint], ids=["mixture", "joint"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_experts_in_every_form_compute_and_learn_what_they_do_on_the_cpu(family, forms, dtype, error, implementation):
    if forms is joint and family == "nemotron_h":
        pytest.skip("experts without a gate have no joint factors")
    experts, hidden_TH = with_forms(family, forms)
    expected, gradients = run(copy.deepcopy(experts).double(), hidden_TH, "eager")
    found, learned = run(experts.to(DEVICE, dtype), hidden_TH, implementation)
    assert relative_error(found, expected) < error
    assert set(learned) == set(gradients)
    for name, gradient in gradients.items():
        assert relative_error(learned[name], gradient) < 2 * error, name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_merged_experts_give_the_same_logits_in_every_implementation(family):
    model = build(family)
    share_E = torch.tensor([1.0 / LABELS.count(label) for label in LABELS], dtype=torch.float64)
    for found in find_blocks(model):
        found.surgeon.cut(found.module(model), BlockPlan(found.info.name, LABELS, DOMINANTS, "map", share_E))
    inputs = inputs_for(family)
    expected = logits_of(model, inputs)
    model.to(DEVICE)
    for implementation in STOCK_LOOPS:
        model.set_experts_implementation(implementation)
        assert relative_error(logits_of(model, {n: v.to(DEVICE) for n, v in inputs.items()}), expected) < 1e-5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_device_is_cut_as_on_the_cpu(family, name, tmp_path: Path):
    target = by_name(family)
    if target.refuses(name):
        pytest.skip(target.refuses(name))
    models = {place: build(target).to(place) for place in ("cpu", DEVICE)}
    plans = {}
    for place, model in models.items():
        compressor = MoECompressor.from_pretrained(model, METHODS[name], calibration(target), progress=False)
        models[place] = compressor.apply()
        plans[place] = compressor.plan
    for block, plan in plans["cpu"].blocks.items():
        assert plans[DEVICE].blocks[block].labels_E == plan.labels_E
    inputs = inputs_for(target)
    found = logits_of(models[DEVICE], {n: v.to(DEVICE) for n, v in inputs.items()})
    assert found.device.type == "cuda"
    assert relative_error(found, logits_of(models["cpu"], inputs)) < 1e-3


@pytest.mark.parametrize(
    "method", [ByteBudget(runs_in="transformers", share=0.5), MSMoE(num_experts=4)], ids=["budget", "m-smoe"]
)
def test_what_was_cut_on_the_device_loads_there_and_on_the_cpu(method, tmp_path: Path):
    model = build("qwen3_moe").to(DEVICE)
    compressor = MoECompressor.from_pretrained(model, method, calibration("qwen3_moe"), progress=False)
    inputs = inputs_for("qwen3_moe")
    on_device = {n: v.to(DEVICE) for n, v in inputs.items()}
    expected = logits_of(compressor.apply(), on_device)
    compressor.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=DEVICE)
    assert torch.equal(logits_of(again, on_device), expected)
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), inputs), expected) < 1e-5


def test_streaming_on_the_device_writes_what_memory_writes(tmp_path: Path):
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    logits = {}
    for engine in ("memory", "streaming"):
        compressor = MoECompressor.from_pretrained(
            tmp_path / "model",
            MSMoE(num_experts=4),
            calibration("qwen3_moe"),
            engine=engine,
            device_map=DEVICE,
            output_dir=tmp_path / engine,
            progress=False,
        )
        compressor.apply()
        logits[engine] = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / engine), inputs_for("qwen3_moe"))
    assert torch.equal(logits["memory"], logits["streaming"])


def test_tensors_between_processes_arrive_on_the_device_of_the_receiver() -> None:
    here, there = torch.arange(3.0), torch.arange(4.0, device=DEVICE)
    parcel = Parcel.of({"here": here, "there": [there]})
    assert all(tensor.device.type == "cpu" for tensor in parcel.tensors)
    for device in (torch.device("cpu"), torch.device(DEVICE)):
        opened = parcel.opened(device)
        assert opened["here"].device.type == "cpu"
        assert opened["there"][0].device == device
        assert torch.equal(opened["there"][0].cpu(), there.cpu())
