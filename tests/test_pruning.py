"""Expert pruning as a stage: sets of experts, numbers that differ by block, and what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, verify
from optimum_moe.algorithms.count_allocation import allocate_counts
from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.reconstruction import Reconstruction, kept_by_reconstruction, removal_path
from optimum_moe.algorithms.rerouting import Rerouter
from optimum_moe.algorithms.router_fit import RouterView
from optimum_moe.plan import keep_some
from optimum_moe.stages.damage_curve import DamageCurve, share_counts
from optimum_moe.surgeons import find_blocks
from tests.block_output import output_of
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def silu_gated(gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
    assert gate_PI is not None
    return torch.nn.functional.silu(gate_PI) * up_PI


def random_block(num_experts: int = 6, top_k: int = 2, tokens: int = 40, seed: int = 0) -> Reconstruction:
    generator = torch.Generator().manual_seed(seed)
    experts = ExpertTensors(
        up=torch.randn(num_experts, 6, 8, generator=generator),
        gate=torch.randn(num_experts, 6, 8, generator=generator),
        down=torch.randn(num_experts, 8, 6, generator=generator),
        activate=silu_gated,
    )
    return reconstruction(experts, torch.randn(num_experts, 8, generator=generator), top_k, tokens, generator)


def reconstruction(experts, rows_EH, top_k: int, tokens: int, generator=None, input_SH=None) -> Reconstruction:
    input_SH = torch.randn(tokens, rows_EH.shape[1], generator=generator) if input_SH is None else input_SH
    score_SE = (input_SH @ rows_EH.T).softmax(-1)
    weights_SK, index_SK = score_SE.topk(top_k)
    weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
    router = RouterView(rows_EH, len(rows_EH), lambda logits_SN: logits_SN.softmax(-1))
    sample = SampledTokens(input_SH, index_SK, weights_SK)
    return Reconstruction(experts, sample, Rerouter(router, input_SH, index_SK, weights_SK))


def test_every_subset_has_the_loss_of_the_public_implementation() -> None:
    """Its loss is the sum over batches, of two rows here, of the norm of the change; ours is squared."""
    given = load_file(Path(__file__).parent / "data" / "parity_criteria.safetensors")
    given = {key.removeprefix("expert_sparsity/"): t for key, t in given.items() if key.startswith("expert_sparsity/")}
    gate_EIH, up_EIH = given["in/gate_up"].chunk(2, dim=1)
    experts = ExpertTensors(up=up_EIH, gate=gate_EIH, down=given["in/down"], activate=silu_gated)
    block = reconstruction(experts, given["in/router"], 2, 0, input_SH=given["in/x"].flatten(0, 1))
    losses = []
    for dropped in given["out/combos_dropped"].tolist():
        errors_S = block.errors([e for e in range(4) if e not in dropped])
        losses.append(errors_S.unflatten(0, (3, -1)).sum(1).sqrt().sum())
    torch.testing.assert_close(torch.stack(losses), given["out/losses"], rtol=1e-5, atol=0)
    assert set(range(4)) - set(kept_by_reconstruction(block, 2)) == set(given["out/experts_to_drop"].tolist())


@pytest.mark.parametrize("num_kept", [2, 3, 5])
def test_the_best_of_all_sets_is_kept(num_kept: int) -> None:
    block = random_block()
    errors = {kept: block.error(kept) for kept in combinations(range(6), num_kept)}
    kept = kept_by_reconstruction(block, num_kept)
    assert errors[kept] == min(errors.values())
    assert block.error(range(6)) == pytest.approx(0.0, abs=1e-6 * max(errors.values()))


def test_where_sets_are_too_many_experts_are_removed_one_by_one() -> None:
    block = random_block()
    path = removal_path(block, 2)
    assert [len(kept) for kept, _ in path] == [6, 5, 4, 3, 2]
    for (before, _), (after, error) in pairwise(path):
        tried = {e: block.error([k for k in before if k != e]) for e in before}
        (removed,) = set(before) - set(after)
        assert tried[removed] == min(tried.values()) == error
    assert kept_by_reconstruction(block, 2, most_subsets=14) == path[-1][0]
    assert kept_by_reconstruction(block, 2, most_subsets=15) == min(combinations(range(6), 2), key=block.error)


def test_router_groups_keep_equal_numbers() -> None:
    block = random_block()
    for most_subsets in (8, 9):
        kept = kept_by_reconstruction(block, 2, router_groups=2, most_subsets=most_subsets)
        assert [e // 3 for e in kept] == [0, 1]
    best = min(product(range(3), range(3, 6)), key=block.error)
    assert kept == best


def test_counts_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for total in (6, 9, 14):
        # Neither convex nor falling everywhere.
        curves = [{k: float(torch.rand(1, generator=generator)) for k in (2, 3, 5, 6)} for _ in range(3)]
        every = [c for c in product((2, 3, 5, 6), repeat=3) if sum(c) == total]
        best = min(every, key=lambda counts: sum(curve[k] for curve, k in zip(curves, counts, strict=True)))
        assert allocate_counts(curves, total) == list(best)
    with pytest.raises(ValueError, match=r"that keep 2 to 6, 2 to 6, 2 to 6, \.\.\. sum to 19"):
        allocate_counts(curves, 19)


def test_a_curve_sums_the_saliencies_of_those_that_go() -> None:
    saliency_E = torch.tensor([5.0, 1.0, 2.0, 8.0, 4.0, 3.0], dtype=torch.float64)
    curve = DamageCurve.of_saliencies(saliency_E, saliency_E, 2, 1, in_loss=False)
    assert curve.damages == {2: 10.0, 3: 6.0, 4: 3.0, 5: 1.0, 6: 0.0}
    assert curve.whole == 23.0
    grouped = DamageCurve.of_saliencies(saliency_E, saliency_E, 2, 2, in_loss=False)
    assert grouped.damages == {2: 10.0, 4: 4.0, 6: 0.0}
    shifted = DamageCurve.of_saliencies(saliency_E - 5, saliency_E, 2, 1, in_loss=False)
    assert shifted.damages == {2: 6.0, 3: 3.0, 4: 1.0, 5: 0.0, 6: 0.0}


def test_blocks_are_compared_in_the_loss_or_by_their_shares() -> None:
    def curve(values: list[float], in_loss: bool) -> DamageCurve:
        saliency_E = torch.tensor(values, dtype=torch.float64)
        return DamageCurve.of_saliencies(saliency_E, saliency_E, 1, 1, in_loss)

    large, small = [80.0, 90.0, 100.0], [0.1, 0.1, 9.0]
    assert share_counts({"a": curve(large, True), "b": curve(small, True)}, 4) == {"a": 3, "b": 1}
    assert share_counts({"a": curve(large, False), "b": curve(small, False)}, 4) == {"a": 3, "b": 1}
    small = [8.0, 9.0, 9.1]
    assert share_counts({"a": curve(large, True), "b": curve(small, True)}, 4) == {"a": 3, "b": 1}
    assert share_counts({"a": curve([1.0, 1.0, 98.0], False), "b": curve(small, False)}, 4) == {"a": 1, "b": 3}
    with pytest.warns(UserWarning, match="No gradient of the loss was observed at 1 of 2 blocks"):
        assert share_counts({"a": curve([1.0, 1.0, 98.0], True), "b": curve(small, False)}, 4) == {"a": 1, "b": 3}


def data_for(name: str) -> CalibrationConfig:
    return CalibrationConfig([inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("saliency", ["fisher", "reap", "razor"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3-groups", "gpt_oss"])
def test_blocks_share_one_number_of_experts(name: str, saliency: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "original")
    stage = ExpertPruning(keep_ratio=0.5, saliency=saliency, allocation="global")
    compressor = MoECompressor.from_pretrained(tmp_path / "original", stage, data_for(name), progress=False)
    model = compressor.apply()
    infos = compressor.source.info.blocks
    counts = [compressor.plan.blocks[info.name].num_groups for info in infos]
    assert sum(counts) == 4 * len(infos)
    for info, count in zip(infos, counts, strict=True):
        assert count % info.router_groups == 0
        assert count >= info.top_k
        labels_E = torch.tensor(compressor.plan.blocks[info.name].labels_E)
        assert len({int((part >= 0).sum()) for part in labels_E.chunk(info.router_groups)}) == 1
    assert not compressor.preview().plain
    compressor.save_pretrained(tmp_path / "out")
    assert compressor.plan.is_plain == (len(set(counts)) == 1)
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded, inputs_for(name)), logits_of(model, inputs_for(name)))
    assert verify(tmp_path / "out", against=tmp_path / "original", inputs=inputs_for(name)).passed


def test_what_a_block_keeps_follows_what_it_would_lose() -> None:
    """The experts of the first block give almost nothing, so it keeps the fewest that its router can choose from."""
    model = build("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(1e-4)
    stage = ExpertPruning(num_experts=4, saliency="fisher", allocation="global")
    compressor = MoECompressor.from_pretrained(model, stage, data_for("qwen3_moe"), progress=False)
    compressor.apply()
    counts = [plan.num_groups for plan in compressor.plan.blocks.values()]
    assert counts[0] == 2
    assert sum(counts) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocation": "globl"}, r"allocation='globl' is unknown; did you mean 'global'"),
        ({"saliency": "raezor"}, r"saliency='raezor' is unknown; did you mean 'razor'"),
        (
            {"allocation": "global", "saliency": "aimer"},
            r"compares what blocks lose on data, and saliency='aimer'",
        ),
        (
            {"allocation": "global", "saliency": "reconstruction"},
            r"saliency='reconstruction' chooses a set for",
        ),
        ({"num_experts": 0}, r"num_experts=0 keeps no expert"),
        ({"num_experts": None, "keep_ratio": 0.0}, r"keep_ratio=0.0 must lie in \(0, 1\]"),
    ],
)
def test_wrong_settings_are_refused_without_a_model(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPruning(**{"num_experts": 4, **settings})


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_what_a_router_cannot_choose_from_is_refused_before_weights_are_read(allocation: str) -> None:
    for ratio in (0.1, 0.125):
        stage = ExpertPruning(keep_ratio=ratio, allocation=allocation)
        with pytest.raises(ValueError, match="num_experts=1 is smaller than num_experts_per_tok=2"):
            MoECompressor.from_pretrained(build("qwen3_moe"), stage, data_for("qwen3_moe"), progress=False)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3-groups", "llama4", "gpt_oss"])
def test_reconstruction_keeps_the_set_that_changes_the_block_the_least(name: str) -> None:
    """Against the block itself, with every possible set of experts removed by the surgeon."""
    inputs = inputs_for(name, rows=4, length=16)
    stage = ExpertPruning(num_experts=6, saliency="reconstruction")
    compressor = MoECompressor.from_pretrained(build(name), stage, CalibrationConfig([inputs]), progress=False)
    compressor.apply()
    info = compressor.source.info.blocks[0]
    before_TH = output_of(build(name), info.name, inputs)
    size, each = 8 // info.router_groups, 6 // info.router_groups
    parts = [combinations(range(g * size, (g + 1) * size), each) for g in range(info.router_groups)]
    changes = {}
    for kept in (sum(found, ()) for found in product(*parts)):
        model = build(name)
        found = find_blocks(model)[0]
        found.surgeon.carry_out(found.module(model), keep_some(info.name, 8, kept))
        changes[kept] = float((output_of(model, info.name, inputs) - before_TH).double().square().sum())
    labels_E = compressor.plan.blocks[info.name].labels_E
    assert tuple(e for e in range(8) if labels_E[e] >= 0) == min(changes, key=lambda kept: changes[kept])
