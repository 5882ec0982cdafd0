"""What an architecture cannot express is refused before anything of the block is changed."""

from __future__ import annotations

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.plan import BlockPlan
from optimum_moe.surgeons import find_blocks
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
