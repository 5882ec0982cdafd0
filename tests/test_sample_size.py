"""The number of tokens that the byte budget samples: all that are observed, as far as memory and disk allow."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor, MSMoE, Statistics
from optimum_moe.checkpoint import shards
from optimum_moe.engine.sample_size import Room, choose_sample_size, fitting_tokens
from optimum_moe.model_info import BlockInfo
from optimum_moe.recipe import Recipe
from tests.test_resume import contents, progress, stop_at, stream
from tests.tiny_models import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")

BUDGET = Recipe((ByteBudget(share=0.5),))
NEEDS = BUDGET.needs
BLOCKS = [BlockInfo(f"layers.{n}", n, 8, 2, 1, 16, 32, 1536, 1536, 32, expert_itemsize=2.0) for n in range(3)]
TOKEN = 2 * 32 * 2 + 2 * (8 + 2)
"""Bytes of a token at a block: input and gradient in bfloat16, and two experts with their weights."""


@dataclass(frozen=True)
class SmallSample(ByteBudget):
    """The byte budget with samples that tests can observe."""

    name: ClassVar[str] = "small-sample"

    @property
    def sample_size(self) -> int:
        return 48


def data(**settings: int) -> CalibrationConfig:
    """Of 384 tokens."""
    return CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(3)], **settings)


@pytest.mark.parametrize(
    ("observed", "room", "expected"),
    [
        # Few tokens need no more than the stage does, whatever the memory.
        (1_000, 0, 32_768),
        (32_768, 10**9, 32_768),
        # Doubled as long as it fits.
        (40_000, 65_536, 65_536),
        (40_000, 65_535, 32_768),
        (10**6, 131_071, 65_536),
        (10**6, 131_072, 131_072),
        # Four times is the most, since time grows too.
        (10**6, 10**9, 131_072),
    ],
)
def test_the_sample_grows_by_doubling(observed: int, room: int, expected: int) -> None:
    plenty = 10**15
    for free in (
        Room(memory=4 * room * 3 * TOKEN),
        # Streaming has one block in memory at a time.
        Room(memory=4 * room * TOKEN, disk=plenty),
        Room(memory=plenty, disk=4 * room * 3 * TOKEN),
        Room(memory=plenty, device=4 * room * (TOKEN + 4 * 4 * 32)),
    ):
        assert choose_sample_size(BUDGET, BLOCKS, observed, free, NEEDS) == expected


def test_other_recipes_take_what_they_need() -> None:
    assert choose_sample_size(Recipe((MSMoE(num_experts=4),)), BLOCKS, 10**6, Room(memory=10**15), NEEDS) == 4096
    both = Recipe((MSMoE(num_experts=4), ByteBudget(share=0.5, runs_in="transformers")))
    assert choose_sample_size(both, BLOCKS, 10**6, Room(memory=10**15), NEEDS) == 131_072
    assert choose_sample_size(BUDGET, BLOCKS, 10**6, Room(memory=-1), NEEDS) == 32_768
    just = Room(memory=4 * 65_536 * 3 * TOKEN)
    assert choose_sample_size(BUDGET, BLOCKS, 10**6, just, NEEDS) == 65_536
    assert choose_sample_size(BUDGET, BLOCKS, 10**6, just, NEEDS | {"residual"}) == 32_768


@pytest.mark.parametrize(("everything", "rows"), [(False, 2), (True, 3)], ids=["of the recipe", "of everything"])
def test_the_bytes_of_a_token_are_those_that_are_kept(everything: bool, rows: int) -> None:
    compressor = MoECompressor.from_pretrained(build("qwen3_moe"), ByteBudget(share=0.5), data(), progress=False)
    if everything:
        compressor.calibrate()
    else:
        compressor.apply()
    statistics = compressor.statistics
    kept = 0
    for block in statistics.blocks.values():
        sample = block.reservoir
        tensors = {id(t): t for f in fields(sample) if (t := getattr(sample, f.name)) is not None}
        kept += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert len(sample.index_SK) == 384
    blocks = compressor.source.info.blocks
    assert fitting_tokens(blocks, rows=rows, room=Room(memory=4 * kept)) == 384
    assert fitting_tokens(blocks, rows=rows, room=Room(memory=4 * kept - 1)) == 383


@pytest.mark.parametrize(("explicit", "sampled"), [(None, 192), (100, 100), (300, 300)])
def test_the_number_is_recorded_and_said(explicit: int | None, sampled: int, tmp_path: Path) -> None:
    """384 tokens are observed; four times the need of 48 are the most, and an explicit number stays what it is."""
    settings = {} if explicit is None else {"reservoir_tokens": explicit}
    stage = SmallSample(share=0.5)
    compressor = MoECompressor.from_pretrained(build("qwen3_moe"), stage, data(**settings), progress=False)
    compressor.apply()
    assert {len(block.reservoir.index_SK) for block in compressor.statistics.blocks.values()} == {sampled}
    assert compressor.plan.calibration["reservoir_tokens"] == sampled
    (said,) = [remark for remark in compressor.plan.remarks if "reservoir_tokens" in remark]
    assert f"a sample of {sampled} of 384 calibration tokens" in said
    assert "Calibrate with reservoir_tokens=384 to use all" in said
    compressor.save_pretrained(tmp_path / "out")
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["calibration"]["reservoir_tokens"] == sampled
    compressor.statistics.save_pretrained(tmp_path / "statistics")
    assert Statistics.from_pretrained(tmp_path / "statistics").calibration["reservoir_tokens"] == sampled


def test_a_resumed_run_keeps_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupted run has another number than this machine would choose now."""
    build("qwen3_moe").save_pretrained(tmp_path / "original")
    stage = SmallSample(share=0.5, runs_in="transformers")
    expected = contents(stream(tmp_path / "original", tmp_path / "expected", stage, data(reservoir_tokens=96)))
    automatic = contents(stream(tmp_path / "original", tmp_path / "automatic", stage, data()))
    assert automatic["plan.json"] != expected["plan.json"]
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at(patched, shards, "put_in_place", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stream(tmp_path / "original", out, stage, data(reservoir_tokens=96))
    assert progress(out)["identity"]["number of sampled tokens"] == 96
    assert progress(out)["finished"]
    with pytest.raises(ValueError, match=r"unfinished run with another number of sampled tokens: 96 there, 192 now"):
        stream(tmp_path / "original", out, stage, data(reservoir_tokens=192))
    found = contents(stream(tmp_path / "original", out, stage, data()))
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= {"README.md", "report.html"}
