"""Plan, report and card say what merging did to the stable rank of the experts' matrices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optimum_moe import CompressionPlan, LowRankSparse, MSMoE
from optimum_moe.surgeons import find_blocks
from tests.expert_order import edited, make_copies
from tests.factor_methods import compressor_for
from tests.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

LABELS = [0, 1, 2, 0, 3, 2, 1, 3]


def by_hand(model) -> float:
    """Mean over all matrices of all experts of |W|_F^2 / |W|_2^2."""
    ranks = []
    for found in find_blocks(model):
        view = found.surgeon.experts(found.module(model))
        for values in (view.gate, view.up, view.down):
            for matrix in values:
                squared_D = torch.linalg.svdvals(matrix.detach().double()).square()
                ranks.append(float(squared_D.sum() / squared_D[0]))
    return sum(ranks) / len(ranks)


@torch.no_grad()
def noisy_copies():
    """Experts of rank 2 in permuted copies, each with noise of its own."""
    model = build("qwen3_moe")
    for found in find_blocks(model):
        view = found.surgeon.experts(found.module(model))
        for values in (view.gate, view.up, view.down):
            for matrix in values:
                left_OR, right_RX = torch.randn(len(matrix), 2), torch.randn(2, matrix.shape[1])
                matrix.copy_(0.08 * left_OR @ right_RX)
    make_copies(model, LABELS)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def statistics_of(compressor):
    """In which the copies are alike."""
    same_EE = (torch.tensor(LABELS)[:, None] == torch.tensor(LABELS)).double()
    counts_E = torch.tensor([9.0, 8.0, 7.0, 1.0, 6.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    return edited(compressor.calibrate(), router_gram_EE=same_EE, token_count_E=counts_E)


def test_merging_noisy_copies_lowers_the_stable_rank_as_computed_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = by_hand(noisy_copies())
    torch.manual_seed(0)
    merge = MSMoE(num_experts=4)
    merging = compressor_for(noisy_copies(), merge, "qwen3_moe")
    after = by_hand(merging.apply(statistics_of(merging)))
    assert after < 0.95 * before
    torch.manual_seed(0)
    compressor = compressor_for(noisy_copies(), [merge, LowRankSparse(rank=8)], "qwen3_moe")
    compressor.apply(statistics_of(compressor))
    compressor.save_pretrained(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text(encoding="utf-8"))
    assert report["stable_rank"] == {"before": pytest.approx(before, rel=1e-3), "after": pytest.approx(after, rel=1e-3)}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    shown = f"{report['stable_rank']['before']:.2f} before merging, {report['stable_rank']['after']:.2f} after."
    assert f"Mean stable rank of the experts' matrices: {shown}" in card
    assert "experts were merged and stored in smaller formats." in card
    plan = CompressionPlan.from_pretrained(tmp_path / "out")
    assert [b.stable_rank for b in plan.blocks.values()] == [b.stable_rank for b in compressor.plan.blocks.values()]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (MSMoE(num_experts=4), "experts were merged."),
        (LowRankSparse(rank=8), "experts were stored in smaller formats."),
    ],
)
def test_without_both_steps_nothing_is_said(method, sentence: str, tmp_path: Path) -> None:
    compressor = compressor_for(build("qwen3_moe"), method, "qwen3_moe")
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    assert "stable_rank" not in json.loads((tmp_path / "out" / "compression_report.json").read_text(encoding="utf-8"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "stable rank" not in card
    assert sentence in card
