"""Every private or undocumented name of transformers, torch and argparse that the package uses.

What has a public way uses that instead; here stands only what has none, so that a new version of transformers is a
matter of this file. `INTERNALS` and `ATTRIBUTES` list the names with the reason for each, and `tests/hf/test_compat.py`
fails with the name that an installed version lacks. Outside of `optimum_moe/hf` none of them is written.

Imports neither transformers nor torch when it is imported: `nn/`, which knows no transformers, uses it too.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Action, ArgumentParser

    import torch
    from torch import nn

INTERNALS: dict[str, tuple[str, str]] = {
    "AUTO_QUANTIZATION_CONFIG_MAPPING": (
        "transformers.quantizers.auto",
        "registering a method twice raises, and nothing public tells whether one is registered",
    ),
    "ALL_EXPERTS_FUNCTIONS": (
        "transformers.integrations.moe",
        "the registry of experts implementations, where calibration registers one that watches",
    ),
    "Concatenate": ("transformers.core_model_loading", "gate and up of an expert lie one behind the other"),
    "ConversionOps": ("transformers.core_model_loading", "what turns stored tensors into those of a model"),
    "DtensorShardOperation": (
        "transformers.distributed.sharding_utils",
        "the part of a tensor that a process holds, where several load a model together",
    ),
    "FineGrainedFP8HfQuantizer": (
        "transformers.quantizers.quantizer_finegrained_fp8",
        "the FP8 quantizer, whose dequantization is mended in `hf.fp8`",
    ),
    "Fp8Dequantize": ("transformers.integrations.finegrained_fp8", "the FP8 dequantization that is mended"),
    "MergeModulelist": ("transformers.core_model_loading", "the experts of a block are stacked into one tensor"),
    "PrefixChange": ("transformers.core_model_loading", "left out when a model is saved"),
    "WeightConverter": ("transformers.core_model_loading", "how stored tensors become those of a model"),
    "WeightRenaming": ("transformers.core_model_loading", "under which name a stored tensor is loaded"),
    "build_glob_alternation": ("transformers.core_model_loading", "which tensors a plan of dtypes means"),
    "dot_natural_key": ("transformers.core_model_loading", "the order in which stored experts are stacked"),
    "get_model_conversion_mapping": (
        "transformers.conversion_mapping",
        "the conversions of an architecture; public are only those that `from_pretrained` carries out as a whole",
    ),
    "remove_tied_weights_from_state_dict": (
        "transformers.modeling_utils",
        "what `save_pretrained` leaves out; it runs on a whole model only, and shards are written layer by layer",
    ),
    "rename_source_key": ("transformers.core_model_loading", "the name that a stored tensor has in the model"),
    "revert_weight_conversion": (
        "transformers.core_model_loading",
        "the tensors of a layer as they are stored; `save_pretrained` does it for a whole model only",
    ),
}
"""Names to import from here instead of their module, which transformers moves and changes without notice."""

ATTRIBUTES: dict[str, tuple[str, str]] = {
    "_actions": ("argparse:ArgumentParser", "see `arguments_of`"),
    "_adjust_missing_and_unexpected_keys": ("transformers:PreTrainedModel", "see `watch_loading`"),
    "_apply_gate": ("transformers.integrations.moe", "see `apply_gate`"),
    "_buffers": ("torch.nn:Module", "see `load_at_first_use`"),
    "_compiled_call_impl": ("torch.nn:Module", "see `is_compiled`"),
    "_default_apply_gate": ("transformers.integrations.moe", "see `has_default_gate`"),
    "_dequantize_one": ("transformers.integrations.finegrained_fp8:Fp8Dequantize", "overridden in `hf.fp8`"),
    "_experts_implementation": ("transformers:PreTrainedConfig", "see `experts_implementation`"),
    "_from_config": ("transformers:PreTrainedModel", "see `model_from_config`"),
    "_get_dtype_plan": ("transformers:PreTrainedModel", "see `patterns_in_float32`"),
    "_get_target_dtype": ("transformers.integrations.finegrained_fp8:Fp8Dequantize", "used in `hf.fp8`"),
    "_is_expert_parallel": ("transformers.integrations.moe", "see `accept_sentinels`"),
    "_is_hf_initialized": ("transformers.modeling_utils", "see `mark_initialized`"),
    "_is_quantized": ("transformers.quantizers.base", "see `forget_quantization`"),
    "_keys_to_ignore_on_load_missing": ("transformers:PreTrainedModel", "see `patterns_that_may_be_missing`"),
    "_keys_to_ignore_on_save": ("transformers:PreTrainedModel", "see `names_not_saved`"),
    "get_hf_quantizer": ("transformers.quantizers.auto", "see `before_quantizers`"),
    "_orig_mod": ("torch._dynamo.eval_frame", "see `is_compiled`"),
    "_parameters": ("torch.nn:Module", "see `load_at_first_use`"),
    "_process_model_after_weight_loading": ("transformers.quantizers:HfQuantizer", "overridden in `hf.quantizer`"),
    "_process_model_before_weight_loading": ("transformers.quantizers:HfQuantizer", "overridden in `hf.quantizer`"),
    "_torchdynamo_orig_callable": ("torch._dynamo.eval_frame", "see `is_compiled`"),
    "_weight_conversions": ("transformers.core_model_loading", "see `weight_conversions`"),
}
"""Attributes by name: the class that has them, or the module whose code sets them, and what they are used for."""

_IRREGULAR = {
    "PreTraining": "PRETRAINING",
    "Seq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM",
    "SpeechSeq2Seq": "SPEECH_SEQ_2_SEQ",
}
_NO_WORD_ENDS = re.compile(r"(?<=[a-z])(?=[A-Z])")


def __getattr__(name: str) -> Any:
    """A name of `INTERNALS`, imported when it is first asked for.

    Raises:
        AttributeError: If there is none, or the installed transformers lacks it.
    """
    if name not in INTERNALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(INTERNALS[name][0]), name)


def experts_implementation(config: Any) -> str | None:
    """Which implementation (`"eager"`, `"grouped_mm"`, ...) the experts with this config run by; None for eager.

    `PreTrainedModel.set_experts_implementation` is the public way to choose one; nothing public reads it.
    """
    return config._experts_implementation


def set_experts_implementation(config: Any, name: str | None) -> None:
    """Choose the implementation of the experts with this config, and of no others.

    `PreTrainedModel.set_experts_implementation` needs the model, and sets the configs of its other towers too.
    """
    config._experts_implementation = {"": name}


def apply_gate(experts: Any, gate_up_Pn: torch.Tensor) -> torch.Tensor:
    """The hidden neurons (P, n) of gate and up (P, 2n) by the gate function of an experts module.

    Only the module knows whether it clamps, scales or interleaves; there is no public way to call it.
    """
    return experts._apply_gate(gate_up_Pn)


def has_default_gate(experts: Any) -> bool:
    """Whether the gate function is the one of classes without one of their own: `act_fn(gate) * up`."""
    return type(experts)._apply_gate.__name__ == "_default_apply_gate"


def accept_sentinels(experts: Any) -> None:
    """Have stock implementations skip the ids beyond `num_experts`, as they do under expert parallelism only."""
    experts._is_expert_parallel = True


def mark_initialized(module: Any) -> None:
    """Keep `initialize_weights` away from a module: its tensors come from the checkpoint, or are no longer there."""
    module._is_hf_initialized = True


def forget_initialized(model: nn.Module) -> None:
    """Have `initialize_weights` look at every module again; parameters that are given carry a mark of their own."""
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)


def model_from_config(cls: Any, config: Any, trust_remote_code: bool = False) -> Any:
    """An uninitialized model of a config, in the config's dtype.

    The Auto classes have `from_config`. A model class has only its constructor, which ignores the dtype, and the
    method that the Auto classes call.
    """
    if hasattr(cls, "_from_config"):
        return cls._from_config(config)
    return cls.from_config(config, trust_remote_code=trust_remote_code)


def auto_class_knows(name: str, config: Any) -> bool:
    """Whether an Auto class, such as `"AutoModelForCausalLM"`, has a model for a config."""
    return type(config) in _models_of(name)


def auto_class_gives(name: str, model: Any) -> bool:
    """Whether an Auto class loads a checkpoint of a model as that model's class."""
    if not auto_class_knows(name, model.config):
        return False
    known = _models_of(name)[type(model.config)]
    # Of several classes for a config the Auto class takes the one that the config names.
    return isinstance(model, known)


