"""Losses of distillation: against the public implementation, closed forms and finite differences."""

import pytest
import torch
from torch.nn import functional

from optimum_moe.algorithms.distillation import (
    IGNORED,
    TopLogits,
    cross_entropy,
    distillation_loss,
    hidden_state_loss,
    kl_divergence,
    top_kl_divergence,
    top_logits,
)


def pair(tokens=6, vocabulary=11):
    return torch.randn(tokens, vocabulary) * 3, torch.randn(tokens, vocabulary) * 3


def test_it_is_the_public_loss_without_the_square_of_the_temperature(parity):
    teacher_TV, student_TV = parity["kd/teacher_logits"], parity["kd/student_logits"]
    total, distilled, task, _ = parity["kd/hd0"]
    divergence_T = kl_divergence(teacher_TV, student_TV, temperature=2.0)
    counts_T = torch.ones_like(divergence_T, dtype=torch.bool)
    # The public code divides the sum over all tokens by the number of sequences, ours by that of tokens.
    tokens = divergence_T.shape[1]
    ours = distillation_loss(tokens * divergence_T, counts_T, task, scale_by_temperature=False)
    torch.testing.assert_close(ours, total)
    torch.testing.assert_close(ours - task, distilled)
    scaled = distillation_loss(tokens * divergence_T, counts_T, task)
    torch.testing.assert_close(scaled - task, 4 * distilled)


def test_the_divergence_is_that_of_torch_and_zero_for_equal_logits():
    teacher_TV, student_TV = pair()
    for temperature in (1.0, 2.0):
        logs = (student_TV / temperature).log_softmax(-1), (teacher_TV / temperature).log_softmax(-1)
        expected = functional.kl_div(*logs, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(kl_divergence(teacher_TV, student_TV, temperature), expected)
    student_TV = teacher_TV.clone().requires_grad_(True)
    loss = kl_divergence(teacher_TV, student_TV).sum()
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(student_TV.grad.abs().max()) < 1e-6


def test_tokens_that_the_teacher_excludes_add_nothing():
    teacher_TV, student_TV = pair()
    teacher_TV[:, 4] = -torch.inf
    kept = [v for v in range(11) if v != 4]
    student_TV[:, 4] = -torch.inf
    expected = kl_divergence(teacher_TV[:, kept], student_TV[:, kept])
    student_TV.requires_grad_(True)
    found = kl_divergence(teacher_TV, student_TV)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert bool(student_TV.grad[:, kept].isfinite().all())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_logits_and_the_rest_are_the_divergence_of_as_many_outcomes(k, temperature):
    teacher_TV, student_TV = pair()
    p_TV, q_TV = (logits.div(temperature).softmax(-1) for logits in (teacher_TV, student_TV))
    chosen_TK = teacher_TV.topk(k, -1).indices
    outcomes = []
    for distribution_TV in (p_TV, q_TV):
        top_TK = distribution_TV.gather(-1, chosen_TK)
        outcomes.append(torch.cat([top_TK, 1 - top_TK.sum(-1, keepdim=True)], -1))
    expected = (outcomes[0] * (outcomes[0] / outcomes[1]).log()).sum(-1)
    found = top_kl_divergence(top_logits(teacher_TV, k, temperature), student_TV)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool((found <= kl_divergence(teacher_TV, student_TV, temperature) + 1e-6).all())


def test_all_logits_are_the_whole_divergence_with_the_same_gradient():
    teacher_TV, student_TV = pair()
    gradients = []
    for loss in (
        lambda student: kl_divergence(teacher_TV, student),
        lambda student: top_kl_divergence(top_logits(teacher_TV, 11), student),
        lambda student: top_kl_divergence(top_logits(teacher_TV, 99), student),
    ):
        own_TV = student_TV.clone().requires_grad_(True)
        value_T = loss(own_TV)
        value_T.sum().backward()
        gradients.append((value_T.detach(), own_TV.grad))
    for value_T, gradient_TV in gradients[1:]:
        torch.testing.assert_close(value_T, gradients[0][0])
        torch.testing.assert_close(gradient_TV, gradients[0][1])


def test_gradients_are_those_of_finite_differences():
    teacher_TV, student_TV = (logits.double() for logits in pair(2, 5))
    top = TopLogits(*(getattr(top_logits(teacher_TV, 2), name) for name in ("logits_TK", "tokens_TK", "rest_T")))
    for loss in (lambda s: kl_divergence(teacher_TV, s, 2.0), lambda s: top_kl_divergence(top, s)):
        own_TV = student_TV.clone().requires_grad_(True)
        loss(own_TV).sum().backward()
        step, number = 1e-2, torch.zeros_like(student_TV)
        for index in range(number.numel()):
            moved = torch.zeros_like(student_TV)
            moved.view(-1)[index] = step
            number.view(-1)[index] = (loss(student_TV + moved) - loss(student_TV - moved)).sum() / (2 * step)
        torch.testing.assert_close(own_TV.grad, number, rtol=1e-2, atol=1e-4)


def test_what_does_not_count_changes_nothing():
    teacher_TV, student_TV = pair()
    counts_T = torch.tensor([True, True, False, True, False, False])
    divergence_T = kl_divergence(teacher_TV, student_TV)
    divergence_T[2] = torch.nan
    labels_T = torch.tensor([1, 2, IGNORED, 3, IGNORED, IGNORED])
    task = cross_entropy(student_TV, labels_T)
    assert float(task) == pytest.approx(float(functional.cross_entropy(student_TV[counts_T], labels_T[counts_T])))
    expected = task + 0.2 * 4 * divergence_T[counts_T].mean()
    torch.testing.assert_close(distillation_loss(divergence_T, counts_T, task), expected)
    nothing = torch.zeros(6, dtype=torch.bool)
    assert float(distillation_loss(divergence_T, nothing, cross_entropy(student_TV, labels_T * 0 + IGNORED))) == 0


def test_hidden_states_are_compared_where_they_count():
    teacher, student = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    counts_T = torch.tensor([True, False, True, True])
    expected = (teacher - student)[:, counts_T].square().mean()
    torch.testing.assert_close(hidden_state_loss(list(teacher), list(student), counts_T), expected)
    with pytest.raises(ValueError, match=r"3 hidden states .* and the student 2"):
        hidden_state_loss(list(teacher), list(student[:2]), counts_T)
