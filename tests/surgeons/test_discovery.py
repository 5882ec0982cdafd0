"""Blocks that are in no row: read by the common contract and self-tested, or refused with the way to describe them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor, MSMoE
from optimum_moe.surgeons import find_blocks, registry
from optimum_moe.surgeons.discovery import discover, unknown_blocks
from optimum_moe.surgeons.generic import GenericSurgeon
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

UNREADABLE = {
    "gemma4": "2 of its children",
    "diffusion_gemma": "none of the attributes top_k",
    "deepseek_v4": "neither a softmax nor a sigmoid",
    "deepseek_v4-hash": "calling its router and its experts failed",
    "phimoe": "neither a softmax nor a sigmoid",
    "inkling": "reading the rows of its router failed",
    "muse_spark": "calling its router and its experts failed",
    "zaya": "0 of its children",
}
"""Architectures that need their row, with what the self-test says of them."""


@pytest.mark.parametrize("target", every_target())
def test_discovery_finds_what_the_table_says_or_refuses(target: Target) -> None:
    model = build(target)
    surgeon = find_blocks(model)[0].surgeon
    if not isinstance(surgeon, GenericSurgeon):
        pytest.skip("has a surgeon of its own, because it does not follow the contract")
    unknown = unknown_blocks(model, set())[0]
    if target.name in UNREADABLE:
        with pytest.raises(ValueError, match=UNREADABLE[target.name]):
            discover(unknown)
        return
    row, known = discover(unknown), surgeon.architecture
    assert (row.block, row.router, row.experts) == (known.block, known.router, known.experts)
    present = {tensor.path for tensor, _ in surgeon.router_tensors(find_blocks(model)[0].module(model))}
    wanted = {(t.path, t.axis, t.on_block, t.role) for t in known.tensors if t.path in present}
    assert {(t.path, t.axis, t.on_block, t.role) for t in row.tensors} == wanted
    assert row.tensors[0].path == known.tensors[0].path
    assert set(known.router_counts) <= set(row.router_counts)
    if target.router_groups > 1:
        assert row.router_groups == known.router_groups


class AcmeBlock(qwen.Qwen3MoeSparseMoeBlock):
    """A block that is in no row."""


class AcmeForCausalLM(Qwen3MoeForCausalLM):
    block: type[nn.Module] = AcmeBlock

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = self.block(config)
        self.post_init()


def acme(block: type[nn.Module] = AcmeBlock) -> AcmeForCausalLM:
    fields: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 64,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    cls = type("AcmeForCausalLM", (AcmeForCausalLM,), {"block": block, "__module__": __name__})
    model = cls(Qwen3MoeConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)
    return model


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SURGEONS", dict(registry._SURGEONS))


def test_an_unknown_block_is_compressed_saved_and_loaded(tmp_path: Path) -> None:
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32)])
    with pytest.warns(UserWarning, match=r"AcmeBlock has no row .* passed the self-test"):
        compressor = MoECompressor.from_pretrained(acme(), MSMoE(num_experts=4), data, progress=False)
    assert [found.info.num_experts for found in compressor.source.blocks] == [8, 8]
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.allclose(logits_of(loaded, inputs_for("qwen3_moe")), logits_of(model, inputs_for("qwen3_moe")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe", [MSMoE(num_experts=4), ByteBudget(runs_in="transformers", share=0.5)], ids=["map", "budget"]
)
def test_a_process_that_never_saw_the_block_loads_it(
    recipe: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the self-test runs while `from_pretrained` builds the model on the meta device, in the model's dtype."""
    known = dict(registry._SURGEONS)
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32)])
    with pytest.warns(UserWarning, match="AcmeBlock has no row"):
        compressor = MoECompressor.from_pretrained(acme().to(dtype), recipe, data, progress=False)
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    monkeypatch.setattr(registry, "_SURGEONS", known)
    with pytest.warns(UserWarning, match="AcmeBlock has no row"):
        loaded = type(model).from_pretrained(tmp_path / "out")
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_discovery_leaves_the_weights_alone() -> None:
    model = acme()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="passed the self-test"):
        find_blocks(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config._experts_implementation != "optimum_moe_watched"


class SwappedRouter(qwen.Qwen3MoeTopKRouter):
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, index = super().forward(hidden_states)
        return logits, index, weights


class AnotherContract(AcmeBlock):
    """Its router returns ids before weights, and its block knows."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config)
        self.gate = SwappedRouter(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        _, index, weights = self.gate(flat)
        return self.experts(flat, index, weights).view(hidden_states.shape)


class NumberedExperts(AcmeBlock):
    """What an expert computes depends on its number."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(flat)
        return self.experts(flat, index, weights * (1 + index)).view(hidden_states.shape)


class NoRouter(AcmeBlock):
    """Its router is hidden in a list."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config)
        self.hidden = [self.gate]
        del self.gate


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (AnotherContract, "merging copies of experts"),
        (NumberedExperts, "neither a softmax nor a sigmoid"),
        (NoRouter, "0 of its children"),
    ],
)
def test_a_block_that_breaks_the_contract_is_refused_with_the_way_to_describe_it(block, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        find_blocks(acme(block))
    assert f"{block.__name__} (model.layers.0.mlp)" in str(raised.value)
    assert f"register_surgeon(Architecture('{block.__name__}'" in str(raised.value) or block is NoRouter
    assert "docs/source/extending.md" in str(raised.value)


class HomemadeMoE(nn.Module):
    """Experts without the stamp of transformers."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return sum(expert(hidden_states) for expert in self.experts) / 4


def test_experts_without_the_stamp_are_not_taken_for_a_dense_model() -> None:
    with pytest.raises(
        ValueError, match=r"HomemadeMoE is not an MoE block .*(?s:.)*subclass of optimum_moe.surgeons.Surgeon"
    ):
        find_blocks(acme(HomemadeMoE))
