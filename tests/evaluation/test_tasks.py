"""The single tasks: questions, continuations, loops, the bootstrap and the overlap check, on inputs known by hand."""

import random

import pytest
import torch

from optimum_moe.calibration.data import CalibrationConfig, build_batches
from optimum_moe.evaluation.choice import make_questions, score_questions
from optimum_moe.evaluation.disjoint import check_disjoint
from optimum_moe.evaluation.generation import (
    continue_greedily,
    is_loop,
    make_prompts,
    share_of_agreement,
    share_of_prefix,
)
from optimum_moe.evaluation.heldout import HeldOut
from optimum_moe.evaluation.scores import UnitScores, paired_interval


def held_out(documents: list[list[int]], prefix: tuple[int, ...] = ()) -> HeldOut:
    windows = build_batches(CalibrationConfig([{"input_ids": torch.zeros(1, 2, dtype=torch.long)}]))
    return HeldOut(windows, tuple(map(tuple, documents)), prefix)


def random_documents(count: int = 30, length: int = 800, vocab: int = 64) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(count)]


def counting_documents(count: int = 8, length: int = 400, vocab: int = 64) -> list[list[int]]:
    return [[(7 * d + i) % vocab for i in range(length)] for d in range(count)]


def test_an_oracle_answers_every_question(make_successor_model):
    questions = make_questions(held_out(counting_documents()), 40, seed=0)
    assert questions.rows.shape == (40, 4, 80)
    right = score_questions(make_successor_model(), questions)
    assert right.all()
    assert set(questions.answer.tolist()) == {0, 1, 2, 3}
    in_parts = [score_questions(make_successor_model(), questions, slice(i, i + 7)) for i in range(0, 40, 7)]
    assert torch.equal(torch.cat(in_parts), right)


def test_a_random_model_guesses(make_model):
    questions = make_questions(held_out(random_documents()), 200, seed=0)
    right = score_questions(make_model(vocab_size=64), questions)
    assert len(right) == 200
    assert 0.15 < right.double().mean() < 0.35


def test_score_is_the_sum_of_log_probabilities(make_model):
    questions = make_questions(held_out(random_documents(3), prefix=(1,)), 5, seed=0)
    model = make_model(vocab_size=64)
    assert questions.rows.shape == (5, 4, 81)
    expected = []
    for rows, answer in zip(questions.rows, questions.answer, strict=True):
        with torch.no_grad():
            log_p = model(rows).logits.log_softmax(-1)
        sums = torch.stack([sum(log_p[c, p - 1, rows[c, p]] for p in range(65, 81)) for c in range(4)])
        expected.append(bool(sums.argmax() == answer))
    assert score_questions(model, questions).tolist() == expected


def test_wrong_choices_come_from_other_documents():
    documents = [[d] * 100 + list(range(10, 30)) for d in range(6)]
    questions = make_questions(held_out(documents), 6, seed=0)
    for rows, answer in zip(questions.rows, questions.answer, strict=True):
        own = rows[0, 0]
        assert (rows[answer] == own).sum() >= 64
        for choice in range(4):
            assert choice == answer or own not in rows[choice, 64:]


def test_one_document_gives_choices_away_from_the_question():
    document = list(range(500))
    questions = make_questions(held_out([document]), 6, seed=0)
    for rows, answer in zip(questions.rows, questions.answer, strict=True):
        span = set(rows[answer].tolist())
        assert all(choice == answer or not span & set(rows[choice, 64:].tolist()) for choice in range(4))


def test_what_questions_need(caplog):
    with pytest.raises(ValueError, match="at least 80 tokens, the longest held-out one has 79"):
        make_questions(held_out([[1] * 79]), 5, seed=0)
    with pytest.raises(ValueError, match="No 4 different continuations"):
        make_questions(held_out([[1] * 400, [1] * 400]), 5, seed=0)
    assert len(make_questions(held_out(random_documents(2, 100)), 5, seed=0).answer) == 2
    assert "room for 2 of 5" in caplog.text


