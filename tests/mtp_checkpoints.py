"""Tiny checkpoints with multi-token-prediction layers, which transformers leaves out when it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.quantized_checkpoints import edit_config
from tests.tiny_models import build

PREFIXES = {"deepseek_v3": "model.layers.3.", "qwen3_next": "mtp.layers.0."}
_OWN = {
    "deepseek_v3": {"eh_proj.weight": (64, 128), "enorm.weight": (64,), "shared_head.norm.weight": (64,)},
    "qwen3_next": {},
}
_BESIDE = {"deepseek_v3": {}, "qwen3_next": {"mtp.fc.weight": (64, 128), "mtp.norm.weight": (64,)}}


def save_with_mtp(folder: Path, name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> list[str]:
    """Write a checkpoint whose MTP layer is like its last layer, with other numbers.

    Returns:
        Names of the tensors of the MTP layer.
    """
    model = build(name, dtype=dtype, **fields)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last = f"model.layers.{model.config.num_hidden_layers - 1}."
    generator = torch.Generator().manual_seed(1)
    shapes = {PREFIXES[name] + k.removeprefix(last): t.shape for k, t in tensors.items() if k.startswith(last)}
    shapes |= {PREFIXES[name] + k: shape for k, shape in _OWN[name].items()} | _BESIDE[name]
    extra = {k: (0.1 * torch.randn(shape, generator=generator)).to(dtype) for k, shape in shapes.items()}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, num_nextn_predict_layers=1)
    return list(extra)
