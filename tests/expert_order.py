"""Edit the experts of a tiny model by hand: copies, permutations, experts that never win."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_moe.statistics import BlockStatistics, Statistics
from optimum_moe.surgeons import FoundBlock, find_blocks
from optimum_moe.surgeons.base import NEURON_AXIS, replace_tensor
from optimum_moe.surgeons.generic import GenericSurgeon


def router_of(found: FoundBlock, block: Any) -> Any:
    """The module whose output are the logits, or the router around it."""
    if not isinstance(found.surgeon, GenericSurgeon):
        return block.router
    row = found.surgeon.architecture
    return getattr(block, row.router).get_submodule(row.logits or "")


def router_tensors(found: FoundBlock, block: Any) -> list[torch.Tensor]:
    """Every tensor of the router with an expert axis, as views (experts first) of what belongs to the E experts."""
    if not isinstance(found.surgeon, GenericSurgeon):
        return [block.router.classifier.weight]
    tensors = found.surgeon.router_tensors(block)
    return [tensor.movedim(row.axis, 0)[: found.info.num_experts] for row, tensor in tensors]


def id_tables(found: FoundBlock, block: Any) -> list[torch.Tensor]:
    """Tensors of the router whose values are expert ids."""
    generic = isinstance(found.surgeon, GenericSurgeon)
    return [tensor for _, tensor in found.surgeon.router_tensors(block, holds_ids=True)] if generic else []


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
        if isinstance(found.surgeon, GenericSurgeon):
            experts = getattr(block, found.surgeon.architecture.experts)
            for name, tensor in list(experts.named_parameters(recurse=False)):
                replace_tensor(experts, name, tensor[order_E].clone())
        else:
            modules = list(block.experts.values())
            block.experts.update({f"expert_{i}": modules[e] for i, e in enumerate(order_E)})
        for tensor in router_tensors(found, block):
            tensor.copy_(tensor[order_E].clone())
        for table in id_tables(found, block):
            table.copy_(torch.tensor(order_E).argsort()[table])


@torch.no_grad()
def silence(model: PreTrainedModel, experts: list[int], inputs: dict[str, torch.Tensor]) -> None:
    """Give experts a router logit of -60 on every token of `inputs`, block by block in running order."""
    for found in find_blocks(model):
        block = found.module(model)
        seen: list[torch.Tensor] = []
        handle = router_of(found, block).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model(**inputs)
        handle.remove()
        if not seen:  # a pool of experts for tokens of another modality
            continue
        hidden_TH = seen[0].reshape(-1, seen[0].shape[-1]).double()
        assert len(hidden_TH) <= hidden_TH.shape[1], "more tokens than channels: no exact solution"
        direction_H = torch.linalg.pinv(hidden_TH) @ torch.ones(len(hidden_TH), dtype=torch.float64)
        weight, *others = router_tensors(found, block)
        weight[experts] = -60 * direction_H.to(weight.dtype)
        for tensor in others:
            tensor[experts] = -10.0


def edited(statistics: Statistics, **changes) -> Statistics:
    """Statistics in which every block has other sums; a change may be a function of the block's name."""
    blocks: dict[str, BlockStatistics] = {}
    for name, block in statistics.blocks.items():
        values = {field: value(name) if callable(value) else value for field, value in changes.items()}
        blocks[name] = dataclasses.replace(block, **values)
    return dataclasses.replace(statistics, blocks=blocks)
