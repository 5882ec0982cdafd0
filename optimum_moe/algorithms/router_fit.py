"""Fit the rows of a smaller router to how the original one shared its weight among the groups.

Shape letters: E experts, G groups, N router logits (E and those of no routed expert), S sampled tokens, K top-k,
X width of the router's last linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

Scores = Callable[[torch.Tensor], torch.Tensor]

RIDGE = 0.05
"""Pull towards the starting rows, in units of the inputs' mean square: without it the rows follow the sample too
closely. On the reference model at half of the experts, 0.02, 0.05 and 0.2 give a held-out KL of 0.2152, 0.2155 and
0.2252, the starting rows 0.2303."""
_STEPS, _PATIENCE = 60, 5
_BIAS_STEPS = 100


@dataclass(frozen=True, eq=False)
class RouterView:
    """The last linear layer of a router, and how its logits become weights and choices.

    Args:
        rows_NX: Rows, those of no routed expert (shared or skipped ones) last.
        num_experts: Routed experts (E).
        scores: Turns (S, N) logits into (S, N) scores, which the weights of the chosen experts come from.
        bias_N: Added to the logits.
        correction_E: Added to the scores for the choice only.
        selects_by: What the correction is added to.
    """

    rows_NX: torch.Tensor
    num_experts: int
    scores: Scores
    bias_N: torch.Tensor | None = None
    correction_E: torch.Tensor | None = None
    selects_by: Literal["scores", "logits"] = "scores"

    def logits(self, input_SX: torch.Tensor) -> torch.Tensor:
        """(S, N) logits in float64: in float32 the order of experts would decide where the fit ends."""
        logits_SN = input_SX.double() @ self.rows_NX.to(input_SX.device, torch.float64).T
        return logits_SN if self.bias_N is None else logits_SN + self.bias_N.to(logits_SN)


@dataclass(frozen=True, eq=False)
class RouterFit:
    """What replaces the expert entries of a router: fitted rows, and bias and correction where the router has them."""

    rows_GX: torch.Tensor
    bias_G: torch.Tensor | None = None
    correction_G: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Choices:
    """What the original router chose for a sample of tokens.

    Args:
        input_SX: Inputs of the last linear layer.
        index_SK: Selected experts; an id >= E is no routed expert.
        weights_SK: Their routing weights.
        labels_E: Group of each expert.
        num_groups: G.
    """

    input_SX: torch.Tensor
    index_SK: torch.Tensor
    weights_SK: torch.Tensor
    labels_E: torch.Tensor
    num_groups: int


def fit_router(
    original: RouterView,
    start: RouterView,
    choices: Choices,
    top_k: int,
    router_groups: int = 1,
    groups_used: int = 1,
    generator: torch.Generator | None = None,
) -> RouterFit:
    """Fit rows to each group's share of the selected weight, then the correction to the selection frequencies.

    Where the router divides the weights of a token by their sum, the groups' shares of that sum are fitted, among the
    groups that the original used and those that the fitted rows select: where both are the same, nothing changes.
    Where it does not divide, the level counts too: the other groups should score what the original left to them (a
    softmax), or what their best expert scores (a sigmoid). Rows are found by L-BFGS on three quarters of the sample;
    of all steps the one that fits the last quarter best is kept, so that no fit is worse there than the start.

    Args:
        original: The router of E experts.
        start: The router of G groups to start from; rows of no routed expert stay as they are.
        choices: The sample.
        top_k: K.
        router_groups: Router groups that the G groups are divided into.
        groups_used: Router groups that a token may use.
        generator: Draws the quarter.

    Returns:
        The fitted entries, in float32.
    """
    # Tokens that no routed expert serves say nothing of how these share.
    served_S = (choices.index_SK < original.num_experts).any(-1)
    choices = replace(
        choices,
        input_SX=choices.input_SX[served_S].double(),
        index_SK=choices.index_SK[served_S],
        weights_SK=choices.weights_SK[served_S].double(),
    )
    groups = choices.num_groups
    if not len(choices.input_SX):
        bias_G = None if start.bias_N is None else start.bias_N[:groups].float()
        correction_G = None if start.correction_E is None else start.correction_E.float()
        return RouterFit(start.rows_NX[:groups].float(), bias_G, correction_G)
    scores_SN = original.scores(original.logits(choices.input_SX))
    shares = _weights_are_shares(scores_SN, choices)
    target_SN = _target(scores_SN, choices, original.num_experts, shares)
    if shares:
        # Entries of no routed expert do not take part in how the others share.
        start_rows = replace(start, rows_NX=start.rows_NX[:groups])
        start_rows = replace(start_rows, bias_N=None if start.bias_N is None else start.bias_N[:groups])
    else:
        start_rows = start
    top_k = min(top_k, groups)
    rows_GX, bias_G = _fit_rows(start_rows, choices.input_SX, target_SN, groups, top_k if shares else None, generator)
    fit = RouterFit(rows_GX.float(), None if bias_G is None else bias_G.float())
    if start.correction_E is None:
        return fit
    fitted = replace(start_rows, rows_NX=rows_GX, bias_N=bias_G)
    logits_SG = fitted.logits(choices.input_SX)
    choice_SG = logits_SG if start.selects_by == "logits" else fitted.scores(logits_SG)
    wanted_G, first_G = _selected(choices, original.num_experts).sum(0), start.correction_E.to(choice_SG)
    correction_G = _fit_correction(choice_SG, first_G, wanted_G, top_k, router_groups, groups_used)
    return replace(fit, correction_G=correction_G.float())


def _weights_are_shares(scores_SN: torch.Tensor, choices: Choices) -> bool:
    """Whether the router's weights are not simply proportional to the scores: then it divided them by their sum."""
    routed_SK = choices.index_SK < scores_SN.shape[1]
    chosen_SK = scores_SN.gather(1, choices.index_SK.clamp(max=scores_SN.shape[1] - 1))
    ratio_P = (choices.weights_SK / chosen_SK.clamp(min=1e-12))[routed_SK & (choices.weights_SK != 0)]
    return bool(ratio_P.std(correction=0) > 0.01 * ratio_P.mean())


