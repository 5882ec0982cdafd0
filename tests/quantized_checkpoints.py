"""Tiny checkpoints as they are released: MXFP4 and block-wise FP8, written by the inverse of what dequantizes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import FP4_VALUES

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantize_mxfp4(weight_EXR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (E, R, X / 32, 16) of two numbers a byte and scales (E, R, X / 32) of a matrix (E, X, R)."""
    values = weight_EXR.transpose(1, 2).float().unflatten(-1, (-1, 32))
    exponent = (values.abs().amax(-1) / 6).clamp(min=2.0**-100).log2().ceil()
    table = torch.tensor(FP4_VALUES)
    codes = ((values / exponent.exp2()[..., None])[..., None] - table).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


def quantize_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in e4m3 and one float32 scale for each block, blocks at the edge being cut."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    stored = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].float().abs().max() / FP8_MAX
            stored[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales


def dequantize_fp8(stored: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Written out number by number of the scales, in float32."""
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return stored.float() * spread[: stored.shape[0], : stored.shape[1]]


def to_mxfp4(plain: Path, out: Path) -> Path:
    """A copy of a gpt-oss checkpoint with its experts in MXFP4."""
    shutil.copytree(plain, out)
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantize_mxfp4(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    edit_config(out, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return out


def to_fp8(plain: Path, out: Path, block: tuple[int, int] = (16, 16), skip: Iterable[str] = ()) -> Path:
    """A copy with every projection in FP8, except those whose name has a part of `skip`."""
    shutil.copytree(plain, out)
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        skipped = any(part in name for part in (*skip, "embed", "norm", "lm_head", "mlp.gate."))
        if tensor.dim() == 2 and not skipped:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8(tensor, block)
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block}
    edit_config(out, quantization_config=quantization)
    return out


def edit_config(folder: Path, **fields: object) -> None:
    """Set fields of `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")
