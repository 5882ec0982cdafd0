"""Checks of all weights before anything is cut: NaN and infinity are refused, all-zero matrices cause a warning."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from transformers import PreTrainedModel

from optimum_moe.surgeons import ExpertAxis, FoundBlock

Named = tuple[str, torch.Tensor]

_SHOWN = 4
_IN_A_MODULE = re.compile(r"\bexperts?\.(?:expert_)?(\d+)\.")
"""Finds the expert's index in the module path, for architectures with one module per expert."""


def check_model(model: PreTrainedModel, blocks: Sequence[FoundBlock], beside: Iterable[Named] = ()) -> PreTrainedModel:
    """Run `check_tensors` on a model in memory and on the tensors copied beside it; returns the model."""
    seen: set[tuple[int, torch.Size]] = set()

    def once() -> Iterator[Named]:
        for name, tensor in model.state_dict().items():
            # Tied tensors share one address; offloaded ones have none.
            key = (tensor.data_ptr(), tensor.shape)
            if not tensor.is_meta and key not in seen:
                seen.add(key)
                yield name, tensor

    check_tensors(chain(once(), beside), model, blocks)
    return model


def check_tensors(tensors: Iterable[Named], model: PreTrainedModel, blocks: Sequence[FoundBlock]) -> None:
    """Refuse tensors with NaN or infinity, and warn of matrices that are all zeros.

    Args:
        tensors: All tensors to compress, by the names of the model.
        model: The model.
        blocks: Its MoE blocks, not cut yet.

    Raises:
        ValueError: If an element is NaN or infinite.
    """
    axes = {f"{f.info.name}.{path}": a for f in blocks for path, a in f.surgeon.expert_axes(f.module(model)).items()}
    names = sorted((found.info.name for found in blocks), key=len, reverse=True)
    of_experts = _names_of_experts(model, blocks)
    broken, zeros, narrow, is_dead = [], [], False, False
    for name, tensor in tensors:
        if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        axis, block = axes.get(name), next((b for b in names if name.startswith(f"{b}.")), None)
        tensor = tensor.detach()
        is_sound = _is_finite(tensor)
        if is_sound and not (axis.is_matrix if axis else tensor.dim() > 1 and name.endswith(".weight")):
            continue
        for expert, part in _parts(name, tensor, axis):
            if not is_sound and not _is_finite(part):
                kind = "NaN" if bool(part.isnan().any()) else "infinity"
                broken.append(f"{_place(name, block, expert)} holds {kind}")
                narrow |= kind == "infinity" and tensor.dtype == torch.float16
            elif not bool(part.any()):
                zeros.append(_place(name, block, expert))
                is_dead |= name in of_experts
    if broken:
        wider = 'load it in a wider dtype than float16 (dtype="bfloat16" or dtype="float32"), or ' if narrow else ""
        raise ValueError(
            f"The weights are broken: {_listed(broken)}. Nothing was cut. To fix this, {wider}download, copy or "
            "train the checkpoint again."
        )
    if zeros:
        follows = "An expert of zeros outputs zero, and is removed first. " if is_dead else ""
        warnings.warn(
            f"These weights are all zeros: {_listed(zeros)}. {follows}Check the checkpoint if this is not intended.",
            stacklevel=2,
        )


def _names_of_experts(model: PreTrainedModel, blocks: Sequence[FoundBlock]) -> set[str]:
    """Names of the parameters of routed experts, without those of their routers."""
    experts = {id(p) for found in blocks for p in found.surgeon.expert_parameters(found.module(model))}
    return {name for name, parameter in model.named_parameters() if id(parameter) in experts}


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are finite; allocates no tensor of the same size."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:
        # 8-bit dtypes support few operations.
        tensor = tensor.float()
    return all(bool(value.isfinite()) for value in tensor.aminmax())


def _parts(name: str, tensor: torch.Tensor, axis: ExpertAxis | None) -> Iterator[tuple[int | None, torch.Tensor]]:
    """Yield the slice of each expert with its index, and the slices of no expert with None."""
    found = _IN_A_MODULE.search(name)
    if axis is None:
        yield None if found is None else int(found[1]), tensor
        return
    first = tensor.movedim(axis.axis, 0)
    for expert in range(axis.num_experts):
        yield expert, first[expert * axis.entries : (expert + 1) * axis.entries]
    rest = first[axis.num_experts * axis.entries :]
    if len(rest):
        yield None, rest


def _place(name: str, block: str | None, expert: int | None) -> str:
    where = [] if block is None else [f"block {block}"]
    where += [] if expert is None else [f"expert {expert}"]
    return f"{name} ({', '.join(where)})" if where else name


def _listed(places: Sequence[str]) -> str:
    more = f"; and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return "; ".join(places[:_SHOWN]) + more
