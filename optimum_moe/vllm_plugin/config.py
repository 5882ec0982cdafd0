"""What vLLM asks of a quantization method: who owns which layer, and what the tensors are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from optimum_moe.hf.structure import METHOD, MoEStructureConfig
from optimum_moe.vllm_plugin.blocks import CompressedBlock
from optimum_moe.vllm_plugin.packed_method import PackedExpertsMethod
from optimum_moe.vllm_plugin.stock_method import MappedExpertsMethod, StockExpertsMethod

EXPERTS = "experts.routed_experts"
"""Where vLLM keeps the parameters of a block's experts."""


class CompressedConfig(QuantizationConfig):
    """`quantization_config` of a compressed checkpoint.

    Args:
        structure: As in config.json.

    Raises:
        ValueError: If the plugin does not run what it says.
    """

    def __init__(self, structure: MoEStructureConfig) -> None:
        super().__init__()
        if structure.quantization is not None:
            inner = structure.quantization.get("quant_method", "unknown")
            raise ValueError(
                f"This checkpoint is compressed and quantized at once (quant_method={inner!r}), which the vLLM plugin "
                "does not run. Serve the checkpoint from before the quantization, or use transformers."
            )
        self.blocks = {name: CompressedBlock.of_entry(name, entry) for name, entry in structure.blocks.items()}
        self._prefixes = {name: name for name in self.blocks}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedConfig:
        """From the dictionary in config.json.

        Raises:
            ValueError: If its format_version or a field is not known, or the plugin does not run what it says.
        """
        return cls(MoEStructureConfig(**config))

    def get_name(self) -> str:
        """`optimum_moe`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Every dtype of an unquantized model."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Volta, the first GPUs that vLLM and Triton run on."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything stands in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Find blocks by the module paths of vLLM; called by a model and by those that it is made of."""
        self._prefixes = {hf_to_vllm_mapper.map_name(path) or path: name for path, name in self._prefixes.items()}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Renames the tensors of compressed blocks before a model's own loader sees them."""
        return WeightsMapper(orig_to_new_renaming=[_Renaming(self.blocks)])

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The experts of compressed blocks, and everything else as without quantization."""
        if isinstance(layer, RoutedExperts):
            block = self._block_at(prefix)
            if block is None:
                return StockExpertsMethod(layer.moe_config, prefix)
            own = MappedExpertsMethod if block.spec is None else PackedExpertsMethod
            return own(layer.moe_config, block)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _block_at(self, prefix: str) -> CompressedBlock | None:
        for path, name in self._prefixes.items():
            if prefix.startswith(f"{path}."):
                return self.blocks[name]
        layer = extract_layer_index(prefix)
        same = [name for path, name in self._prefixes.items() if extract_layer_index(path) == layer]
        if same:
            raise ValueError(
                f"config.json compresses the block {same[0]}, and vLLM builds the experts of this layer at {prefix}: "
                "the names do not match. Save the checkpoint again with the present optimum_moe, or serve it with "
                "transformers."
            )
        return None


class _Renaming:
    """Renames by whole names; vLLM applies it before all patterns."""

    def __init__(self, blocks: Mapping[str, CompressedBlock]) -> None:
        self._blocks = blocks

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in vLLM, and the old one if it was changed."""
        at = source_key.find(".experts.")
        block = self._blocks.get(source_key[:at]) if at >= 0 else self._of_router(source_key)
        if block is None:
            return source_key, None
        own = block.renamed(source_key[len(block.name) + 1 :])
        return (source_key, None) if own is None else (f"{block.name}.{EXPERTS}.{own}", source_key)

    def _of_router(self, name: str) -> CompressedBlock | None:
        if not name.endswith(".expert_map"):
            return None
        return next((block for path, block in self._blocks.items() if name.startswith(f"{path}.")), None)
