"""Expert skipping: which experts a token leaves out, and that it runs no others and no fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from optimum_moe import (
    CalibrationConfig,
    CompressionPlan,
    ExpertSkipping,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    Statistics,
    verify,
)
from optimum_moe.algorithms.expert_skipping import Skipping, experts_per_token, is_normalized, median_ratios, skip
from optimum_moe.calibration import batches_for, observe
from optimum_moe.checkpoint.streamed import align
from optimum_moe.surgeons import find_blocks
from tests.test_streaming import assert_same
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def data(target: Target | str, batches: int = 2) -> CalibrationConfig:
    return CalibrationConfig([inputs_for(target, seed=seed) for seed in range(batches)])


def reason_against(target: Target) -> str:
    """Why nothing can be skipped; empty if it can."""
    blocks = find_blocks(build(target))
    return "top-1" if any(b.info.top_k == 1 for b in blocks) else next((b.info.no_skipping for b in blocks), "")


def test_the_rule_on_four_tokens() -> None:
    weights_TK = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.39, 0.21], [0.2, 0.7, 0.1], [0.5, 0.25, 0.25]])
    # Of the largest weight: 0.6, 0.4; 0.975, 0.525; 0.286, 0.143; 0.5, 0.5.
    left_TK = skip(weights_TK, Skipping((0.6, 0.45), renormalize=False))
    expected = torch.tensor([[0.5, 0.3, 0.0], [0.4, 0.39, 0.21], [0.0, 0.7, 0.0], [0.5, 0.0, 0.25]])
    assert torch.equal(left_TK, expected)
    normalized_TK = skip(weights_TK, Skipping((0.6, 0.45), renormalize=True))
    assert torch.allclose(normalized_TK, expected / expected.sum(-1, keepdim=True), rtol=0, atol=1e-7)
    assert torch.equal(normalized_TK[1], weights_TK[1])
    assert experts_per_token(weights_TK, Skipping((0.6, 0.45), renormalize=False)) == (2 + 3 + 1 + 2) / 4
    # An even number of tokens averages the two in the middle.
    assert median_ratios(weights_TK) == pytest.approx(((0.5 + 0.6) / 2, (0.4 + 0.5) / 2))
    assert median_ratios(weights_TK[:3]) == pytest.approx((0.6, 0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [False, True])
def test_weights_of_tokens_that_skip_nothing_keep_their_bits(dtype: torch.dtype, renormalize: bool) -> None:
    weights_TK = torch.rand(500, 8).softmax(-1).to(dtype)
    assert torch.equal(skip(weights_TK, Skipping((0.0,) * 7, renormalize)), weights_TK)
    left_TK = skip(weights_TK, Skipping((0.5,) * 7, renormalize))
    whole = (left_TK != 0).all(-1)
    assert 0 < int(whole.sum()) < 500
    assert torch.equal(left_TK[whole], weights_TK[whole])


def test_skipping_is_that_of_the_public_implementation() -> None:
    """Its ratio, and with it the outputs of a block of four experts, each token with two."""
    given = load_file(Path(__file__).parent / "data" / "parity_criteria.safetensors")
    given = {key.removeprefix("expert_sparsity/"): t for key, t in given.items() if key.startswith("expert_sparsity/")}
    input_TH = given["in/x"].flatten(0, 1)
    weights_TK, index_TK = (input_TH @ given["in/router"].T).softmax(-1).topk(2)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    ratios = median_ratios(weights_TK)
    assert ratios == pytest.approx(given["out/beta_median"].tolist(), rel=1e-6)

    def output(left_TK: torch.Tensor) -> torch.Tensor:
        gate_TKI, up_TKI = torch.einsum("th,tkih->tki", input_TH, given["in/gate_up"][index_TK]).chunk(2, dim=-1)
        hidden_TKI = torch.nn.functional.silu(gate_TKI) * up_TKI
        return torch.einsum("tk,tki,tkhi->th", left_TK, hidden_TKI, given["in/down"][index_TK])

    torch.testing.assert_close(output(weights_TK), given["out/moe"].flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert is_normalized(weights_TK)
    left_TK = skip(weights_TK, Skipping(ratios, renormalize=True))
    assert int((left_TK == 0).sum()) == len(left_TK) // 2
    torch.testing.assert_close(output(left_TK), given["out/dynamic_skip"].flatten(0, 1), rtol=1e-5, atol=1e-5)


class MadeFromNumbers(TorchDispatchMode):
    """Counts tensors that are made from Python numbers, which on a GPU are copied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_no_tensor_is_copied_to_the_device_when_tokens_skip() -> None:
    weights_TK = torch.rand(5, 4).softmax(-1)
    with MadeFromNumbers() as made:
        torch.tensor([0.5])
        assert made.count == 1
        skip(weights_TK, Skipping((0.5, 0.4, 0.3), renormalize=True))
    assert made.count == 1


def test_a_router_that_normalizes_is_known_by_its_sums() -> None:
    weights_SK = torch.rand(500, 4).softmax(-1)
    assert is_normalized(weights_SK)
    assert is_normalized(2.5 * weights_SK.bfloat16())
    assert not is_normalized(torch.randn(500, 16).softmax(-1).topk(4).values)


