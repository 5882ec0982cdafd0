"""What `config.json` says of the structure of a compressed checkpoint.

Imports of transformers no more than the base of quantization configs: `hf.quantizer`, which registers the config, is
imported in the middle of the import of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_moe.algorithms.expert_skipping import Skipping
from optimum_moe.formats import ExpertsSpec

METHOD = "optimum_moe"
FORMAT_VERSION = 2
CARRIED_MODULE = "modeling_optimum_moe"
"""The module of code that `hf.carried_code` puts beside the weights."""
SENTINEL = {"a compressed checkpoint: pip install optimum-moe, or pass trust_remote_code=True": True}
"""Stands in `config.fusion_config`. transformers only warns of an unknown quantization method and would go on to
initialize missing experts at random; of an unknown fusion it raises, with this name in the message."""

REPLACEMENTS = "compression_config"
"""Field of `config.json` where vLLM looks for experts that are replaced by constants; it refuses them in a checkpoint
with a `quantization_config`."""

ENTRY_FIELDS = {"num_experts", "num_groups", "routing"}


class MoEStructureConfig(QuantizationConfigMixin):
    """`config.quantization_config` of a compressed checkpoint: the sizes of every block that differs from stock.

    Args:
        blocks: By prefix in the files: `num_experts` (before), `num_groups` (after), `routing` (`"map"` or
            `"reduce"`), `factors` (`ExpertsSpec.to_dict()`) where experts are kept in compressed forms, and `skipping`
            (`Skipping.to_dict()`) where tokens skip experts.
        format_version: Version of this schema.
        quantization: Quantization config of the values, where another method quantized them.
        quantize_on_load: Whether the stored values are still those before `quantization`.
        saved_again: Whether the model was loaded and saved since it was compressed, so that it may have been trained.

    Raises:
        ValueError: If the version or a field is not known, or a size is impossible.
    """

    def __init__(
        self,
        blocks: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quantization: Mapping[str, Any] | None = None,
        quantize_on_load: bool = False,
        saved_again: bool = False,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has optimum_moe format_version={format_version!r}, the installed package reads "
                f"{FORMAT_VERSION}. Install the version that wrote it."
            )
        if unknown:
            raise ValueError(
                f"quantization_config has unknown fields {sorted(unknown)}. Restore the saved config.json."
            )
        if not isinstance(blocks, Mapping) or not all(isinstance(entry, Mapping) for entry in blocks.values()):
            raise ValueError(
                "quantization_config must name its blocks with their sizes. Restore the saved config.json."
            )
        self.blocks = {name: dict(entry) for name, entry in blocks.items()}
        self.quantization = None if quantization is None else dict(quantization)
        self.quantize_on_load = quantize_on_load
        self.saved_again = saved_again
        for name, entry in self.blocks.items():
            _check_entry(name, entry)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; fields of an inner quantization only where there is one."""
        return {key: value for key, value in super().to_dict().items() if value not in (None, False)}


def adopt_replacements(config: Any) -> None:
    """Make a config that was written for vLLM one of ours."""
    found = getattr(config, REPLACEMENTS, None)
    if isinstance(found, Mapping) and METHOD in found and getattr(config, "quantization_config", None) is None:
        config.quantization_config = dict(found[METHOD])
        delattr(config, REPLACEMENTS)


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    if set(entry) - {"factors", "skipping"} != ENTRY_FIELDS:
        raise ValueError(
            f"quantization_config of {name} must have the fields {sorted(ENTRY_FIELDS)}, got {sorted(entry)}. "
            "Restore the saved config.json."
        )
    experts, groups = entry["num_experts"], entry["num_groups"]
    sizes = type(experts) is int and type(groups) is int and 1 <= groups <= experts
    if not sizes or entry["routing"] not in ("map", "reduce"):
        raise ValueError(
            f"quantization_config of {name} says num_experts={experts!r}, num_groups={groups!r}, "
            f"routing={entry['routing']!r}; 1 <= num_groups <= num_experts and routing 'map' or 'reduce' are "
            "possible. Restore the saved config.json."
        )
    if "skipping" in entry:
        Skipping.from_dict(entry["skipping"])
    if "factors" in entry and len(ExpertsSpec.from_dict(entry["factors"]).widths) != groups:
        raise ValueError(
            f"quantization_config of {name} gives sizes to another number of experts than num_groups={groups}. "
            "Restore the saved config.json."
        )
