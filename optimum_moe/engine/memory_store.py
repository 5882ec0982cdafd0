"""A store over a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from transformers import PreTrainedModel

from optimum_moe.checkpoint.stored import StoredModel
from optimum_moe.engine.layers import Layer, find_layers
from optimum_moe.engine.store import Observed
from optimum_moe.engine.working_folder import WorkingFolder
from optimum_moe.plan import BlockPlan
from optimum_moe.surgeons import FoundBlock


class MemoryStore:
    """The layers of a model in memory.

    Args:
        model: The model.
        blocks: Its MoE blocks.
        stored: Dtypes and bits of its tensors in the checkpoint; None if loading did not change them.
    """

    folder: WorkingFolder | None = None
    holds_all = True

    def __init__(self, model: PreTrainedModel, blocks: Sequence[FoundBlock], stored: StoredModel | None = None) -> None:
        self.model = model
        self._stored = stored
        self.blocks = blocks
        self.layers: Sequence[Layer] = find_layers(model, blocks)
        self._plans: dict[str, BlockPlan] = {}
        self._finished: set[str] = set()

    @property
    def device(self) -> torch.device:
        """See `Store.device`."""
        return self.model.device

    @contextmanager
    def loaded(self, layer: Layer) -> Iterator[None]:
        """See `Store.loaded`; the layer is always loaded."""
        yield

    def opened(self, layer: Layer) -> AbstractContextManager[None]:
        """See `Store.opened`; the layer is always open."""
        return self.loaded(layer)

    def as_stored(self, layer: Layer) -> AbstractContextManager[None]:
        """See `Store.as_stored`."""
        return self.loaded(layer) if self._stored is None else self._stored.as_stored(layer.name)

    def provide(self, found: FoundBlock, experts: bool) -> None:
        """Do nothing, since all tensors are in memory."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `Store.running`; the model can always run."""
        yield

    def free_between_layers(self) -> None:
        """Do nothing, since a model in memory is never freed."""

    def is_finished(self, layer: Layer) -> bool:
        """Whether the layer was cut."""
        return layer.name in self._finished

    def finish(self, layer: Layer, plans: Mapping[str, BlockPlan], observed: Observed | None) -> None:
        """Record the plans of the layer."""
        self._finished.add(layer.name)
        self._plans |= plans
        if self._stored is not None:
            self._stored.record_dtypes(plans)

    def restore(self, layer: Layer) -> None:
        """Do nothing, since a cut layer remains in memory."""

    def plans(self) -> dict[str, BlockPlan]:
        """See `Store.plans`."""
        order = [found.info.name for found in self.blocks]
        return {name: self._plans[name] for name in order if name in self._plans}
