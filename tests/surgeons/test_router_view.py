"""What a surgeon says of a router is what the router does, on every architecture."""

from __future__ import annotations

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.algorithms.router_fit import select
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import Target, build, every_target, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


@pytest.mark.parametrize("target", every_target())
def test_scores_choice_and_weights_follow_from_the_logits(target: Target) -> None:
    if target.name == "phimoe":
        pytest.skip("its sparse mixer masks the softmax anew for each of its two experts")
    if target.fixed_router:
        pytest.skip(target.fixed_router)
    model = build(target)
    data = CalibrationConfig([inputs_for(target, rows=4, length=32)])
    statistics = MoECompressor.from_pretrained(model, ExpertPruning(num_experts=8), data, progress=False).calibrate()
    seen = 0
    for found in find_blocks(model):
        router, sample = found.surgeon.router(found.module(model)), statistics.blocks[found.info.name].reservoir
        routed_S = (sample.index_SK < router.num_experts).all(-1)
        if not routed_S.any():
            continue
        index_SK, weights_SK = sample.index_SK[routed_S], sample.weights_SK[routed_S].float()
        logits_SN = router.logits(sample.router_input_SH[routed_S])
        scores_SN = router.scores(logits_SN)
        scale_E = {row.role: t for row, t in found.surgeon.router_tensors(found.module(model))}.get("scale")
        if scale_E is not None:
            weights_SK = weights_SK / scale_E[index_SK]
        ratio_SK = weights_SK / scores_SN.gather(1, index_SK)
        # Some divide by the sum of the selected scores, some multiply by a constant: one factor a token either way.
        assert torch.allclose(ratio_SK, ratio_SK[:, :1].expand_as(ratio_SK), rtol=1e-3)
        if not found.surgeon.router_tensors(found.module(model), holds_ids=True):
            choice_SE = logits_SN if router.selects_by == "logits" else scores_SN
            choice_SE = choice_SE[:, : router.num_experts]
            choice_SE = choice_SE if router.correction_E is None else choice_SE + router.correction_E
            info = found.info
            chosen_SK = select(choice_SE, info.top_k, info.router_groups, info.router_groups_used)
            same_S = (chosen_SK.sort().values == index_SK.sort().values).all(-1)
            # Routers without a correction may rank router groups by their best expert alone.
            least = 0.99 if info.router_groups == 1 or router.correction_E is not None else 0.6
            assert same_S.float().mean() >= least
        seen += len(ratio_SK)
    assert seen > 0
