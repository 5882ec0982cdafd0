"""The stored dtypes of a checkpoint's tensors, which may differ from the dtype that its model runs in.

transformers loads all tensors in one dtype, which would round a float32 router of a bfloat16 checkpoint. So tensors are
cut and written in their stored dtypes, and run in those that transformers loads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_moe.checkpoint.checkpoint_tensors import Parts
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.hf.compat import names_not_saved, remove_tied_weights_from_state_dict, revert_weight_conversion
from optimum_moe.plan import BlockPlan


class StoredModel:
    """A loaded model, with the stored values of tensors that were rounded when it was loaded.

    Args:
        model: The loaded model.
        source: Its source; for a model in memory the stored dtypes are the present ones.
    """

    def __init__(self, model: PreTrainedModel, source: ModelSource) -> None:
        self.model = model
        self._runs_in = {name: t.dtype for name, t in model.state_dict().items() if t.is_floating_point()}
        self._dtypes = dict(self._runs_in)
        self._exact: dict[str, torch.Tensor] = {}
        self._mixed: dict[str, Parts] = {}
        self._saved_in: dict[str, torch.dtype] = {}
        self._itemsizes: dict[str, float] = {}
        headers = source.headers
        # The same set of dtypes may be assigned to other tensors than in the checkpoint.
        in_one_dtype = (
            headers is not None and headers.dtypes == set(self._runs_in.values()) and len(headers.dtypes) == 1
        )
        if headers is None or not source.as_stored or in_one_dtype:
            return
        with source.shards() as get:
            checkpoint_tensors = source.checkpoint_tensors(get)
            self._mixed = checkpoint_tensors.mixed()
            given = {name: t.dtype for name, t in checkpoint_tensors.tensors.items() if name in self._dtypes}
            self._dtypes |= given
            lost = [name for name, dtype in given.items() if not _holds(self._runs_in[name], dtype)]
            # Copy, since tensors in a mapped file become invalid with it.
            self._exact = {name: tensor.clone() for name, tensor in checkpoint_tensors.read(lost).items()}
        self.record_dtypes({})

    @contextmanager
    def as_stored(self, module: str) -> Iterator[None]:
        """Context in which a module has its stored tensors, to be cut; on exit they are cast to run again."""
        before: dict[str, Running] = {}
        for name, tensor in self._tensors(module):
            dtype = self._dtypes.get(name, tensor.dtype)
            before[name] = Running(tensor.numel(), dtype, self._runs_in.get(name, dtype))
            exact = self._exact.pop(name, None)
            # Some routers change their dtype at the first run, which does not restore rounded values.
            tensor.data = tensor.data.to(dtype) if exact is None else exact.to(tensor.device)
        yield
        found = dict(self._tensors(module))
        runs_in = of_replaced(before, found)
        for name, tensor in found.items():
            stored = self._dtypes[name] = tensor.dtype
            runs = self._runs_in.setdefault(name, runs_in.get(stored, stored))
            if runs != stored:
                if not _holds(runs, stored):
                    self._exact[name] = tensor.data
                tensor.data = tensor.data.to(runs)

    def record_dtypes(self, plans: Mapping[str, BlockPlan]) -> None:
        """Record the dtype of each remaining expert, for stacks whose experts have different dtypes."""
        for name, parts in self._mixed.items():
            plan = plan_of(name, plans)
            if plan is not None or not plans:
                saved = slot_dtypes(parts, plan)
                self._saved_in |= saved
                self._itemsizes[name] = sum(dtype.itemsize for dtype in saved.values()) / len(saved)

    def state(self) -> dict[str, torch.Tensor] | None:
        """All tensors to save by their names in the checkpoint; None if the model's own tensors can be saved."""
        state = dict(self.model.state_dict())
        odd = {name for name, t in state.items() if t.dtype != self._dtypes.get(name, t.dtype)}
        changed = {name: t for name, t in state.items() if name in odd or name in self._exact}
        if not changed and not self._mixed:
            return None
        for name in names_not_saved(self.model):
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, self.model)
        state |= {name: self._stored(name, tensor) for name, tensor in changed.items() if name in state}
        return in_dtypes(revert_weight_conversion(self.model, state), self._saved_in)

    def itemsize(self, name: str, tensor: torch.Tensor) -> float:
        """Bytes per element of a tensor of the model, as saved."""
        return self._itemsizes.get(name, self._dtypes.get(name, tensor.dtype).itemsize)

    def _stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        exact = self._exact.get(name)
        if exact is not None and torch.equal(_bits(exact.to(self._runs_in[name]).to(tensor)), _bits(tensor)):
            return exact
        # The tensor was trained since.
        return tensor.to(self._dtypes[name])

    def _tensors(self, module: str) -> Iterator[tuple[str, torch.Tensor]]:
        inside: nn.Module = self.model.get_submodule(module)
        for name, tensor in [*inside.named_parameters(), *inside.named_buffers()]:
            path = f"{module}.{name}" if module else name
            if tensor.is_floating_point():
                yield path, tensor


@dataclass(frozen=True)
class Running:
    """A tensor before its block was cut: its size, and the dtypes that it is stored and runs in."""

    numel: int
    stored: torch.dtype
    runs: torch.dtype


def of_replaced(before: Mapping[str, Running], left: Collection[str]) -> dict[torch.dtype, torch.dtype]:
    """The dtype in which new tensors run, by the one they are stored in: that of the tensors which they replace.

    Not that of any tensor of the block: some models run the router in float32 whatever it is stored in.

    Args:
        before: The tensors of a module by name.
        left: Names that there are after the cut.
    """
    gone = sorted((found for name, found in before.items() if name not in left), key=lambda found: found.numel)
    return {found.stored: found.runs for found in gone}


def plan_of(name: str, plans: Mapping[str, BlockPlan]) -> BlockPlan | None:
    """The plan of the block that contains a tensor, None if there is none."""
    return next((plan for block, plan in plans.items() if name.startswith(f"{block}.")), None)


def slot_dtypes(parts: Parts, plan: BlockPlan | None) -> dict[str, torch.dtype]:
    """The dtype of each stored tensor of a stack after the plan, which moves dominant experts to the first slots."""
    kept = range(len(parts)) if plan is None else [*plan.references_G, *range(plan.num_experts, len(parts))]
    return {
        name: dtype
        for slot, expert in enumerate(kept)
        for (name, _), (_, dtype) in zip(parts[slot], parts[expert], strict=True)
    }


def rounded(
    tensors: Mapping[str, torch.Tensor], mixed: Mapping[str, Parts], plan: BlockPlan | None
) -> dict[str, torch.Tensor]:
    """The tensors of a cut block, rounded as by saving stacks in parts of several dtypes."""
    return {name: _rounded(t, mixed[name], plan) if name in mixed else t for name, t in tensors.items()}


def _rounded(stack: torch.Tensor, parts: Parts, plan: BlockPlan | None) -> torch.Tensor:
    kept = slot_dtypes(parts, plan)
    slots = []
    for entry, names in zip(stack, parts, strict=False):
        pieces = zip(entry.chunk(len(names)), names, strict=True)
        slots.append(torch.cat([piece.to(kept[name]) for piece, (name, _) in pieces]))
    return torch.stack(slots)


def in_dtypes(tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Tensors by name, with the named ones cast to the given dtypes."""
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype represents all values of another exactly."""
    return torch.promote_types(dtype, other) == dtype


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
