"""Compressed checkpoints in vLLM: a quantization method that vLLM finds through the entry point of this package.

vLLM is imported in this folder only, and only when vLLM itself loads its plugins. Nothing here needs a newer torch or
transformers than vLLM brings.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the quantization method `optimum_moe`; called in every process of vLLM, possibly several times."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from optimum_moe.hf.structure import METHOD

    if METHOD not in QUANTIZATION_METHODS:
        from optimum_moe.vllm_plugin.config import CompressedConfig
        from optimum_moe.vllm_plugin.loading import track_loading

        register_quantization_config(METHOD)(CompressedConfig)
        track_loading()
