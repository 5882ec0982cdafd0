"""A store over a checkpoint on disk: one layer is in memory at a time, and is written to its own shard once cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optimum_moe.checkpoint.byte_ranges import ByteRange
from optimum_moe.checkpoint.headers import INDEX_FILE
from optimum_moe.checkpoint.reader import CheckpointReader, ShardReader
from optimum_moe.checkpoint.shards import write_shard
from optimum_moe.checkpoint.stored import in_dtypes, plan_of, slot_dtypes
from optimum_moe.checkpoint.streamed import StreamedModel
from optimum_moe.checkpoint.system import return_freed
from optimum_moe.engine.layers import Layer, find_layers, is_in
from optimum_moe.engine.store import Observed
from optimum_moe.engine.working_folder import WorkingFolder
from optimum_moe.hf.compat import names_not_saved, remove_tied_weights_from_state_dict, revert_weight_conversion
from optimum_moe.plan import BlockPlan
from optimum_moe.surgeons import FoundBlock, guarded, stock_block

SHARD_SIZE = 5 * 10**9


class DiskStore:
    """The layers of a model whose tensors are read on demand and written once they are cut.

    Args:
        streamed: The model.
        blocks: Its MoE blocks.
        folder: Working folder for finished layers; None for a run that only observes.
    """

    holds_all = False

    def __init__(self, streamed: StreamedModel, blocks: Sequence[FoundBlock], folder: WorkingFolder | None) -> None:
        self.streamed, self.blocks, self.folder = streamed, blocks, folder
        self.model: Any = streamed.model
        state = dict(self.model.state_dict())
        ignored = set(names_not_saved(self.model))
        kept = remove_tied_weights_from_state_dict({n: t for n, t in state.items() if n not in ignored}, self.model)
        self._dropped = set(state) - set(kept)
        layers = find_layers(self.model, blocks)
        rest = [name for name in kept if not is_in(name, layers)]
        self.layers: Sequence[Layer] = [*layers, *_rest_layers(rest, state)]
        self._saved_as: dict[str, str] = {}
        self._stacked: set[str] = set()
        self._check_conversions(kept)
        sizes = {layer.name: [_bytes(state[name]) for name in self._state_names(layer, kept)] for layer in self.layers}
        largest = max(sizes.values(), key=sum)
        self.needed = sum(largest) + 2 * max(largest, default=0)
        """Peak bytes of memory while the largest layer is read, cut and written."""
        self._files = [layer.name for layer in self.layers if sizes[layer.name]]
        self._plans: dict[str, BlockPlan] = {}
        self._place, self._step = 0, 1
        self._runs = False
        self._to_rebuild: list[Layer] = []
        for layer in self.layers:
            if folder is not None and layer.blocks and self.is_finished(layer):
                self._plans |= folder.plans(layer.name)
                self._to_rebuild.append(layer)

    def _state_names(self, layer: Layer, kept: Mapping[str, Any]) -> list[str]:
        return list(layer.tensors) or [name for name in kept if is_in(name, [layer])]

    def _check_conversions(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Check that each layer can be written alone.

        Raises:
            ValueError: If a tensor of the checkpoint contains several layers.
        """
        whole = sorted(revert_weight_conversion(self.model, dict(kept)))
        parts = []
        for layer in self.layers:
            state = {name: kept[name] for name in self._state_names(layer, kept)}
            stored = revert_weight_conversion(self.model, state)
            parts += stored
            self._find_copies(state, stored)
        if sorted(parts) != whole:
            odd = sorted(set(parts) ^ set(whole)) or parts
            raise ValueError(
                f"Checkpoints of {type(self.model).__name__} store several layers in one tensor ({odd[0]}), so they "
                'cannot be written layer by layer. Use engine="memory".'
            )

    def _find_copies(self, state: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
        """Find the tensors of a layer that can be copied as bytes, under one other name or expert by expert."""
        names = {id(tensor): name for name, tensor in stored.items()}
        for name, tensor in state.items():
            entries = self.streamed.entries(name)
            if entries is None:
                continue
            if id(tensor) in names:
                self._saved_as[name] = names[id(tensor)]
            elif all(self._comes_back(part, tensor.dtype, stored) for entry in entries for part in entry):
                self._stacked.add(name)

    def _comes_back(self, part: str, dtype: torch.dtype, stored: Mapping[str, torch.Tensor]) -> bool:
        """Whether a slice of a stacked tensor is saved under its stored name."""
        size = self.streamed.checkpoint_tensors.headers.tensors[part][2]
        return part in stored and stored[part].dtype == dtype and _bytes(stored[part]) == size

    @property
    def device(self) -> torch.device:
        """See `Store.device`."""
        return self.streamed.device

    @contextmanager
    def loaded(self, layer: Layer) -> Iterator[None]:
        """Read the layer, and free it on exit."""
        runs, self.streamed.runs = self.streamed.runs, True
        try:
            with self.opened(layer):
                self._load(layer.tensors or self.streamed.names(layer.name))
                self._runs = True
                yield
        finally:
            self.streamed.runs = runs
        return_freed()

    @contextmanager
    def opened(self, layer: Layer) -> Iterator[None]:
        """Open the layer without reading it, and free it on exit."""
        place = self.layers.index(layer)
        self._place, self._step = place, -1 if place < self._place else 1
        try:
            yield
        finally:
            self._runs = False
            if layer.tensors:
                self.streamed.free_named(layer.tensors)
            else:
                self.streamed.free(layer.name)

    @contextmanager
    def as_stored(self, layer: Layer) -> Iterator[None]:
        """See `Store.as_stored`."""
        with self.streamed.as_stored(layer.name, layer.tensors):
            yield

    def provide(self, found: FoundBlock, experts: bool) -> None:
        """Read the block; without `experts`, free the experts that can be copied from file to file."""
        if self._runs:
            return
        names = self.streamed.names(found.info.name)
        if experts:
            self._load(names)
            return
        own = {id(parameter) for parameter in found.surgeon.expert_parameters(found.module(self.model))}
        left = [name for name in names if name in self._stacked and id(self.streamed.at(name)) in own]
        self.streamed.free_named(left)
        self.streamed.load(name for name in names if name not in left)

    def _load(self, names: Sequence[str]) -> None:
        """Read tensors of the open layer, and start to prefetch the next layer in the same direction."""
        self.streamed.expect(names)
        self.streamed.load(names)
        place = self._place + self._step
        following = self.layers[place : place + 1] if place >= 0 else ()
        if following and following[0].blocks and not self.is_finished(following[0]):
            self.streamed.expect(self.streamed.names(following[0].name))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of the layers that are not finished, with one layer in memory at a time."""
        for layer in self.layers:
            if not self.is_finished(layer):
                with self.loaded(layer):
                    yield from self._state(layer).items()

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `Store.running`; modules outside of the layers are read at first use."""
        with self.streamed.loading_at_first_use():
            yield

    def free_between_layers(self) -> None:
        """See `Store.free_between_layers`."""
        self.streamed.free_lent()

    def is_finished(self, layer: Layer) -> bool:
        """Whether the layer's shard is written."""
        return self.folder is not None and layer.name in self.folder.finished

    def finish(self, layer: Layer, plans: Mapping[str, BlockPlan], observed: Observed | None) -> None:
        """Write the layer to its shard, and record it as finished."""
        assert self.folder is not None
        copyable = self._stacked | self._saved_as.keys()
        self.streamed.load(name for name in self._unread(self._state(layer)) if name not in copyable)
        state = self._state(layer)
        if not self._stacked.intersection(self._unread(state)):
            # The original experts are no longer needed; free them before the new ones are written.
            self.streamed.buffers.release()
        tensors = in_dtypes(revert_weight_conversion(self.model, state), self._saved_in(state, plans))
        shard, size = None, 0
        if tensors:
            shard = self._shard(layer)
            size = write_shard(self.folder.checkpoint / shard, tensors, dict(self._copies(state, plans)))
        record = None
        if layer.blocks:
            record = self.folder.write_record(f"layer-{self.layers.index(layer):05d}", plans, observed)
        weights = {name: [tensor.numel(), _bytes(tensor)] for name, tensor in tensors.items()}
        self.folder.add(
            layer.name, shard=shard, size=size, record=record, observed=observed is not None, weights=weights
        )
        self._plans |= plans

    def _saved_in(self, state: Mapping[str, torch.Tensor], plans: Mapping[str, BlockPlan]) -> Mapping[str, torch.dtype]:
        """Saved name -> dtype, for experts whose stack is stored in more than one dtype."""
        dtypes: dict[str, torch.dtype] = {}
        for name in state:
            if name in self.streamed.mixed:
                dtypes |= slot_dtypes(self.streamed.mixed[name], plan_of(name, plans))
        return dtypes

    def itemsize(self, name: str, tensor: torch.Tensor) -> float:
        """Bytes per element of a tensor of the finished model, as saved."""
        saved = self._saved_in({name: tensor}, self._plans).values()
        return sum(dtype.itemsize for dtype in saved) / len(saved) if saved else tensor.element_size()

    def restore(self, layer: Layer) -> None:
        """Cut a layer again by its recorded plans; the factors of experts are read from its shard.

        Raises:
            ValueError: If the factors in the shard differ from those that were written.
        """
        for found in layer.blocks:
            plan, block = self._plans[found.info.name], found.module(self.model)
            with guarded(self.model, found, plan.needs_guard):
                # A plan that was read from disk has no factors.
                found.surgeon.carry_out(block, replace(plan, sizes=None, neurons=None, is_stock=False))
                if plan.sizes is not None:
                    self._build(found, plan)
            if plan.sizes is not None:
                self._read_factors(layer, found, plan)

    def _read_factors(self, layer: Layer, found: FoundBlock, plan: BlockPlan) -> None:
        assert self.folder is not None
        done = self.folder.finished[layer.name]
        block = found.module(self.model)
        reader = CheckpointReader(self.model, done["weights"])
        shard = self.folder.checkpoint / done["shard"]
        with ShardReader(dict.fromkeys(done["weights"], shard)) as get:
            tensors = reader.read(found.info.name, get)
            for path, tensor in found.surgeon.written_experts(block).items():
                tensor.copy_(tensors[f"{found.info.name}.{path}"])
        if found.surgeon.digest(block) != plan.digest:
            raise ValueError(
                f"{shard} does not contain the factors of {plan.name} that were written. Pass overwrite=True "
                "(--overwrite) to start again."
            )

    def _build(self, found: FoundBlock, plan: BlockPlan) -> None:
        """Give a block the structure of its plan, with empty tensors."""
        stock = stock_block(self.model, self.blocks, plan)
        block = found.module(self.model)
        sizes = None if plan.is_stock else plan.sizes
        found.surgeon.build_structure(block, plan.num_groups, plan.routing, sizes, stock, plan.skipping)

    def plans(self) -> dict[str, BlockPlan]:
        """See `Store.plans`."""
        order = [found.info.name for found in self.blocks]
        return {name: self._plans[name] for name in order if name in self._plans}

    def rebuild(self) -> None:
        """Rebuild, without weights, the modules of the layers that an earlier run cut."""
        for found in (found for layer in self._to_rebuild for found in layer.blocks):
            plan = self._plans[found.info.name]
            block = found.module(self.model)
            if not plan.is_identity and found.surgeon.is_stock(block, plan):
                with guarded(self.model, found, plan.needs_guard):
                    self._build(found, plan)
        self._to_rebuild.clear()

    def write_index(self, directory: Path) -> None:
        """Write the safetensors index of all shards."""
        assert self.folder is not None
        weight_map: dict[str, str] = {}
        sizes: list[list[int]] = []
        for layer in self.folder.finished.values():
            weight_map |= dict.fromkeys(layer["weights"], layer["shard"])
            sizes += layer["weights"].values()
        total = {"total_parameters": sum(n for n, _ in sizes), "total_size": sum(size for _, size in sizes)}
        record = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _state(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Tensors of a loaded layer that are saved, by the model's names."""
        if layer.tensors:
            return {name: self.streamed.at(name).detach() for name in layer.tensors}
        inside = self.model.get_submodule(layer.name).state_dict(prefix=f"{layer.name}.")
        return {name: tensor for name, tensor in inside.items() if name not in self._dropped}

    def _copies(
        self, state: Mapping[str, torch.Tensor], plans: Mapping[str, BlockPlan]
    ) -> Iterator[tuple[str, ByteRange]]:
        """Saved name and byte range in the original files, for the tensors that are still on the meta device."""
        for name in self._unread(state):
            entries = self.streamed.entries(name)
            assert entries is not None
            if name in self._saved_as:
                yield self._saved_as[name], self.streamed.byte_range(entries[0][0])
                continue
            plan = plan_of(name, plans)
            kept = [] if plan is None else plan.references_G
            # Slots after the routed experts, such as zero experts, are kept.
            rest = range(0 if plan is None else plan.num_experts, len(entries))
            for slot, expert in enumerate([*kept, *rest]):
                for saved, stored in zip(entries[slot], entries[expert], strict=True):
                    yield saved, self.streamed.byte_range(stored)

    def _unread(self, state: Mapping[str, torch.Tensor]) -> list[str]:
        return [name for name, tensor in state.items() if tensor.is_meta]

    def _shard(self, layer: Layer) -> str:
        return f"model-{self._files.index(layer.name) + 1:05d}-of-{len(self._files):05d}.safetensors"


def _rest_layers(names: Sequence[str], state: Mapping[str, torch.Tensor]) -> list[Layer]:
    """All tensors outside of the layers, in parts of at most `SHARD_SIZE` bytes."""
    parts: list[list[str]] = []
    room = 0
    for name in names:
        if not parts or _bytes(state[name]) > room:
            parts.append([])
            room = SHARD_SIZE
        parts[-1].append(name)
        room -= _bytes(state[name])
    return [Layer(f"rest {number}", tensors=tuple(part)) for number, part in enumerate(parts, 1)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
