"""FP8 and MXFP4 checkpoints, which are dequantized while they are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

from optimum_moe.checkpoint.headers import Headers
from optimum_moe.checkpoint.reader import CheckpointReader, Get
from optimum_moe.hf.compat import set_weight_conversions
from optimum_moe.hf.fp8 import BLOCK_FP8, BlockFp8Dequantize, register_block_fp8
from optimum_moe.surgeons import owning_configs

_LOADED_AS = {"fp8": BLOCK_FP8, "mxfp4": "mxfp4"}
_SCALES = (
    (re.compile(r"_scale_inv$"), ""),
    (re.compile(r"\.scale$"), ".weight"),
    (re.compile(r"\.qscale_weight$"), ".weight"),
    (re.compile(r"_scales$"), "_blocks"),
)
"""Patterns that turn the name of a scale into that of the tensor it scales."""


def accepted_quantization(config: PreTrainedConfig, dequantize: bool) -> dict[str, Any] | None:
    """The quantization config of a checkpoint to dequantize; None if it is not quantized.

    Raises:
        ValueError: If it is quantized and `dequantize` is False or not supported, or if it is not and `dequantize` is
            True.
    """
    for owner in owning_configs(config):
        quantization = getattr(owner, "quantization_config", None)
        if quantization is None:
            continue
        record = dict(quantization if isinstance(quantization, Mapping) else quantization.to_dict())
        method = str(getattr(record.get("quant_method"), "value", record.get("quant_method")))
        if method == "optimum_moe":
            raise ValueError("This checkpoint was already compressed by optimum_moe. Start from the original one.")
        if method not in _LOADED_AS:
            raise ValueError(
                f"This checkpoint is already quantized ({method}); dequantize=True reads "
                f"{' and '.join(_LOADED_AS)}. Start from its unquantized original."
            )
        if not dequantize:
            raise ValueError(
                f"This checkpoint is already quantized ({method}). Pass dequantize=True to compress its bf16 values."
            )
        if record.get("modules_to_convert"):
            raise ValueError(
                f"transformers keeps {record['modules_to_convert']} of this checkpoint in fp8 even when it dequantizes "
                "the rest. Start from its unquantized original."
            )
        return record
    if dequantize:
        raise ValueError("dequantize=True is for quantized checkpoints, and this one is not. Leave it out.")
    return None


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the dequantized model; its dtype is bfloat16 if the original has none."""
    config = deepcopy(config)
    _forget(config)
    if getattr(config, "dtype", None) is None:
        config.dtype = getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    return config


def quantizer_of(quantization: Mapping[str, Any]) -> HfQuantizer:
    """The transformers quantizer that dequantizes such a checkpoint."""
    return AutoHfQuantizer.from_config(_loading_record(quantization), pre_quantized=True)


def load_dequantized(
    cls: Any,
    location: str | Path,
    config: PreTrainedConfig,
    quantization: Mapping[str, Any],
    headers: Headers,
    arguments: Mapping[str, Any],
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load the model as if its checkpoint were unquantized.

    Args:
        cls: Model class.
        location: Folder or Hub id.
        config: Result of `plain_config`.
        quantization: Result of `accepted_quantization`.
        headers: Headers of the checkpoint.
        arguments: Keyword arguments for `from_pretrained`.

    Returns:
        The model and the loading report.
    """
    config = deepcopy(config)
    config.quantization_config = _loading_record(quantization)
    model, report = cls.from_pretrained(location, config=config, output_loading_info=True, **arguments)
    _forget(model.config)
    # Saving reverts the conversions of loading, which would quantize again, so drop them.
    set_weight_conversions(model, CheckpointReader(model, unpacked(headers).tensors).used_conversions)
    return model, report


def unpacked(headers: Headers, itemsize: int = 2) -> Headers:
    """The headers of the dequantized checkpoint: without scales, and with unpacked shapes.

    Args:
        headers: Headers of the quantized checkpoint.
        itemsize: Bytes per dequantized element.
    """
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, (scaled, _) in scaled_parts(headers.tensors).items():
        dtype, shape, _ = headers.tensors[scaled]
        if scaled.endswith("_blocks"):
            # (E, rows, blocks, bytes) with two elements per byte; the rows are the model's last axis.
            experts, rows, blocks, packed = shape
            shape = (experts, blocks * packed * 2, rows)
        elif dtype == "I8":
            shape = (*shape[:-1], shape[-1] * 2)
        tensors[name] = ("BF16", shape, prod(shape) * itemsize)
    parts = {part for pair in scaled_parts(headers.tensors).values() for part in pair}
    for name, (dtype, shape, _) in headers.tensors.items():
        if name not in parts and not name.endswith("activation_scale"):
            tensors[name] = (dtype, shape, prod(shape) * itemsize)
    return Headers(tensors, headers.files)


def scaled_parts(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Names of each stored tensor and its scales, by the name of the dequantized tensor."""
    known = set(names)
    parts = {}
    for name in known:
        for pattern, replacement in _SCALES:
            stored, found = pattern.subn(replacement, name)
            if found and stored in known:
                parts[stored.removesuffix("_blocks")] = (stored, name)
                break
    return parts


def read_dequantized(names: Iterable[str], get: Get, quantizer: HfQuantizer, dtype: torch.dtype) -> dict[str, Any]:
    """Dequantize tensors that the model does not load.

    Args:
        names: Stored names, including scales.
        get: Function that reads a stored tensor.
        quantizer: Quantizer of an FP8 checkpoint.
        dtype: Dtype of the result.
    """
    names = set(names)
    operation = BlockFp8Dequantize(quantizer)
    parts = scaled_parts(names)
    tensors = {name: operation.dequantize(get(a), get(b), dtype) for name, (a, b) in parts.items()}
    used = {part for pair in parts.values() for part in pair}
    return tensors | {n: get(n) for n in sorted(names - used) if not n.endswith("activation_scale")}


def _loading_record(quantization: Mapping[str, Any]) -> dict[str, Any]:
    register_block_fp8()
    method = quantization["quant_method"]
    return {**quantization, "quant_method": _LOADED_AS[getattr(method, "value", method)], "dequantize": True}


def _forget(config: PreTrainedConfig) -> None:
    for owner in owning_configs(config):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
