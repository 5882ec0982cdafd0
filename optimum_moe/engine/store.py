"""The protocol of a store, which reads and writes the tensors of a model in memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from transformers import PreTrainedModel

from optimum_moe.engine.layers import Layer
from optimum_moe.engine.working_folder import WorkingFolder
from optimum_moe.plan import BlockPlan
from optimum_moe.statistics import BlockStatistics
from optimum_moe.surgeons import FoundBlock

Observed = Mapping[str, BlockStatistics]
"""Statistics by block."""


class Store(Protocol):
    """A model whose layers are observed, decided, cut and written one after the other."""

    model: PreTrainedModel
    blocks: Sequence[FoundBlock]
    layers: Sequence[Layer]
    folder: WorkingFolder | None
    """Stores finished layers and statistics until the run is complete; None for a store that writes nothing."""

    @property
    def holds_all(self) -> bool:
        """Whether all layers are in memory at once, so that they need not be observed one by one."""

    @property
    def device(self) -> torch.device:
        """Where layers are loaded and run; of a model on several devices the first."""

    def loaded(self, layer: Layer) -> AbstractContextManager[None]:
        """Context in which the layer has its tensors and can run."""

    def opened(self, layer: Layer) -> AbstractContextManager[None]:
        """Context in which the layer can be cut but not run; `provide` reads its tensors."""

    def as_stored(self, layer: Layer) -> AbstractContextManager[None]:
        """Context in which the tensors of an open layer have the dtypes and bits of the checkpoint, to decide, cut and
        finish it. Outside, the layer has the dtypes that the model runs in."""

    def provide(self, found: FoundBlock, experts: bool) -> None:
        """Provide the tensors that are needed to cut a block of an open layer, and its experts if `experts`.

        Otherwise experts may be on the meta device, where those that remain keep their order.
        """

    def running(self) -> AbstractContextManager[None]:
        """Context in which forward passes of the model can run."""

    def free_between_layers(self) -> None:
        """Free the tensors outside of the layers that a forward pass has used so far."""

    def is_finished(self, layer: Layer) -> bool:
        """Whether the layer is finished, by this run or an earlier one."""

    def finish(self, layer: Layer, plans: Mapping[str, BlockPlan], observed: Observed | None) -> None:
        """Store an open layer that was cut."""

    def restore(self, layer: Layer) -> None:
        """Give a loaded layer the compressed state that an earlier run wrote."""

    def plans(self) -> dict[str, BlockPlan]:
        """Plans carried out so far, by block, in the order of the model."""
