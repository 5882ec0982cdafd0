"""What an architecture cannot express is refused before anything of the block is changed."""

from __future__ import annotations

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.plan import BlockPlan
from optimum_moe.surgeons import find_blocks
from tests.architectures_table import REFUSED_TARGETS
from tests.tiny_models import build, inputs_for, logits_of

HASHED = ["model.layers.0.*", "model.layers.1.*"]


def prune(protect: list[str] | None) -> MoECompressor:
    data = CalibrationConfig([inputs_for("deepseek_v4-hash", rows=4, length=32)])
    method = ExpertPruning(num_experts=4, saliency="reap", protect=protect)
    return MoECompressor.from_pretrained(build("deepseek_v4-hash"), method, data, progress=False)


def test_experts_of_a_table_of_token_ids_cannot_be_pruned() -> None:
    with pytest.raises(ValueError, match=r"mlp of deepseek_v4 .* table of token ids.*protect="):
        prune(None).apply()
    compressor = prune(HASHED)
    assert logits_of(compressor.apply(), inputs_for("deepseek_v4-hash")).isfinite().all()
    assert [plan.num_groups for plan in compressor.plan.blocks.values()] == [8, 8, 4]


def test_a_table_of_token_ids_follows_a_merge() -> None:
    model = build("deepseek_v4-hash")
    table = model.model.layers[0].mlp.gate.tid2eid.clone()
    data = CalibrationConfig([inputs_for("deepseek_v4-hash", rows=4, length=32)])
    compressor = MoECompressor.from_pretrained(model, MSMoE(num_experts=4, routing="reduce"), data, progress=False)
    compressor.apply()
    labels_E = torch.tensor(compressor.plan.blocks["model.layers.0.mlp"].labels_E)
    assert torch.equal(model.model.layers[0].mlp.gate.tid2eid, labels_E[table])


def test_a_block_that_would_become_dense_is_refused() -> None:
    model = build("jamba", num_experts_per_tok=1)
    found = find_blocks(model)[0]
    one_E = torch.zeros(8, dtype=torch.float64).index_fill_(0, torch.tensor([3]), 1.0)
    labels = tuple(0 if expert == 3 else -1 for expert in range(8))
    plan = BlockPlan(found.info.name, labels, (3,), "reduce", one_E, router_weights_E=one_E)
    with pytest.raises(ValueError, match="Keep at least 2"):
        found.surgeon.cut(found.module(model), plan)
    assert find_blocks(model)[0].info == found.info


@pytest.mark.parametrize("method", [MSMoE(num_experts=4, routing="reduce"), ExpertPruning(num_experts=4)])
def test_what_data_sets_choose_from_cannot_shrink(method) -> None:
    with pytest.raises(ValueError, match=r"index of a data set selects the expert.*Merge its experts with routing="):
        MoECompressor.from_pretrained(build("vitpose_backbone"), method, None)


def test_a_plan_of_another_model_that_shrinks_it_is_refused_too() -> None:
    model = build("vitpose_backbone")
    found = find_blocks(model)[0]
    one_E = torch.zeros(8, dtype=torch.float64).index_fill_(0, torch.tensor([3]), 1.0)
    labels = tuple(0 if expert == 3 else -1 for expert in range(8))
    plan = BlockPlan(found.info.name, labels, (3,), "reduce", one_E, router_weights_E=one_E)
    with pytest.raises(ValueError, match=r'has no router.*Merge with routing="map"'):
        found.surgeon.cut(found.module(model), plan)
    assert find_blocks(model)[0].info == found.info


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nllb_moe", r"layers\.1\.ffn \(NllbMoeSparseMLP\).* runs only its first two experts.*Wait for a version"),
        ("doge", r"layers\.0\.mlp \(DogeCDMoE\).* mixes the tokens of a batch.*is_moe=False"),
        ("diffusion_gemma-decoder", r"DecoderTextLayer\).*shares its weights with the encoder layer.*encoder alone"),
    ],
)
def test_blocks_that_cannot_be_compressed_rightly_are_refused(name: str, message: str) -> None:
    model = build(REFUSED_TARGETS[name])
    with pytest.raises(ValueError, match=message):
        MoECompressor.from_pretrained(model, MSMoE(num_experts=4), None)
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        find_blocks(type(model)(model.config))


@torch.no_grad()
def test_upstream_still_runs_two_experts_of_nllb() -> None:
    """Once this fails, transformers runs all experts: write a surgeon and drop the refusal."""
    target = REFUSED_TARGETS["nllb_moe"]
    model, inputs = build(target), inputs_for(target)
    inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    expected = logits_of(model, inputs)

    def silence(experts: range) -> float:
        for module in model.modules():
            if type(module).__name__ == "NllbMoeSparseMLP":
                for expert in experts:
                    for parameter in module.experts[f"expert_{expert}"].parameters():
                        parameter.zero_()
        return float((logits_of(model, inputs) - expected).abs().max())

    assert silence(range(2, 8)) == 0
    assert silence(range(2)) > 1e-3


@torch.no_grad()
def test_upstream_still_mixes_the_tokens_of_doge() -> None:
    """Once this fails, a token is routed by itself: write a surgeon and drop the refusal."""
    target = REFUSED_TARGETS["doge"]
    inputs = inputs_for(target)
    others = inputs["input_ids"].clone()
    others[1] = others[1].flip(0)
    for is_moe, mixes in ((True, True), (False, False)):
        model = build(target, is_moe=is_moe)
        first, second = (logits_of(model, {"input_ids": ids})[0] for ids in (inputs["input_ids"], others))
        assert ((first - second).abs().max() > 1e-3) == mixes