def _selected(choices: Choices, num_experts: int) -> torch.Tensor:
    """(S, G) 1 where at least one expert of the group was selected."""
    labels_E = torch.cat([choices.labels_E, choices.labels_E.new_tensor([-1])])
    groups_SK = labels_E[choices.index_SK.clamp(max=num_experts)]
    padded = torch.zeros(len(groups_SK), choices.num_groups + 1)
    return padded.scatter_(1, groups_SK.where(groups_SK >= 0, choices.num_groups), 1.0)[:, : choices.num_groups]


def _target(scores_SN: torch.Tensor, choices: Choices, num_experts: int, shares: bool) -> torch.Tensor:
    """What the scores of the groups should be: (S, G) shares, or (S, G + N - E) scores."""
    columns = choices.num_groups + scores_SN.shape[1] - num_experts
    trailing = torch.arange(choices.num_groups, columns)
    column_N = torch.cat([choices.labels_E.where(choices.labels_E >= 0, columns), trailing])

    def grouped(values_SN: torch.Tensor) -> torch.Tensor:
        padded = values_SN.new_zeros(len(values_SN), columns + 1)
        return padded.index_add_(1, column_N, values_SN)[:, :columns]

    selected_SN = scores_SN.new_zeros(len(scores_SN), scores_SN.shape[1] + 1)
    index_SK = choices.index_SK.where(choices.index_SK < num_experts, scores_SN.shape[1])
    selected_SN = selected_SN.scatter_(1, index_SK, 1.0)[:, :-1]
    chosen_SG = grouped(scores_SN * selected_SN)
    if shares:
        chosen_SG = chosen_SG[:, : choices.num_groups]
        return chosen_SG / chosen_SG.sum(-1, keepdim=True).clamp(min=1e-12)
    if not _sum_to_one(scores_SN):
        best_SG = scores_SN.new_zeros(len(scores_SN), columns + 1)
        best_SG = best_SG.scatter_reduce_(1, column_N.expand_as(scores_SN), scores_SN, "amax")[:, :columns]
        return chosen_SG.where(chosen_SG > 0, best_SG)
    others_SG = grouped(scores_SN).masked_fill(chosen_SG > 0, 0.0)
    left_S1 = 1 - chosen_SG.sum(-1, keepdim=True)
    return chosen_SG + others_SG * (left_S1 / others_SG.sum(-1, keepdim=True).clamp(min=1e-12))


