"""The pruning criterion in the unit of the loss, against sums written out here."""

from __future__ import annotations

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

NAME = "qwen3_moe"


def compressor_for(method: ExpertPruning) -> MoECompressor:
    data = CalibrationConfig([inputs_for(NAME, rows=4, length=32, seed=seed) for seed in range(2)])
    return MoECompressor.from_pretrained(build(NAME), method, data, progress=False)


def test_experts_stay_that_the_loss_is_expected_to_miss() -> None:
    method = ExpertPruning(num_experts=4, saliency="fisher")
    assert method.needs == {"sample", "gradients"}
    compressor = compressor_for(method)
    statistics = compressor.calibrate()
    model = build(NAME)
    compressor.apply(statistics=statistics)
    for found in find_blocks(model):
        sample = statistics.blocks[found.info.name].reservoir
        experts = found.surgeon.experts(found.module(model))
        damages = []
        for expert in range(8):
            token_P, slot_P = (sample.index_SK == expert).nonzero(as_tuple=True)
            input_PH = sample.experts_input_SH[token_P]
            hidden_PI = torch.nn.functional.silu(input_PH @ experts.gate[expert].T) * (input_PH @ experts.up[expert].T)
            output_PH = hidden_PI @ experts.down[expert].T
            weighted_PJH = sample.gradient_SJH[token_P] * sample.weights_SK[token_P, slot_P, None, None]
            # One matrix of directions for all tokens, each of which counts by the size of its gradients.
            rows_QH, size_P = weighted_PJH.flatten(0, 1), weighted_PJH.square().sum((1, 2)) / weighted_PJH.shape[1]
            directions_HH = rows_QH.T @ rows_QH / rows_QH.square().sum()
            damages.append(0.5 * float(((output_PH @ directions_HH * output_PH).sum(-1) * size_P).sum()))
        kept = compressor.plan.blocks[found.info.name].dominants_G
        assert set(kept) == set(torch.tensor(damages).topk(4).indices.tolist())


def test_an_expert_that_gives_nothing_goes_first() -> None:
    model = build(NAME)
    for found in find_blocks(model):
        with torch.no_grad():
            found.surgeon.experts(found.module(model)).down[3].zero_()
    data = CalibrationConfig([inputs_for(NAME, rows=4, length=32)])
    compressor = MoECompressor.from_pretrained(
        model, ExpertPruning(num_experts=7, saliency="fisher"), data, progress=False
    )
    compressor.apply()
    assert all(plan.labels_E[3] == -1 for plan in compressor.plan.blocks.values())
