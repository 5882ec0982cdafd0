"""Blocks of unknown architectures: a row is derived from the common contract, and verified by a self-test."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from optimum_moe.algorithms.experts import NEURON_AXIS
from optimum_moe.hf.compat import set_experts_implementation
from optimum_moe.plan import BlockPlan
from optimum_moe.surgeons.architecture import Architecture, Role, RouterTensor
from optimum_moe.surgeons.base import Block
from optimum_moe.surgeons.generic import GenericSurgeon
from optimum_moe.surgeons.scoring import sigmoid, softmax

_STAMP = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
_TOP_K = ("top_k", "num_experts_per_tok", "topk", "moe_topk", "k")
_GROUPS = ("n_group", "num_group", "num_expert_group")
_TOLERANCE = 1e-4
_TOKENS = 48


class ContractError(Exception):
    """A block cannot be read by the common contract; the message says why."""


@dataclass(frozen=True)
class UnknownBlock:
    """A block that no surgeon matches, with experts that `use_experts_implementation` marks."""

    path: str
    block: Any
    experts: str


def unknown_blocks(model: nn.Module, known: set[str]) -> list[UnknownBlock]:
    """One block for each unknown class with experts that `use_experts_implementation` marks.

    Args:
        model: The model, on any device.
        known: Module paths of the blocks that have a surgeon.
    """
    found: dict[type, UnknownBlock] = {}
    for path, module in model.named_modules():
        if not all(hasattr(module, name) for name in _STAMP):
            continue
        parent, _, attribute = path.rpartition(".")
        if parent not in known and not any(parent.startswith(f"{name}.") for name in known):
            block = model.get_submodule(parent)
            found.setdefault(type(block), UnknownBlock(parent, block, attribute))
    return list(found.values())


def looks_like_moe(model: nn.Module) -> list[str]:
    """Class names in a model that resemble MoE blocks or experts."""
    return sorted({type(m).__name__ for m in model.modules() if re.search("moe(?!del)|expert", type(m).__name__, re.I)})


def how_to(what: str, reason: str, row: Architecture | None = None) -> str:
    """The error message for a block that cannot be read, with instructions to add its architecture."""
    guess = row or Architecture("my_moe", what.split(" ")[0], ("num_experts",))
    return (
        f"{what} is not an MoE block that optimum_moe knows, and does not follow the common contract: {reason}. "
        "Describe it:\n"
        "    from optimum_moe import register_surgeon\n"
        "    from optimum_moe.surgeons import Architecture\n"
        f"    register_surgeon({_spelled(guess)})\n"
        "A block that does not call router(h) -> (logits, weights, index) and experts(h, index, weights) needs a "
        "subclass of optimum_moe.surgeons.Surgeon instead. docs/source/extending.md shows both."
    )


def _spelled(row: Architecture) -> str:
    """A row as Python code: positional fields, and fields that differ from their defaults."""
    named = [f for f in fields(row)[3:] if getattr(row, f.name) != f.default and f.name != "scoring"]
    first = ", ".join(repr(getattr(row, f.name)) for f in fields(row)[:3])
    return f"Architecture({', '.join([first, *(f'{f.name}={getattr(row, f.name)!r}' for f in named)])})"


def discover(unknown: UnknownBlock) -> Architecture:
    """The row of a block that follows the contract, tested on a copy of it with random weights.

    Raises:
        ValueError: If it does not; with the reason, and instructions to write a surgeon.
    """
    row = None
    try:
        row = _propose(unknown)
        return self_test(row, unknown.block)
    except ContractError as error:
        raise ValueError(how_to(f"{type(unknown.block).__name__} ({unknown.path})", str(error), row)) from error


def _propose(unknown: UnknownBlock) -> Architecture:
    """A row guessed from names and sizes; the self-test finds wrong guesses."""
    block, experts = unknown.block, getattr(unknown.block, unknown.experts)
    count = experts.num_experts
    routers = [
        name
        for name, child in block.named_children()
        if name != unknown.experts and any(count in tensor.shape for _, tensor in _tensors(child))
    ]
    classes = {name: type(getattr(block, name)).__name__ for name in routers}
    named = [name for name in routers if re.search("router|gate", f"{name} {classes[name]}", re.I)]
    if len(named) != 1:
        raise ContractError(f"{len(named)} of its children ({', '.join(routers) or 'none'}) could be the router")
    router = getattr(block, named[0])
    top_k = next((name for name in _TOP_K if isinstance(getattr(router, name, None), int)), None)
    if top_k is None:
        raise ContractError(f"its router {named[0]} has none of the attributes {', '.join(_TOP_K)}")
    tensors = [_described(name, tensor, count) for name, tensor in _tensors(router) if count in tensor.shape]
    tensors.sort(key=lambda tensor: tensor.role != "rows")
    direct = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    tensors += [replace(_described(n, t, count), on_block=True) for n, t in direct if count in t.shape]
    count_fields = tuple(
        name
        for name, value in experts.config.to_dict().items()
        if value == count and "expert" in name and not re.search("per_tok|shared|top_?k", name)
    )
    if not count_fields:
        raise ContractError(f"no field of {type(experts.config).__name__} holds its number of experts, {count}")
    return Architecture(
        name=type(block).__name__,
        block=type(block).__name__,
        count_fields=count_fields,
        router=named[0],
        experts=unknown.experts,
        router_tensors=tuple(tensors),
        top_k=top_k,
        router_groups=next((name for name in _GROUPS if getattr(router, name, None)), None),
        router_counts=tuple(_counts(router, count)),
        block_counts=tuple(_counts(block, count, recurse=False)),
    )


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _described(name: str, tensor: torch.Tensor, count: int) -> RouterTensor:
    if not tensor.is_floating_point():
        raise ContractError(f"{name} holds integers, perhaps a table of expert ids")
    role: Role = "rows"
    if tensor.squeeze().dim() < 2:
        last = name.rpartition(".")[2]
        role = "bias" if last == "bias" else "correction" if "bias" in last or "correction" in last else "scale"
    return RouterTensor(name, axis=list(tensor.shape).index(count), role=role)


def _counts(module: nn.Module, count: int, recurse: bool = True) -> Iterator[str]:
    """Dotted names of the integer attributes that hold the number of experts."""
    for path, part in module.named_modules() if recurse else [("", module)]:
        for name, value in vars(part).items():
            counts = name == "out_features" or ("expert" in name and "per_tok" not in name)
            if counts and isinstance(value, int) and not isinstance(value, bool) and value == count:
                yield f"{path}.{name}" if path else name


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """New tensors are float32 on the CPU, whatever `from_pretrained` has set while it builds a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@_plain_tensors()
@torch.no_grad()
def self_test(row: Architecture, block: Block) -> Architecture:
    """Test a row on a copy of a block with random weights; only the sizes of `block` matter.

    The output must not change if identical experts are merged, experts are permuted, or experts that are never
    selected are pruned.

    Returns:
        The row, with its scoring.

    Raises:
        ContractError: If the block does not run, or one of these fails.
    """
    row = _with_scoring(row, block)
    surgeon = GenericSurgeon(row)
    trials: tuple[tuple[str, Callable[[GenericSurgeon, Block, torch.Tensor], None]], ...] = (
        ("merging copies of experts", _merge_copies),
        ("putting its experts in another order", _reorder),
        ("pruning experts that never win", _prune_silent),
    )
    for what, change in trials:
        copy, input_BSH = _random_copy(surgeon, block)
        if change is _prune_silent:
            _silence(surgeon, copy)
        elif change is _merge_copies:
            _copy_experts(surgeon, copy)
        with _refused(what):
            before = _run(copy, input_BSH)
            change(surgeon, copy, input_BSH)
            after = _run(copy, input_BSH)
        # A comparison with NaN is false, so NaN fails too.
        if not bool((after - before).abs().max() <= _TOLERANCE * before.abs().max()):
            raise ContractError(f"in a self-test {what} changed its output")
    return row


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Convert any exception of an unknown block into a `ContractError`."""
    try:
        yield
    except Exception as error:
        raise ContractError(f"{what} failed with {type(error).__name__}: {error}") from error


def _random_copy(surgeon: GenericSurgeon, block: Block) -> tuple[Any, torch.Tensor]:
    """A float32 copy of a block on the CPU with random weights, and an input with one constant channel."""
    generator = torch.Generator().manual_seed(0)
    # Copy only the structure, since a real block may be large.
    empty: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in block.parameters()}
    empty |= {id(buffer): buffer.to("meta") for buffer in block.buffers()}
    copy = deepcopy(block, empty).to_empty(device="cpu").float().eval()
    for _, tensor in _tensors(copy):
        if tensor.is_floating_point():
            tensor.normal_(0, 0.3 if tensor.squeeze().dim() < 2 else tensor.shape[-1] ** -0.5, generator=generator)
    set_experts_implementation(getattr(copy, surgeon.architecture.experts).config, "eager")
    hidden = surgeon.experts(copy).hidden_size
    input_BSH = torch.randn(1, _TOKENS, hidden, generator=generator)
    input_BSH[..., 0] = 4.0
    return copy, input_BSH


def _run(block: Any, input_BSH: torch.Tensor) -> torch.Tensor:
    output = block(input_BSH)
    return output[0] if isinstance(output, tuple) else output


def _labels(surgeon: GenericSurgeon, block: Block) -> tuple[int, ...]:
    """Labels that pair neighboring experts, so that no group crosses router groups."""
    return tuple(expert // 2 for expert in range(surgeon.num_experts(block)))


def _orders(surgeon: GenericSurgeon, block: Block) -> torch.Tensor:
    view = surgeon.experts(block)
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(view.intermediate_size, generator=generator) for _ in range(view.num_experts)])


def _copy_experts(surgeon: GenericSurgeon, block: Block) -> None:
    """Make every second expert a copy of its neighbor with permuted neurons."""
    view, order_EI = surgeon.experts(block), _orders(surgeon, block)
    for expert in range(1, view.num_experts, 2):
        for name, axis in NEURON_AXIS.items():
            matrices = getattr(view, name)
            if matrices is not None:
                first = matrices[expert - 1]
                matrices[expert].copy_(first if axis is None else first.index_select(axis, order_EI[expert]))


def _merge_copies(surgeon: GenericSurgeon, block: Block, input_BSH: torch.Tensor) -> None:
    labels_E, order_EI = _labels(surgeon, block), _orders(surgeon, block).argsort(-1)
    order_EI[::2] = torch.arange(order_EI.shape[1])
    sizes = torch.bincount(torch.tensor(labels_E)).double()
    weights_E = 1 / sizes[list(labels_E)]
    surgeon.cut(block, BlockPlan("block", labels_E, tuple(range(0, len(labels_E), 2)), "map", weights_E, order_EI))


def _reorder(surgeon: GenericSurgeon, block: Block, input_BSH: torch.Tensor) -> None:
    """Swap neighboring experts, which remain in their router group."""
    count = surgeon.num_experts(block)
    order_E = [expert ^ 1 if expert ^ 1 < count else expert for expert in range(count)]
    stacks = [tensor.data for tensor in surgeon.expert_parameters(block)]
    for tensor in (*stacks, *(t.movedim(row.axis, 0) for row, t in surgeon.router_tensors(block))):
        tensor.copy_(tensor[order_E].clone())


def _silenced(surgeon: GenericSurgeon, block: Block) -> list[int]:
    """Experts to silence: the second half of every router group, if enough others remain for top-k."""
    info = surgeon.info(block, "block", 0)
    size = info.num_experts // info.router_groups
    kept = min(size, max(size // 2, -(-info.top_k // info.router_groups_used), 2))
    return [expert for expert in range(info.num_experts) if expert % size >= kept]


def _silence(surgeon: GenericSurgeon, block: Block) -> None:
    """Give experts a very low logit wherever the constant channel is positive."""
    silent = _silenced(surgeon, block)
    for row, tensor in surgeon.router_tensors(block):
        entries_EX = tensor.movedim(row.axis, 0)
        if row.role == "rows":
            entries_EX[silent] = 0.0
            entries_EX[silent, 0] = -50.0
        elif row.role in ("bias", "correction"):
            entries_EX[silent] = -50.0


def _prune_silent(surgeon: GenericSurgeon, block: Block, input_BSH: torch.Tensor) -> None:
    silent = set(_silenced(surgeon, block))
    kept = [expert for expert in range(surgeon.num_experts(block)) if expert not in silent]
    labels_E = tuple(kept.index(e) if e in kept else -1 for e in range(surgeon.num_experts(block)))
    weights_E = torch.tensor([float(label >= 0) for label in labels_E], dtype=torch.float64)
    surgeon.cut(block, BlockPlan("block", labels_E, tuple(kept), "reduce", weights_E, router_weights_E=weights_E))


class _Chosen:
    """A watcher that records the routing of one call."""

    def router(self, logits_TE: torch.Tensor, input_TH: torch.Tensor) -> None:
        self.input_TH = input_TH

    def begin(self, input_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        self.index_TK, self.weights_TK = index_TK, weights_TK

    def expert(self, *routed: Any) -> None:
        """Ignore the outputs of the experts."""


def _with_scoring(row: Architecture, block: Block) -> Architecture:
    """Find the scoring to whose scores the routing weights of each token are proportional."""
    surgeon = GenericSurgeon(row)
    copy, input_BSH = _random_copy(surgeon, block)
    chosen = _Chosen()
    with _refused("calling its router and its experts"), surgeon.watch(copy, chosen):
        _run(copy, input_BSH)
    with _refused("reading the rows of its router"):
        logits_TN = surgeon.router(copy).logits(chosen.input_TH)
    scale_E = {r.role: t for r, t in surgeon.router_tensors(copy)}.get("scale")
    weights_TK = chosen.weights_TK if scale_E is None else chosen.weights_TK / scale_E[chosen.index_TK]
    for scoring in (softmax, sigmoid):
        ratio_TK = weights_TK / scoring(None, logits_TN).gather(1, chosen.index_TK)
        # With one expert per token, weights can only be compared between tokens.
        first = ratio_TK[:1] if ratio_TK.shape[1] == 1 else ratio_TK[:, :1]
        if bool(((ratio_TK - first).abs() <= 1e-3 * first.abs()).all()):
            return replace(row, scoring=scoring)
    if weights_TK.shape[1] == 1 and bool((weights_TK == weights_TK[:1]).all()):
        return replace(row, scoring=softmax)
    raise ContractError("its weights are neither a softmax nor a sigmoid of its logits; name its `scoring`")
