"""What the generic surgeon leaves behind, beyond what the exact properties show."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MergedExpertLayer, MoECompressor, MSMoE, register_surgeon
from optimum_moe.surgeons import ARCHITECTURES, find_blocks, get_surgeon
from tests.tiny_models import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def merged(name: str, **settings) -> torch.nn.Module:
    data = CalibrationConfig([inputs_for(name, rows=4, length=32)])
    return MoECompressor.from_pretrained(build(name), MSMoE(num_experts=4, **settings), data, progress=False).apply()


def test_no_hub_kernel_can_bypass_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of GptOssMLP would compute the whole block by itself; `kernels`, if installed, marks the class so."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    monkeypatch.setattr(GptOssMLP, "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    model = merged("gpt_oss")
    for layer in model.model.layers:
        for module in (layer.mlp, layer.mlp.router, layer.mlp.experts):
            assert type(module).kernel_layer_name is None
    assert torch.equal(model(**inputs_for("gpt_oss")).logits, copy.deepcopy(model)(**inputs_for("gpt_oss")).logits)


def test_merged_experts_are_what_they_are_called() -> None:
    model = merged("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, MergedExpertLayer)
    assert experts.num_experts == len(experts.down_proj) == 4
    assert model.model.layers[0].mlp.gate.weight.shape[0] == model.config.num_experts == 8


def test_reducing_leaves_stock_classes_and_a_true_config() -> None:
    model = merged("deepseek_v3", routing="reduce")
    block = model.model.layers[1].mlp
    assert type(block.experts).__name__ == "DeepseekV3Experts"
    assert type(block.gate).__name__ == "DeepseekV3TopkRouter"
    assert block.gate.num_experts == block.experts.num_experts == model.config.n_routed_experts == 4
    assert len(block.gate.e_score_correction_bias) == 4


def test_a_token_must_find_enough_experts_in_its_router_groups() -> None:
    """Two groups of four, of which a token uses one; two experts a group are too few for top-3."""
    model = build("deepseek_v3-groups", num_experts_per_tok=3)
    with pytest.raises(ValueError, match=r"num_experts=4 leaves a token 2 experts .*=3 from: it may use 1 of the 2"):
        MoECompressor.from_pretrained(model, ExpertPruning(num_experts=4), None)
    MoECompressor.from_pretrained(model, ExpertPruning(num_experts=6), None)


def test_registering_is_checked() -> None:
    with pytest.raises(ValueError, match="A surgeon named 'mixtral' is already registered"):
        register_surgeon(ARCHITECTURES[0])
    with pytest.raises(ValueError, match="takes an Architecture row or a Surgeon instance, got str"):
        register_surgeon("mixtral")
    with pytest.raises(ValueError, match=r"No surgeon named 'mixtrall'; did you mean 'mixtral'\?"):
        get_surgeon("mixtrall")


def test_block_sizes_are_read_on_the_meta_device() -> None:
    model = build("deepseek_v3-groups")
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    real, empty = ([dataclasses.asdict(found.info) for found in find_blocks(m)] for m in (model, skeleton))
    assert real == empty
    assert [block["router_groups"] for block in real] == [2, 2]
    assert [block["router_groups_used"] for block in real] == [1, 1]
    assert real[0]["expert_parameters"] == 3 * 24 * 64
    assert real[0]["router_parameters"] == 64 + 1
