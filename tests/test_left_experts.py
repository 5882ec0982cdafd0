"""What pruning leaves of an expert: a constant, or a low-rank affine map of its input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE, export, verify
from optimum_moe.algorithms.affine import AffineFit
from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.formats import build_expert, candidates
from optimum_moe.formats.specification import ExpertsSpec
from optimum_moe.surgeons import find_blocks
from optimum_moe.vllm_plugin.blocks import CompressedBlock
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

LEFT = [{"leaves": "constant"}, {"leaves": "low_rank", "rank": 4}]


def compressor_for(model, data, **settings) -> MoECompressor:
    stage = ExpertPruning(**{"num_experts": 4, "saliency": "frequency", **settings})
    # Equal tokens reach one of several pools of experts only.
    return MoECompressor.from_pretrained(model, stage, CalibrationConfig(data, unseen="keep"), progress=False)


def refused(target: Target) -> str:
    """Why nothing can be left of the experts of a target."""
    infos = [found.info for found in find_blocks(build(target))]
    if target.name.startswith("jetmoe"):
        return "attention experts"
    return next((info.no_factors for info in infos if info.no_factors), "")


def equal_tokens(target: Target) -> dict[str, torch.Tensor]:
    """Three rows of one token, the same in all: every expert gives the same for all of its tokens."""
    inputs = inputs_for(target, rows=1, length=1)
    return {name: value.expand(3, *value.shape[1:]).contiguous() for name, value in inputs.items()}


@pytest.mark.parametrize("settings", LEFT, ids=["constant", "low_rank"])
@pytest.mark.parametrize("target", every_target())
def test_what_is_left_of_a_constant_expert_changes_nothing(target: Target, settings) -> None:
    if reason := refused(target):
        pytest.skip(reason)
    model, inputs = build(target), equal_tokens(target)
    expected = logits_of(model, inputs)
    compressor = compressor_for(model, [inputs], num_experts=1, **settings)
    actual = logits_of(compressor.apply(), inputs)
    form = "constant" if settings["leaves"] == "constant" else "affine"
    left = [plan.sizes.instead.get(form, ()) for plan in compressor.plan.blocks.values() if plan.sizes is not None]
    # The one that stays has no tokens, so that of all that the tokens select something is left.
    assert sum(size is not None for sizes in left for size in sizes) >= compressor.source.info.blocks[0].top_k
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def saved_numbers(compressor: MoECompressor) -> int:
    """What the removed experts of a model stored, less what is left of them, as if each had tokens."""
    saved = 0
    for found in compressor.source.blocks:
        sizes, info = compressor.plan.blocks[found.info.name].sizes, found.info
        left = {sizes.numbers(e, info.hidden_size) for e, width in enumerate(sizes.widths) if not width} - {0}
        saved += sizes.widths.count(0) * (info.expert_parameters - left.pop())
        assert not left
    return saved


@pytest.mark.parametrize("settings", LEFT, ids=["constant", "low_rank"])
@pytest.mark.parametrize("target", every_target())
def test_what_is_left_is_saved_loaded_and_verified(target: Target, settings, tmp_path: Path) -> None:
    if reason := refused(target):
        pytest.skip(reason)
    model = build(target)
    model.save_pretrained(tmp_path / "original")
    data = [inputs_for(target, rows=4, length=32, seed=seed) for seed in range(2)]
    compressor = compressor_for(tmp_path / "original", data, **settings)
    shown = compressor.preview()
    assert not shown.plain
    model = compressor.apply()
    assert shown.before.parameters - shown.after.parameters == saved_numbers(compressor)
    for found in compressor.source.blocks:
        plan, whole = compressor.plan.blocks[found.info.name], found.info.intermediate_size
        assert plan.num_groups == 8
        assert sorted(plan.sizes.widths) == [0] * 4 + [whole] * 4
    compressor.save_pretrained(tmp_path / "out")
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded, inputs_for(target)), logits_of(model, inputs_for(target)))
    report = verify(tmp_path / "out", against=tmp_path / "original", inputs=inputs_for(target))
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_what_is_left_stands_in_the_place_of_the_expert(name: str) -> None:
    """The block's output is that of whole experts plus g times the mean output, or the fitted map, of the others."""
    data = [inputs_for(name, rows=4, length=32, seed=seed) for seed in range(2)]
    compressor = compressor_for(build(name), data, leaves="constant", saliency="reap")
    compressor.apply()
    original = build(name)
    found = find_blocks(original)[0]
    plan, experts = compressor.plan.blocks[found.info.name], found.surgeon.experts(found.module(original))
    held = found.surgeon.factors(found.module(compressor.model))
    sample = compressor.statistics.blocks[found.info.name].reservoir
    for expert, width in enumerate(plan.sizes.widths):
        tokens_SH = sample.experts_input_SH[(sample.index_SK == expert).any(-1)]
        gate_SI, up_SI = tokens_SH @ experts.gate[expert].T, tokens_SH @ experts.up[expert].T
        output_SH = torch.nn.functional.silu(gate_SI) * up_SI @ experts.down[expert].T
        if width:
            assert torch.equal(held.densified(expert)["down"], experts.down[expert])
        else:
            (instead,) = held.without_neurons
            expected_1H = output_SH.mean(0, keepdim=True).detach()
            torch.testing.assert_close(instead(expert, tokens_SH), expected_1H, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", LEFT, ids=["constant", "low_rank"])
def test_streaming_leaves_the_same(settings, tmp_path: Path) -> None:
    build("deepseek_v3").save_pretrained(tmp_path / "original")
    data = [inputs_for("deepseek_v3", rows=4, length=32, seed=seed) for seed in range(2)]
    digests = []
    for engine in ("memory", "streaming"):
        stage = ExpertPruning(keep_ratio=0.5, saliency="reap", allocation="global", **settings)
        compressor = MoECompressor.from_pretrained(
            tmp_path / "original",
            stage,
            CalibrationConfig(data),
            engine=engine,
            output_dir=tmp_path / engine,
            progress=False,
        )
        compressor.apply()
        digests.append([plan.digest for plan in compressor.plan.blocks.values()])
    assert digests[0] == digests[1]


def test_the_map_is_the_best_of_its_rank() -> None:
    """No map of the rank has a smaller ridge objective, and of a map of that rank itself hardly anything is lost."""
    input_PH, output_PH, weight_P = torch.randn(40, 8).double(), torch.randn(40, 8).double(), torch.rand(40).double()
    fit = AffineFit(input_PH, output_PH, 3, weight_P)
    parts = [part.clone().requires_grad_() for part in fit.at(3, torch.float64)]
    share_P = weight_P / weight_P.sum()

    def objective(offset_H, left_RH, right_RH) -> torch.Tensor:
        error_PH = input_PH @ right_RH.T @ left_RH + offset_H - output_PH
        return share_P @ error_PH.square().sum(1) + fit.ridge * (right_RH.T @ left_RH).square().sum()

    best = objective(*parts)
    for gradient in torch.autograd.grad(best, parts):
        assert gradient.abs().max() < 1e-12
    for _ in range(50):
        assert objective(*(part + 1e-3 * torch.randn_like(part) for part in parts)) > best
        assert objective(*(torch.randn_like(part) for part in parts)) > best

    input_PH = torch.randn(200, 20)
    output_PH = input_PH @ torch.randn(20, 3) @ torch.randn(3, 20) + torch.randn(20)
    offset_H, left_RH, right_RH = AffineFit(input_PH, output_PH, 3).at(3)
    error_PH = input_PH @ right_RH.T @ left_RH + offset_H - output_PH
    assert error_PH.norm() < 5e-3 * output_PH.norm()


@pytest.mark.parametrize("tokens", [5, 12, 40])
def test_the_ridge_is_the_one_with_the_least_error_by_generalized_cross_validation(tokens: int) -> None:
    """With hat matrices written out, for fewer and for more tokens than channels."""
    input_PH, output_PH = torch.randn(tokens, 12).double(), torch.randn(tokens, 12).double()
    rows_PH, target_PH = input_PH - input_PH.mean(0), output_PH - output_PH.mean(0)
    gram_HH = rows_PH.T @ rows_PH / tokens
    scale = float(gram_HH.trace()) / min(tokens, 12)
    errors = {}
    for power in range(-3, 4):
        ridge = 10.0**power * scale
        hat_PP = rows_PH @ torch.linalg.inv(gram_HH + ridge * torch.eye(12)) @ rows_PH.T / tokens
        left = (target_PH - hat_PP @ target_PH).square().sum()
        errors[ridge] = float(left / (tokens - 1 - hat_PP.trace()) ** 2)
    best = min(errors, key=lambda ridge: errors[ridge])
    assert AffineFit(input_PH, output_PH, 1).ridge == pytest.approx(best)


def test_one_token_and_equal_tokens_give_their_mean() -> None:
    input_PH, output_PH = torch.randn(1, 6).expand(5, 6), torch.randn(1, 6).expand(5, 6)
    for tokens in (1, 5):
        offset_H, left_RH, right_RH = AffineFit(input_PH[:tokens], output_PH[:tokens], 4).at(4)
        assert left_RH.shape == right_RH.shape == (4, 6)
        torch.testing.assert_close(input_PH @ right_RH.T @ left_RH + offset_H, output_PH)


def test_the_budget_format_is_the_fitted_map() -> None:
    up_IH, gate_IH, down_HI = torch.randn(16, 8), torch.randn(16, 8), torch.randn(8, 16)

    def activate(gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        assert gate is not None
        return torch.nn.functional.silu(gate) * up

    expert = Expert(up_IH, down_HI, activate, gate_IH)
    tokens = ExpertTokens(torch.randn(64, 8), torch.rand(64), torch.randn(2, 64, 8))
    stored = build_expert(expert, tokens, Candidate("affine", 0, 2))
    output_PH = expert.activated(expert.preactivations(tokens.input_PH)) @ expert.down_HI.T
    weight_P = tokens.weight_P.square() * tokens.gradient_JPH.square().sum((0, 2))
    offset_H, left_RH, right_RH = AffineFit(tokens.input_PH, output_PH, 2, weight_P).at(2)
    expected_PH = tokens.input_PH @ right_RH.T @ left_RH + offset_H
    torch.testing.assert_close(stored.run(expert, tokens.input_PH), expected_PH, rtol=1e-4, atol=1e-5)
    points = {p.candidate: p for p in candidates(expert, tokens, formats=["affine"], itemsize=2)}
    assert points[Candidate("affine", 0, 2)].bytes - points[Candidate("empty", 0)].bytes == 2 * (8 + 2 * 2 * 8)


def test_constants_can_be_exported_for_vllm_and_maps_are_refused_by_name(tmp_path: Path) -> None:
    data = [inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(2)]
    for settings in LEFT:
        compressor = compressor_for(build("qwen3_moe"), data, **settings)
        model = compressor.apply()
        folder = compressor.save_pretrained(tmp_path / settings["leaves"])
        if settings["leaves"] == "constant":
            out = export(folder, "vllm", tmp_path / "exported")
            loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
            assert torch.equal(logits_of(loaded, inputs_for("qwen3_moe")), logits_of(model, inputs_for("qwen3_moe")))
        else:
            with pytest.raises(ValueError, match="in the format 'affine', which the vLLM plugin does not run"):
                export(folder, "vllm", tmp_path / "refused")


def test_the_plugin_for_vllm_refuses_the_map_by_name() -> None:
    spec = ExpertsSpec((0, 16), ("gate", "up", "down"), instead={"affine": (4, None)})
    with pytest.raises(ValueError, match="in the format 'affine', which the vLLM plugin does not run"):
        CompressedBlock("layers.0.mlp", 2, 2, spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"leaves": "konstant"}, r"leaves='konstant' is unknown; did you mean 'constant'"),
        ({"leaves": "low_rank"}, r'leaves="low_rank" needs the rank'),
        ({"leaves": "constant", "rank": 4}, r"rank=4 has no meaning with leaves='constant'"),
        ({"rank": 4}, r"rank=4 has no meaning with leaves='nothing'"),
        ({"leaves": "low_rank", "rank": 0}, r"rank=0"),
        ({"leaves": "constant", "num_experts": None, "target_size": "50%"}, r"target_size='50%' cannot be met with"),
        ({"leaves": "constant", "saliency": "reconstruction"}, r"tokens are routed again, and with leaves='constant'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPruning(**{"num_experts": 4, **settings})


def test_what_a_model_cannot_store_is_refused_before_weights_are_read() -> None:
    data = [inputs_for("qwen3_moe")]
    with pytest.raises(ValueError, match="rank=32 is too large: it must be less than half of the 64 channels"):
        compressor_for(build("qwen3_moe"), data, leaves="low_rank", rank=32)
    stages = [MSMoE(num_experts=4), ExpertPruning(num_experts=2, leaves="constant")]
    with pytest.raises(ValueError, match="expert-pruning cannot follow m-smoe"):
        MoECompressor.from_pretrained(build("qwen3_moe"), stages, CalibrationConfig(data), progress=False)
    with pytest.raises(ValueError, match=r'meet what all experts share.*leaves="nothing"'):
        compressor_for(build("jetmoe"), [inputs_for("jetmoe")], leaves="constant").apply()


@pytest.mark.parametrize("tokens", [3, 5, 12, 64, 200])
def test_the_rounding_of_inputs_does_not_choose_the_ridge(tokens: int) -> None:
    """With few tokens the criterion of cross-validation hardly falls with the ridge, down to the rounding of sums."""
    generator = torch.Generator().manual_seed(tokens)
    input_PH = torch.randn(tokens, 64, generator=generator)
    output_PH = torch.tanh(input_PH @ torch.randn(64, 64, generator=generator) / 8)
    fits = []
    for turn in range(8):
        noise_PH = torch.randn(tokens, 64, generator=generator) * 1e-7 * (turn > 0)
        fits.append(AffineFit(input_PH + noise_PH, output_PH, rank=4))
    assert len({round(fit.ridge / fits[0].ridge, 4) for fit in fits}) == 1
