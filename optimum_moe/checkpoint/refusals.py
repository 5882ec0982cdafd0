"""Refusal of models and arguments whose weights would differ from those in the safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from optimum_moe.hf.compat import is_compiled, is_compiled_wrapper

_MERGE = "merge_and_unload()"
_OTHER_WEIGHTS = {
    "gguf_file": "it names a GGUF file. Give the safetensors checkpoint that it was converted from.",
    "state_dict": "weights come from the checkpoint. Load them into a model, and pass the model instead of its path.",
    "config": "the config comes from the checkpoint. Change its config.json, or load the model and pass that.",
    "quantization_config": "it quantizes while loading. Compress the unquantized weights, and quantize the result.",
    "adapter_kwargs": f"it loads an adapter. Merge it into the weights first, with PEFT's {_MERGE}.",
    "torch_dtype": "transformers 5 calls it dtype=. Pass that.",
}
"""Remedies by argument of `from_pretrained`, for arguments that replace or change the checkpoint's weights."""


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for arguments of `from_pretrained` that load other weights than the safetensors files."""
    for name, remedy in _OTHER_WEIGHTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"{name}= cannot be used to compress a checkpoint: {remedy}")
    if arguments.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False loads pickled weights, and only safetensors files are read. Leave it out, or save "
            "the checkpoint again with transformers."
        )


def check_model(model: Any) -> PreTrainedModel:
    """Return a model in memory, if it can be cut and saved.

    Raises:
        ValueError: If it is wrapped, compiled, contains an adapter, or is not a transformers model.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        remedy = "Pass a PreTrainedModel, a Hub id, or the folder of a checkpoint."
        if hasattr(model, "merge_and_unload"):
            remedy = f"It holds an adapter: pass model.{_MERGE}."
        elif is_compiled_wrapper(model):
            remedy = "It is compiled: pass the model that torch.compile was given, and compile the result."
        elif isinstance(getattr(model, "module", None), PreTrainedModel):
            remedy = "It wraps a model: pass model.module."
        raise ValueError(f"{kind} cannot be compressed. {remedy}")
    for name, module in model.named_modules():
        if _is_adapter(module):
            raise ValueError(
                f"The model in memory has an adapter in it ({name} is a {type(module).__name__}), which would be saved "
                f"apart from the weights. Merge it first, with PEFT's {_MERGE}, or load the model without it."
            )
        if is_compiled(module):
            raise ValueError(
                f"The model in memory is compiled ({name or kind}), and its code is that of the uncut model. Load it "
                "without torch.compile, and compile the result."
            )
    return model


def all_in_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model, if all of its weights are in memory and whole, since others cannot be cut.

    Raises:
        ValueError: If some weights are offloaded, or split over processes (FSDP, tensor or expert parallelism).
    """
    split = [name for name, tensor in _tensors(model) if hasattr(tensor, "placements")]
    if split:
        raise ValueError(
            f"{len(split)} tensors of the model are split over processes ({split[0]}, ...), as FSDP and tensor "
            "parallelism do, and each expert has to be whole where it is cut. Load it without tp_plan= and before FSDP "
            "wraps it; several processes then share the batches and the blocks."
        )
    away = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if away:
        raise ValueError(
            f"{len(away)} tensors of the model are offloaded to CPU or disk or have no values ({away[0]}, ...), and "
            "only weights that are in memory can be cut and saved. Leave out device_map= and max_memory= if it fits, "
            'or pass engine="streaming" with output_dir=, which reads one layer at a time.'
        )
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_adapter(module: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
