"""Recipes that are drawn at random: what is not refused gives the same in both engines, and loads as it was cut."""

from __future__ import annotations

import random
from collections.abc import Callable
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
from optimum_moe.stages import Stage
from tests.test_reload import move_out_of_the_file
from tests.tiny_checkpoints import tensors_in
from tests.tiny_models import OTHERS, TARGETS, Target, build, inputs_for, logits_of

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


@pytest.mark.parametrize("seed", range(120))
def test_a_drawn_recipe_is_refused_at_once_or_loads(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    target: Target = rng.choice([target for target in (*TARGETS, *OTHERS) if target.inputs == "input_ids"])
    stages, propagates = drawn(rng), rng.random() < 0.3
    model_class = getattr(transformers, target.architecture)
    build(target, seed=seed).save_pretrained(tmp_path / "model")
    data = CalibrationConfig([inputs_for(target, rows=4, length=32, seed=row) for row in range(2)])
    settings: dict[str, Any] = {"progress": False, "auto_class": model_class, "report": False}
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
    if not any(stage.drops_layers for stage in stages):
        # Which layer goes is not known before; those of hybrid models differ in size.
        assert compressor.measured().after.bytes <= foretold
    inputs = inputs_for(target)
    loaded = model_class.from_pretrained(tmp_path / "memory")
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, inputs), logits_of(cut, inputs))
    assert verify(tmp_path / "streaming", against=tmp_path / "model", inputs=inputs).passed
