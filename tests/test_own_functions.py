"""Functions of the user: what each kind must return, who is named where it does not, and what is done with the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from optimum_moe import (
    ExpertMerging,
    ExpertPruning,
    register_grouping,
    register_router_rows,
    register_saliency,
    register_similarity,
    register_stage,
    register_weighting,
)
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.router_fit import RouterFit, RouterView
from optimum_moe.model_info import BlockInfo
from optimum_moe.plan import BlockPlan
from optimum_moe.stages import BlockContext, Groups, RouterRows, Stage, registered_stages
from optimum_moe.stages.results import WrongResult
from optimum_moe.statistics import BlockStatistics, Reservoir

E, G, H, NEURONS, K = 8, 4, 6, 5, 2
NAMES = (f"own {number}" for number in count())
REGISTER = {
    "saliency": register_saliency,
    "similarity": register_similarity,
    "grouping": register_grouping,
    "weighting": register_weighting,
    "router_rows": register_router_rows,
}


def context_of(router_groups: int = 1) -> BlockContext:
    """A block of 8 random experts with statistics of 64 tokens; the last expert has none."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(6, E, generator=generator, dtype=torch.float64)
    index_SK = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(64)])
    weights_SK = torch.full((64, K), 0.5)
    inputs_SH = torch.randn(64, H, generator=generator)
    statistics = BlockStatistics(
        num_tokens=64,
        reservoir=Reservoir(inputs_SH, inputs_SH, index_SK, weights_SK),
        token_count_E=torch.bincount(index_SK.flatten(), minlength=E).double(),
        output_norm_sum_E=random[0],
        output_sq_sum_E=random[1],
        gated_norm_sum_E=random[2],
        gated_sq_sum_E=random[3],
        gate_sum_E=random[4],
        router_gram_EE=torch.eye(E, dtype=torch.float64),
    )
    return BlockContext(
        info=BlockInfo("layers.0.mlp", 0, E, K, router_groups, NEURONS, H, 3 * NEURONS * H, 3 * NEURONS * H, H),
        experts=ExpertTensors(
            up=torch.randn(E, NEURONS, H, generator=generator),
            gate=torch.randn(E, NEURONS, H, generator=generator),
            down=torch.randn(E, H, NEURONS, generator=generator),
        ),
        router=RouterView(torch.randn(E, H, generator=generator), E, lambda logits_SN: logits_SN.softmax(-1)),
        generator=generator,
        statistics=statistics,
    )


def stage_with(kind: str, function: Callable[..., Any]) -> tuple[str, Stage]:
    """A name under which the function is registered now, and a stage that uses it."""
    name = next(NAMES)
    REGISTER[kind](name)(function)
    if kind == "saliency":
        return name, ExpertPruning(num_experts=G, saliency=name)
    rest = {"routing": "reduce", "router_rows": "mean"} | {kind: name}
    return name, ExpertMerging(num_experts=G, **rest)


def decided(kind: str, function: Callable[..., Any], context: BlockContext | None = None) -> BlockPlan:
    stage = stage_with(kind, function)[1]
    return stage.decide(context_of() if context is None else context, G)


def vector(**changed: float) -> torch.Tensor:
    """(8,) ones, with the values that are named e0 to e7."""
    values_E = torch.ones(E, dtype=torch.float64)
    for name, value in changed.items():
        values_E[int(name[1:])] = value
    return values_E


def matrix(i: int, j: int, value: float) -> torch.Tensor:
    values_EE = torch.eye(E, dtype=torch.float64)
    values_EE[i, j] = value
    return values_EE


PAIRS = torch.arange(E) // 2
NAN, INF = float("nan"), float("inf")
DIVIDE = (
    "Weights and statistics are finite, and an expert without tokens has sums of 0: divide by "
    "token_count_E.clamp(min=1)."
)
IN_ORDER = "Return a value for each of the 8 experts, in order."
NUMBER = "Give each of the num_groups groups an expert, and number the groups without a gap."
LEAVE_OUT = "Correct them, or leave them out: the most frequent expert of each group is taken then."
FINITE = "a tensor of 8 finite values"
NONNEGATIVE = "a tensor of 8 finite, nonnegative values"
ROWS = "weights_E of 8 finite, nonnegative values"
SQUARE = "a symmetric (8, 8) tensor of finite values"
LABELS = "labels_E of shape (8,) with each of the 4 labels 0..3"
DOMINANTS = "as dominants an expert of each of the 4 groups, in the order of the labels"


