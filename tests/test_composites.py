"""Models whose text part is a mixture of experts: found, calibrated with media, cut and loaded again as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from optimum_moe import (
    BlockDrop,
    CalibrationConfig,
    CompressionPlan,
    ExpertPruning,
    LayerDrop,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    Rounding,
    verify,
)
from optimum_moe.calibration.observe import running_part
from optimum_moe.checkpoint.source import open_source
from optimum_moe.surgeons import find_blocks
from tests.composites_table import COMPOSITES, IMAGE, Composite, build_composite, composite_named, inputs_with_media
from tests.expert_order import edited, make_copies, permute_experts, silence
from tests.test_exact_properties import LABELS, assert_rounding
from tests.test_reload import assert_same_tensors, move_out_of_the_file
from tests.tiny_checkpoints import tensors_in
from tests.tiny_models import logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def marks_of(composite: Composite) -> list[pytest.MarkDecorator]:
    broken = transformers.__version__ == composite.broken_in
    reason = f"{composite.architecture} of transformers {composite.broken_in} has a forward pass that raises"
    full = [] if composite.default else [pytest.mark.full]
    return [*full, pytest.mark.skipif(broken, reason=reason)]


EVERY = pytest.mark.parametrize(
    "composite",
    [pytest.param(c, id=c.name, marks=marks_of(c)) for c in COMPOSITES],
)
METHODS = {
    "map": MSMoE(num_experts=4),
    "reduce": MSMoE(num_experts=4, routing="reduce"),
    "prune": ExpertPruning(num_experts=4, saliency="reap"),
}


def output_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return logits_of(running_part(model), inputs)


def unreached(model: Any, composite: Composite) -> list[str]:
    return [found.info.name for found in find_blocks(model) if found.info.name.startswith(composite.unreached)]


def reached_only(method: Any, model: Any, composite: Composite) -> Any:
    """The method, without the blocks that a forward pass does not reach."""
    settings = dict(method.settings())
    settings.pop("stage")
    names = unreached(model, composite) if composite.unreached else []
    return type(method)(**settings | {"protect": names or None})


def compressor_for(model: Any, method: Any, composite: Composite, **settings: Any) -> MoECompressor:
    data = [inputs_with_media(composite, seed=seed) for seed in range(3)]
    method = reached_only(method, model, composite)
    return MoECompressor.from_pretrained(model, method, CalibrationConfig(data, **settings), progress=False)


@EVERY
def test_every_stack_of_experts_belongs_to_a_block(composite: Composite) -> None:
    model = build_composite(composite)
    blocks = [found.module(model) for found in find_blocks(model)]
    inside = {id(module) for block in blocks for module in block.modules()}
    stacks = [module for module in model.modules() if hasattr(module, "has_gate") and hasattr(module, "is_transposed")]
    assert blocks
    assert [name for name, module in model.named_modules() if module in stacks and id(module) not in inside] == []


@EVERY
def test_calibration_counts_every_token_of_text_and_media(composite: Composite) -> None:
    model = build_composite(composite)
    compressor = compressor_for(model, MSMoE(num_experts=4), composite)
    statistics = compressor.calibrate()
    tokens = sum(inputs_with_media(composite, seed=seed)["input_ids"].numel() for seed in range(3))
    assert statistics.calibration["num_tokens"] == tokens
    for name, block in statistics.blocks.items():
        expected = composite.tokens_of(name, [inputs_with_media(composite, seed=seed) for seed in range(3)])
        assert block.num_tokens == (0 if name.startswith(composite.unreached or "-") else expected), name
        assert block.token_count_E.sum() == 2 * block.num_tokens


@EVERY
def test_copies_of_experts_merge_without_loss(composite: Composite) -> None:
    model = build_composite(composite)
    make_copies(model, LABELS)
    inputs = inputs_with_media(composite)
    expected = output_of(model, inputs)
    compressor = compressor_for(model, MSMoE(num_experts=4), composite)
    same_EE = (torch.tensor(LABELS)[:, None] == torch.tensor(LABELS)).double()
    frequency_E = torch.tensor([9.0, 2.0, 8.0, 1.0, 7.0, 3.0, 6.0, 4.0], dtype=torch.float64)
    statistics = edited(compressor.calibrate(), router_gram_EE=same_EE, token_count_E=frequency_E)
    merged = compressor.apply(statistics)
    kept = {name: 8 if name in unreached(model, composite) else 4 for name in compressor.plan.blocks}
    assert {name: block.num_groups for name, block in compressor.plan.blocks.items()} == kept
    assert_rounding(output_of(merged, inputs), expected)


@EVERY
@pytest.mark.parametrize("method", [MSMoE(num_experts=8), ExpertPruning(num_experts=8)], ids=["merge", "prune"])
def test_keeping_every_expert_changes_nothing(composite: Composite, method: Any) -> None:
    model = build_composite(composite)
    inputs = inputs_with_media(composite)
    expected = output_of(model, inputs)
    compressor = MoECompressor.from_pretrained(model, method, CalibrationConfig([inputs]), progress=False)
    assert torch.equal(output_of(compressor.apply(), inputs), expected)
    assert compressor.plan.is_plain


@EVERY
def test_pruning_experts_that_never_win_changes_nothing(composite: Composite) -> None:
    model = build_composite(composite)
    inputs = inputs_with_media(composite, rows=1)
    part = running_part(model)
    silence(part, [1, 6], inputs)
    expected = output_of(model, inputs)
    method = reached_only(ExpertPruning(num_experts=6, saliency="frequency"), model, composite)
    compressor = MoECompressor.from_pretrained(model, method, CalibrationConfig([inputs]), progress=False)
    statistics = compressor.calibrate()
    for block in statistics.blocks.values():
        assert block.token_count_E[[1, 6]].tolist() == [0, 0]
    counts_E = torch.ones(8, dtype=torch.float64)
    counts_E[[1, 6]] = 0
    pruned = compressor.apply(edited(statistics, token_count_E=counts_E))
    assert_rounding(output_of(pruned, inputs), expected)


@EVERY
@pytest.mark.parametrize("method", ["map", "prune"])
def test_the_order_of_experts_does_not_matter(composite: Composite, method: str) -> None:
    order_E = [2, 0, 3, 1, 5, 7, 4, 6]
    inputs = inputs_with_media(composite)
    results = []
    # Sums that tie in float would be broken by index; a little more for each expert breaks them by expert.
    extra_E = torch.linspace(0.01, 0.05, 8, dtype=torch.float64)
    for order in (list(range(8)), order_E):
        model = build_composite(composite)
        permute_experts(model, order)
        compressor = compressor_for(model, METHODS[method], composite)
        statistics = compressor.calibrate()
        observed = statistics.blocks
        statistics = edited(
            statistics,
            token_count_E=lambda name, observed=observed, order=order: observed[name].token_count_E + extra_E[order],
        )
        results.append(output_of(compressor.apply(statistics), inputs))
    assert_rounding(results[1], results[0])


@EVERY
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_as_a_whole(composite: Composite, method: str, tmp_path: Path) -> None:
    compressor = compressor_for(build_composite(composite), METHODS[method], composite)
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    plain = "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert plain == compressor.plan.is_plain == (method != "map")
    for auto in dict.fromkeys((composite.auto, "AutoModelForMultimodalLM")):
        loaded = getattr(transformers, auto).from_pretrained(tmp_path / "out")
        assert type(loaded) is type(model)
        assert_same_tensors(loaded, model)
        move_out_of_the_file(loaded)
        inputs = inputs_with_media(composite)
        assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    again = CompressionPlan.from_pretrained(tmp_path / "out")
    assert {n: b.labels_E for n, b in again.blocks.items()} == {
        n: b.labels_E for n, b in compressor.plan.blocks.items()
    }


@EVERY
@pytest.mark.parametrize("engine", ["memory", "streaming"])
def test_a_checkpoint_keeps_the_dtype_of_its_config(composite: Composite, engine: str, tmp_path: Path) -> None:
    """Of a model whose class loads the first of its parts in float32, too."""
    model = build_composite(composite, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    method = reached_only(ExpertPruning(num_experts=4, saliency="aimer"), model, composite)
    compressor = MoECompressor.from_pretrained(
        tmp_path / "in", method, engine=engine, output_dir=tmp_path / "out", auto_class=type(model), progress=False
    )
    compressor.apply()
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written["dtype"] == "bfloat16"
    stored = tensors_in(tmp_path / "out").values()
    assert {tensor.dtype for tensor in stored if tensor.is_floating_point()} == {torch.bfloat16}
    assert verify(tmp_path / "out", against=tmp_path / "in").passed


@EVERY
def test_a_config_without_architectures_opens_as_the_whole_model(composite: Composite, tmp_path: Path) -> None:
    model = build_composite(composite)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = open_source(tmp_path)
    assert type(source.skeleton) is type(model)
    assert [found.info for found in source.blocks] == [found.info for found in open_source(model).blocks]


def test_each_pool_of_ernie_counts_its_own_tokens_without_padding() -> None:
    composite = composite_named("ernie4_5_vl_moe")
    model = build_composite(composite)
    inputs = inputs_with_media(composite)
    inputs["attention_mask"][0, -5:] = 0
    inputs["attention_mask"][1, :2] = 0
    real = inputs["attention_mask"].bool()
    vision = inputs["moe_mm_token_type_ids"].bool()
    method = MSMoE(num_experts=4)
    statistics = MoECompressor.from_pretrained(model, method, CalibrationConfig([inputs]), progress=False).calibrate()
    for name, block in statistics.blocks.items():
        mine = vision if name.endswith("vision_moe") else ~vision
        assert block.num_tokens == int((real & mine).sum())
        assert block.token_count_E.sum() == 2 * block.num_tokens
    reached = statistics.calibration["tokens_by_block"]
    assert reached == {
        "model.language_model.layers.*.mlp.text_moe": int((real & ~vision).sum()),
        "model.language_model.layers.*.mlp.vision_moe": int((real & vision).sum()),
    }


@pytest.mark.parametrize(
    "method", [BlockDrop(num_blocks=1), LayerDrop(num_layers=2, layers=[0, 1])], ids=["block", "layer"]
)
def test_a_layer_of_two_pools_is_measured_for_each_on_its_own_tokens(method: Any) -> None:
    composite = composite_named("ernie4_5_vl_moe")
    inputs = inputs_with_media(composite)
    inputs["attention_mask"][0, -5:] = 0
    real, vision = inputs["attention_mask"].bool(), inputs["moe_mm_token_type_ids"].bool()
    config = CalibrationConfig([inputs])
    compressor = MoECompressor.from_pretrained(build_composite(composite), method, config, progress=False)
    for name, block in compressor.calibrate().blocks.items():
        assert block.layer_tokens == int((real & (vision if name.endswith("vision_moe") else ~vision)).sum())
    compressor.apply()


def text_only(composite: Composite) -> CalibrationConfig:
    ids = torch.randint(3, 89, (2, 24), generator=torch.Generator().manual_seed(0))
    return CalibrationConfig([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


@pytest.mark.parametrize("unseen", ["warn", "prune"])
def test_blocks_that_calibration_never_reached_are_not_merged_at_random(unseen: str) -> None:
    composite = composite_named("ernie4_5_vl_moe")
    model = build_composite(composite)
    config = text_only(composite)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressor = MoECompressor.from_pretrained(
        model, MSMoE(num_experts=4), CalibrationConfig(config.source, unseen=unseen), progress=False
    )
    with pytest.raises(ValueError, match=r"reached 2 of the blocks to compress \(.*vision_moe.*protect="):
        compressor.apply()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_unreached_blocks_are_kept_on_request() -> None:
    composite = composite_named("qwen3_omni_moe")
    config = CalibrationConfig([inputs_with_media(composite)], unseen="keep")
    compressor = MoECompressor.from_pretrained(build_composite(composite), MSMoE(num_experts=4), config, progress=False)
    compressor.apply()
    counts = {name.partition(".")[0]: block.num_groups for name, block in compressor.plan.blocks.items()}
    assert counts == {"thinker": 4, "talker": 8}


def test_the_talker_of_an_omni_model_needs_to_be_protected() -> None:
    composite = composite_named("qwen3_omni_moe")
    inputs = inputs_with_media(composite)
    compressor = MoECompressor.from_pretrained(
        build_composite(composite), MSMoE(num_experts=4), CalibrationConfig([inputs]), progress=False
    )
    reached = compressor.calibrate().calibration["tokens_by_block"]
    assert reached == {
        "thinker.model.language_model.layers.*.mlp": inputs["input_ids"].numel(),
        "talker.model.layers.*.mlp": 0,
    }
    with pytest.raises(ValueError, match=r"No calibration token reached 3 of the blocks to compress \(talker"):
        compressor.apply()


def test_towers_with_different_counts_are_plain(tmp_path: Path) -> None:
    composite = composite_named("qwen3_omni_moe")
    model = build_composite(composite)
    method = MSMoE(num_experts=4, routing="reduce", protect=["talker.*"])
    config = CalibrationConfig([inputs_with_media(composite)])
    compressor = MoECompressor.from_pretrained(model, method, config, progress=False)
    assert compressor.preview().plain
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in written
    assert written["thinker_config"]["text_config"]["num_experts"] == 4
    assert written["talker_config"]["text_config"]["num_local_experts"] == 8
    assert written["talker_config"]["text_config"]["num_experts"] == 8


@pytest.mark.parametrize("routing", ["map", "reduce"])
def test_pools_of_one_layer_with_different_counts_are_refused(routing: str) -> None:
    """transformers saves both pools in one list and cuts it into halves on loading."""
    method = MSMoE(num_experts=4, routing=routing, protect=["*.vision_moe"])
    with pytest.raises(ValueError, match=r"text_moe would keep 4 and .*vision_moe 8. Keep the same number in both"):
        MoECompressor.from_pretrained(build_composite(composite_named("ernie4_5_vl_moe")), method)


@pytest.mark.parametrize("protected", ["text", "vision"])
@pytest.mark.parametrize("method", [Rounding(bits=8), LowRankSparse(rank=8)], ids=["bits", "low-rank"])
def test_pools_of_one_layer_in_different_forms_are_refused(method: Any, protected: str) -> None:
    model = build_composite(composite_named("ernie4_5_vl_moe"))
    other = "vision" if protected == "text" else "text"
    with pytest.raises(
        ValueError, match=rf"experts of \S+\.{other}_moe would take .*\.{protected}_moe stay as they are"
    ):
        MoECompressor.from_pretrained(model, replace(method, protect=[f"*.{protected}_moe"]))


def test_a_pool_that_no_token_reached_leaves_the_other_as_it_is() -> None:
    composite = composite_named("ernie4_5_vl_moe")
    ids = {k: v for k, v in inputs_with_media(composite).items() if k in ("input_ids", "attention_mask")}
    text = ids | {"input_ids": ids["input_ids"] % IMAGE}
    text |= {name: torch.zeros_like(ids["input_ids"]) for name in ("mm_token_type_ids", "moe_mm_token_type_ids")}
    compressor = MoECompressor.from_pretrained(
        build_composite(composite), LowRankSparse(rank=8), CalibrationConfig([text], unseen="keep"), progress=False
    )
    with pytest.raises(
        ValueError, match=r"vision_moe stay as they are\. Change both or neither: calibrate with images"
    ):
        compressor.apply()


def test_images_reach_the_statistics() -> None:
    composite = composite_named("qwen3_vl_moe")
    inputs = inputs_with_media(composite)
    other = inputs | {"pixel_values": inputs["pixel_values"].roll(1, 0)}
    grams = []
    for batch in (inputs, other):
        config = CalibrationConfig([batch])
        compressor = MoECompressor.from_pretrained(
            build_composite(composite), MSMoE(num_experts=4), config, progress=False
        )
        statistics = compressor.calibrate()
        grams.append(next(iter(statistics.blocks.values())).router_gram_EE)
    assert (grams[0] - grams[1]).abs().max() > 1e-3 * grams[0].abs().max()


def test_pixels_take_the_dtype_of_the_model() -> None:
    composite = composite_named("qwen3_vl_moe")
    model = build_composite(composite, dtype=torch.bfloat16)
    statistics = compressor_for(model, MSMoE(num_experts=4), composite).calibrate()
    assert {block.num_tokens for block in statistics.blocks.values()} == {3 * 2 * 24}
    assert (inputs_with_media(composite)["input_ids"] == IMAGE).sum() == 2 * 4
