"""Statistics by modality, and the warning where pruning removes the experts of one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from optimum_moe import CalibrationConfig, CompressionPlan, ExpertPruning, MoECompressor, Statistics, register_saliency
from optimum_moe.calibration import batches_for, observe
from optimum_moe.statistics import MODALITIES
from optimum_moe.surgeons import find_blocks
from tests.calibration.test_media import chat, needs_images, picture, question, vision_checkpoint
from tests.composites_table import (
    AUDIO,
    COMPOSITES,
    IMAGE,
    Composite,
    build_composite,
    composite_named,
    inputs_with_media,
)
from tests.expert_order import RouterInputs, router_tensors, running_order
from tests.test_reload import move_out_of_the_file
from tests.tiny_checkpoints import save_checkpoint, write_text
from tests.tiny_models import logits_of

UPSTREAM = {"llama4": "transformers 5.24 asks the text model's output for image_outputs"}
MARKED = [pytest.param(c, id=c.name, marks=() if c.default else pytest.mark.full) for c in COMPOSITES]


def prune(model: Any, inputs: list[dict[str, torch.Tensor]], **arguments: Any) -> MoECompressor:
    stage = ExpertPruning(num_experts=4, saliency=arguments.pop("saliency", "frequency"))
    config = CalibrationConfig(inputs, unseen="keep")
    return MoECompressor.from_pretrained(model, stage, config, progress=False, **arguments)


@pytest.mark.parametrize("composite", MARKED)
def test_tokens_are_counted_by_what_their_placeholder_stands_for(composite: Composite):
    if composite.name in UPSTREAM:
        pytest.skip(UPSTREAM[composite.name])
    model, inputs = build_composite(composite), [inputs_with_media(composite, seed=seed) for seed in (1, 2)]
    config = CalibrationConfig(inputs, unseen="keep")
    blocks = find_blocks(model)
    statistics = observe(model, blocks, batches_for(model, config, None), config, progress=False)
    ids = torch.cat([batch["input_ids"].flatten() for batch in inputs])
    present = {"image": bool((ids == IMAGE).any()), "video": False, "audio": bool((ids == AUDIO).any())}
    assert any(present.values())
    for name, block in statistics.blocks.items():
        if name.startswith(composite.unreached or "-"):
            assert block.modality_count_VE.sum() == 0
            continue
        if "vision_tower" in name:
            # Patches have no ids, so their modality is not asked for.
            assert (block.num_tokens > 0, block.modality_count_VE.sum()) == (True, 0)
            continue
        assert torch.equal(block.modality_count_VE.sum(0), block.token_count_E)
        assert torch.allclose(block.modality_gated_norm_VE.sum(0), block.gated_norm_sum_E, rtol=1e-12)
        counts = dict(zip(MODALITIES, block.modality_count_VE.sum(1).tolist(), strict=True))
        if name.endswith(("text_moe", "vision_moe")):
            own = "image" if name.endswith("vision_moe") else "text"
            assert {kind for kind, count in counts.items() if count} == {own}
        else:
            assert {kind: count > 0 for kind, count in counts.items()} == {"text": True, **present}


def test_padding_has_no_modality():
    composite = composite_named("qwen3_vl_moe")
    model, inputs = build_composite(composite), inputs_with_media(composite)
    inputs["attention_mask"][:, -6:] = 0
    config = CalibrationConfig([inputs])
    statistics = observe(model, find_blocks(model), batches_for(model, config, None), config, progress=False)
    images = int((inputs["input_ids"] == IMAGE).sum())
    text = int(inputs["attention_mask"].sum()) - images
    for block in statistics.blocks.values():
        assert block.modality_count_VE.sum(1).tolist() == [2 * text, 2 * images, 0, 0]


def test_text_alone_is_not_counted_by_modality(tmp_path: Path):
    save_checkpoint(tmp_path / "model")
    config = CalibrationConfig(str(write_text(tmp_path / "text.jsonl")), max_tokens=512, sequence_length=64)
    stage = ExpertPruning(num_experts=4)
    compressor = MoECompressor.from_pretrained(tmp_path / "model", stage, config, progress=False)
    for block in compressor.calibrate().blocks.values():
        assert block.modality_count_VE is None
    compressor.apply()
    assert compressor.plan.remarks == ()


@torch.no_grad()
def give_images_experts_of_their_own(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """In every block experts 6 and 7 are selected by the placeholders of images, and by nothing else."""
    assert inputs["input_ids"].numel() <= 64, "more tokens than channels: no exact solution"
    wanted_T = torch.where(inputs["input_ids"].flatten() == IMAGE, 1.0, -1.0).double()
    for found in running_order(model, inputs):
        block, seen = found.module(model), RouterInputs(found, [])
        with found.surgeon.watch(block, seen):
            model(**inputs)
        rows_EH = router_tensors(found, block)[0]
        direction_H = torch.linalg.pinv(seen.input_TH.double()) @ wanted_T
        rows_EH[6], rows_EH[7] = (60 * direction_H).to(rows_EH.dtype), (50 * direction_H).to(rows_EH.dtype)


@pytest.fixture
def seeing(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint that serves images by two of its eight experts, and a batch of two images in text."""
    composite = composite_named("qwen3_vl_moe")
    model, inputs = build_composite(composite), inputs_with_media(composite)
    give_images_experts_of_their_own(model, inputs)
    model.save_pretrained(tmp_path / "original")
    return tmp_path / "original", inputs