@pytest.mark.parametrize(
    ("kind", "value", "rule", "got", "remedy"),
    [
        ("saliency", None, FINITE, "None", "Return a torch.Tensor."),
        ("saliency", [1.0] * E, FINITE, "a value of type list", "Return a torch.Tensor."),
        ("saliency", torch.ones(E, 2), FINITE, "shape (8, 2)", IN_ORDER),
        ("saliency", vector(e3=NAN, e5=-INF), FINITE, "NaN or infinity for experts 3, 5", DIVIDE),
        ("saliency", torch.ones(E, dtype=torch.complex64), FINITE, "dtype torch.complex64", "Return real values."),
        (
            "similarity",
            torch.eye(7),
            SQUARE,
            "shape (7, 7)",
            "Return the similarity of each pair of the 8 experts, in their order.",
        ),
        ("similarity", matrix(1, 2, NAN), SQUARE, "NaN or infinity for expert 1", DIVIDE),
        (
            "similarity",
            matrix(5, 2, 0.75),
            SQUARE,
            "0 for experts 2 and 5, 0.75 for 5 and 2",
            "Return the mean of the matrix and its transpose, (s + s.T) / 2.",
        ),
        ("similarity", torch.eye(E).numpy(), SQUARE, "a value of type ndarray", "Return a torch.Tensor."),
        ("grouping", PAIRS, "Groups", "a value of type Tensor", "Return Groups(labels_E), from optimum_moe.stages."),
        ("grouping", Groups(PAIRS.tolist()), LABELS, "a value of type list", "Return a torch.Tensor."),  # type: ignore
        ("grouping", Groups(PAIRS[:6]), LABELS, "shape (6,)", NUMBER),
        ("grouping", Groups(PAIRS.double()), LABELS, "dtype torch.float64", "Return integers: labels_E.long()."),
        ("grouping", Groups(PAIRS * 2), LABELS, "labels 4, 6 and none of labels 1, 3", NUMBER),
        ("grouping", Groups(PAIRS - 1), LABELS, "label -1 and none of label 3", NUMBER),
        ("grouping", Groups(PAIRS.clamp(max=2)), LABELS, "none of label 3", NUMBER),
        ("grouping", Groups(PAIRS, (0, 2, 4)), DOMINANTS, "3 experts", LEAVE_OUT),
        ("grouping", Groups(PAIRS, (0, 2, 4, 8)), DOMINANTS, "8 for label 3, which is no expert", LEAVE_OUT),
        ("grouping", Groups(PAIRS, (0, 4, 2, 6)), DOMINANTS, "expert 4 with label 2 for label 1", LEAVE_OUT),
        ("grouping", Groups(PAIRS, 0), DOMINANTS, "a value of type int", LEAVE_OUT),  # type: ignore[arg-type]
        ("weighting", torch.ones(7), NONNEGATIVE, "shape (7,)", IN_ORDER),
        ("weighting", vector(e2=INF), NONNEGATIVE, "NaN or infinity for expert 2", DIVIDE),
        ("weighting", vector(e2=-0.5, e6=-2), NONNEGATIVE, "-2 for expert 6", "Clamp the values at 0, or shift them."),
        ("weighting", None, NONNEGATIVE, "None", "Return a torch.Tensor."),
        (
            "router_rows",
            vector(),
            "RouterRows",
            "a value of type Tensor",
            "Return RouterRows(weights_E), from optimum_moe.stages.",
        ),
        ("router_rows", RouterRows(torch.ones(1)), ROWS, "shape (1,)", IN_ORDER),
        ("router_rows", RouterRows(vector(e0=NAN)), ROWS, "NaN or infinity for expert 0", DIVIDE),
        ("router_rows", RouterRows(vector(e0=-1)), ROWS, "-1 for expert 0", "Clamp the values at 0, or shift them."),
        (
            "router_rows",
            RouterRows(vector(), RouterFit(torch.ones(3, H))),
            "rows_GX of shape (4, 6) with finite values",
            "shape (3, 6)",
            "Return a row for each group, as wide as those of the original router.",
        ),
        (
            "router_rows",
            RouterRows(vector(), torch.ones(G, H)),  # type: ignore[arg-type]
            "RouterFit",
            "a value of type Tensor",
            "Return RouterRows(weights_E, RouterFit(rows_GX)).",
        ),
    ],
)
def test_wrong_results_name_the_function(kind: str, value: Any, rule: str, got: str, remedy: str) -> None:
    name, stage = stage_with(kind, lambda info: value)
    with pytest.raises(ValueError) as caught:
        stage.decide(context_of(), G)
    said = str(caught.value)
    assert said == f"{kind} {name!r} must return {rule}; for layers.0.mlp it returned {got}. {remedy}"
    assert not hasattr(caught.value, "__notes__")


def test_groups_of_a_reduced_router_lie_in_its_router_groups() -> None:
    two = context_of(router_groups=2)
    crossing = Groups(torch.tensor([0, 0, 1, 2, 1, 2, 3, 3]))
    message = (
        r"must return 2 groups of experts in each of the 2 router groups, and none across two of them; for "
        r"layers.0.mlp it returned 3, 3 groups that have experts in them\. Read router_groups, and group each 4 "
        r"consecutive experts by themselves\."
    )
    with pytest.raises(ValueError, match=message):
        decided("grouping", lambda info: crossing, two)
    uneven = Groups(torch.tensor([0, 1, 2, 2, 3, 3, 3, 3]))
    with pytest.raises(ValueError, match=r"it returned 3, 1 groups that have experts in them"):
        decided("grouping", lambda info: uneven, two)
    assert decided("grouping", lambda info: Groups(PAIRS), two).labels_E == (0, 0, 1, 1, 2, 2, 3, 3)


