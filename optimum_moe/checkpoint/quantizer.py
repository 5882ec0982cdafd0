"""Loading through `AutoModel...from_pretrained`: a quantiser that rebuilds our structure before weights are read.

Imports nothing of transformers beyond its quantisers, because it is registered in the middle of their import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = "optimum_moe"
FORMAT_VERSION = 1
SENTINEL = {"install_and_import_optimum_moe": True}
"""Stands in `config.fusion_config`. transformers only warns of an unknown quantisation method and would go on to
initialise missing experts at random; of an unknown fusion it raises, with this name in the message."""

ENTRY_FIELDS = {"num_experts", "num_groups", "routing"}


class MoEStructureConfig(QuantizationConfigMixin):
    """`config.quantization_config` of a compressed checkpoint: the sizes of every block that differs from stock.

    Args:
        blocks: By module path: `num_experts` (before), `num_groups` (after), `routing` (`"map"` or `"reduce"`).
        format_version: Version of this schema.

    Raises:
        ValueError: If the version or a field is not known, or a size is impossible.
    """

    def __init__(
        self, blocks: Mapping[str, Mapping[str, Any]], format_version: int = FORMAT_VERSION, **unknown: Any
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.blocks = {name: dict(entry) for name, entry in blocks.items()}
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
        for name, entry in self.blocks.items():
            _check_entry(name, entry)


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    if set(entry) != ENTRY_FIELDS:
        raise ValueError(
            f"quantization_config of {name} must have the fields {sorted(ENTRY_FIELDS)}, got {sorted(entry)}. "
            "Restore the saved config.json."
        )
    experts, groups = entry["num_experts"], entry["num_groups"]
    sizes = isinstance(experts, int) and isinstance(groups, int) and 1 <= groups <= experts
    if not sizes or entry["routing"] not in ("map", "reduce"):
        raise ValueError(
            f"quantization_config of {name} says num_experts={experts!r}, num_groups={groups!r}, "
            f"routing={entry['routing']!r}; 1 <= num_groups <= num_experts and routing 'map' or 'reduce' are "
            "possible. Restore the saved config.json."
        )


class MoEStructureQuantizer(HfQuantizer):
    """Gives the empty model the structure of the checkpoint; no value is quantised."""

    quantization_config: MoEStructureConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The first sight of the config before the model is built: takes out the sentinel."""
        if getattr(config, "fusion_config", None) == SENTINEL:
            del config.fusion_config
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        changed = rebuild_structure(model, self.quantization_config)
        _refuse_missing(model, changed)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> PreTrainedModel:
        # Nothing is quantised: with these marks Trainer, .half() and save_pretrained(state_dict=...) would refuse.
        del model._adjust_missing_and_unexpected_keys
        del model.hf_quantizer
        del model.quantization_method
        model.is_quantized = False
        mark_config(model.config, self.quantization_config)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_is_quantized"):
                config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        """The structure is saved with the config."""
        return True

    @property
    def is_trainable(self) -> bool:
        """All parameters are ordinary ones."""
        return True


def mark_config(config: PreTrainedConfig, structure: MoEStructureConfig) -> None:
    """Make a live model's config say what `save_pretrained` has to write for the checkpoint to load again."""
    config.quantization_config = structure
    config.fusion_config = dict(SENTINEL)


def rebuild_structure(model: PreTrainedModel, config: MoEStructureConfig) -> list[str]:
    """Change every block of an uncompressed model as the config says; tensors stay empty.

    Returns:
        Module paths of the changed blocks in `model`, which may hold the saved model as its base or the reverse.

    Raises:
        ValueError: If a block is missing or has another number of experts.
    """
    from optimum_moe.surgeons import find_blocks

    found = {block.info.name: block for block in find_blocks(model)}
    changed = []
    for saved_name, entry in config.blocks.items():
        name = _name_in(model, saved_name, found)
        experts = found[name].info.num_experts
        if experts != entry["num_experts"]:
            raise ValueError(
                f"{name} has {experts} experts by config.json, and {entry['num_experts']} by its quantization_config. "
                "Restore the saved config.json."
            )
        block: Any = found[name].module(model)
        found[name].surgeon.rebuild(block, entry["num_groups"], entry["routing"])
        # Some architectures initialise a block by the config's expert count; its tensors all come from the checkpoint.
        block._is_hf_initialized = True
        changed.append(name)
    return changed


def _name_in(model: PreTrainedModel, saved_name: str, found: Mapping[str, Any]) -> str:
    prefix = f"{model.base_model_prefix}."
    for name in (saved_name, saved_name.removeprefix(prefix), prefix + saved_name):
        if name in found:
            return name
    raise ValueError(
        f"quantization_config names the block {saved_name}, which {type(model).__name__} does not have. "
        "Load the checkpoint with the class it was saved from."
    )


def _refuse_missing(model: Any, changed: list[str]) -> None:
    """Make the load fail where transformers would initialise missing tensors of a changed block at random."""
    adjust = model._adjust_missing_and_unexpected_keys

    def adjust_and_check(loading_info: Any) -> None:
        adjust(loading_info)
        missing = sorted(key for key in loading_info.missing_keys if key.startswith(tuple(f"{n}." for n in changed)))
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors of compressed blocks ({', '.join(missing[:3])}, ...). "
                "They would be random. Copy the missing files, or compress again."
            )

    model._adjust_missing_and_unexpected_keys = adjust_and_check


def register() -> None:
    """Make transformers know the method; transformers refuses to register it twice."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MoEStructureConfig)
        register_quantizer(METHOD)(MoEStructureQuantizer)