@pytest.mark.parametrize("engine", ["memory", "streaming"])
def test_images_whose_experts_are_pruned_are_reported(
    engine: str, seeing: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
):
    original, inputs = seeing
    compressor = prune(original, [inputs], engine=engine, output_dir=tmp_path / "out")
    with pytest.warns(UserWarning, match="Most image tokens of the calibration data were routed to experts") as warned:
        compressor.apply()
    (remark,) = compressor.plan.remarks
    assert [str(w.message) for w in warned if "image" in str(w.message)] == [remark]
    observed = MoECompressor.from_pretrained(
        original, ExpertPruning(num_experts=4), CalibrationConfig([inputs], unseen="keep"), progress=False
    ).calibrate()
    assert f"in {len(observed.blocks)} blocks" in remark
    for name, block in observed.blocks.items():
        removed = compressor.plan.blocks[name].removed_experts
        assert {6, 7} <= set(removed)
        whole = float(block.token_count_E[list(removed)].sum() / block.token_count_E.sum())
        assert f"{name}: 100% of the image tokens and {whole:.0%} of all, experts 6, 7" in remark
    assert f'protect=["{next(iter(observed.blocks))}"]' in remark
    # What was reported is in the checkpoint, which loads as any other.
    assert CompressionPlan.from_pretrained(tmp_path / "out").remarks == (remark,)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    again = prune(original, [inputs])
    expected = again.apply()
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, inputs), logits_of(expected, inputs))
    assert not torch.equal(logits_of(loaded, inputs), logits_of(prune(original, [inputs]).source.load(), inputs))


def test_a_criterion_that_looks_at_each_modality_keeps_their_experts(seeing: tuple[Path, dict[str, torch.Tensor]]):
    @register_saliency("largest share of a modality")
    def largest_share(modality_count_VE: torch.Tensor) -> torch.Tensor:
        return (modality_count_VE / modality_count_VE.sum(1, keepdim=True).clamp(min=1)).amax(0)

    original, inputs = seeing
    compressor = prune(original, [inputs], saliency="largest share of a modality")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressor.apply()
    assert compressor.plan.remarks == ()
    assert all({6, 7} <= set(plan.references_G) for plan in compressor.plan.blocks.values())


def test_the_order_of_experts_does_not_matter_and_statistics_are_saved(
    seeing: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
):
    original, inputs = seeing
    observed = prune(original, [inputs]).calibrate()
    observed.save_pretrained(tmp_path / "statistics")
    again = Statistics.from_pretrained(tmp_path / "statistics")
    for name, block in observed.blocks.items():
        assert torch.equal(again.blocks[name].modality_count_VE, block.modality_count_VE)
        assert block.modality_count_VE[MODALITIES.index("image"), 6:].tolist() == [8, 8]
    compressor = prune(original, [inputs])
    with pytest.warns(UserWarning, match="Most image tokens"):
        compressor.apply(statistics=again)


@needs_images
def test_images_through_a_processor(tmp_path: Path):
    processor = vision_checkpoint(tmp_path / "original")
    chats = [chat({"type": "image", "image": picture(seed)}) for seed in range(3)]
    chats += [question({"type": "text", "text": "only words"})]
    statistics = prune(tmp_path / "original", chats).calibrate()
    # An image of 24 x 16 pixels has 6 x 4 patches, of which four make one token.
    for block in statistics.blocks.values():
        images = 2 * 3 * 6
        assert block.modality_count_VE[:2].sum(1).tolist() == [2 * block.num_tokens - images, images]
    assert processor.image_token_id is not None
