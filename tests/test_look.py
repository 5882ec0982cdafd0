"""A look inside: what it tells of every architecture, exactly where the answer is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optimum_moe.reporting.pictures
from optimum_moe import CalibrationConfig, LookInside, MoECompressor, MSMoE, look_inside
from optimum_moe.look import COMPARED_TOKENS, LOOK_FILE
from optimum_moe.reporting.block_look import BlockLook, plain
from tests.composites_table import IMAGE, build_composite, composite_named, inputs_with_media
from tests.expert_order import make_copies, permute_experts, reordered, silence
from tests.tiny_checkpoints import documents, save_checkpoint, tokenizer, write_text
from tests.tiny_models import Target, build, by_name, every_target, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

Run = Callable[..., tuple[int, str, str]]
ORDER = [2, 0, 3, 1, 6, 4, 7, 5]
UNCHANGED = list(range(8))


def look_of(model: Any, target: Target, order_E: list[int] = UNCHANGED) -> LookInside:
    data = [reordered(inputs_for(target, rows=4, length=16, seed=seed), order_E) for seed in range(2)]
    return look_inside(model, CalibrationConfig(data), progress=False)


def assert_reordered(found: Any, expected: torch.Tensor, order_E: list[int], axes: int, tolerance: float) -> None:
    for axis in range(axes):
        expected = expected.index_select(expected.ndim - 1 - axis, torch.tensor(order_E))
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("target", every_target())
def test_the_order_of_experts_permutes_the_numbers(target: Target):
    model, other = build(target), build(target)
    permute_experts(other, ORDER)
    one, two = look_of(model, target), look_of(other, target, ORDER)
    assert list(one.blocks) == list(two.blocks)
    for name, block in one.blocks.items():
        again = two.blocks[name]
        assert_reordered(again.observed.token_count_E, block.observed.token_count_E, ORDER, 1, 0)
        assert_reordered(again.output_norm_E, block.output_norm_E, ORDER, 1, 1e-4)
        assert_reordered(again.coactivation_EE, block.coactivation_EE, ORDER, 2, 0)
        assert set(again.similarities) == set(block.similarities)
        for kind, values_EE in block.similarities.items():
            assert_reordered(again.similarities[kind], values_EE, ORDER, 2, 1e-4)
        assert again.router_entropy == pytest.approx(block.router_entropy, rel=1e-5, nan_ok=True)
        # The nearest expert may be another one where two are equally near, as all are without a router.
        near_E = torch.tensor(ORDER)[again.neighbors.nearest_E]
        same_E = near_E == block.neighbors.nearest_E[ORDER]
        aligned_E = block.neighbors.aligned_E[ORDER]
        assert same_E.sum() >= 6 or math.isnan(block.router_entropy)
        assert torch.allclose(again.neighbors.aligned_E[same_E], aligned_E[same_E], rtol=1e-4, atol=1e-5)
        text = json.dumps(two.to_dict(), allow_nan=False)
        assert json.loads(text)["blocks"][0]["num_experts"] == 8


@pytest.mark.parametrize("target", every_target())
def test_permuted_copies_have_equal_outputs_and_equal_neurons_after_alignment(target: Target):
    model = build(target)
    make_copies(model, [0, 0, 1, 1, 2, 2, 3, 3])
    for block in look_of(model, target).blocks.values():
        same_EE = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])[:, None] == torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        if "outputs" not in block.similarities:
            continue
        outputs_EE = block.similarities["outputs"]
        scaled_alike = bool((outputs_EE[same_EE] > 1 - 1e-5).all())
        # A scale or bias of its own may remain of each expert.
        assert scaled_alike or "per_expert_scale" in dict(model.named_parameters()) or target.name == "gpt_oss"
        if not scaled_alike:
            continue
        assert (outputs_EE[~same_EE] < 1 - 1e-3).all()
        assert block.neighbors.nearest_E.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
        assert torch.allclose(block.neighbors.aligned_E, torch.ones(8, dtype=torch.float64), atol=1e-5)
        if not target.fixed_neurons:
            assert (block.neighbors.unaligned_E < 0.9).all()


def looked(model: Any, **arguments: Any) -> LookInside:
    data = CalibrationConfig(documents(), max_tokens=1024, sequence_length=64)
    return look_inside(model, data, tokenizer=tokenizer(), progress=False, **arguments)


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [leaf for inner in (value.values() if isinstance(value, dict) else value) for leaf in flat(inner)]
    return [value]


def test_layer_by_layer_gives_the_numbers_of_a_model_in_memory(tmp_path: Path):
    save_checkpoint(tmp_path / "model", "deepseek_v3")
    whole, streamed = (looked(tmp_path / "model", engine=engine) for engine in ("memory", "streaming"))
    for one, other in zip(flat(streamed.to_dict()), flat(whole.to_dict()), strict=True):
        assert one == (other if isinstance(other, str | None) else pytest.approx(other, rel=1e-5, abs=1e-6))
    assert list(streamed.blocks) == list(whole.blocks)
    assert str(streamed).count("\n") == len(whole.blocks) + 1


def test_what_is_told_of_a_block_is_what_was_observed(tmp_path: Path):
    save_checkpoint(tmp_path / "model", "mixtral")
    look = looked(tmp_path / "model")
    stage, data = MSMoE(num_experts=4), CalibrationConfig(documents(), max_tokens=1024, sequence_length=64)
    observed = MoECompressor.from_pretrained(tmp_path / "model", stage, data, progress=False).calibrate()
    for name, block in look.blocks.items():
        sums, record = observed.blocks[name], block.to_dict()
        assert torch.equal(block.observed.token_count_E, sums.token_count_E)
        share_E = sums.token_count_E / sums.token_count_E.sum()
        effective = math.exp(-float((share_E * share_E.clamp(min=1e-300).log()).sum()))
        assert record["summary"]["effective_experts"] == pytest.approx(effective, rel=1e-5)
        assert record["output_norm"] == pytest.approx((sums.output_norm_sum_E / sums.token_count_E).tolist(), rel=1e-5)
        assert 0 < record["summary"]["relative_entropy"] <= 1
        assert sum(record["norm_rank_of_first"]) == pytest.approx(1, abs=1e-5)
        assert record["norm_rank_of_first"][0] == record["summary"]["first_is_largest"]
        # 256 tokens decide, so every share is a multiple of it.
        assert [v * COMPARED_TOKENS for v in record["norm_rank_of_first"]] == pytest.approx(
            [round(v * COMPARED_TOKENS) for v in record["norm_rank_of_first"]], abs=1e-3
        )
        rows_EH = build_rows(tmp_path / "model", name)
        unit_EH = rows_EH / rows_EH.norm(dim=1, keepdim=True)
        assert torch.allclose(block.similarities["router_rows"], (unit_EH @ unit_EH.T + 1) / 2, atol=1e-6)
        for tree in record["dendrograms"].values():
            assert len(tree) == 7
            assert tree[-1][3] == 8


def build_rows(folder: Path, block: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")[f"{block.replace('mlp', 'block_sparse_moe')}.gate.weight"].double()


def test_a_uniform_router_has_the_largest_entropy_and_a_block_of_zero_rows_no_correlation():
    target = by_name("mixtral")
    model = build(target)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    for block in look_of(model, target).blocks.values():
        record = block.to_dict()
        assert record["summary"]["router_entropy"] == pytest.approx(math.log(8), rel=1e-5)
        assert record["summary"]["relative_entropy"] == 1
        assert record["summary"]["norm_rank_correlation"] is None
        assert record["summary"]["router_rows_and_outputs"] is None


def test_experts_without_tokens_have_no_norm_and_nothing_is_nan():
    target = by_name("qwen3_moe")
    model, inputs = build(target), inputs_for(target)
    silence(model, [1, 6], inputs)
    look = look_inside(model, CalibrationConfig([inputs]), progress=False)
    for block in look.blocks.values():
        record = block.to_dict()
        assert record["experts_without_tokens"] == [1, 6]
        for field in ("output_norm", "routing_weight"):
            assert [e for e, value in enumerate(record[field]) if value is None] == [1, 6]
        assert record["frequency"][1] == record["coactivation"][1][0] == 0
        assert record["coactivation"][1][6] is None
    assert "NaN" not in json.dumps(look.to_dict(), allow_nan=False)


def test_media_are_told_apart():
    composite = composite_named("qwen3_vl_moe")
    inputs = inputs_with_media(composite)
    look = look_inside(build_composite(composite), CalibrationConfig([inputs]), progress=False)
    images = int((inputs["input_ids"] == IMAGE).sum())
    for block in look.blocks.values():
        found = block.to_dict()["modalities"]
        assert set(found) == {"text", "image"}
        assert sum(found["image"]["token_count"]) == 2 * images
        assert sum(found["text"]["share"]) == pytest.approx(1, abs=1e-5)
        unseen = [e for e, count in enumerate(found["image"]["token_count"]) if not count]
        assert [e for e, norm in enumerate(found["image"]["weighted_output_norm"]) if norm is None] == unseen
    rows = look.modality_rows()
    assert [row[1] for row in rows[1:]] == ["text", "image"] * len(look.blocks)
    assert str(look).endswith(" |")


def test_text_has_no_table_by_modality(tmp_path: Path):
    assert looked(save_checkpoint(tmp_path / "model")).modality_rows() == []


def test_files(tmp_path: Path):
    look = looked(save_checkpoint(tmp_path / "model"))
    files = look.save(tmp_path / "out")
    stems = ["overview", "block-000", "block-001", "block-002"]
    assert [file.name for file in files] == [LOOK_FILE, *(f"{s}{suffix}" for s in stems for suffix in (".png", ".svg"))]
    assert json.loads((tmp_path / "out" / LOOK_FILE).read_text(encoding="utf-8")) == look.to_dict()
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files if file.suffix == ".png")
    again = look.save(tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_a_block_of_one_expert_is_drawn_and_told(tmp_path: Path):
    target = by_name("mixtral")
    model = build(target, num_local_experts=1, num_experts_per_tok=1)
    look = look_of(model, target)
    for block in look.blocks.values():
        record = block.to_dict()
        assert isinstance(block, BlockLook)
        assert (record["summary"]["effective_experts"], record["summary"]["imbalance"]) == (1, 1)
        assert record["dendrograms"] == {"router_rows": [], "router_logits": [], "expert_weights": [], "outputs": []}
    assert len(look.save(tmp_path)) == 1 + 2 * (1 + len(look.blocks))


def test_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = save_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="reservoir_tokens=0 samples no tokens"):
        look_inside(model, CalibrationConfig(documents(), reservoir_tokens=0))
    with pytest.raises(ValueError, match="source is None"):
        look_inside(model, None)
    with pytest.raises(ValueError, match="engine"):
        looked(model, engine="disk")
    data = CalibrationConfig(documents(), max_tokens=1024, sequence_length=64)
    MoECompressor.from_pretrained(
        model, MSMoE(num_experts=4), data, output_dir=tmp_path / "small", progress=False
    ).apply()
    with pytest.raises(ValueError, match="already compressed by optimum_moe"):
        looked(tmp_path / "small")
    monkeypatch.setattr(optimum_moe.reporting.pictures, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Pictures need matplotlib"):
        looked(model).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_numbers():
    values = {"a": torch.tensor([1 / 3, math.nan], dtype=torch.float64), "b": [torch.tensor(2), 1234567.0]}
    assert plain(values) == {"a": [0.333333, None], "b": [2, 1234570]}


def test_a_corpus_on_disk(tmp_path: Path):
    model = save_checkpoint(tmp_path / "model")
    corpus = write_text(tmp_path / "corpus.jsonl")
    look = look_inside(model, CalibrationConfig(str(corpus), max_tokens=512, sequence_length=64), progress=False)
    assert look.calibration["num_tokens"] == 512
    assert {block.observed.num_tokens for block in look.blocks.values()} == {512}
