"""Low-rank-sparse experts on every architecture: exact at full rank, equal in any order, and equal after a reload."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe import CompressionPlan, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.surgeons import block_names, find_blocks
from tests.expert_order import edited, permute_experts, reordered
from tests.factor_methods import METHODS, compressor_for, refusal
from tests.test_exact_properties import UNCHANGED, assert_rounding
from tests.test_exact_properties import compressor_for as compressor_in_order
from tests.test_reload import assert_same_tensors, move_out_of_the_file
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


@pytest.mark.parametrize("kind", ["full rank", "every row", "plain", "merged"])
@pytest.mark.parametrize("target", every_target())
def test_what_loses_nothing_changes_nothing(target: Target, kind: str) -> None:
    if refusal(target, kind):
        pytest.skip(refusal(target, kind))
    model = build(target)
    widths = {found.info.index: found.info.intermediate_size for found in find_blocks(model)}
    # Attention experts may have another width: the full rank of one kind at a time.
    full = widths[0]
    layers = [index for index, width in widths.items() if width == full]
    method = {
        "full rank": LowRankSparse(rank=full, density=None, layers=layers),
        "every row": LowRankSparse(rank=8, density=1.0),
        "plain": LowRankSparse(rank=full, density=0.5, whiten=False, layers=layers),
        "merged": [MSMoE(num_experts=4), LowRankSparse(rank=full, density=None, layers=layers)],
    }[kind]
    if kind == "merged":
        expected = logits_of(compressor_for(build(target), method[0], target).apply(), inputs_for(target))
    else:
        expected = logits_of(model, inputs_for(target))
    compressor = compressor_for(model, method, target)
    factorized = compressor.apply()
    found = [
        block.sizes.table("low_rank")["up"] for block in compressor.plan.blocks.values() if block.sizes is not None
    ]
    assert len(found) == len(layers if kind != "every row" else widths)
    assert {rank for ranks in found for rank in ranks} == {8 if kind == "every row" else full}
    assert_rounding(logits_of(factorized, inputs_for(target)), expected)


@pytest.mark.parametrize("target", every_target())
def test_a_low_rank_does_change_the_model(target: Target) -> None:
    """The negative control."""
    if refusal(target, "uniform"):
        pytest.skip(refusal(target, "uniform"))
    model = build(target)
    expected = logits_of(model, inputs_for(target))
    actual = logits_of(compressor_for(model, METHODS["uniform"], target).apply(), inputs_for(target))
    assert (actual - expected).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["uniform", "map"])
@pytest.mark.parametrize("target", every_target())
def test_the_order_of_experts_does_not_matter(target: Target, kind: str) -> None:
    if refusal(target, kind):
        pytest.skip(refusal(target, kind))
    method = METHODS[kind]
    if target.fixed_router and kind == "map":
        # One-hot logits make all experts equally similar, and equals would be joined by index.
        method = [dataclasses.replace(method[0], similarity="expert_weights"), method[1]]
    order_E = [2, 0, 3, 1, 5, 7, 4, 6]
    # Sums that tie in float would be broken by index; a little more for each expert breaks them by expert.
    extra_E = torch.linspace(0.01, 0.05, 8, dtype=torch.float64)
    results = []
    for order in (UNCHANGED, order_E):
        model = build(target)
        permute_experts(model, order)
        compressor = compressor_in_order(model, method, target, order)
        observed = compressor.calibrate()
        counts = {name: block.token_count_E + extra_E[order] for name, block in observed.blocks.items()}
        statistics = edited(observed, token_count_E=counts.__getitem__)
        results.append(logits_of(compressor.apply(statistics), reordered(inputs_for(target), order)))
    assert_rounding(results[1], results[0])


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("target", every_target())
def test_reload_is_bit_equal(target: Target, kind: str, tmp_path: Path) -> None:
    if refusal(target, kind):
        pytest.skip(refusal(target, kind))
    compressor = compressor_for(build(target), METHODS[kind], target)
    expected_size = compressor.preview().after
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    measured = compressor.measured().after
    # In memory the preview counts a router's correction, which no parameter is, with the experts that go.
    if kind in ("uniform", "map") and target.name == "longcat_flash":
        # Upstream holds matrices for its zero experts too, which go with the stock tensors.
        assert measured.bytes < expected_size.bytes
    elif kind in ("uniform", "map"):
        assert (measured.parameters, measured.bytes) == (expected_size.parameters, expected_size.bytes)
    loaded = getattr(transformers, target.architecture).from_pretrained(tmp_path / "out")
    assert_same_tensors(loaded, model)
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, inputs_for(target)), logits_of(model, inputs_for(target)))
    assert measured.bytes < compressor.measured().before.bytes
    structure = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"][
        "blocks"
    ]
    again = CompressionPlan.from_pretrained(tmp_path / "out")
    assert again.structure() == compressor.plan.structure()
    in_files = {found.info.name: block_names(loaded, found).block for found in compressor.source.blocks}
    assert structure == {in_files[name]: entry for name, entry in again.structure().items()}
    assert [b.digest for b in again.blocks.values()] == [b.digest for b in compressor.plan.blocks.values()]
    assert compressor.measured().plain is False


def test_an_energy_gives_ranks_of_their_own() -> None:
    compressor = compressor_for(build("qwen3_moe"), LowRankSparse(energy=0.8, density=None), "qwen3_moe")
    compressor.apply()
    found = [rank for block in compressor.plan.blocks.values() for rank in block.sizes.table("low_rank")["down"]]
    assert len(set(found)) > 1
    assert all(rank is None or rank % 8 == 0 for rank in found)


@pytest.mark.parametrize("settings", [{"energy": 0.98}, {"rank_ratio": 1.0}])
def test_what_factors_would_not_make_smaller_stays_dense(settings) -> None:
    """Rank 16 of 24 and 6 of 24 rows take 16 x 88 + 6 x 65 = 1798 numbers, more than the matrix's 1536."""
    compressor = compressor_for(build("qwen3_moe"), LowRankSparse(density=0.25, **settings), "qwen3_moe")
    expected = compressor.preview()
    model = compressor.apply()
    assert {r for b in compressor.plan.blocks.values() for rs in b.sizes.table("low_rank").values() for r in rs} == {
        None
    }
    measured = compressor.measured().after
    # The preview of an energy gives bounds of the FLOPs.
    assert (measured.bytes, measured.flops_upper) == (expected.after.bytes, expected.after.flops_upper)
    assert (measured.bytes, measured.flops_upper) == (expected.before.bytes, expected.before.flops_upper)
    before = logits_of(build("qwen3_moe"), inputs_for("qwen3_moe"))
    # The same matrices, gate and up by themselves: float32 sums in another order.
    assert (logits_of(model, inputs_for("qwen3_moe")) - before).abs().max() <= 2e-5 * before.abs().max()


