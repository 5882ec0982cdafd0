"""Recipes that are drawn at random: what is not refused gives the same in both engines, and loads as it was cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from optimum_moe import (
    BlockDrop,
    ByteBudget,
    CalibrationConfig,
    ExpertMerging,
    ExpertPruning,
    ExpertSkipping,
    LayerDrop,
    LowRankSparse,
    MoECompressor,
    NeuronPruning,
    Rounding,
    WeightPruning,
    verify,
)
from optimum_moe.calibration.observe import placed
from optimum_moe.stages import Stage
from tests.composites_table import COMPOSITES, build_composite, inputs_with_media
from tests.mtp_checkpoints import PREFIXES, save_with_mtp
from tests.quantized_checkpoints import to_fp8, to_mxfp4
from tests.test_reload import move_out_of_the_file
from tests.tiny_checkpoints import tensors_in
from tests.tiny_models import OTHERS, TARGETS, Target, build, by_name, inputs_for, logits_of

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss"),
]

Draw = Callable[[random.Random], Stage]
# In the order in which stages can follow one another; of the last group only one can.
GROUPS: tuple[tuple[Draw, ...], ...] = (
    (lambda rng: BlockDrop(num_blocks=1),),
    (
        lambda rng: ExpertPruning(num_experts=rng.randint(2, 6), saliency=rng.choice(["reap", "aimer", "frequency"])),
        lambda rng: ExpertMerging(num_experts=rng.randint(2, 6), routing=rng.choice(["map", "reduce"])),
        lambda rng: ExpertMerging(keep_ratio=0.5, allocation="adaptive", align=rng.random() < 0.5),
        lambda rng: ExpertSkipping(),
    ),
    (lambda rng: NeuronPruning(num_neurons=8, curvature=False, refit=rng.random() < 0.5),),
    (
        lambda rng: LowRankSparse(rank=8, density=rng.choice([None, 0.3]), layers=layers(rng)),
        lambda rng: Rounding(bits=rng.choice([4, 8]), layers=layers(rng)),
        lambda rng: WeightPruning(rng.choice(["magnitude", "wanda"]), layers=layers(rng)),
        lambda rng: ByteBudget(
            share=rng.choice([0.25, 0.5, 0.75]),
            runs_in=rng.choice(["any", "transformers"]),
            curvature=False,
        ),
        lambda rng: LayerDrop(num_layers=1),
    ),
)


def layers(rng: random.Random) -> list[int] | None:
    return rng.choice([None, [0], [1]])


def drawn(rng: random.Random) -> list[Stage]:
    """One to four stages in a possible order; the recipe may still be refused."""
    chosen = [rng.choice(group)(rng) for group in GROUPS if rng.random() < 0.5]
    return chosen or [rng.choice(GROUPS[-1])(rng)]


@dataclass(frozen=True)
class Source:
    """A checkpoint that was drawn.

    Args:
        model_class: Loads it.
        inputs: From a seed to model inputs.
        settings: What compressing it needs.
    """

    model_class: Any
    inputs: Callable[[int], dict[str, torch.Tensor]]
    settings: Mapping[str, Any] = field(default_factory=dict)


def text_source(rng: random.Random, folder: Path) -> Source:
    target = rng.choice([target for target in (*TARGETS, *OTHERS) if target.inputs == "input_ids"])
    build(target, seed=rng.randrange(1000)).save_pretrained(folder)
    return of_target(target)


def composite_source(rng: random.Random, folder: Path) -> Source:
    composite = rng.choice([c for c in COMPOSITES if transformers.__version__ != c.broken_in and not c.unreached])
    dtype = rng.choice([torch.float32, torch.bfloat16])
    model = build_composite(composite, seed=rng.randrange(1000), dtype=dtype)
    model.save_pretrained(folder)

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        return placed(inputs_with_media(composite, rows=4, seed=seed), model)

    return Source(type(model), inputs)


def source_with_mtp(rng: random.Random, folder: Path) -> Source:
    name = rng.choice(sorted(PREFIXES))
    save_with_mtp(folder, name, rng.choice([torch.float32, torch.bfloat16]))
    return of_target(by_name(name), mtp=rng.choice(["copy", "cut", "drop"]))


def quantized_source(rng: random.Random, folder: Path) -> Source:
    target = by_name(rng.choice(["qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss"]))
    fields = {"intermediate_size": 64} if target.name == "gpt_oss" else {}
    plain = folder.with_name("plain")
    build(target, dtype=torch.bfloat16, **fields).save_pretrained(plain)
    if target.name == "gpt_oss":
        to_mxfp4(plain, folder)
    else:
        to_fp8(plain, folder)
    return of_target(target, dequantize=True)


def of_target(target: Target, **settings: Any) -> Source:
    def inputs(seed: int) -> dict[str, torch.Tensor]:
        return inputs_for(target, rows=4, length=32, seed=seed)

    return Source(getattr(transformers, target.architecture), inputs, settings)


SOURCES = {"text": text_source, "media": composite_source, "mtp": source_with_mtp, "quantized": quantized_source}
DRAWS = {"text": 120, "media": 60, "mtp": 20, "quantized": 20}


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, count in DRAWS.items() for seed in range(count)])
def test_a_drawn_recipe_is_refused_at_once_or_loads(kind: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    source = SOURCES[kind](rng, tmp_path / "model")
    stages, propagates = drawn(rng), rng.random() < 0.3
    data = CalibrationConfig([source.inputs(row) for row in range(2)])
    settings = {"progress": False, "auto_class": source.model_class, "report": False, **source.settings}
    try:
        compressor = MoECompressor.from_pretrained(
            tmp_path / "model", stages, data, error_propagation=propagates, engine="memory", **settings
        )
        foretold = compressor.preview().after.bytes
    except ValueError as refusal:
        pytest.skip(f"refused: {refusal}")
    cut = compressor.apply()
    compressor.save_pretrained(tmp_path / "memory")
    MoECompressor.from_pretrained(
        tmp_path / "model",
        stages,
        data,
        error_propagation=propagates,
        engine="streaming",
        output_dir=tmp_path / "streaming",
        **settings,
    ).apply()
    one, other = tensors_in(tmp_path / "memory"), tensors_in(tmp_path / "streaming")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    counted_later = any(getattr(stage, "allocation", None) == "adaptive" for stage in stages)
    some_blocks = any(getattr(stage, "layers", None) for stage in stages)
    if not any(stage.drops_layers for stage in stages) and not (counted_later and some_blocks):
        # Which layer goes is not known before, nor how many experts are left in the one that a later stage changes.
        assert compressor.measured().after.bytes <= foretold
    inputs = source.inputs(2)
    loaded = source.model_class.from_pretrained(tmp_path / "memory")
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, inputs), logits_of(cut, inputs))
    assert verify(tmp_path / "streaming", against=tmp_path / "model", inputs=inputs).passed
