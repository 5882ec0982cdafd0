"""Edit the experts of a tiny model by hand: copies, permutations, experts that never win."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_moe.algorithms.experts import NEURON_AXIS
from optimum_moe.statistics import BlockStatistics, Statistics
from optimum_moe.surgeons import FoundBlock, find_blocks


def router_tensors(found: FoundBlock, block: Any) -> list[torch.Tensor]:
    """Every tensor of the router with an expert axis, as views (experts first) of what belongs to the E experts."""
    tensors = found.surgeon.router_tensors(block)
    return [tensor.movedim(row.axis, 0)[: found.info.num_experts] for row, tensor in tensors]


@torch.no_grad()
def make_copies(model: PreTrainedModel, labels_E: list[int], seed: int = 0) -> None:
    """Make all experts with one label copies of the first of them, each with its neurons in another order."""
    generator = torch.Generator().manual_seed(seed)
    for found in find_blocks(model):
        experts = found.surgeon.experts(found.module(model))
        for expert, label in enumerate(labels_E):
            first = labels_E.index(label)
            if expert == first:
                continue
            order = torch.randperm(found.info.intermediate_size, generator=generator)
            if experts.fixed_neurons:
                order = order.sort().values
            for name, axis in NEURON_AXIS.items():
                matrices = getattr(experts, name)
                if matrices is not None:
                    source = matrices[first] if axis is None else matrices[first].index_select(axis, order)
                    matrices[expert].copy_(source)


@torch.no_grad()
def permute_experts(model: PreTrainedModel, order_E: list[int]) -> None:
    """Put expert `order_E[i]` in place i, with every tensor that has an expert axis."""
    for found in find_blocks(model):
        block = found.module(model)
        experts = found.surgeon.experts(block)
        for matrices in (getattr(experts, name) for name in NEURON_AXIS):
            if matrices is not None:
                ordered = [matrices[expert].clone() for expert in order_E]
                for place, matrix in enumerate(ordered):
                    matrices[place].copy_(matrix)
        for tensor in router_tensors(found, block):
            tensor.copy_(tensor[order_E].clone())
        for _, table in found.surgeon.router_tensors(block, holds_ids=True):
            table.copy_(torch.tensor(order_E).argsort()[table])


def reordered(inputs: dict[str, torch.Tensor], order_E: list[int]) -> dict[str, torch.Tensor]:
    """Inputs that choose the experts themselves, for a model whose experts stand in that order."""
    if "dataset_index" not in inputs:
        return inputs
    return inputs | {"dataset_index": torch.tensor(order_E).argsort()[inputs["dataset_index"]]}


class RouterInputs:
    """A watcher that keeps what the router of a block sees, and the order in which blocks run."""

    def __init__(self, found: FoundBlock, running_order: list[FoundBlock]) -> None:
        self.found, self.running_order = found, running_order
        self.input_TH = torch.empty(0)

    def router(self, logits_TE: torch.Tensor, input_TH: torch.Tensor) -> None:
        self.input_TH = input_TH
        self.running_order.append(self.found)

    def begin(self, *routing: torch.Tensor) -> None:
        """Not needed."""

    def expert(self, *routed: Any) -> None:
        """Not needed."""


@torch.no_grad()
def running_order(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[FoundBlock]:
    """The blocks as they run, which is not the order of modules everywhere; a pool of experts for tokens of another
    modality does not run."""
    order: list[FoundBlock] = []
    with ExitStack() as stack:
        for found in find_blocks(model):
            stack.enter_context(found.surgeon.watch(found.module(model), RouterInputs(found, order)))
        model(**inputs)
    return order


@torch.no_grad()
def silence(
    model: PreTrainedModel, experts: list[int] | Mapping[str, list[int]], inputs: dict[str, torch.Tensor]
) -> None:
    """Give experts a router logit of -60 on every token of `inputs`, block by block in running order.

    Args:
        model: The model, changed in place.
        experts: The same of every block, or by the block's name.
        inputs: Fewer tokens than channels.
    """
    for found in running_order(model, inputs):
        silent = experts if isinstance(experts, list) else experts[found.info.name]
        block, seen = found.module(model), RouterInputs(found, [])
        with found.surgeon.watch(block, seen):
            model(**inputs)
        hidden_TH = seen.input_TH.double()
        assert len(hidden_TH) <= hidden_TH.shape[1], "more tokens than channels: no exact solution"
        direction_H = torch.linalg.pinv(hidden_TH) @ torch.ones(len(hidden_TH), dtype=torch.float64)
        weight, *others = router_tensors(found, block)
        weight[silent] = -60 * direction_H.to(weight.dtype)
        for tensor in others:
            tensor[silent] = -10.0


def edited(statistics: Statistics, **changes) -> Statistics:
    """Statistics in which every block has other sums; a change may be a function of the block's name."""
    blocks: dict[str, BlockStatistics] = {}
    for name, block in statistics.blocks.items():
        values = {field: value(name) if callable(value) else value for field, value in changes.items()}
        blocks[name] = dataclasses.replace(block, **values)
    return dataclasses.replace(statistics, blocks=blocks)
