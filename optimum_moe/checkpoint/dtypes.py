"""Torch dtypes by their names in safetensors headers, and those that models run in.

Apart from `headers`, which needs no torch.
"""

from __future__ import annotations

from typing import Any

import torch

from optimum_moe.hf.compat import build_glob_alternation, patterns_in_float32

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Torch dtypes by their names in headers."""


def names_in_float32(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """The tensors of a model that `from_pretrained(dtype=dtype)` loads in float32 nevertheless."""
    patterns = patterns_in_float32(model, dtype)
    if not patterns:
        return frozenset()
    return frozenset(filter(build_glob_alternation(patterns)[0].search, model.state_dict()))
