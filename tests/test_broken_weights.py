"""NaN, infinity and zeros in weights, activations and gradients: named before anything is cut."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.stages.saliency import SALIENCIES
from tests.tiny_models import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")
AIMER = ExpertPruning(num_experts=4, saliency="aimer")
METHODS: dict[str, Any] = {
    **{name: ExpertPruning(num_experts=4, saliency=name) for name in sorted(SALIENCIES.functions)},
    "map": MSMoE(num_experts=4),
    "reduce": MSMoE(num_experts=4, routing="reduce"),
    "adaptive": MSMoE(num_experts=4, allocation="adaptive"),
    "rank": LowRankSparse(rank=8),
    "rank without data": LowRankSparse(rank=8, whiten=False),
    "budget": ByteBudget(runs_in="transformers", share=0.5),
    "merged and budget": [MSMoE(num_experts=4), ByteBudget(runs_in="transformers", share=0.5)],
}
MLP = "model.layers.1.mlp"
PLACES = [
    ("qwen3_moe", f"{MLP}.experts.down_proj", (3, 0, 0), f"block {MLP}, expert 3"),
    ("qwen3_moe", f"{MLP}.gate.weight", (5, 2), f"block {MLP}, expert 5"),
    ("qwen3_moe", "model.embed_tokens.weight", (7, 1), ""),
    ("qwen3_moe", "model.layers.0.input_layernorm.weight", (0,), ""),
    ("gpt_oss", f"{MLP}.experts.gate_up_proj_bias", (2, 1), f"block {MLP}, expert 2"),
    ("gpt_oss", f"{MLP}.router.bias", (6,), f"block {MLP}, expert 6"),
    ("deepseek_v3", f"{MLP}.gate.e_score_correction_bias", (4,), f"block {MLP}, expert 4"),
    ("deepseek_v3", f"{MLP}.shared_experts.up_proj.weight", (0, 0), f"block {MLP}"),
    ("dbrx", "transformer.blocks.1.ffn.experts.mlp.w1", (100, 3), "block transformer.blocks.1.ffn, expert "),
    ("switch_transformers", None, (0, 0), "expert 3"),
]
KINDS = {"NaN": float("nan"), "infinity": float("-inf")}


def compressor_of(model: Any, method: Any, name: str = "qwen3_moe", **settings: Any) -> MoECompressor:
    data = CalibrationConfig([inputs_for(name)])
    return MoECompressor.from_pretrained(model, method, data, progress=False, **settings)


def refused(compressor: MoECompressor, message: str) -> None:
    """It raises, and the model is as it was."""
    model = compressor.source.live
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        compressor.apply()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t.nan_to_num(), before[name].nan_to_num()) for name, t in after.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("target", "tensor", "at", "place"), PLACES)
def test_tensor_block_and_expert_are_named(
    target: str, tensor: str | None, at: tuple[int, ...], place: str, kind: str
) -> None:
    model = build(target)
    state = model.state_dict()
    tensor = tensor or next(name for name in state if "expert_3.wi" in name)
    state[tensor][at] = KINDS[kind]
    if target == "dbrx":
        place += str(at[0] * 8 // len(state[tensor]))
    where = re.escape(f"{tensor} ({place}" if place.startswith("block") else tensor) + (".*" + place) * (tensor is None)
    refused(compressor_of(model, MSMoE(num_experts=4), target), rf"weights are broken: {where}.* holds {kind}.*Nothing")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_a_broken_expert(method: str) -> None:
    model = build("qwen3_moe")
    model.state_dict()[f"{MLP}.experts.gate_up_proj"][6, 1, 1] = float("nan")
    place = rf"{MLP}.experts.gate_up_proj \(block {MLP}, expert 6\) holds NaN\. Nothing was cut"
    refused(compressor_of(model, METHODS[method]), place)


@pytest.mark.parametrize("method", ["aimer", "reap", "budget"])
@pytest.mark.parametrize("name", [f"{MLP}.experts.6.up_proj.weight", f"{MLP}.gate.weight", "lm_head.weight"])
def test_a_stream_refuses_before_a_shard_is_written(name: str, method: str, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[name][6, 0] = float("inf")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {"engine": "streaming", "output_dir": tmp_path / "out"}
    place = rf"\(block {MLP}, expert 6\)" if name.startswith(MLP) else "lm_head.weight"
    with pytest.raises(ValueError, match=rf"weights are broken: .*{place} holds infinity"):
        compressor_of(tmp_path / "model", METHODS[method], **settings).apply()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.rglob("*.safetensors")) == [tmp_path / "model" / "model.safetensors"]


def test_what_a_narrow_dtype_cannot_hold_is_blamed_on_it(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.state_dict()[f"{MLP}.experts.down_proj"][2] = 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'expert 2\) holds infinity.*wider dtype than float16 \(dtype="bfloat16"'):
        compressor_of(tmp_path, AIMER, dtype="float16").apply()


@pytest.mark.parametrize("tensors", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_a_criterion_without_data_ranks_a_dead_expert_last(tensors: tuple[str, ...]) -> None:
    model = build("qwen3_moe")
    for name in tensors:
        model.state_dict()[f"{MLP}.experts.{name}"][5] = 0
    compressor = compressor_of(model, ExpertPruning(num_experts=7, saliency="aimer"))
    with pytest.warns(UserWarning, match=rf"all zeros: {MLP}.experts.{tensors[0]} \(block {MLP}, expert 5\)"):
        compressor.apply()
    assert compressor.plan.blocks[MLP].dominants_G == (0, 1, 2, 3, 4, 6, 7)


@pytest.mark.parametrize(
    ("name", "is_dead"), [("experts.down_proj", True), ("gate.weight", False), ("self_attn.o_proj.weight", False)]
)
def test_only_an_expert_of_zeros_is_said_to_output_zero(name: str, is_dead: bool) -> None:
    model = build("qwen3_moe")
    place = f"{MLP}.{name}" if is_dead or name == "gate.weight" else f"{MLP.removesuffix('.mlp')}.{name}"
    model.state_dict()[place][:] = 0
    with pytest.warns(UserWarning, match="all zeros") as caught:
        compressor_of(model, ExpertPruning(num_experts=7, saliency="aimer")).apply()
    said = str(next(warning.message for warning in caught if "all zeros" in str(warning.message)))
    assert place in said
    assert ("An expert of zeros outputs zero, and is removed first." in said) is is_dead
    assert said.endswith("Check the checkpoint if this is not intended.")


@pytest.mark.parametrize("method", METHODS)
def test_dead_experts_and_router_rows_are_named_and_harm_nothing(method: str) -> None:
    model = build("qwen3_moe")
    state = model.state_dict()
    for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        state[f"{MLP}.{name}"][5] = 0
    compressor = compressor_of(model, METHODS[method])
    with pytest.warns(UserWarning, match="all zeros") as caught:
        compressor.apply()
    said = " ".join(str(warning.message) for warning in caught)
    for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        assert f"{MLP}.{name} (block {MLP}, expert 5)" in said
    assert all(tensor.isfinite().all() for tensor in compressor.model.state_dict().values())


def test_an_expert_that_gives_zeros_is_named() -> None:
    model = build("qwen3_moe")
    model.state_dict()[f"{MLP}.experts.down_proj"][4] = 0
    with pytest.warns(UserWarning, match=rf"All outputs are zero for 1 of 24 experts \({MLP}: 4\)\. Check their"):
        compressor_of(model, METHODS["reap"]).calibrate()


@pytest.mark.parametrize("engine", ["memory", "streaming"])
@pytest.mark.parametrize("method", ["reap", "map", "budget"])
def test_activations_that_overflow_are_blamed_on_block_and_expert(method: str, engine: str, tmp_path: Path) -> None:
    model = build("qwen3_moe")
    for name in ("gate_up_proj", "down_proj"):
        model.state_dict()[f"{MLP}.experts.{name}"][4] *= 1e25
    message = rf"Observation gave NaN or infinity in the (hidden neurons|outputs) of expert 4 of {MLP}"
    if engine == "memory":
        refused(compressor_of(model, METHODS[method]), message)
        return
    model.save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {"engine": engine, "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=message):
        compressor_of(tmp_path / "model", METHODS[method], **settings).apply()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (
            float("nan"),
            "NaN or infinity in the gradients of the loss of experts 0, 1.* of model.layers.0.mlp, and in 2",
        ),
        (0.0, "All gradients of the loss at model.layers.0.mlp are zero.*pass curvature=False"),
    ],
)
def test_gradients_that_say_nothing_are_blamed(factor: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    observing = importlib.import_module("optimum_moe.calibration.observe")
    real = observing.sampled_loss
    monkeypatch.setattr(observing, "sampled_loss", lambda *given: real(*given) * factor)
    refused(compressor_of(build("qwen3_moe"), ByteBudget(runs_in="transformers", share=0.5)), message)


def test_statistics_of_another_day_are_checked_too(tmp_path: Path) -> None:
    statistics = compressor_of(build("qwen3_moe"), METHODS["reap"]).calibrate()
    statistics.blocks[MLP].output_sq_sum_E[2] = float("nan")
    with pytest.raises(ValueError, match=rf"NaN or infinity in the outputs of expert 2 of {MLP}, so its statistics"):
        compressor_of(build("qwen3_moe"), METHODS["reap"]).apply(statistics)
