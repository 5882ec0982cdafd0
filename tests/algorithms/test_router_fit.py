"""Fitting the rows of a reduced router."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from optimum_moe.algorithms.router_fit import Choices, RouterView, fit_router, select

LABELS_E = torch.tensor([0, 1, 2, 0, 3, 2, 1, 3])
DOMINANTS = [0, 1, 2, 4]


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def routed(router: RouterView, top_k: int, divide: bool, tokens: int = 600, seed: int = 0) -> Choices:
    """What `router` chooses for random tokens."""
    input_SX = torch.randn(tokens, router.rows_NX.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    scores_SE = router.scores(router.logits(input_SX))[:, : router.num_experts]
    choice_SE = scores_SE if router.correction_E is None else scores_SE + router.correction_E
    index_SK = select(choice_SE, top_k)
    weights_SK = scores_SE.gather(1, index_SK)
    if divide:
        weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
    return Choices(input_SX, index_SK, weights_SK, LABELS_E, len(DOMINANTS))


def view(scores, correction: bool = False, trailing: int = 0, seed: int = 1) -> RouterView:
    generator = torch.Generator().manual_seed(seed)
    rows_NX = torch.randn(8 + trailing, 16, generator=generator) * 0.5
    return RouterView(
        rows_NX, 8, scores, correction_E=torch.randn(8, generator=generator) * 0.1 if correction else None
    )


def reduced(router: RouterView) -> RouterView:
    rows = [*DOMINANTS, *range(8, len(router.rows_NX))]
    correction_G = None if router.correction_E is None else router.correction_E[DOMINANTS]
    return replace(router, rows_NX=router.rows_NX[rows], num_experts=4, correction_E=correction_G)


def group_weights(router: RouterView, choices: Choices) -> torch.Tensor:
    """(S, G) selected weight of each group."""
    groups_SK = choices.labels_E[choices.index_SK]
    return choices.weights_SK.new_zeros(len(groups_SK), 4).scatter_add_(1, groups_SK, choices.weights_SK)


@pytest.mark.parametrize("scores", [softmax, torch.sigmoid])
@pytest.mark.parametrize("divide", [True, False])
def test_fitted_rows_give_groups_more_nearly_their_weight_on_new_tokens(scores, divide: bool) -> None:
    original = view(scores)
    start = reduced(original)
    fit = fit_router(original, start, routed(original, 3, divide), 3, generator=torch.Generator().manual_seed(0))
    unseen = routed(original, 3, divide, seed=5)
    wanted_SG = group_weights(original, unseen)
    errors = []
    for rows_GX in (start.rows_NX, fit.rows_GX):
        router = replace(start, rows_NX=rows_GX)
        chosen = routed(router, 3, divide, seed=5)
        given_SG = wanted_SG.new_zeros(600, 4).scatter_(1, chosen.index_SK, chosen.weights_SK)
        errors.append(float((given_SG - wanted_SG).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_a_router_whose_shares_are_known_is_found() -> None:
    original = view(softmax)
    choices = routed(original, 8, divide=True)
    shares_SG = group_weights(original, choices)
    start = reduced(original)
    fit = fit_router(original, start, choices, 3)

    def divergence(rows_GX: torch.Tensor) -> float:
        found_SG = (choices.input_SX @ rows_GX.double().T).softmax(-1)
        return float((shares_SG * (shares_SG / found_SG).log()).sum(-1).mean())

    assert divergence(fit.rows_GX) < 0.3 * divergence(start.rows_NX)


def test_the_correction_brings_selection_to_the_frequencies_of_the_groups() -> None:
    original = view(torch.sigmoid, correction=True)
    choices = routed(original, 3, divide=True)
    start = reduced(original)
    fit = fit_router(original, start, choices, 2)
    selected_SG = torch.zeros(600, 4).scatter_(1, LABELS_E[choices.index_SK], 1.0)
    wanted_G = selected_SG.sum(0) * (2 * 600 / selected_SG.sum())
    scores_SG = torch.sigmoid(choices.input_SX @ fit.rows_GX.double().T)

    def error(correction_G: torch.Tensor) -> float:
        counts_G = torch.bincount(select(scores_SG + correction_G, 2).flatten(), minlength=4)
        return float((counts_G - wanted_G).abs().sum())

    assert error(fit.correction_G) <= 0.02 * 2 * 600 < error(start.correction_E)


def test_rows_of_no_routed_expert_stay_and_take_their_part() -> None:
    original = view(softmax, trailing=1)
    choices = routed(original, 1, divide=False)
    skipping = choices.index_SK.masked_fill(torch.arange(600)[:, None] % 5 == 0, 8)
    fit = fit_router(original, reduced(original), replace(choices, index_SK=skipping), 1)
    assert fit.rows_GX.shape == (4, 16)


def test_no_token_leaves_the_start() -> None:
    original = view(torch.sigmoid, correction=True)
    choices = routed(original, 2, divide=True, tokens=0)
    fit = fit_router(original, reduced(original), choices, 2)
    assert torch.equal(fit.rows_GX, original.rows_NX[DOMINANTS])
    assert torch.equal(fit.correction_G, original.correction_E[DOMINANTS])


def test_selection_stays_within_the_best_router_groups() -> None:
    choice_SE = torch.tensor([[9.0, 0.0, 0.0, 0.0, 6.0, 5.0, 4.0, 0.0]])
    assert select(choice_SE, 3, 2, 1).sort().values.tolist() == [[4, 5, 6]]
    assert select(choice_SE, 3).sort().values.tolist() == [[0, 4, 5]]
