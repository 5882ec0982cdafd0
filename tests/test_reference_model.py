"""The bundled reference MoE is a real language model whose routing matters, and M-SMoE beats chance on it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.evaluation import check_disjoint, evaluate_many
from optimum_moe.surgeons import find_blocks

REFERENCE = Path(__file__).parent / "data" / "reference"
pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def documents(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (REFERENCE / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, float]]:
    calibration = CalibrationConfig(str(REFERENCE / "calibration.jsonl"), sequence_length=256, max_tokens=16384)
    shuffled = AutoModelForCausalLM.from_pretrained(REFERENCE / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for found in find_blocks(shuffled):
            rows = found.surgeon.router_rows(found.module(shuffled))
            rows.copy_(rows[torch.randperm(len(rows), generator=generator)].clone())
    models = {"original": AutoModelForCausalLM.from_pretrained(REFERENCE / "model"), "shuffled": shuffled}
    methods = {
        "m-smoe": MSMoE(num_experts=16),
        "random groups": MSMoE(num_experts=16, grouping="random"),
        "no alignment": MSMoE(num_experts=16, align=False),
        "random pruning": ExpertPruning(num_experts=16, saliency="random"),
    }
    statistics = None
    for name, method in methods.items():
        compressor = MoECompressor.from_pretrained(REFERENCE / "model", method, calibration, progress=False)
        statistics = statistics or compressor.calibrate()
        models[name] = compressor.apply(statistics=statistics)
    results = evaluate_many(
        models,
        str(REFERENCE / "held_out.jsonl"),
        reference=models["original"],
        tokenizer=AutoTokenizer.from_pretrained(REFERENCE / "model"),
        max_tokens=8192,
        tasks=("perplexity", "agreement"),
        progress=False,
    )
    return {name: {key: score.value for key, score in result.scores.items()} for name, result in results.items()}


def unigram_perplexity() -> float:
    """On held-out text, of a unigram model of that very text: the best that any unigram model can do."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "model")
    counts = Counter(token for text in documents("held_out.jsonl") for token in tokenizer(text)["input_ids"])
    total = sum(counts.values())
    return math.exp(-sum(count / total * math.log(count / total) for count in counts.values()))


def test_perplexity_is_at_most_a_third_of_a_unigram_models(scores) -> None:
    assert scores["original"]["perplexity"] <= unigram_perplexity() / 3


def test_routing_matters(scores) -> None:
    assert scores["shuffled"]["perplexity"] >= 1.2 * scores["original"]["perplexity"]


def test_half_of_the_experts_cannot_go_unnoticed(scores) -> None:
    assert scores["random pruning"]["perplexity"] >= 1.1 * scores["original"]["perplexity"]


@pytest.mark.parametrize("baseline", ["random groups", "random pruning", "no alignment"])
def test_msmoe_beats_the_baseline(scores, baseline: str) -> None:
    assert scores["m-smoe"]["perplexity"] < scores[baseline]["perplexity"]
    assert scores["m-smoe"]["kl"] < scores[baseline]["kl"]


def test_the_bundle_is_small_and_disjoint() -> None:
    assert (REFERENCE / "model" / "model.safetensors").stat().st_size <= 10_000_000
    texts = [REFERENCE / name for name in ("calibration.jsonl", "held_out.jsonl")]
    assert sum(path.stat().st_size for path in texts) <= 1_000_000
    assert check_disjoint(documents("calibration.jsonl"), documents("held_out.jsonl")) == 0.0
