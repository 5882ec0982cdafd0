"""Where the tensors of a model come from, and where they go: the one difference between memory and disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

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
    """Where finished layers and statistics are kept until the run is complete; None where nothing is."""

    @property
    def holds_all(self) -> bool:
        """Whether all layers are there at once, so that whole forward and backward passes can run."""

    def loaded(self, layer: Layer) -> AbstractContextManager[None]:
        """While it is open the layer has its tensors."""

    def opened(self, layer: Layer) -> AbstractContextManager[None]:
        """While it is open the layer can be cut, though it cannot run: it has what `provide` is asked for."""

    def as_stored(self, layer: Layer) -> AbstractContextManager[None]:
        """While it is open the tensors of an open layer have the dtypes and bits of the checkpoint: to decide and cut
        it and to finish it. Around it the layer has the dtypes that the model runs in."""

    def provide(self, found: FoundBlock, experts: bool) -> None:
        """Have what a block of an open layer is cut by, and its experts if they are wanted.

        Experts that are not wanted may be on the meta device, where those that remain keep their order.
        """

    def running(self) -> AbstractContextManager[None]:
        """While it is open the model runs."""

    def settle(self) -> None:
        """Let go of what the model needed between two layers."""

    def is_finished(self, layer: Layer) -> bool:
        """Whether the layer was finished, perhaps by an earlier run."""

    def finish(self, layer: Layer, plans: Mapping[str, BlockPlan], observed: Observed | None) -> None:
        """Take a layer that was cut, while it is open."""

    def restore(self, layer: Layer) -> None:
        """Make of a loaded layer what an earlier run made of it."""

    def plans(self) -> dict[str, BlockPlan]:
        """What was carried out so far, by block, in the order of the model."""