def _models_of(name: str) -> Mapping[type, Any]:
    """The models of an Auto class by the type of their config.

    Looks them up in the public `MODEL_FOR_..._MAPPING`, whose name follows that of the class with few exceptions.
    """
    transformers = importlib.import_module("transformers")
    task = name.removeprefix("AutoModel").removeprefix("For")
    words = _IRREGULAR.get(task) or _NO_WORD_ENDS.sub("_", task).upper()
    return getattr(transformers, f"MODEL_FOR_{words}_MAPPING" if task else "MODEL_MAPPING", {})


def patterns_in_float32(model: Any, dtype: torch.dtype) -> list[str]:
    """Patterns of the tensors that `from_pretrained(dtype=dtype)` loads in float32 nevertheless."""
    return list(model._get_dtype_plan(dtype))


def names_not_saved(model: Any) -> list[str]:
    """The tensors that `save_pretrained` leaves out of a checkpoint."""
    return list(getattr(model, "_keys_to_ignore_on_save", None) or ())


def patterns_that_may_be_missing(model: Any) -> list[re.Pattern[str]]:
    """Patterns of tensors that a checkpoint may lack: the class computes them."""
    return [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]


def weight_conversions(model: Any) -> list[Any] | None:
    """The conversions that a model was loaded by, which `save_pretrained` reverts; None where it was not loaded."""
    return getattr(model, "_weight_conversions", None)


