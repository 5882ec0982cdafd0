"""The bundled reference MoEs are real language models whose routing matters; M-SMoE beats chance on the first."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.evaluation import check_disjoint, evaluate_many
from optimum_moe.stages import Stage
from optimum_moe.surgeons import find_blocks

REFERENCE = Path(__file__).parent / "data" / "reference"
DEEPSEEK = Path(__file__).parent / "data" / "reference_deepseek"
MODELS = {REFERENCE.name: REFERENCE / "model", DEEPSEEK.name: DEEPSEEK / "model"}
RANDOM_HALF = {
    REFERENCE.name: ExpertPruning(num_experts=16, saliency="random"),
    DEEPSEEK.name: ExpertPruning(num_experts=12, saliency="random"),
}
pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def documents(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (REFERENCE / name).read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def shuffled(folder: Path) -> PreTrainedModel:
    """The model whose routers select other experts: permuted weights are permuted ids."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for found in find_blocks(model):
        order_E = torch.randperm(found.info.num_experts, generator=generator)
        for weight_EXY in found.surgeon.expert_parameters(found.module(model)):
            weight_EXY.copy_(weight_EXY[order_E])
    return model


def scores_of(folder: Path, methods: dict[str, Stage]) -> dict[str, dict[str, float]]:
    """Scores on held-out text of the original, the shuffled and the compressed models."""
    calibration = CalibrationConfig(str(REFERENCE / "calibration.jsonl"), sequence_length=256, max_tokens=16384)
    models = {"original": AutoModelForCausalLM.from_pretrained(folder), "shuffled": shuffled(folder)}
    statistics = None
    for name, method in methods.items():
        compressor = MoECompressor.from_pretrained(folder, method, calibration, progress=False)
        statistics = statistics or compressor.calibrate()
        models[name] = compressor.apply(statistics=statistics)
    results = evaluate_many(
        models,
        str(REFERENCE / "held_out.jsonl"),
        reference=models["original"],
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_tokens=8192,
        tasks=("perplexity", "agreement"),
        progress=False,
    )
    return {name: {key: score.value for key, score in result.scores.items()} for name, result in results.items()}


@pytest.fixture(scope="module")
def all_scores() -> dict[str, dict[str, dict[str, float]]]:
    methods = {
        "m-smoe": MSMoE(num_experts=16),
        "random groups": MSMoE(num_experts=16, grouping="random"),
        "no alignment": MSMoE(num_experts=16, align=False),
    }
    return {
        name: scores_of(folder, {**(methods if name == REFERENCE.name else {}), "random pruning": RANDOM_HALF[name]})
        for name, folder in MODELS.items()
    }


@pytest.fixture(params=MODELS)
def scores(request: pytest.FixtureRequest, all_scores: dict) -> dict[str, dict[str, float]]:
    return all_scores[request.param]


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
def test_msmoe_beats_the_baseline(all_scores, baseline: str) -> None:
    scores = all_scores[REFERENCE.name]
    assert scores["m-smoe"]["perplexity"] < scores[baseline]["perplexity"]
    assert scores["m-smoe"]["kl"] < scores[baseline]["kl"]


def test_the_bundle_is_small_and_disjoint() -> None:
    assert (REFERENCE / "model" / "model.safetensors").stat().st_size <= 10_000_000
    assert (DEEPSEEK / "model" / "model.safetensors").stat().st_size <= 8_000_000
    texts = [REFERENCE / name for name in ("calibration.jsonl", "held_out.jsonl")]
    assert sum(path.stat().st_size for path in texts) <= 1_000_000
    assert check_disjoint(documents("calibration.jsonl"), documents("held_out.jsonl")) == 0.0


def test_both_models_have_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (MODELS[DEEPSEEK.name] / name).read_bytes() == (MODELS[REFERENCE.name] / name).read_bytes()


def test_the_second_model_routes_as_deepseek_v3_does() -> None:
    config = json.loads((MODELS[DEEPSEEK.name] / "config.json").read_text(encoding="utf-8"))
    assert (config["n_group"], config["topk_group"], config["n_shared_experts"]) == (2, 1, 1)
    tensors = load_file(MODELS[DEEPSEEK.name] / "model.safetensors")
    biases = [tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    for bias_E in biases:
        # In bfloat16 most of the steps of 0.001 with which they were trained would be lost.
        assert bias_E.dtype == torch.float32
        assert bias_E.std() > 0.01


def test_the_correction_bias_balances_the_experts_and_both_router_groups() -> None:
    data = CalibrationConfig(str(REFERENCE / "held_out.jsonl"), sequence_length=256, max_tokens=8192)
    compressor = MoECompressor.from_pretrained(
        MODELS[DEEPSEEK.name], ExpertPruning(num_experts=12, saliency="frequency"), data, progress=False
    )
    for block in compressor.calibrate().blocks.values():
        share_E = block.frequency_E
        assert share_E.std() / share_E.mean() < 0.7
        assert 0.35 < share_E[:12].sum() < 0.65
