"""Blocks that no token of the calibration data reaches, and experts that none reaches any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE
from tests.composites_table import build_composite, composite_named, inputs_with_media
from tests.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")
METHODS: dict[str, Any] = {
    "prune": ExpertPruning(num_experts=4),
    "map": MSMoE(num_experts=4),
    "reduce": MSMoE(num_experts=4, routing="reduce"),
    "adaptive": MSMoE(num_experts=4, allocation="adaptive"),
    "rank": LowRankSparse(rank=8),
    "budget": ByteBudget(runs_in="transformers", share=0.5),
    "merged and budget": [MSMoE(num_experts=4), ByteBudget(runs_in="transformers", share=0.5)],
    "pruned without data and rank": [ExpertPruning(num_experts=4, saliency="aimer"), LowRankSparse(rank=8)],
}
MESSAGE = (
    r"No calibration token reached 3 of the blocks to compress \(talker\.model\.layers\.0\.mlp, .*Add data "
    r'that reaches them, leave them out with protect=\["talker\.model\.layers\.0\.mlp", \.\.\.\] or layers=, '
    r'or set unseen="keep"'
)


def omni(method: Any, unseen: str = "warn", **settings: Any) -> MoECompressor:
    """A compressor of an omni model, whose talker runs in generation only."""
    composite = composite_named("qwen3_omni_moe")
    model = settings.pop("model", None) or build_composite(composite)
    config = CalibrationConfig([inputs_with_media(composite)], unseen=unseen)
    return MoECompressor.from_pretrained(model, method, config, progress=False, **settings)


@pytest.mark.parametrize("propagate", [False, True], ids=["", "error propagation"])
@pytest.mark.parametrize("method", METHODS)
def test_an_unreached_tower_is_refused_before_anything_is_cut(method: str, propagate: bool) -> None:
    compressor = omni(METHODS[method], error_propagation=propagate)
    model = compressor.source.live
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=MESSAGE):
        compressor.apply()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("method", ["rank", "budget"])
def test_a_streamed_tower_is_refused_and_nothing_is_written(method: str, tmp_path: Path) -> None:
    build_composite(composite_named("qwen3_omni_moe")).save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {"engine": "streaming", "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=MESSAGE):
        omni(METHODS[method], model=tmp_path / "model", **settings).apply()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_an_unreached_tower_stays_as_it_is_where_that_is_wanted(method: str) -> None:
    compressor = omni(METHODS[method], unseen="keep")
    talker = {name: t.clone() for name, t in compressor.source.live.talker.state_dict().items()}
    after = compressor.apply().talker.state_dict()
    assert after.keys() == talker.keys()
    assert all(torch.equal(tensor, talker[name]) for name, tensor in after.items())
    plans = compressor.plan.blocks.items()
    kept = {name for name, plan in plans if plan.num_groups == 8 and plan.sizes is None}
    assert {name.partition(".")[0] for name in kept} >= {"talker"}
    assert len(kept) < len(compressor.plan.blocks)


def test_a_budget_is_a_share_of_what_is_reached() -> None:
    """Half of the thinker's experts: what the talker keeps does not count."""
    compressor = omni(ByteBudget(runs_in="transformers", share=0.5), unseen="keep")
    dense = sum(p.numel() for n, p in compressor.source.live.thinker.named_parameters() if ".experts." in n)
    left = sum(p.numel() for n, p in compressor.apply().thinker.named_parameters() if ".experts." in n)
    assert 0.4 * dense < left <= 0.5 * dense


def test_nothing_that_is_reached_is_refused_even_to_keep_it() -> None:
    talker = ["talker.model.layers.0.mlp", "talker.model.layers.1.mlp", "talker.model.layers.2.mlp"]
    compressor = omni(LowRankSparse(rank=8, protect=["thinker.*"]), unseen="keep")
    with pytest.raises(
        ValueError, match=rf"reached 3 of the blocks to compress \({', '.join(talker)}\).* or layers=\.$"
    ):
        compressor.apply()


def behind_cut_layers(method: Any, seed: int, propagate: bool) -> MoECompressor:
    """A compressor of a model of 32 experts, many of which see one token or none."""
    model = build("qwen3_moe", seed=seed, num_experts=32, vocab_size=300)
    ids = torch.randint(3, 299, (2, 24), generator=torch.Generator().manual_seed(seed))
    config = CalibrationConfig([{"input_ids": ids}])
    return MoECompressor.from_pretrained(model, method, config, progress=False, error_propagation=propagate)


@pytest.mark.parametrize(("first", "seed"), [(ExpertPruning(num_experts=20), 1), (MSMoE(num_experts=20), 3)])
def test_forms_are_those_that_the_budget_was_spent_on(first: Any, seed: int) -> None:
    """Behind cut layers tokens choose other experts; what was priced is what is made, also without any token left."""
    method = [first, ByteBudget(runs_in="transformers", share=0.5, curvature=False)]
    plans = []
    for propagate in (False, True):
        compressor = behind_cut_layers(method, seed, propagate)
        compressor.apply()
        plans.append(compressor.plan.blocks)
    for name, plain in plans[0].items():
        assert plans[1][name].labels_E == plain.labels_E
        assert plans[1][name].sizes == plain.sizes
    # Not because nothing was propagated: the second block sees what the first one gives now.
    assert [plans[0][name].digest == plans[1][name].digest for name in plans[0]] == [True, False, False]