@pytest.mark.parametrize("kind", REGISTER)
def test_an_error_of_a_function_keeps_its_type_and_says_where(kind: str) -> None:
    def fail(info: BlockInfo) -> None:
        raise KeyError("mine")

    name, stage = stage_with(kind, fail)
    with pytest.raises(KeyError, match="mine") as caught:
        stage.decide(context_of(), G)
    assert caught.value.__notes__ == [f"It was raised in the {kind} {name!r} for layers.0.mlp."]


def test_a_wrong_similarity_is_named_and_not_the_grouping_that_called_it() -> None:
    similarity, grouping = next(NAMES), next(NAMES)
    register_similarity(similarity)(lambda info: None)
    register_grouping(grouping)(lambda similarity, num_groups: Groups(similarity()[0].long() % num_groups))
    stage = ExpertMerging(num_experts=G, similarity=similarity, grouping=grouping)
    with pytest.raises(WrongResult, match=rf"^similarity {similarity!r} must return") as caught:
        stage.decide(context_of(), G)
    assert not hasattr(caught.value, "__notes__")


def test_results_are_used_as_they_are_meant() -> None:
    by_index = decided("saliency", lambda info: torch.arange(info.num_experts, dtype=torch.float16))
    assert by_index.dominants_G == (4, 5, 6, 7)
    chosen = decided("grouping", lambda info: Groups(PAIRS.flip(0).int(), (7, 5, 3, 0)))
    assert (chosen.labels_E, chosen.dominants_G) == ((0, 0, 1, 1, 2, 2, 3, 3), (0, 3, 5, 7))
    weighted = decided("weighting", lambda labels_E: (labels_E + 1) * torch.tensor([1, 3] * 4))
    for group in range(G):
        members = [e for e, label in enumerate(weighted.labels_E) if label == group]
        parts = torch.tensor([1.0 + 2 * (e % 2) for e in members], dtype=torch.float64)
        assert torch.allclose(weighted.merge_weights_E[members], parts / parts.sum())
    nearly_symmetric = decided("similarity", lambda info: matrix(0, 1, 1e-3))
    assert nearly_symmetric.num_groups == G


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_router_rows_are_means_whatever_the_scale_of_their_weights(scale: float) -> None:
    name = next(NAMES)
    register_grouping(name)(lambda info: Groups(PAIRS))
    rows = next(NAMES)
    register_router_rows(rows)(lambda info: RouterRows(vector(e0=3.0, e2=0, e3=0) * scale))
    stage = ExpertMerging(num_experts=G, grouping=name, router_rows=rows, routing="reduce")
    assert stage.decide(context_of(), G).router_weights_E.tolist() == [0.75, 0.25, *[0.5] * 6]


def test_weights_that_are_all_zero_are_equal() -> None:
    stage_name = next(NAMES)
    register_grouping(stage_name)(lambda info: Groups(PAIRS))
    name = next(NAMES)
    register_weighting(name)(lambda info: torch.zeros(E))
    plan = ExpertMerging(num_experts=G, grouping=stage_name, weighting=name).decide(context_of(), G)
    assert plan.merge_weights_E.tolist() == [0.5] * E


def test_a_function_that_is_defined_again_replaces_itself() -> None:
    name = next(NAMES)

    def define(value: float) -> None:
        @register_saliency(name)
        def cell(info: BlockInfo) -> torch.Tensor:
            return torch.arange(E) * value

    define(1.0)
    define(-1.0)
    plan = ExpertPruning(num_experts=G, saliency=name).decide(context_of(), G)
    assert plan.dominants_G == (0, 1, 2, 3)
    message = rf"saliency {name!r} is already registered, by .*define.*cell\. Choose another name\."
    with pytest.raises(ValueError, match=message):
        register_saliency(name)(vector)


def test_a_stage_that_is_defined_again_replaces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_moe.stages.base._STAGES", {})

    def define(seed: int, base: type[Stage]) -> type[Stage]:
        @register_stage
        class Again(base):
            name = "own-stage"
            made = seed

        return Again

    define(0, ExpertPruning)
    second = define(1, ExpertPruning)
    assert registered_stages()["own-stage"] is second

    class Another(ExpertPruning):
        name = "own-stage"

    with pytest.raises(
        ValueError, match=r"stage 'own-stage' is already registered, by .*define.*Again\. Choose another"
    ):
        register_stage(Another)


def test_a_decorator_without_a_name_is_refused() -> None:
    message = (
        r'saliency functions are registered by a name, got <function vector .*>\. Write @register_saliency\("name"\)'
    )
    with pytest.raises(ValueError, match=message):
        register_saliency(vector)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got ''"):
        register_grouping("")


def test_an_unknown_name_says_how_to_register_it() -> None:
    message = (
        "weighting='absent' is unknown. Choose one of 'dominant', .*, 'uniform', or register it first, with "
        "register_weighting (for a command, in a file: --import FILE)."
    )
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        ExpertMerging(num_experts=G, weighting="absent")
