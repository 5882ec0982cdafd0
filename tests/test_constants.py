"""Constant experts, and budgets for vLLM as it is: whole experts and constants, as many as each block needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor
from optimum_moe.algorithms.byte_budget import Candidate, Point
from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.formats import build_expert, candidates
from optimum_moe.model_info import BlockInfo
from optimum_moe.runtimes import get_runtime
from optimum_moe.stages.byte_budget import BlockProfile, spend_budget
from optimum_moe.verification import verify
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")


def expert_and_tokens(tokens: int = 64) -> tuple[Expert, ExpertTokens]:
    torch.manual_seed(0)
    up_IH, gate_IH, down_HI = torch.randn(16, 8), torch.randn(16, 8), torch.randn(8, 16)

    def activate(gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        assert gate is not None
        return torch.nn.functional.silu(gate) * up

    expert = Expert(up_IH, down_HI, activate, gate_IH)
    return expert, ExpertTokens(torch.randn(tokens, 8), torch.rand(tokens), torch.randn(2, tokens, 8))


def test_a_constant_is_half_of_the_mean_output_weighted_as_the_loss_is() -> None:
    expert, tokens = expert_and_tokens()
    stored = build_expert(expert, tokens, Candidate("constant", 0, 1))
    output_PH = expert.activated(expert.preactivations(tokens.input_PH)) @ expert.down_HI.T
    gradient_JPH = tokens.gradient_JPH
    assert gradient_JPH is not None
    weight_P = tokens.weight_P.square() * gradient_JPH.square().sum((0, 2))
    expected_H = 0.5 * (weight_P[:, None] * output_PH).sum(0) / weight_P.sum()
    torch.testing.assert_close(stored.instead.tensors["approx_value"][0], expected_H, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stored.run(expert, tokens.input_PH), expected_H.expand_as(output_PH))
    assert stored.width == 0
    assert stored.instead.size == 1


def test_a_constant_costs_its_numbers_and_less_than_nothing_in_its_place() -> None:
    expert, tokens = expert_and_tokens()
    # The same output for all tokens, but for a little.
    tokens = ExpertTokens(tokens.input_PH[:1] + 0.01 * tokens.input_PH, tokens.weight_P, tokens.gradient_JPH)
    points = {point.candidate.format: point for point in candidates(expert, tokens, formats=["constant"], itemsize=2)}
    assert points["constant"].bytes - points["empty"].bytes == 8 * 2
    # Half of the mean leaves a quarter of the damage, of whose gain half is counted on.
    assert points["constant"].damage == pytest.approx((1 + 0.25) / 2 * points["empty"].damage, rel=0.02)
    assert "constant" not in {p.candidate.format for p in candidates(expert, tokens, formats=["narrow"])}


def test_an_expert_without_tokens_has_no_constant() -> None:
    expert, tokens = expert_and_tokens(tokens=0)
    assert [p.candidate.format for p in candidates(expert, tokens)] == ["empty", "dense"]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_for_vllm_experts_are_whole_or_constant(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "original")
    data = CalibrationConfig([inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)])
    compressor = MoECompressor.from_pretrained(
        tmp_path / "original", ByteBudget(share=0.5, runs_in="vllm"), data, progress=False
    )
    model = compressor.apply()
    total = kept = 0
    for found in compressor.source.blocks:
        plan = compressor.plan.blocks[found.info.name]
        whole = [width == found.info.intermediate_size for width in plan.sizes.widths]
        assert set(plan.sizes.widths) <= {0, found.info.intermediate_size}
        assert plan.num_groups == found.info.num_experts
        assert set(plan.sizes.parts) == set()
        assert any(whole)
        left = plan.sizes.instead.get("constant", (None,) * len(whole))
        assert all((size is None) == is_whole for size, is_whole in zip(left, whole, strict=True))
        total, kept = total + len(whole), kept + sum(whole)
    assert 0 < kept <= total / 2
    compressor.save_pretrained(tmp_path / "out")
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded, inputs_for(name)), logits_of(model, inputs_for(name)))
    assert verify(tmp_path / "out", against=tmp_path / "original", inputs=inputs_for(name)).passed


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h"])
def test_constants_load_beside_biases_and_without_gates(name: str, tmp_path: Path) -> None:
    data = CalibrationConfig([inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)])
    stage = ByteBudget(share=0.5, runs_in="transformers", formats=["constant"])
    compressor = MoECompressor.from_pretrained(build(name), stage, data, progress=False)
    model = compressor.apply()
    constants = [plan.sizes.instead.get("constant", ()) for plan in compressor.plan.blocks.values()]
    assert any(size is not None for block in constants for size in block)
    compressor.save_pretrained(tmp_path / "out")
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded, inputs_for(name)), logits_of(model, inputs_for(name)))


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("gpt_oss", r'"any" or runs_in="vllm\+optimum_moe" or runs_in="transformers"'),
        # Its experts are chosen once for two blocks, from whose router none can be removed.
        ("jetmoe", r'"vllm\+optimum_moe" or runs_in="transformers"'),
    ],
)
def test_an_architecture_that_vllm_reads_in_another_way_is_refused_early(name: str, others: str) -> None:
    reason = rf"vLLM replaces experts by constants only where .* glm4_moe, not of {name}\. Pass runs_in={others}\.$"
    with pytest.raises(ValueError, match=rf'^runs_in="vllm" does not fit this model: {reason}'):
        MoECompressor.from_pretrained(build(name), ByteBudget(share=0.5, runs_in="vllm"), ["no text is read"])


def test_names_of_blocks_have_to_tell_the_layer() -> None:
    vllm, other = get_runtime("vllm"), get_runtime("vllm+optimum_moe")
    assert vllm.objection("mixtral", ["model.layers.0.mlp", "model.layers.11.mlp"]) is None
    for odd in ("model.mlp", "towers.1.layers.2.mlp"):
        said = vllm.objection("mixtral", ["model.layers.0.mlp", odd])
        assert said is not None
        assert f"and {odd} has another number of them" in said
        assert other.objection("any_moe", [odd]) is None


def test_every_block_keeps_the_expert_that_it_needs_most() -> None:
    blocks = [BlockInfo(f"layers.{n}", n, 2, 1, 1, 16, 8, 384, 384, 8) for n in range(2)]

    def points(damage: float) -> tuple[Point, ...]:
        return Point(0.0, damage, Candidate("empty", 0)), Point(10.0, 0.0, Candidate("dense", 16))

    profiles = {
        "layers.0": BlockProfile((points(9.0), points(8.0)), in_loss=True),
        "layers.1": BlockProfile((points(1.0), points(2.0)), in_loss=True),
    }
    widths = {n: [c.neurons for c in found] for n, found in spend_budget(blocks, profiles, 20.0).items()}
    assert widths == {"layers.0": [16, 16], "layers.1": [0, 0]}
    widths = {n: [c.neurons for c in found] for n, found in spend_budget(blocks, profiles, 20.0, True).items()}
    assert widths == {"layers.0": [16, 0], "layers.1": [0, 16]}


def test_whole_experts_make_up_for_those_that_are_gone() -> None:
    """Refitted to the block's output; with refit=False they stay as they are."""
    model = build("qwen3_moe")
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(3)])
    downs = {}
    for refit in (True, False):
        stage = ByteBudget(share=0.5, runs_in="vllm", refit=refit)
        compressor = MoECompressor.from_pretrained(build("qwen3_moe"), stage, data, progress=False)
        compressor.apply()
        plan = compressor.plan.blocks["model.layers.0.mlp"]
        kept = [e for e, width in enumerate(plan.sizes.widths) if width]
        downs[refit] = {e: compressor.model.model.layers[0].mlp.experts.factors.densified(e)["down"] for e in kept}
    own = {e: model.model.layers[0].mlp.experts.down_proj[e] for e in downs[False]}
    assert all(torch.equal(downs[False][e], own[e]) for e in own)
    assert downs[True].keys() == downs[False].keys()
    assert any((downs[True][e] - own[e]).abs().max() > 1e-4 for e in own)


def test_constants_count_in_the_budget() -> None:
    """With experts of few neurons, so that what is left of many removed ones has the bytes of some."""
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=8, length=64, seed=seed) for seed in range(3)])
    model = build("qwen3_moe", moe_intermediate_size=8, num_experts=32)
    compressor = MoECompressor.from_pretrained(model, ByteBudget(share=0.5, runs_in="vllm"), data, progress=False)
    compressor.apply()
    stored = constants = 0
    for found in compressor.source.blocks:
        sizes = compressor.plan.blocks[found.info.name].sizes
        stored += sum(sizes.numbers(expert, found.info.hidden_size) for expert in range(32))
        constants += sum(size is not None for size in sizes.instead["constant"])
    info = compressor.source.blocks[0].info
    whole = len(compressor.source.blocks) * 32 * info.expert_parameters
    assert constants * info.hidden_size > info.expert_parameters
    assert 0.5 * whole - info.expert_parameters < stored <= 0.5 * whole
