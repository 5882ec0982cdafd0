"""Which layers a recipe drops: the least important ones that stock classes can do without."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.recipe import Recipe
from optimum_moe.stages import Stage
from optimum_moe.statistics import Statistics
from optimum_moe.surgeons import shallow_model


def possible_drop(source: ModelSource, stage: Stage) -> tuple[str, ...]:
    """Some layers that the stage may drop, before anything is observed.

    Raises:
        ValueError: If stock classes cannot do without as many layers as the stage drops.
    """
    return _first_possible(source, stage, stage.candidates(source.info))


def choose_drop(source: ModelSource, stage: Stage, statistics: Statistics) -> tuple[str, ...]:
    """The layers that the stage drops: candidates by ascending importance, without those that stock classes need.

    Raises:
        ValueError: If stock classes cannot do without as many layers, or a layer was not reached.
    """
    candidates = stage.candidates(source.info)
    importance = [stage.importance(source.info, statistics, candidate) for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda n: importance[n])
    return _first_possible(source, stage, [candidates[n] for n in order])


def expected_source(source: ModelSource, recipe: Recipe) -> ModelSource:
    """What a recipe leaves for its other stages, by its sizes; the source itself if it drops no layers.

    Raises:
        ValueError: If stock classes cannot do without as many layers as the recipe drops.
    """
    stage = recipe.dropping
    if stage is None or not stage.number_of_layers(source.info):
        return source
    return source.expected_without(possible_drop(source, stage))


def _first_possible(source: ModelSource, stage: Stage, candidates: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    number, reason = stage.number_of_layers(source.info), ""
    dropped: tuple[str, ...] = ()
    for candidate in candidates:
        if len(dropped) == number:
            break
        found = shallow_model(source.skeleton, source.blocks, (*dropped, *candidate))
        if isinstance(found, str):
            reason = reason or f"without {candidate[0]}, {found}"
        else:
            dropped += candidate
    if len(dropped) < number:
        raise ValueError(
            f"{stage.name} drops {number} layers, but {type(source.skeleton).__name__} can only be built without "
            f"{len(dropped)} of the {len(candidates)} candidates: {reason}. Drop fewer, another run of them "
            "(consecutive=True with as many as the pattern of layers repeats after), or remove experts instead."
        )
    order = [block.layer for block in source.info.blocks]
    return tuple(sorted(dropped, key=order.index))
