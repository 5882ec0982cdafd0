"""The whole evaluation on tiny models: numbers against direct computations, determinism, errors, saving."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import T5Config, T5ForConditionalGeneration

from optimum_moe.calibration.data import CalibrationConfig, build_batches
from optimum_moe.evaluation import EvaluationResult, evaluate, evaluate_many, format_results, paired_difference
from optimum_moe.evaluation.scores import Score

SMALL = {"max_tokens": 1024, "sequence_length": 64, "num_questions": 8, "num_prompts": 4, "new_tokens": 8}
QUIET = {**SMALL, "progress": False}


@pytest.fixture(scope="module")
def results(model, text, tokenizer, make_model) -> dict[str, EvaluationResult]:
    models = {"same": model, "copy": make_model(), "other": make_model(seed=1)}
    return evaluate_many(models, text, reference=model, tokenizer=tokenizer, **QUIET)


def rows_of(text, tokenizer) -> torch.Tensor:
    config = CalibrationConfig(text, max_tokens=1024, sequence_length=64)
    return torch.cat([batch["input_ids"] for batch in build_batches(config, tokenizer)])


def test_perplexity_is_the_direct_one(results, model, text, tokenizer):
    ids = rows_of(text, tokenizer)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    score = results["same"].scores["perplexity"]
    assert score.value == pytest.approx(expected, rel=1e-5)
    assert score.count == len(ids) == 16
    assert score.low < score.value < score.high


def test_agreement_is_the_direct_one(results, model, text, tokenizer, make_model):
    ids, other = rows_of(text, tokenizer), make_model(seed=1)
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].log_softmax(-1).flatten(0, 1) for m in (model, other))
    scores = results["other"].scores
    assert scores["kl"].value == pytest.approx(kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert scores["top1_agreement"].value == pytest.approx(same, abs=1e-9)


def test_a_model_agrees_with_itself(results):
    for name in ("same", "copy"):
        scores = results[name].scores
        assert scores["kl"].value == pytest.approx(0, abs=1e-6)
        for score in ("top1_agreement", "generation_agreement", "prefix_agreement"):
            assert scores[score].value == 1
    assert results["other"].scores["kl"].value > 0.1
    assert results["other"].scores["generation_agreement"].value < 1


def test_paired_difference(results):
    for score in results["same"].scores:
        difference, low, high = paired_difference(results["same"], results["copy"], score)
        assert low <= 0 <= high
        assert difference == pytest.approx(0, abs=1e-5)
    difference, low, high = paired_difference(results["other"], results["same"], "kl")
    assert 0 < low < difference < high
    assert difference == results["other"].scores["kl"].value - results["same"].scores["kl"].value
    with pytest.raises(ValueError, match="No score 'kll'; did you mean 'kl'"):
        paired_difference(results["same"], results["copy"], "kll")


def test_results_of_different_text_do_not_pair(results, model, text, tokenizer):
    elsewhere = evaluate(model, text[:10], model, tokenizer, **QUIET)
    with pytest.raises(ValueError, match="differ in hash"):
        paired_difference(results["same"], elsewhere, "kl")


def test_one_model_alone_scores_the_same_again(results, model, text, tokenizer, make_model):
    alone = evaluate(make_model(seed=1), text, model, tokenizer, **QUIET)
    assert alone.scores == results["other"].scores
    assert evaluate(model, text, None, tokenizer, **QUIET, seed=1).data["hash"] != alone.data["hash"]


def test_save_and_load(results, tmp_path):
    results["other"].save(tmp_path / "result.json")
    loaded = EvaluationResult.load(tmp_path / "result.json")
    assert loaded.scores == results["other"].scores
    assert loaded.units == results["other"].units
    assert paired_difference(loaded, results["other"], "perplexity")[0] == 0
    (tmp_path / "else.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not a saved EvaluationResult"):
        EvaluationResult.load(tmp_path / "else.json")


def test_table(results):
    lines = format_results(results).split("\n")
    assert lines[0].split() == ["score", "same", "copy", "other"]
    assert [line.split()[0] for line in lines[1:]] == list(results["other"].scores)
    assert lines[1].startswith("perplexity (n=16)  ")
    assert f"  {results['other'].scores['perplexity'].value:.3f} [" in lines[1]
    start = lines[0].index("other")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)
    tiny = replace(results["other"], scores={"kl": Score(2.3e-6, 0.0, 1.2e-5, 16)})
    assert format_results({"it": tiny}).split("\n")[1] == "kl (n=16)  2e-06 [0.00000, 0.00001]"
    with pytest.raises(ValueError, match="no result"):
        format_results({})


def test_without_reference_there_is_no_agreement(model, text, tokenizer):
    scores = evaluate(model, text, tokenizer=tokenizer, **QUIET).scores
    assert list(scores) == ["perplexity", "choice_accuracy", "loop_rate"]
    with pytest.raises(ValueError, match="Pass reference="):
        evaluate(model, text, tokenizer=tokenizer, tasks=("perplexity", "agreement"))


def test_bfloat16_is_scored_in_float32(model, text, tokenizer, make_model):
    half = make_model().bfloat16()
    scores = evaluate(half, text, model, tokenizer, **QUIET, tasks=("perplexity", "agreement")).scores
    exact = evaluate(model, text, None, tokenizer, **QUIET, tasks="perplexity").scores
    assert scores["perplexity"].value == pytest.approx(exact["perplexity"].value, rel=0.05)
    assert 0 < scores["kl"].value < 0.05


def test_uniform_model(text, tokenizer, make_constant_model):
    scores = evaluate(make_constant_model(), text, tokenizer=tokenizer, **QUIET).scores
    assert scores["perplexity"].value == pytest.approx(300, rel=1e-5)
    assert scores["loop_rate"].value == 1


def test_padded_model_inputs_count_real_tokens_only(make_successor_model):
    model = make_successor_model()
    row = torch.arange(20)[None]
    padded = torch.cat([row, torch.full((1, 12), 7)], dim=1)
    mask = (torch.arange(32) < 20).long()[None]
    plain = evaluate(model, [{"input_ids": row}], tasks="perplexity", progress=False).scores["perplexity"]
    masked = evaluate(model, [{"input_ids": padded, "attention_mask": mask}], tasks="perplexity", progress=False)
    assert masked.scores["perplexity"].value == pytest.approx(plain.value, rel=1e-5)
    # One-hot hidden states of norm 8 after the final RMSNorm: the true token has logit 8, 63 others 0.
    assert plain.value == pytest.approx(1 + 63 * math.exp(-8), rel=1e-4)


def test_models_by_path(model, text, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = evaluate(str(tmp_path), text, reference=tmp_path, **QUIET, tasks=("perplexity", "agreement"))
    assert result.scores["kl"].value == 0


def test_training_flags_and_generation_config_are_put_back(text, tokenizer, make_model):
    model = make_model().train()
    model.model.layers[0].eval()
    model.generation_config.repetition_penalty = 1.5
    flags, config = [m.training for m in model.modules()], model.generation_config
    evaluate(model, text, tokenizer=tokenizer, **QUIET)
    assert [m.training for m in model.modules()] == flags
    assert model.generation_config is config


def test_calibration_text_must_be_disjoint(model, text, tokenizer):
    settings = {**QUIET, "tasks": "perplexity"}
    result = evaluate(model, text[:10], None, tokenizer, **settings, calibration=CalibrationConfig(text[10:]))
    assert result.data["calibration_overlap"] == 0
    with pytest.raises(ValueError, match=r"15\.0% of the evaluation text's"):
        evaluate(model, text, None, tokenizer, **settings, calibration=text[:3])
    encoded = [{"input_ids": torch.tensor([tokenizer(text[0])["input_ids"]])}]
    with pytest.raises(ValueError, match=r"10\.0% of the evaluation text's"):
        evaluate(model, (part for part in text[:10]), None, tokenizer, **settings, calibration=encoded)


def test_errors(model, text, tokenizer, make_model):
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        evaluate(encoder_decoder, text, tokenizer=tokenizer, **QUIET)
    with pytest.raises(ValueError, match="Unknown task 'perplexities'; did you mean 'perplexity'"):
        evaluate(model, text, tokenizer=tokenizer, tasks=["perplexities"])
    with pytest.raises(ValueError, match="Unknown setting 'max_token'; did you mean 'max_tokens'"):
        evaluate_many({"a": model}, text, tokenizer=tokenizer, max_token=3)
    with pytest.raises(ValueError, match="new_tokens=4"):
        evaluate(model, text, tokenizer=tokenizer, new_tokens=4)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        evaluate(model, text)
    with pytest.raises(ValueError, match="no model"):
        evaluate_many({}, text)
    with pytest.raises(ValueError, match="models\\['a'\\] is a int"):
        evaluate_many({"a": 3}, text, tokenizer=tokenizer, **QUIET)
    with pytest.raises(ValueError, match="vocabulary of 310 and the model one of 300"):
        evaluate(model, text, make_model(310), tokenizer, **QUIET)
