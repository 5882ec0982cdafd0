"""Export to vLLM without a plugin: experts that are whole, or that vLLM replaces by a constant (from 0.33 on).

vLLM up to 0.32 does not know of them and would answer zeros for replaced experts. So the names of the constants are
spelled out, and one of them is no name of the model's: older versions stop at it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optimum_moe.checkpoint.checkpoint_tensors import built
from optimum_moe.exporting.exported import Exported
from optimum_moe.exporting.staging import stage, write_json
from optimum_moe.formats import ExpertsSpec
from optimum_moe.formats.constant import Constant
from optimum_moe.hf.structure import METHOD, REPLACEMENTS
from optimum_moe.runtimes import get_runtime

_FILE, _INDEX = "model-approximate-experts.safetensors", "model.safetensors.index.json"
_SINGLE, _FIRST = "model.safetensors", "model-00001-of-00001.safetensors"
_ROOT = "approximate_experts"
"""First part of names that no model has."""

# What vLLM's format constant-v1 says of the router; there is no other.
_ROUTER = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


def replaced_experts(checkpoint: Exported) -> dict[str, list[int]] | None:
    """By block the experts that are replaced; None for a checkpoint that this export cannot express."""
    record = checkpoint.record
    if not record or "quantization" in record:
        return None
    found: dict[str, list[int]] = {}
    for name, entry in record["blocks"].items():
        if entry["num_groups"] != entry["num_experts"] or "factors" not in entry:
            return None
        sizes = ExpertsSpec.from_dict(entry["factors"])
        kept = set(sizes.widths) - {0}
        if sizes.parts or set(sizes.instead) - {Constant.name} or len(kept) != 1:
            return None
        found[name] = [expert for expert, width in enumerate(sizes.widths) if not width]
    return found


@dataclass(frozen=True)
class ReplacedExport:
    """A checked export as a folder of the same weights and one small file more.

    Args:
        checkpoint: The checkpoint.
        config: Its config as other runtimes read it.
        replaced: By block the experts that are replaced.
        hidden_size: Width of the residual stream (H).
    """

    checkpoint: Exported
    config: Mapping[str, Any]
    replaced: Mapping[str, list[int]]
    hidden_size: int

    def write(self, output: Path) -> None:
        """Write the folder; weights are hard links where the file system has them."""
        output.mkdir()
        record, stored = self.checkpoint.record, self.checkpoint.headers.tensors
        tensors: dict[str, torch.Tensor] = {}
        targets: dict[str, Any] = {}
        for block, experts in self.replaced.items():
            names = {expert: f"{block}.experts.{expert}.approx_value" for expert in experts}
            for expert, name in names.items():
                if name not in stored or not tensors:
                    names[expert] = f"{_ROOT}.{name}"
                    tensors[names[expert]] = self._value(block, name)
            targets[f"{block}.experts"] = {
                "num_logical_experts": record["blocks"][block]["num_experts"],
                "weight_layout": "compact_retained_experts",
                "replacements": {
                    str(expert): {"format": "constant-v1", "tensors": {"value": name}} for expert, name in names.items()
                },
            }
        substitution = {"version": 1, "router_semantics": _ROUTER, "targets": targets}
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        config[REPLACEMENTS] = {"transform_config": {"expert_substitution": substitution}, METHOD: record}
        stage(self.checkpoint, output, config, link=False)
        # It may be a link to the same file of a folder that was exported before.
        (output / _FILE).unlink(missing_ok=True)
        save_file(tensors, output / _FILE, metadata={"format": "pt"})
        _add_to_index(output, self.checkpoint, tensors)

    def _value(self, block: str, name: str) -> torch.Tensor:
        """A constant of the checkpoint; zeros for an expert in the place of which nothing stands."""
        if name in self.checkpoint.headers.tensors:
            return self._read(name)
        own = next(n for n in self.checkpoint.headers.tensors if n.startswith(f"{block}.experts."))
        return torch.zeros(self.hidden_size, dtype=self._read(own).dtype)

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self.checkpoint.headers.homes[name], framework="pt") as file:
            return file.get_tensor(name)


def _add_to_index(output: Path, checkpoint: Exported, tensors: Mapping[str, torch.Tensor]) -> None:
    """Name the new file in the index of the shards, which a checkpoint of one file does not have."""
    index, homes = output / _INDEX, {name: home.name for name, home in checkpoint.headers.homes.items()}
    if (output / _SINGLE).is_file():
        # Readers take this name for all of the checkpoint, and look into no index.
        (output / _SINGLE).rename(output / _FIRST)
        homes = dict.fromkeys(homes, _FIRST)
    found = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {"metadata": {}, "weight_map": {}}
    found["weight_map"] |= homes
    found["weight_map"] |= dict.fromkeys(tensors, _FILE)
    # It may be a link to the checkpoint's own.
    index.unlink(missing_ok=True)
    write_json(index, found)


def plan_replaced(checkpoint: Exported, replaced: Mapping[str, list[int]]) -> ReplacedExport:
    """Check an export to vLLM as it is, before any tensor is read.

    Args:
        checkpoint: The checkpoint.
        replaced: See `replaced_experts`.

    Raises:
        ValueError: If vLLM reads the experts of this architecture in another way, or cannot tell the layers.
    """
    objection = get_runtime("vllm").objection(checkpoint.config.get("model_type", ""), replaced)
    if objection is not None:
        raise ValueError(
            f"{objection}. Serve the checkpoint with this package in vLLM, or compress the original again with "
            "--runs-in any."
        )
    _, blocks = built(checkpoint.directory, checkpoint.headers)
    return ReplacedExport(checkpoint, checkpoint.spelled_config(), replaced, blocks[0].info.hidden_size)
