"""The training that a recipe asks for, of the model that was just compressed and is still in memory."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_moe.checkpoint.refusals import all_in_memory
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.recovery.data import RecoveryData
from optimum_moe.recovery.run import train_in_place, training_data
from optimum_moe.recovery_settings import Recovery


@dataclass(frozen=True)
class TrainingAfterCut:
    """What a training needs of the original, taken before the cut.

    Args:
        recovery: The settings, with their text.
        original: The original: its checkpoint, or a copy of the model in memory.
        data: The text, read and split.
        seed: Seed of all random choices.
        progress: Show a progress bar.
    """

    recovery: Recovery
    original: ModelSource
    data: RecoveryData
    seed: int
    progress: bool

    @classmethod
    def prepare(
        cls, source: ModelSource, recovery: Recovery, tokenizer: Any, seed: int, progress: bool
    ) -> TrainingAfterCut:
        """Read the text, and copy a model in memory, which is about to be cut.

        Raises:
            ValueError: If there is too little text, or some of it is on both sides.
        """
        data = training_data(source.skeleton, tokenizer, recovery, seed)
        if source.live is not None:
            source = replace(source, live=deepcopy(all_in_memory(source.live)))
        return cls(recovery, source, data, seed, progress)

    def run(self, model: PreTrainedModel, states: Path) -> TrainingRecord:
        """Train the compressed model in place; see `train_in_place`."""
        return train_in_place(model, self.original, self.recovery, self.data, states, self.seed, self.progress)
