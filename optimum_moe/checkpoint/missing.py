"""Tensors that a checkpoint lacks; transformers only warns and initializes them randomly."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_moe.hf.compat import patterns_that_may_be_missing, revert_weight_conversion

SHOWN = 3
_NUMBER = re.compile(r"\d+")


def lacking(model: PreTrainedModel, given: Collection[str], blocks: Iterable[str]) -> list[str]:
    """The tensors of a model that loading would initialize randomly.

    Not among them are tensors tied to a given one, tensors that the architecture allows to be missing, buffers outside
    of the MoE blocks that no layer has in the checkpoint (their class computes them), and the head of a class for
    another task than the checkpoint's.

    Args:
        model: The model, on any device.
        given: Names of its tensors that are in the checkpoint.
        blocks: Module paths of its MoE blocks.
    """
    patterns = patterns_that_may_be_missing(model)
    buffers = {name for name, _ in model.named_buffers()}
    inside = tuple(f"{block}." for block in blocks)
    kinds = {_NUMBER.sub("*", name) for name in given}
    known, head = _with_tied(model, set(given)), _head_for_another_task(model)

    def is_computed(name: str) -> bool:
        return name in buffers and not name.startswith(inside) and _NUMBER.sub("*", name) not in kinds

    return [
        name
        for name in model.state_dict()
        if name not in known
        and not is_computed(name)
        and not (head and not name.startswith(head))
        and not any(pattern.search(name) for pattern in patterns)
    ]


def refuse_lacking(what: str, names: Collection[str]) -> None:
    """Raise a `ValueError` if `names` has any tensors, which would be random."""
    if names:
        shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        raise ValueError(
            f"{what} lacks {len(names)} tensors ({shown}). They would be random. Copy or download the missing files, "
            "or create the checkpoint again."
        )


def as_saved(model: PreTrainedModel, names: Iterable[str], stored: Collection[str]) -> list[str]:
    """The tensors that a checkpoint lacks, by the names that they would have in it.

    Args:
        model: The model.
        names: Tensors of the model that cannot be converted from stored ones.
        stored: Names of the stored tensors.
    """
    state, found = model.state_dict(), []
    for name in names:
        empty = {name: torch.empty(state[name].shape, device="meta")}
        try:
            saved = set(revert_weight_conversion(model, empty)) - set(stored)
        except ValueError:
            # Some tensors are saved together with others.
            saved = set()
        found += sorted(saved) or [name]
    return found


def _with_tied(model: Any, given: set[str]) -> set[str]:
    """The given names, and those of all tensors tied to one of them."""
    pairs = [{target, other} for target, other in (getattr(model, "all_tied_weights_keys", None) or {}).items()]
    known, before = given, -1
    while len(known) > before:
        before = len(known)
        known = known.union(*(pair for pair in pairs if pair & known))
    return known


def _head_for_another_task(model: PreTrainedModel) -> str:
    """Name prefix of the base model, if the model has a head that the checkpoint's class does not have."""
    saved_as = getattr(model.config, "architectures", None) or []
    if not saved_as or type(model).__name__ in saved_as or model.base_model is model:
        return ""
    return f"{model.base_model_prefix}."
