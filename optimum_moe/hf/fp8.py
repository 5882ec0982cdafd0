"""FP8 checkpoints dequantized as they were quantized, also where transformers would scale them wrongly."""

from __future__ import annotations

from typing import Any

import torch
from transformers import FineGrainedFP8Config
from transformers.quantizers import register_quantization_config, register_quantizer

from optimum_moe.hf.compat import AUTO_QUANTIZATION_CONFIG_MAPPING, FineGrainedFP8HfQuantizer, Fp8Dequantize

BLOCK_FP8 = "optimum_moe_fp8"
"""The `quant_method` that `register_block_fp8` makes known to transformers."""


class BlockFp8Dequantize(Fp8Dequantize):
    """Also right where a side of a matrix is no multiple of the block.

    transformers divides the matrix evenly by its number of scales: DeepSeek-V3's `kv_a_proj_with_mqa` (576 rows, 5
    scales of 128 rows) fails, and 192 rows with 2 scales of 128 would be scaled wrongly.
    """

    def dequantize(self, quantized: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """One stored tensor in the dtype given."""
        return self._dequantize_one(quantized, scales, dtype)

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if block is None or scales.ndim < 2 or quantized.dtype == torch.int8:
            return super()._dequantize_one(quantized, scales, output_dtype)
        *leading, rows, columns = quantized.shape
        tall, wide = (-(-side // step) for side, step in zip((rows, columns), block, strict=True))
        if tuple(scales.shape[-2:]) != (tall, wide):
            return super()._dequantize_one(quantized, scales, output_dtype)
        padded = quantized.new_zeros((*leading, tall * block[0], wide * block[1]))
        padded[..., :rows, :columns] = quantized
        return super()._dequantize_one(padded, scales, output_dtype)[..., :rows, :columns].contiguous()

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As upstream, and in the dtype of the model where a tensor has no scale."""
        dtype = self._get_target_dtype(kwargs.get("model"), kwargs.get("full_layer_name"))
        return {name: _in_dtype(value, dtype) for name, value in super().convert(*args, **kwargs).items()}


def _in_dtype(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, list):
        return [_in_dtype(tensor, dtype) for tensor in value]
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


class BlockFp8Quantizer(FineGrainedFP8HfQuantizer):
    """The FP8 quantizer of transformers with `BlockFp8Dequantize`."""

    def get_load_operations(self) -> dict[str, Any]:
        """What `from_pretrained` does to quantized tensors."""
        return {"dequantize": BlockFp8Dequantize}


def register_block_fp8() -> None:
    """Make transformers know `BLOCK_FP8`; calling again changes nothing."""
    if BLOCK_FP8 not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(BLOCK_FP8)(FineGrainedFP8Config)
        register_quantizer(BLOCK_FP8)(BlockFp8Quantizer)
