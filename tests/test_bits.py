"""Experts of eight and four bits in a byte budget: what they store, what they lose, and that they load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, MoECompressor, Rounding
from optimum_moe.formats import budget_formats, build_expert, candidates
from optimum_moe.formats.budget import candidate_bytes
from optimum_moe.verification import verify
from tests.algorithms.test_byte_budget import HIDDEN, INNER, make_expert, make_tokens, measured
from tests.tiny_models import build, in_full, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")
FAMILIES = ("qwen3_moe", "gpt_oss", "switch_transformers", "deepseek_v3", "nemotron_h", "llama4")
"""Joint gate and up; router groups; biases; without a gate; inputs scaled by the router; encoder-decoder."""


def test_points_are_what_build_makes_of_them() -> None:
    expert, tokens = make_expert(), make_tokens(draws=2)
    points = candidates(expert, tokens, formats=["narrow", "int8", "int4"], itemsize=2)
    few = {point.candidate.format: point for point in points if point.candidate.neurons == INNER}
    assert few["int4"].bytes == 3 * INNER * HIDDEN / 2 + 2 * (2 * INNER + HIDDEN)
    assert few["int8"].bytes == 3 * INNER * HIDDEN + 2 * (2 * INNER + HIDDEN)
    for point in points:
        stored = build_expert(expert, tokens, point.candidate)
        # Of a float32 expert, whose scales have four bytes.
        assert stored.bytes(4) == candidate_bytes(point.candidate, expert, 4, 4)
        if point.candidate.format in ("int8", "int4"):
            # Estimated from fits to half of the tokens.
            assert 0.5 < point.damage / measured(expert, tokens, stored) < 3
    empty = next(point for point in points if point.candidate.format == "empty")
    assert few["int8"].damage < 1e-3 * empty.damage
    assert few["int8"].damage < few["int4"].damage < 0.03 * empty.damage


def test_bits_are_tried_only_where_they_are_asked_for() -> None:
    found = {point.candidate.format for point in candidates(make_expert(), make_tokens())}
    assert not found & {"int8", "int4"}
    assert not {"int8", "int4"} & set(ByteBudget(share=0.5, runs_in="transformers").tried_formats)
    assert ByteBudget(share=0.5, runs_in="transformers", bits=[4]).tried_formats == (*budget_formats(), "int4")


@pytest.mark.parametrize("name", [*FAMILIES[:3], *in_full(*FAMILIES[3:])])
def test_models_of_few_bits_load(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "original")
    data = CalibrationConfig([inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)])
    outputs = []
    for engine in ("memory", "streaming"):
        stage = ByteBudget(share=0.4, runs_in="transformers", bits=[8, 4], curvature=False)
        given = {"engine": engine, "output_dir": tmp_path / engine} if engine == "streaming" else {}
        compressor = MoECompressor.from_pretrained(tmp_path / "original", stage, data, progress=False, **given)
        compressor.apply()
        if engine == "memory":
            compressor.save_pretrained(tmp_path / engine)
        loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / engine)
        outputs.append(logits_of(loaded, inputs_for(name)))
        used = set().union(*(plan.sizes.parts for plan in compressor.plan.blocks.values()))
        assert used & {"int8", "int4"}
        assert verify(tmp_path / engine, against=tmp_path / "original", inputs=inputs_for(name)).passed
    assert torch.equal(*outputs)


@pytest.mark.parametrize("bits", [[8], [4]])
def test_a_share_below_the_bits_of_all_experts_is_kept(bits: list[int], tmp_path: Path) -> None:
    model = build("qwen3_moe")
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(3)])
    before = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n)
    stage = ByteBudget(share=0.1, runs_in="transformers", bits=bits)
    cut = MoECompressor.from_pretrained(model, stage, data, progress=False).apply()
    after = sum(t.numel() * t.element_size() for n, t in cut.state_dict().items() if ".experts." in n)
    assert 0.08 * before < after <= 0.1 * before


@pytest.mark.parametrize("stage", [Rounding(), Rounding(bits=8), Rounding(fitted=False)])
def test_all_experts_can_be_rounded(stage: Rounding, tmp_path: Path) -> None:
    model = build("qwen3_moe")
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(3)])
    compressor = MoECompressor.from_pretrained(model, stage, data if stage.needs else None, progress=False)
    cut = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    loaded = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")
    inputs = inputs_for("qwen3_moe")
    found, expected = logits_of(loaded, inputs), logits_of(build("qwen3_moe"), inputs)
    assert torch.equal(found, logits_of(cut, inputs))
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < (0.01 if stage.bits == 8 else 0.1)


def test_rounding_follows_pruning(tmp_path: Path) -> None:
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(3)])
    stages = [ExpertPruning(num_experts=4), Rounding()]
    compressor = MoECompressor.from_pretrained(build("qwen3_moe"), stages, data, progress=False)
    compressor.apply()
    assert all(plan.num_groups == 4 for plan in compressor.plan.blocks.values())
    assert all(set(plan.sizes.parts) == {"int4"} for plan in compressor.plan.blocks.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": [3]}, r"bits=\[3\] can hold \[4, 8\], got 3"),
        ({"bits": [4], "runs_in": "any"}, r'Pass runs_in="transformers", or plan for the quantizer'),
    ],
)
def test_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ByteBudget(share=0.5, **{"runs_in": "transformers", **given})


def test_rows_that_fill_no_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 numbers of 4 bits fill a word, which does not divide the 20 columns"):
        MoECompressor.from_pretrained(build("qwen3_moe", moe_intermediate_size=20), Rounding(), progress=False)
    with pytest.raises(ValueError, match=r"bits=2 must be one of \[4, 8\]"):
        Rounding(bits=2)