def test_greedy_continuation(make_successor_model):
    prompts = make_prompts(held_out(counting_documents()), 6, seed=0)
    assert prompts.shape == (6, 64)
    tokens = continue_greedily(make_successor_model(), prompts, 10)
    assert torch.equal(tokens, (prompts[:, -1:] + torch.arange(1, 11)) % 64)


def test_eos_and_penalties_change_nothing(make_successor_model):
    prompts = make_prompts(held_out(counting_documents()), 6, seed=0)
    model = make_successor_model()
    plain = continue_greedily(model, prompts, 70)
    model.generation_config.eos_token_id = 5
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.max_new_tokens = 3
    assert torch.equal(continue_greedily(model, prompts, 70), plain)


def test_generation_equals_the_forward_without_cache(make_model):
    model = make_model(vocab_size=64)
    prompts = make_prompts(held_out(random_documents(4)), 4, seed=0)
    rows = prompts
    for _ in range(6):
        with torch.no_grad():
            rows = torch.cat([rows, model(rows, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(continue_greedily(model, prompts, 6), rows[:, 64:])


def test_loops(make_constant_model):
    constant = continue_greedily(make_constant_model(64), make_prompts(held_out(random_documents(2)), 3, seed=0), 32)
    assert is_loop(constant).tolist() == [1, 1, 1]
    period = torch.arange(32) % 14
    too_long = torch.arange(32) % 15
    once = torch.arange(32)
    # A loop that the text has left again is none.
    left = torch.cat([torch.zeros(20, dtype=torch.long), torch.arange(1, 13)])
    assert is_loop(torch.stack([period, too_long, once, left])).tolist() == [1, 0, 0, 0]


def test_shares_of_agreement():
    reference = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [9, 2, 3, 4]])
    assert share_of_agreement(reference, tokens).tolist() == [1, 0.75, 0.75]
    assert share_of_prefix(reference, tokens).tolist() == [1, 0.5, 0]


def test_bootstrap_of_a_mean_has_its_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    score = UnitScores.of(values).summary(seed=0)
    error = values.std() / 20
    assert score.value == pytest.approx(values.mean().item())
    assert score.high - score.low == pytest.approx(2 * 1.96 * error.item(), rel=0.1)
    assert UnitScores.of(values).summary(seed=0) == score
    assert UnitScores.of(values).summary(seed=1) != score


def test_pairs_are_narrower_than_intervals():
    hard = torch.randn(300, generator=torch.Generator().manual_seed(0)).double()
    a, b = UnitScores.of(hard + 0.05), UnitScores.of(hard)
    difference, low, high = paired_interval(a, b, seed=0)
    assert difference == pytest.approx(0.05)
    assert (low, high) == (pytest.approx(0.05), pytest.approx(0.05))
    assert a.summary(0).low < b.summary(0).high


def test_weights_are_respected():
    units = UnitScores.of(torch.tensor([2.0, 30.0]), torch.tensor([1.0, 3.0]))
    assert units.value() == 8
    assert UnitScores.of(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 3.0]), exponential=True).value() == pytest.approx(
        2.718281828
    )


def test_overlap_is_found():
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    fresh = " ".join(f"word{i}" for i in range(200))
    assert check_disjoint([fresh], ["x " + shared]) == 0
    # The second document has 2 13-grams, one of them shared whatever its case and punctuation.
    assert check_disjoint([shared.upper().replace(" ", ", ")], [fresh, "x " + shared], threshold=0.5) == 1 / 190
    with pytest.raises(ValueError, match=r"50\.0% of the evaluation text's 13-word .* 'one two three"):
        check_disjoint([shared], ["x " + shared])
    with pytest.raises(ValueError, match="100"):
        check_disjoint(["A short line."], ["a short line"])
    assert check_disjoint(["a short line"], ["another short line"]) == 0
    with pytest.raises(ValueError, match="no words"):
        check_disjoint([shared], ["..."])
    with pytest.raises(ValueError, match="ngram=0"):
        check_disjoint([shared], [fresh], ngram=0)
