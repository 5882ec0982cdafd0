"""On the reference model the output error of factorized matrices is the closed form, and whitening pays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe import CalibrationConfig, LowRankSparse, MoECompressor, Statistics
from optimum_moe.algorithms.expert_tokens import SampledTokens, single_expert
from optimum_moe.algorithms.low_rank import decompose
from optimum_moe.checkpoint.headers import data_start
from optimum_moe.evaluation import evaluate_many
from optimum_moe.formats.uniform import weighted_inputs
from optimum_moe.surgeons import find_blocks

REFERENCE = Path(__file__).parent / "data" / "reference"
# The shorter side of its matrices is 80.
RANKS = range(8, 80, 8)
pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def compressor_for(method: LowRankSparse) -> MoECompressor:
    calibration = CalibrationConfig(str(REFERENCE / "calibration.jsonl"), sequence_length=256, max_tokens=8192)
    return MoECompressor.from_pretrained(REFERENCE / "model", method, calibration, progress=False)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return compressor_for(LowRankSparse(rank=8)).calibrate()


def matrices(statistics: Statistics) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(O, X) matrices that tokens reached, with the (P, X) weighted inputs of each."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "model")
    for found in find_blocks(model):
        view = found.surgeon.experts(found.module(model))
        seen = statistics.blocks[found.info.name].reservoir
        sample = SampledTokens(seen.experts_input_SH, seen.index_SK, seen.weights_SK)
        for index in range(view.num_experts):
            expert, tokens = single_expert(view, index), sample.of_expert(index)
            for name, matrix_OX in (("gate", expert.gate_IH), ("up", expert.up_IH), ("down", expert.down_HI)):
                rows_PX = weighted_inputs(expert, tokens, name)
                if rows_PX is not None:
                    yield matrix_OX, rows_PX


@torch.no_grad()
def test_the_output_error_is_the_closed_form_and_whitening_lowers_it_at_every_rank(statistics: Statistics) -> None:
    errors = {"whitened": torch.zeros(len(RANKS)), "plain": torch.zeros(len(RANKS))}
    looked_at, worse = 0, 0
    for matrix_OX, rows_PX in matrices(statistics):
        whitened, plain = decompose(matrix_OX, input_rows_PX=rows_PX), decompose(matrix_OX)
        total = whitened.dropped_energy(0)
        for place, rank in enumerate(RANKS):
            found = {}
            for name, spectrum in (("whitened", whitened), ("plain", plain)):
                change_OX = matrix_OX.double() - spectrum.truncated(rank).densified().double()
                found[name] = float((rows_PX.double() @ change_OX.T).square().sum())
                errors[name][place] += found[name]
                if name == "whitened":
                    closed = whitened.dropped_energy(rank) - whitened.input_ridge * float(change_OX.square().sum())
                    assert found[name] == pytest.approx(closed, rel=1e-3, abs=1e-7 * total)
            worse += found["whitened"] > found["plain"] + 1e-7 * total
        looked_at += 1
    assert looked_at >= 0.9 * 4 * 32 * 3
    assert worse == 0
    assert (errors["whitened"] < errors["plain"]).all()
    # Not by a hair: at half of the numbers (rank 24) by more than a third.
    assert errors["whitened"][2] < 0.65 * errors["plain"][2]


def test_whitened_experts_are_closer_to_the_original_on_held_out_text(statistics: Statistics) -> None:
    models = {"original": AutoModelForCausalLM.from_pretrained(REFERENCE / "model")}
    for name, whiten in (("whitened", True), ("plain", False)):
        models[name] = compressor_for(LowRankSparse(rank=24, density=None, whiten=whiten)).apply(statistics)
    results = evaluate_many(
        models,
        str(REFERENCE / "held_out.jsonl"),
        reference=models["original"],
        tokenizer=AutoTokenizer.from_pretrained(REFERENCE / "model"),
        max_tokens=8192,
        tasks=("perplexity", "agreement"),
        progress=False,
    )
    scores = {name: {key: score.value for key, score in result.scores.items()} for name, result in results.items()}
    assert scores["whitened"]["kl"] < 0.9 * scores["plain"]["kl"]
    assert scores["original"]["perplexity"] < scores["whitened"]["perplexity"] < scores["plain"]["perplexity"]


def test_the_file_of_the_reference_model_is_as_large_as_the_preview_says(
    statistics: Statistics, tmp_path: Path
) -> None:
    compressor = compressor_for(LowRankSparse(rank=16, density=0.1))
    expected = compressor.preview().after.bytes
    compressor.apply(statistics)
    compressor.save_pretrained(tmp_path / "out")
    assert compressor.measured().after.bytes == expected
    file = tmp_path / "out" / "model.safetensors"
    # Every block has a guard of one number.
    assert file.stat().st_size - data_start(file) == expected + 2 * len(compressor.plan.blocks)
