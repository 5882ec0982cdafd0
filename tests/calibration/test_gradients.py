"""Backward passes over calibration data: what is sampled is the gradient at what the experts give."""

from __future__ import annotations

import pytest
import torch

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor, MSMoE
from optimum_moe.calibration import build_batches, observe
from optimum_moe.calibration.gradients import sampled_loss
from optimum_moe.calibration.random_draws import generator_for
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import TARGETS, Target, build, inputs_for

DRAWS = 2


def observed(model, inputs, draws: int = DRAWS):
    config = CalibrationConfig([inputs])
    return observe(model, find_blocks(model), build_batches(config), config, progress=False, draws=draws)


def target_without(target: Target, statistics) -> list[str]:
    """Blocks that no gradient is sampled at: attention experts are no sum, but queries and outputs of an attention."""
    return [name for name in statistics.blocks if target.name == "jetmoe" and "attention" in name]


@pytest.mark.filterwarnings("ignore:Calibration gave no token")
@pytest.mark.parametrize("target", [pytest.param(t, id=t.name) for t in TARGETS])
def test_every_block_gets_a_gradient_for_each_of_its_tokens(target: Target) -> None:
    model = build(target)
    inputs = inputs_for(target, rows=1, length=12)
    with torch.no_grad():
        has_logits = "logits" in model(**inputs)
    if not has_logits or target.inputs != "input_ids":
        pytest.skip("no logits, no loss")
    statistics = observed(model, inputs, draws=1)
    for name, block in statistics.blocks.items():
        if name in target_without(target, statistics):
            assert block.reservoir.gradient_SJH is None
            continue
        gradient = block.reservoir.gradient_SJH
        assert gradient.shape == (block.num_tokens, 1, block.reservoir.experts_input_SH.shape[1])
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


def test_parameters_get_no_gradient_and_keep_what_they_had() -> None:
    model = build("qwen3_moe")
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    observed(model, inputs_for("qwen3_moe"))
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert all(p.grad is None for p in model.parameters())


def test_gradients_change_no_other_statistic() -> None:
    model, inputs = build("qwen3_moe"), inputs_for("qwen3_moe")
    plain, with_gradients = observed(model, inputs, draws=0), observed(model, inputs)
    for name, block in plain.blocks.items():
        other = with_gradients.blocks[name]
        assert block.reservoir.gradient_SJH is None
        assert torch.equal(block.token_count_E, other.token_count_E)
        assert torch.equal(block.reservoir.index_SK, other.reservoir.index_SK)
        torch.testing.assert_close(block.gated_norm_sum_E, other.gated_norm_sum_E)


def test_a_gradient_is_the_derivative_of_the_loss() -> None:
    model, inputs = build("mixtral"), inputs_for("mixtral", rows=1, length=8)
    model.set_experts_implementation("eager")
    found = find_blocks(model)[0]
    sample = observed(model, inputs, draws=1).blocks[found.info.name].reservoir
    direction_SH = torch.randn(sample.experts_input_SH.shape, generator=torch.Generator().manual_seed(3))
    experts = found.surgeon.summing_module(found.module(model))

    def loss_at(step: float) -> float:
        handle = experts.register_forward_hook(lambda m, a, out: out + step * direction_SH.view_as(out))
        with torch.no_grad():
            value = sampled_loss(model, model(**inputs), inputs, generator_for("labels", 0, 0))
        handle.remove()
        return float(value.double())

    slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3
    expected = float((sample.gradient_SJH[:, 0].double() * direction_SH.double()).sum())
    assert slope == pytest.approx(expected, rel=1e-2)


def test_gradients_survive_saving(tmp_path) -> None:
    statistics = observed(build("mixtral"), inputs_for("mixtral"))
    statistics.save_pretrained(tmp_path)
    again = type(statistics).from_pretrained(tmp_path)
    for name, block in statistics.blocks.items():
        assert torch.equal(block.reservoir.gradient_SJH, again.blocks[name].reservoir.gradient_SJH)


def test_a_model_without_logits_falls_back_to_output_errors() -> None:
    target_model = build("qwen3_moe").model
    statistics = observed(target_model, inputs_for("qwen3_moe"))
    assert all(block.reservoir.gradient_SJH is None for block in statistics.blocks.values())
    compressor = MoECompressor.from_pretrained(
        target_model, ByteBudget(runs_in="transformers", share=0.5), [inputs_for("qwen3_moe")]
    )
    with pytest.warns(UserWarning, match="damage is measured by output errors"):
        compressor.apply()
    target_model = build("qwen3_moe").model
    assert MoECompressor.from_pretrained(target_model, MSMoE(num_experts=4), [inputs_for("qwen3_moe")]).calibrate()