@pytest.mark.parametrize("target", every_target())
def test_beta_0_changes_no_bit(target: Target) -> None:
    if reason := reason_against(target):
        with pytest.raises(ValueError, match="top-1" if reason == "top-1" else "cannot be skipped"):
            MoECompressor.from_pretrained(build(target), ExpertSkipping(beta=0), data(target), progress=False)
        return
    model = build(target)
    expected = logits_of(model, inputs_for(target))
    compressor = MoECompressor.from_pretrained(model, ExpertSkipping(beta=0), data(target), progress=False)
    assert torch.equal(logits_of(compressor.apply(), inputs_for(target)), expected)
    assert compressor.plan.is_plain


@pytest.mark.parametrize("target", every_target())
def test_a_beta_below_all_ratios_changes_rounding_only(target: Target) -> None:
    if reason := reason_against(target):
        pytest.skip(reason)
    model = build(target)
    expected = logits_of(model, inputs_for(target))
    compressor = MoECompressor.from_pretrained(model, ExpertSkipping(beta=1e-12), data(target), progress=False)
    actual = logits_of(compressor.apply(), inputs_for(target))
    assert not compressor.plan.is_plain
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("target", every_target())
def test_tokens_run_as_many_experts_as_the_medians_say(target: Target) -> None:
    if reason := reason_against(target):
        pytest.skip(reason)
    model, blocks = build(target), find_blocks(build(target))
    compressor = MoECompressor.from_pretrained(model, ExpertSkipping(), data(target), progress=False)
    statistics = compressor.calibrate()
    compressor.apply()
    # The first block sees what it saw before; later ones see what skipping changed.
    name, plan = next((n, p) for n, p in compressor.plan.blocks.items() if n == blocks[0].info.name)
    before = statistics.blocks[name].reservoir.weights_SK
    assert plan.skipping is not None
    assert plan.skipping.renormalize == is_normalized(before)
    after = observed_again(compressor, target).blocks[name]
    run = float(after.token_count_E.sum()) / after.num_tokens
    routed = (statistics.blocks[name].reservoir.index_SK < blocks[0].info.num_experts) & (
        skip(before, plan.skipping) != 0
    )
    assert run == pytest.approx(float(routed.sum()) / len(routed))
    assert run < float(statistics.blocks[name].token_count_E.sum()) / after.num_tokens
    assert "a token runs" in compressor.plan.remarks[0]


def observed_again(compressor: MoECompressor, target: Target) -> Statistics:
    assert compressor.model is not None
    config = data(target)
    return observe(compressor.model, compressor.source.blocks, batches_for(compressor.model, config, None), config)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "deepseek_v3-groups", "longcat_flash"])
def test_streaming_equals_memory_and_loads(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "original")
    written, results = {}, {}
    for engine in ("memory", "streaming"):
        compressor = MoECompressor.from_pretrained(
            tmp_path / "original",
            ExpertSkipping(),
            data(name),
            engine=engine,
            output_dir=tmp_path / engine / "out",
            progress=False,
        )
        written[engine] = compressor.apply()
        results[engine] = compressor
    assert_same(written["memory"], written["streaming"])
    report = verify(written["memory"], tmp_path / "original")
    assert report.passed, str(report)
    # Kernels round differently at the addresses of a mapped file.
    loaded = align(AutoModelForCausalLM.from_pretrained(written["memory"]).eval())
    inputs = inputs_for(name)
    assert torch.equal(logits_of(loaded, inputs), logits_of(results["memory"].model, inputs))
    assert not torch.equal(logits_of(loaded, inputs), logits_of(build(name), inputs))
    plans = CompressionPlan.from_pretrained(written["memory"]).blocks
    assert {name: plan.skipping for name, plan in plans.items()} == {
        name: plan.skipping for name, plan in results["memory"].plan.blocks.items()
    }
    # Saving the loaded model again keeps it.
    loaded.save_pretrained(tmp_path / "again")
    again = align(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval())
    assert torch.equal(logits_of(again, inputs), logits_of(loaded, inputs))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_skips(implementation: str) -> None:
    results = {}
    for name in ("eager", implementation):
        model = build("qwen3_moe")
        MoECompressor.from_pretrained(model, ExpertSkipping(beta=0.7), data("qwen3_moe"), progress=False).apply()
        model.set_experts_implementation(name)
        results[name] = logits_of(model, inputs_for("qwen3_moe"))
    assert (results[implementation] - results["eager"]).abs().max() <= 2e-5 * results["eager"].abs().max()


def test_factors_may_follow(tmp_path: Path) -> None:
    stages = [ExpertSkipping(), LowRankSparse(rank=8, density=0.25)]
    compressor = MoECompressor.from_pretrained(build("qwen3_moe"), stages, data("qwen3_moe"), progress=False)
    model = compressor.apply()
    assert all(plan.skipping is not None and plan.sizes is not None for plan in compressor.plan.blocks.values())
    compressor.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits_of(loaded, inputs_for("qwen3_moe")), logits_of(model, inputs_for("qwen3_moe")))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([MSMoE(num_experts=4), ExpertSkipping()], "expert-skipping cannot follow m-smoe"),
        ([ExpertSkipping(), MSMoE(num_experts=4)], "m-smoe cannot follow expert-skipping"),
        ([ExpertSkipping(), ExpertSkipping()], "expert-skipping cannot follow expert-skipping"),
    ],
)
def test_orders_that_mean_nothing_are_refused(stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoECompressor.from_pretrained(build("qwen3_moe"), stages, data("qwen3_moe"))


@pytest.mark.parametrize("beta", [-0.1, 1.5, True, "half"])
def test_a_wrong_beta_is_refused(beta: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a number in \[0, 1\]"):
        ExpertSkipping(beta=beta)