@pytest.mark.parametrize("kind", ["uniform", "map", "prune"])
def test_the_file_is_as_large_as_the_preview_says(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 96, "num_hidden_layers": 2}
    build("qwen3_moe", **sizes).save_pretrained(tmp_path / "original")
    compressor = compressor_for(tmp_path / "original", METHODS[kind], "qwen3_moe", output_dir=tmp_path / "out")
    expected = compressor.preview().after
    compressor.apply()
    assert compressor.measured().after.bytes == expected.bytes
    assert compressor.measured().after.parameters == expected.parameters
    file = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert abs(file / expected.bytes - 1) < 0.01
    assert file < 0.75 * (tmp_path / "original" / "model.safetensors").stat().st_size


def test_layers_and_protect_leave_the_others_as_they_are(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    before = model.model.layers[1].mlp.experts.gate_up_proj.detach().clone()
    method = LowRankSparse(rank=8, layers=[0, 2], protect=["*.2.mlp"])
    compressor = compressor_for(model, method, "qwen3_moe")
    preview = compressor.preview().after
    compressor.apply()
    assert [block.sizes is not None for block in compressor.plan.blocks.values()] == [True, False, False]
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj, before)
    assert compressor.measured().after == preview
    compressor.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_tensors(loaded, model)


def test_a_plan_that_was_read_has_no_factors_to_carry_out(tmp_path: Path) -> None:
    compressor = compressor_for(build("qwen3_moe"), METHODS["uniform"], "qwen3_moe")
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    plan = CompressionPlan.from_pretrained(tmp_path / "out")
    other = MoECompressor.from_pretrained(build("qwen3_moe"), METHODS["uniform"], progress=False)
    with pytest.raises(ValueError, match=r"the factors themselves are in the checkpoint .* or pass statistics="):
        other.apply(plan=plan)
