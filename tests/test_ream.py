"""REAM: the experts that REAP keeps take in the others, and the router keeps their rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe import CalibrationConfig, ExpertMerging, ExpertPruning, MoECompressor, verify
from optimum_moe.recipe import load_recipe
from optimum_moe.stages import BlockContext
from optimum_moe.stages.merge_choices import SIMILARITIES, WEIGHTINGS
from optimum_moe.surgeons import find_blocks
from tests.dropping import write_with_both_engines
from tests.expert_order import router_tensors
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

REAM: ExpertMerging = dataclasses.replace(load_recipe("ream").stages[0], num_experts=4, keep_ratio=None)
NAMES = ["qwen3_moe", "deepseek_v3-groups", "gpt_oss"]


def data_for(name: str) -> CalibrationConfig:
    return CalibrationConfig([inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("name", NAMES)
def test_router_and_untouched_experts_are_those_of_reap(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "original")
    compressors = {}
    for stage in (REAM, ExpertPruning(num_experts=4, saliency="reap")):
        compressor = MoECompressor.from_pretrained(tmp_path / "original", stage, data_for(name), progress=False)
        compressor.apply()
        compressors[stage.name] = compressor
    ream, reap = compressors["expert-merging"], compressors["expert-pruning"]
    merged = 0
    for found, other in zip(find_blocks(ream.model), find_blocks(reap.model), strict=True):
        plan = ream.plan.blocks[found.info.name]
        kept = [e for e, label in enumerate(reap.plan.blocks[found.info.name].labels_E) if label >= 0]
        assert plan.dominants_G == tuple(kept)
        blocks = found.module(ream.model), other.module(reap.model)
        for own, theirs in zip(router_tensors(found, blocks[0]), router_tensors(other, blocks[1]), strict=True):
            assert torch.equal(own, theirs)
        experts = [f.surgeon.experts(block) for f, block in zip((found, other), blocks, strict=True)]
        for group in range(4):
            alone = len(plan.members(group)) == 1
            merged += not alone
            assert torch.equal(experts[0].up[group], experts[1].up[group]) == alone
        # The first of each router group takes all that goes.
        sizes = torch.bincount(torch.tensor(plan.labels_E)).tolist()
        assert sorted(sizes) == ([1, 1, 1, 5] if found.info.router_groups == 1 else [1, 1, 3, 3])
    assert merged == sum(found.info.router_groups for found in find_blocks(ream.model))
    ream.save_pretrained(tmp_path / "out")
    loaded = getattr(transformers, type(ream.model).__name__).from_pretrained(tmp_path / "out")
    assert "quantization_config" not in loaded.config.to_dict()
    assert torch.equal(logits_of(loaded, inputs_for(name)), logits_of(ream.model, inputs_for(name)))
    report = verify(tmp_path / "out", against=tmp_path / "original")
    assert report.passed, str(report)


def test_streaming_writes_the_same(tmp_path: Path) -> None:
    write_with_both_engines("deepseek_v3-groups", REAM, tmp_path)


def context_of(model) -> BlockContext:
    statistics = MoECompressor.from_pretrained(model, REAM, data_for("qwen3_moe"), progress=False).calibrate()
    found = find_blocks(model)[0]
    block = found.module(model)
    return BlockContext(
        info=found.info,
        experts=found.surgeon.experts(block),
        router=found.surgeon.router(block),
        generator=torch.Generator(),
        statistics=statistics.blocks[found.info.name],
    )


def test_similarity_and_weights_are_the_formulas() -> None:
    """Written out in float64 on the sampled tokens, which are all tokens here."""
    context = context_of(build("qwen3_moe"))
    seen, experts = context.observed().reservoir, context.experts
    assert len(seen.index_SK) == context.observed().num_tokens
    input_SH = seen.experts_input_SH.double()
    logits_SE = seen.router_input_SH.double() @ context.router.rows_NX.double().T
    gated, saliency = [], []
    for e in range(8):
        gate_SI, up_SI = input_SH @ experts.gate[e].double().T, input_SH @ experts.up[e].double().T
        output_SH = torch.nn.functional.silu(gate_SI) * up_SI @ experts.down[e].double().T
        weight_S = (seen.weights_SK.double() * (seen.index_SK == e)).sum(-1)
        gated.append((weight_S[:, None] * output_SH).mean(0))
        saliency.append((weight_S * output_SH.norm(dim=-1)).sum() / (seen.index_SK == e).any(-1).sum())

    def cosines(vectors_ED: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(vectors_ED[:, None], vectors_ED[None], dim=-1)

    expected_EE = ((cosines(torch.stack(gated)) + 1) / 2 + (cosines(logits_SE.T) + 1) / 2) / 2
    similarity_EE = SIMILARITIES["router_logits_and_outputs"](context)
    torch.testing.assert_close(similarity_EE, expected_EE.detach(), rtol=1e-4, atol=1e-5)
    labels_E, dominants_G = torch.zeros(8, dtype=torch.int64), (0,)
    weights_E = WEIGHTINGS["reap"](context, labels_E=labels_E, dominants_G=dominants_G)
    torch.testing.assert_close(weights_E, torch.stack(saliency).detach(), rtol=1e-5, atol=0)


def test_an_expert_without_tokens_is_kept_where_the_user_says_so() -> None:
    model = build("qwen3_moe")
    statistics = MoECompressor.from_pretrained(model, REAM, data_for("qwen3_moe"), progress=False).calibrate()
    name = find_blocks(model)[0].info.name
    dominants = {}
    for unseen in ("keep", "warn"):
        block = statistics.blocks[name]
        none_E = torch.tensor([1.0] * 5 + [0.0] + [1.0] * 2, dtype=torch.float64)
        changed = dataclasses.replace(
            block, token_count_E=block.token_count_E * none_E, gated_norm_sum_E=block.gated_norm_sum_E * none_E
        )
        given = dataclasses.replace(statistics, blocks={**statistics.blocks, name: changed}, unseen=unseen)
        compressor = MoECompressor.from_pretrained(build("qwen3_moe"), REAM, progress=False)
        compressor.apply(statistics=given)
        dominants[unseen] = compressor.plan.blocks[name].dominants_G
    assert 5 in dominants["keep"]
    assert 5 not in dominants["warn"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"align_by": "weight"}, r"align_by='weight' is unknown; did you mean 'weights'"),
        ({"align_by": "both", "align": False}, r"align_by='both' has no meaning with align=False and merge='mean'"),
        (
            {"align_by": "activations", "merge": "neurons", "refit": "block"},
            r"align_by='activations' has no meaning with align=True and merge='neurons'",
        ),
    ],
)
def test_settings_of_the_alignment_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertMerging(num_experts=4, **settings)