def _fit_rows(
    start: RouterView,
    input_SX: torch.Tensor,
    target_SN: torch.Tensor,
    groups: int,
    shared_by: int | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    order_S = torch.randperm(len(input_SX), generator=generator)
    held_out = order_S[: len(order_S) // 4]
    fitted = order_S[len(order_S) // 4 :]
    scale = input_SX.square().mean()
    first_GX = start.rows_NX[:groups].detach().to(input_SX)
    fixed_NX = start.rows_NX[groups:].detach().to(input_SX)
    first_G = None if start.bias_N is None else start.bias_N[:groups].detach().to(input_SX)
    fixed_N = None if start.bias_N is None else start.bias_N[groups:].detach().to(input_SX)
    rows_GX = first_GX.clone().requires_grad_()
    bias_G = None if first_G is None else first_G.clone().requires_grad_()

    def loss(sample_S: torch.Tensor) -> torch.Tensor:
        router = replace(
            start,
            rows_NX=torch.cat([rows_GX, fixed_NX]),
            bias_N=None if bias_G is None or fixed_N is None else torch.cat([bias_G, fixed_N]),
        )
        logits_SN = router.logits(input_SX[sample_S])
        scores_SN, target = router.scores(logits_SN), target_SN[sample_S]
        if shared_by is None:
            return _divergence(scores_SN, target)
        return _share_divergence(scores_SN, target, _choice(router, logits_SN, scores_SN), shared_by)

    def penalized() -> torch.Tensor:
        value = loss(fitted) + RIDGE * scale * (rows_GX - first_GX).square().sum()
        if bias_G is not None and first_G is not None:
            value = value + RIDGE * (bias_G - first_G).square().sum()
        return value

    trained = [rows_GX] if bias_G is None else [rows_GX, bias_G]
    optimizer = torch.optim.LBFGS(trained, max_iter=1, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = penalized()
        value.backward()
        return value

    def kept() -> tuple[torch.Tensor, torch.Tensor | None]:
        return rows_GX.detach().clone(), None if bias_G is None else bias_G.detach().clone()

    best, result, last = float("inf"), kept(), 0
    with torch.enable_grad():
        for step in range(_STEPS + 1):
            with torch.no_grad():
                value = float(loss(held_out if len(held_out) else fitted))
            if value < best:
                best, result, last = value, kept(), step
            if step - last >= _PATIENCE:
                break
            optimizer.step(closure)
    return result


def _choice(router: RouterView, logits_SN: torch.Tensor, scores_SN: torch.Tensor) -> torch.Tensor:
    """What the router selects the highest values of."""
    choice_SN = logits_SN if router.selects_by == "logits" else scores_SN
    if router.correction_E is None:
        return choice_SN
    corrected_SE = choice_SN[:, : router.num_experts] + router.correction_E.to(choice_SN)
    return torch.cat([corrected_SE, choice_SN[:, router.num_experts :]], dim=-1)


def _share_divergence(
    scores_SG: torch.Tensor, target_SG: torch.Tensor, choice_SG: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Cross-entropy of what each token's groups share: those that it should use and those that it now selects."""
    sharing_SG = (target_SG > 0).scatter(1, choice_SG.detach().topk(top_k, -1).indices, True)
    shares_SG = scores_SG * sharing_SG / (scores_SG * sharing_SG).sum(-1, keepdim=True)
    return -(target_SG * shares_SG.clamp(min=1e-12).log()).sum(-1).mean()


def _divergence(scores_SN: torch.Tensor, target_SN: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of scores that sum to 1, squared error of others."""
    if _sum_to_one(scores_SN):
        return -(target_SN * scores_SN.clamp(min=1e-12).log()).sum(-1).mean()
    return (scores_SN - target_SN).square().sum(-1).mean()


def _sum_to_one(scores_SN: torch.Tensor) -> bool:
    return bool((scores_SN.detach().sum(-1) - 1).abs().max() < 1e-3)


def _fit_correction(
    choice_SG: torch.Tensor, start_G: torch.Tensor, wanted_G: torch.Tensor, top_k: int, router_groups: int, used: int
) -> torch.Tensor:
    """Move the correction of each group until it is selected as often as its experts were, keeping the best one."""
    # At most every token, and together exactly top_k a token.
    tokens = len(choice_SG)
    wanted_G = (wanted_G * (top_k * tokens / wanted_G.sum())).clamp(max=tokens)
    best, result_G, correction_G = float("inf"), start_G, start_G.clone()
    spread = float(choice_SG.std())
    for step in range(_BIAS_STEPS):
        index_SK = select(choice_SG + correction_G, top_k, router_groups, used)
        count_G = torch.bincount(index_SK.flatten(), minlength=len(start_G))
        error = float((count_G - wanted_G).abs().sum())
        if error < best:
            best, result_G = error, correction_G.clone()
        correction_G += spread * 0.97**step * (wanted_G - count_G) / tokens
    return result_G


def select(choice_SE: torch.Tensor, top_k: int, router_groups: int = 1, groups_used: int = 1) -> torch.Tensor:
    """(S, K) ids of the highest values, within the router groups whose two highest values have the largest sum.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and the routers that follow it.
    """
    if router_groups > 1 and groups_used < router_groups:
        parts_SGE = choice_SE.unflatten(-1, (router_groups, -1))
        best_SG = parts_SGE.topk(min(2, parts_SGE.shape[-1]), -1).values.sum(-1).topk(groups_used, -1).indices
        closed_SG = torch.ones(parts_SGE.shape[:-1], dtype=torch.bool, device=choice_SE.device)
        closed_SG.scatter_(1, best_SG, False)
        choice_SE = parts_SGE.masked_fill(closed_SG.unsqueeze(-1), float("-inf")).flatten(-2)
    return choice_SE.topk(top_k, -1).indices
