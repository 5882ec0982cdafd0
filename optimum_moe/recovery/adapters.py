"""Low-rank adapters (LoRA, arXiv:2106.09685) on the matrices of a model, merged into them after the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Adapters:
    """The adapters of a model, which trains in their place.

    Args:
        model: The model; adapters are put into it.
        names: Parameters of which the matrices are adapted: linear layers, routers and stacks of experts; no output
            layer, no convolution, and nothing that kernels of a state-space mixer read by themselves.
        rank: Of each adapter.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], rank: int) -> None:
        from peft import LoraConfig, LoraModel

        modules = dict(model.named_modules())
        linear = {f"{path}.weight": path for path, module in modules.items() if type(module) is nn.Linear}
        output: Any = model.get_output_embeddings()
        self.names = [
            name
            for name in names
            if model.get_parameter(name).dim() in (2, 3)
            and _takes_an_adapter(modules, name.rpartition(".")[0])
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


def _takes_an_adapter(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether the matrices of a module multiply its inputs, and are read by itself."""
    module, (mixer, _, name) = modules[path], path.rpartition(".")
    # Fused kernels of a mixer with a convolution read the weight of its output projection without calling it.
    fused = name == "out_proj" and any(isinstance(beside, CONVOLUTIONS) for beside in modules[mixer].children())
    nested = any(child.state_dict() for child in module.children())
    return not isinstance(module, (nn.Embedding, *CONVOLUTIONS)) and not nested and not fused