def set_weight_conversions(model: Any, conversions: list[Any]) -> None:
    """Choose what `save_pretrained` and `revert_weight_conversion` revert."""
    model._weight_conversions = conversions


def before_quantizers(adopt: Callable[[Any], None]) -> None:
    """Have `adopt(config)` called before transformers looks for the quantizer of a checkpoint."""
    auto: Any = importlib.import_module("transformers.quantizers.auto")
    stock = auto.get_hf_quantizer

    @functools.wraps(stock)
    def adopted(config: Any, *args: Any, **kwargs: Any) -> Any:
        adopt(config)
        return stock(config, *args, **kwargs)

    auto.get_hf_quantizer = adopted
    user: Any = sys.modules.get("transformers.modeling_utils")
    if getattr(user, "get_hf_quantizer", None) is stock:
        user.get_hf_quantizer = adopted


def watch_loading(model: Any, check: Callable[[Any], None]) -> None:
    """Have `check(loading_info)` called once transformers knows what a checkpoint lacks, before that is made random.

    A quantizer is asked again only after every tensor has a value. Where `check` raises a `ValueError`, that is what is
    raised: transformers would raise of the same tensors, with less to say.
    """
    adjust = model._adjust_missing_and_unexpected_keys

    def adjust_and_check(loading_info: Any) -> None:
        adjust(loading_info)
        try:
            check(loading_info)
        except ValueError:
            loading_info.mismatched_keys.clear()
            loading_info.conversion_errors.clear()
            raise

    model._adjust_missing_and_unexpected_keys = adjust_and_check


def unwatch_loading(model: Any) -> None:
    """Take away what `watch_loading` and `read_whole` put there."""
    del model._adjust_missing_and_unexpected_keys
    vars(model).pop("state_dict", None)


