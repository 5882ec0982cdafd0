"""Low-rank adapters (LoRA, arXiv:2106.09685) on all matrices of a model, merged into them after the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class Adapters:
    """The adapters of a model, which trains in their place.

    Args:
        model: The model; adapters are put into it.
        names: Parameters of which the matrices are adapted: linear layers and stacks of experts, no output layer.
        rank: Of each adapter.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], rank: int) -> None:
        from peft import LoraConfig, LoraModel

        linear = {f"{path}.weight": path for path, module in model.named_modules() if _is_plain(module)}
        output: Any = model.get_output_embeddings()
        self.names = [
            name
            for name in names
            if model.get_parameter(name).dim() in (2, 3)
            and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
            and (output is None or model.get_parameter(name) is not output.weight)
        ]
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=[linear[name] for name in self.names if name in linear],
            target_parameters=[name for name in self.names if name not in linear],
        )
        self._tuner = LoraModel(model, config, "default")

    def merge(self) -> None:
        """Add the adapters to the matrices, and take them out of the model."""
        self._tuner.merge_and_unload()


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear
