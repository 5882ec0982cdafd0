"""Loading through `AutoModel...from_pretrained`: a quantizer that rebuilds our structure before weights are read.

Imports nothing of transformers beyond its quantizers, because it is registered in the middle of their import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_moe.algorithms.expert_skipping import Skipping
from optimum_moe.formats import ExpertsSpec
from optimum_moe.hf.compat import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    before_quantizers,
    forget_quantization,
    mark_initialized,
    read_whole,
    unwatch_loading,
    watch_loading,
)
from optimum_moe.hf.structure import CARRIED_MODULE, METHOD, SENTINEL, MoEStructureConfig, adopt_replacements

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from optimum_moe.surgeons import ExpertNames


SUPPORTED_TRANSFORMERS = ((5, 23), (5, 25))
"""First supported version, and first unsupported one after it; setup.py says the same."""


class StructureMixin:
    """Gives the empty model the structure of the checkpoint, in front of whatever a quantizer does to its values."""

    structure: MoEStructureConfig
    names: ExpertNames

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Before anything is built.

        Raises:
            ValueError: If this version of transformers is not supported.
        """
        first, after = SUPPORTED_TRANSFORMERS
        if not first <= _release(transformers.__version__) < after:
            raise ValueError(
                f"optimum_moe rebuilds this checkpoint with transformers >={first[0]}.{first[1]},"
                f"<{after[0]}.{after[1]}; transformers {transformers.__version__} is installed. Install one of those, "
                "or an optimum_moe made for yours."
            )
        super().validate_environment(*args, **kwargs)  # type: ignore[misc]

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The first sight of the config before the model is built: takes out what is for machines without us."""
        if getattr(config, "fusion_config", None) == SENTINEL:
            del config.fusion_config
        # `save_pretrained` of the loaded model writes it again, together with the code.
        if CARRIED_MODULE in str(getattr(config, "auto_map", None)):
            del config.auto_map
        return super().update_attn_implementation(config)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Ours come first: transformers takes guards and compressed experts for stock ones."""
        from optimum_moe.surgeons import own_conversions

        own, self.names = own_conversions(model, self.structure.blocks)
        read_whole(model, lambda name: name in self.names.stacks)
        return [*own, *super().update_weight_conversions(weight_conversions, model)]  # type: ignore[misc]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _check_expert_parallel(self.structure, getattr(model.config, "distributed_config", None))
        files = kwargs.get("checkpoint_files")
        most = max((entry["num_experts"] for entry in self.structure.blocks.values()), default=0)
        # The map has eight bytes of each expert.
        _refuse_larger_than_files(f"blocks of {most:,} experts", 32 * most, files)
        blocks = rebuild_structure(model, self.structure)
        numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        _refuse_larger_than_files(f"a model of {numbers:,} numbers", numbers, files)
        _refuse_misfits(model, blocks, lambda: self.names)
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> PreTrainedModel:
        from optimum_moe.hf.carried_code import mark_model

        super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]
        unwatch_loading(model)
        self.names.forget()
        self.structure.quantize_on_load = False
        self.structure.saved_again = True
        mark_model(model, self.structure)
        return model


class MoEStructureQuantizer(StructureMixin, HfQuantizer):
    """What transformers calls for our checkpoints; no value is quantized unless the config holds a quantization."""

    def __new__(cls, quantization_config: MoEStructureConfig, **kwargs: Any) -> Any:
        """A quantizer of the inner method's class where there is one, and then none of this class."""
        if quantization_config.quantization is not None:
            return _with_inner_quantizer(quantization_config)
        return super().__new__(cls)

    def __init__(self, quantization_config: MoEStructureConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.structure = quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        forget_quantization(model)
        return model

    def is_serializable(self) -> bool:
        """The structure is saved with the config."""
        return True

    @property
    def is_trainable(self) -> bool:
        """All parameters are ordinary ones."""
        return True


def _with_inner_quantizer(structure: MoEStructureConfig) -> HfQuantizer:
    inner = AutoQuantizationConfig.from_dict(dict(structure.quantization or {}))
    stock = type(AutoHfQuantizer.from_config(inner))
    quantizer = type(f"Structure{stock.__name__}", (StructureMixin, stock), {})(
        inner, pre_quantized=not structure.quantize_on_load
    )
    quantizer.structure = structure
    return quantizer


def _check_expert_parallel(config: MoEStructureConfig, distributed: Any) -> None:
    processes = getattr(distributed, "ep_size", None) or 1
    split = max(processes, getattr(distributed, "tp_size", None) or 1)
    factorized = next((name for name, entry in config.blocks.items() if "factors" in entry), None)
    if split > 1 and factorized is not None:
        raise ValueError(
            f"{factorized} keeps its experts in factors with sizes of their own, which cannot be split evenly over "
            f"{split} processes. Use data parallelism (FSDP) or device_map=."
        )
    odd = {name: entry["num_groups"] for name, entry in config.blocks.items() if entry["num_groups"] % processes}
    if odd:
        name, groups = next(iter(odd.items()))
        raise ValueError(
            f"Expert parallelism gives each of its ep_size={processes} processes equally many experts; {name} has "
            f"{groups}, as {len(odd)} of {len(config.blocks)} compressed blocks do not divide. Choose an ep_size that "
            "divides them all, tensor parallelism (ep_size=1), or compress to a multiple of ep_size."
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def quantize_on_load(config: PreTrainedConfig, quantization: QuantizationConfigMixin) -> PreTrainedConfig:
    """Have a compressed checkpoint quantized while it is loaded; the config of transformers has one slot for both.

    Args:
        config: `AutoConfig.from_pretrained(checkpoint)`, to be passed to `from_pretrained` as `config=`.
        quantization: For example a `TorchAoConfig`.

    Raises:
        ValueError: If the config is none of a structured checkpoint, or is quantized already.
    """
    ours = getattr(config, "quantization_config", None)
    if not isinstance(ours, dict) or ours.get("quant_method") != METHOD or "quantization" in ours:
        raise ValueError(
            f"quantize_on_load takes the config of a compressed checkpoint that needs optimum_moe and is not "
            f"quantized, got quantization_config={ours!r:.100}. Pass quantization_config= to from_pretrained instead."
        )
    ours |= {"quantization": quantization.to_dict(), "quantize_on_load": True}
    return config


def quantized_tensors(model: PreTrainedModel) -> dict[str, str]:
    """The parameters that are really held quantized, by name: the class of the tensor that stands for them."""
    return {
        name: type(parameter.data).__name__
        for name, parameter in model.named_parameters()
        if type(parameter.data) is not torch.Tensor
    }


def rebuild_structure(model: PreTrainedModel, config: MoEStructureConfig) -> list[str]:
    """Change every block of an uncompressed model as the config says; tensors stay empty.

    Returns:
        Module paths of all MoE blocks in `model`, which may hold the saved model as its base or the reverse.

    Raises:
        ValueError: If a block is missing or has another number of experts.
    """
    from optimum_moe.surgeons import find_blocks, guarded, names_of

    found = {block.info.name: block for block in find_blocks(model)}
    in_files = {names_of(model, block).block: name for name, block in found.items()}
    for saved_name, entry in config.blocks.items():
        name = _name_in(model, saved_name, in_files)
        experts = found[name].info.num_experts
        if experts != entry["num_experts"]:
            raise ValueError(
                f"{name} has {experts} experts by config.json, and {entry['num_experts']} by its quantization_config. "
                "Restore the saved config.json."
            )
        block: Any = found[name].module(model)
        sizes = ExpertsSpec.from_dict(entry["factors"]) if "factors" in entry else None
        if sizes is not None:
            sizes.check(name, found[name].info.hidden_size, found[name].info.intermediate_size)
        with guarded(model, found[name], entry["routing"] == "map" or sizes is not None):
            skipping = Skipping.from_dict(entry["skipping"]) if "skipping" in entry else None
            found[name].surgeon.build_structure(block, entry["num_groups"], entry["routing"], sizes, skipping=skipping)
        # Some architectures initialize a block by the config's expert count; its tensors all come from the checkpoint.
        mark_initialized(block)
    return list(found)


def _refuse_larger_than_files(what: str, number: int, files: Sequence[str] | None) -> None:
    """Refuse what the files cannot hold, before memory is taken for it.

    Args:
        what: What the config says.
        number: Numbers that are stored of it. Quantized ones have half a byte each, and tied ones may count twice.
        files: The shards.
    """
    size = sum(Path(file).stat().st_size for file in files or ())
    if files and number > 4 * size:
        raise ValueError(
            f"config.json describes {what}, and the files have {size:,} bytes. Restore the saved config.json."
        )


def _name_in(model: PreTrainedModel, saved_name: str, in_files: Mapping[str, str]) -> str:
    """The module path of a block by its prefix in the files, which may have more or less of a prefix itself."""
    from optimum_moe.surgeons import in_one_place

    for name, path in sorted(in_files.items(), key=lambda item: item[0] != saved_name):
        if in_one_place(name, saved_name):
            return path
    raise ValueError(
        f"quantization_config names the block {saved_name}, which {type(model).__name__} does not have. "
        "Load the checkpoint with the class it was saved from."
    )


def _refuse_misfits(model: Any, blocks: list[str], names: Callable[[], ExpertNames]) -> None:
    """Make the load fail where transformers would initialize missing tensors at random."""
    from optimum_moe.checkpoint.missing import lacking, refuse_lacking

    def check(loading_info: Any) -> None:
        prefixes = tuple(f"{name}." for name in blocks)
        suspects = {key for key, *_ in loading_info.mismatched_keys} | set(loading_info.unexpected_keys)
        misfits = sorted({key for key in suspects if key.startswith(prefixes)} | names().misfits)
        if misfits:
            raise ValueError(
                f"{len(misfits)} tensors of compressed blocks ({', '.join(misfits[:3])}, ...) are not what config.json "
                "says of their number or size. Restore the saved config.json, or compress again."
            )
        given = set(model.state_dict()) - set(loading_info.missing_keys)
        gone = lacking(model, given, blocks)
        refuse_lacking("The checkpoint", [name for key in gone for name in names().lacking(key)])

    watch_loading(model, check)


def register() -> None:
    """Make transformers know the method; transformers refuses to register it twice."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MoEStructureConfig)
        register_quantizer(METHOD)(MoEStructureQuantizer)
        before_quantizers(adopt_replacements)


register()