def read_whole(model: Any, is_chosen: Callable[[str], bool]) -> None:
    """Have tensors read as a whole while a model is loaded, although each process holds only a part of them.

    transformers cuts every stored tensor by itself, which is wrong where several are joined along the same axis. It
    asks `state_dict` for what is distributed.
    """
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    stock = model.state_dict

    def whole(*args: Any, **kwargs: Any) -> Any:
        state = stock(*args, **kwargs)
        chosen = {name: tensor for name, tensor in state.items() if is_distributed(tensor) and is_chosen(name)}
        for name, tensor in chosen.items():
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return state

    model.state_dict = whole


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, whose module takes seconds to import."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def forget_quantization(model: Any) -> None:
    """Take the marks of a quantizer off a model none of whose tensors it quantized.

    With them `Trainer`, `half()` and `save_pretrained(state_dict=...)` would refuse.
    """
    del model.hf_quantizer
    del model.quantization_method
    model.is_quantized = False
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_is_quantized"):
            config._is_quantized = False


def is_compiled(module: Any) -> bool:
    """Whether a module was compiled; torch has no public way to ask.

    `compile()` in place, `torch.compile` of a part and that of its `forward` each leave another trace.
    """
    own = vars(module)
    compiled = own.get("_compiled_call_impl") is not None or is_compiled_wrapper(module)
    return compiled or hasattr(own.get("forward"), "_torchdynamo_orig_callable")


def is_compiled_wrapper(module: Any) -> bool:
    """Whether a module is what `torch.compile(model)` returned: a wrapper of the model."""
    return hasattr(module, "_orig_mod")


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter as it is stored; None where a parametrization (an adapter) stands in its place.

    `get_parameter` raises instead of that, and takes several times as long, in a loop over experts.
    """
    return module._parameters.get(name)


def own_entries(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dictionaries in which a module has its submodules and its parameters, to be asked often."""
    return module._modules, module._parameters


def unloaded_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all their names, as they are: none is loaded by `load_at_first_use` on the way."""
    for path, part in module.named_modules(remove_duplicate=False):
        for store in (part._parameters, part._buffers):
            for key, tensor in list(dict.items(store)):
                if tensor is not None:
                    yield (f"{path}.{key}" if path else key), tensor


def unloaded_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its dotted name, as it is."""
    store, key = _slot(model, name)
    return dict.__getitem__(store, key)


def put_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor, a parameter among them, in the place of the parameter or buffer with this dotted name.

    `register_parameter` would first ask for the old one, which `load_at_first_use` would load.
    """
    store, key = _slot(model, name)
    store[key] = tensor


@contextmanager
def load_at_first_use(model: nn.Module, load: Callable[[str], Any]) -> Iterator[None]:
    """While it is open, `load(name)` gives each tensor on the meta device that the model asks for, whichever way.

    A hook on modules would miss what reads a tensor without calling its module, so the dicts that modules keep their
    tensors in are replaced.
    """
    for path, module in model.named_modules():
        state: dict[str, Any] = vars(module)
        for kind in ("_parameters", "_buffers"):
            state[kind] = _LoadedAtFirstUse(state[kind], f"{path}." if path else "", load)
    try:
        yield
    finally:
        for module in model.modules():
            state = vars(module)
            for kind in ("_parameters", "_buffers"):
                state[kind] = dict(dict.items(state[kind]))


class _LoadedAtFirstUse(dict[str, Any]):
    """The parameters or buffers of a module; one on the meta device is loaded when it is asked for."""

    def __init__(self, tensors: Mapping[str, Any], prefix: str, load: Callable[[str], Any]) -> None:
        super().__init__(tensors)
        self.prefix, self.load = prefix, load

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return self.load(self.prefix + key) if value is not None and value.is_meta else value

    def items(self) -> Any:
        """Loads one after the other while it is iterated."""
        return ((key, self[key]) for key in list(self))

    def values(self) -> Any:
        """Loads one after the other while it is iterated."""
        return (self[key] for key in list(self))


def _slot(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dict of its module that holds a tensor, and its key there."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key


def arguments_of(parser: ArgumentParser) -> Iterator[Action]:
    """The arguments of a parser and of its commands, which argparse lists nowhere in public."""
    for action in parser._actions:
        yield action
        for command in action.choices.values() if isinstance(action.choices, Mapping) else ():
            yield from arguments_of(command)
