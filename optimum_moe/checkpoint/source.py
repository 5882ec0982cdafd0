"""The model to compress: its config and headers are opened first, and its weights loaded later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from optimum_moe.checkpoint.checkpoint_tensors import (
    CheckpointTensors,
    no_numbers,
    refuse_incomplete,
    refuse_larger_than_file,
    with_itemsizes,
)
from optimum_moe.checkpoint.dtypes import names_in_float32
from optimum_moe.checkpoint.headers import Headers, header_bytes
from optimum_moe.checkpoint.location import HUB_ARGUMENTS, config_and_headers
from optimum_moe.checkpoint.missing import lacking, refuse_lacking
from optimum_moe.checkpoint.names import check_checkpoint_name, is_hub_id
from optimum_moe.checkpoint.quantized import (
    accepted_quantization,
    load_dequantized,
    plain_config,
    quantizer_of,
    unpacked,
)
from optimum_moe.checkpoint.reader import CheckpointReader, Get, ShardReader
from optimum_moe.checkpoint.refusals import check_model, refuse_arguments
from optimum_moe.checkpoint.system import native_path, readable_path, utf8_path
from optimum_moe.hf.compat import auto_class_gives, auto_class_knows, model_from_config
from optimum_moe.model_info import ModelInfo
from optimum_moe.settings import nearest
from optimum_moe.surgeons import (
    FoundBlock,
    ShallowModel,
    block_names,
    drop_layers,
    find_blocks,
    shallow_model,
    update_config,
    with_widths,
)

_CONFIG_ARGUMENTS = (*HUB_ARGUMENTS, "trust_remote_code")
_AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForTokenClassification",
    "AutoModelForPoseEstimation",
    "AutoModel",
)
"""Auto classes to try if config.json names no architecture: whole models before their parts."""


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint, or a model in memory, with checked config and headers.

    Args:
        name: Hub id, path, or class name of a model in memory.
        config: Its config.
        skeleton: The model on the meta device (the model itself if it is in memory).
        blocks: Its MoE blocks.
        info: Sizes of the model.
        headers: Headers of the checkpoint; None for a model in memory.
        live: The model in memory, None for a checkpoint.
        directory: Local folder with the config and the tokenizer.
        location: Source of the weights for `from_pretrained`: that folder, or the Hub id if it lacks them.
        load_arguments: Keyword arguments for `from_pretrained`.
        quantization: Quantization config of a checkpoint that is dequantized while it is loaded.
        as_stored: Whether each tensor is written in its stored dtype; else in the requested one.
        knows_widths: Whether its blocks say how narrow stock experts can be, see `with_widths`.
    """

    name: str
    config: PreTrainedConfig
    skeleton: PreTrainedModel
    blocks: tuple[FoundBlock, ...]
    info: ModelInfo
    headers: Headers | None = None
    live: PreTrainedModel | None = None
    directory: Path | None = None
    location: str | Path | None = None
    load_arguments: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None
    as_stored: bool = False
    knows_widths: bool = False

    def load(self) -> PreTrainedModel:
        """The model with its weights.

        Raises:
            ValueError: If the checkpoint lacks tensors.
        """
        if self.live is not None:
            return self.live
        auto: Any = type(self.skeleton)
        assert self.location is not None
        assert self.headers is not None
        if self.quantization is not None:
            model, report = load_dequantized(
                auto, self.location, self.config, self.quantization, self.headers, self.load_arguments
            )
        else:
            model, report = auto.from_pretrained(self.location, output_loading_info=True, **self.load_arguments)
        given = set(model.state_dict()) - set(report["missing_keys"])
        refuse_lacking(self.name, lacking(model, given, [found.info.name for found in self.blocks]))
        return model

    def read_in(self, dtype: str) -> ModelSource:
        """The source for a run with `dtype`: `"auto"` for the stored dtype of each tensor, else one for all."""
        if dtype == "auto":
            return self
        return replace(self, as_stored=False, load_arguments={**self.load_arguments, "dtype": dtype})

    def with_widths(self) -> ModelSource:
        """The source with what is known of narrower stock experts in the sizes of its blocks."""
        blocks = with_widths(self.skeleton, self.blocks)
        info = replace(self.info, blocks=tuple(found.info for found in blocks))
        return replace(self, blocks=blocks, info=info, knows_widths=True)

    def shallow(self, dropped: Sequence[str]) -> ShallowModel:
        """The stock model without some layers, on the meta device.

        Args:
            dropped: Paths of the layers.

        Raises:
            ValueError: If stock classes cannot express it.
        """
        found = shallow_model(self.skeleton, self.blocks, dropped)
        if isinstance(found, str):
            raise ValueError(
                f"{type(self.skeleton).__name__} cannot be built without {', '.join(dropped)}: {found}. Drop other "
                "layers, a run of them (consecutive=True), or remove experts instead."
            )
        return found

    def without_layers(self, dropped: Sequence[str]) -> ModelSource:
        """The source as if its checkpoint had never had some layers; the others have the names that follow.

        A model in memory loses the layers.

        Args:
            dropped: Paths of the layers.

        Raises:
            ValueError: If stock classes cannot express it.
        """
        shallow = self.shallow(dropped)
        if self.live is not None:
            drop_layers(self.live, shallow)
            return self._as_known(_from_memory(self.live))
        return self._as_known(self._view(shallow))

    def expected_without(self, dropped: Sequence[str]) -> ModelSource:
        """Like `without_layers`, but a model in memory is not changed: only the sizes of the result are meant.

        Raises:
            ValueError: If stock classes cannot express it.
        """
        shallow = self.shallow(dropped)
        return self._as_known(self._view(shallow) if self.live is None else _from_memory(shallow.skeleton))

    def _as_known(self, shallow: ModelSource) -> ModelSource:
        return shallow.with_widths() if self.knows_widths else shallow

    def _view(self, shallow: ShallowModel) -> ModelSource:
        assert self.headers is not None
        in_files = block_names(self.skeleton, self.blocks[0]).block
        number = self.blocks[0].info.layer.rpartition(".")[2]
        stack = in_files.partition(f".{number}.")[0] if f".{number}." in in_files else in_files.rpartition(".")[0]
        headers = self.headers.renamed(replace(shallow, stack=stack).new_name)
        config = deepcopy(self.config)
        update_config(config, shallow.settings)
        return _from_headers(replace(self, config=config, headers=headers), shallow.skeleton)

    def reader(self, cast: bool = True) -> CheckpointReader:
        """A reader of parts of the checkpoint, with `cast` in the dtypes of the skeleton, else in the stored ones."""
        assert self.headers is not None
        quantizer = None if self.quantization is None else quantizer_of(self.quantization)
        return CheckpointReader(self.skeleton, self.headers.tensors, quantizer, cast or not self.as_stored)

    def checkpoint_tensors(self, get: Get) -> CheckpointTensors:
        """The checkpoint as tensors of the model, in the dtypes that are written.

        Args:
            get: Function that reads a stored tensor.
        """
        assert self.headers is not None
        return CheckpointTensors(self.reader(cast=False), self.headers, get)

    def shards(self) -> ShardReader:
        """A reader of single stored tensors; a context manager."""
        assert self.headers is not None
        return ShardReader(self.headers.homes, self._local, self.headers.stored_as)

    def _local(self, file: Path) -> Path:
        if isinstance(self.location, Path):
            return file
        arguments = {k: v for k, v in self.load_arguments.items() if k in HUB_ARGUMENTS}
        return Path(hf_hub_download(str(self.location), file.name, **arguments))

    def load_tokenizer(self, name: str | Path) -> Any:
        """Load the processor or tokenizer of a folder or the Hub; trusts remote code if the model's is trusted.

        Raises:
            ValueError: If a given folder has none, or it cannot be loaded.
        """
        trusted = bool(self.load_arguments.get("trust_remote_code"))
        if Path(name).is_dir():
            found = load_tokenizer(Path(name), trusted)
            if found is None and Path(name) != self.directory:
                raise ValueError(f"tokenizer={str(name)!r} has no tokenizer files. Give the folder of a tokenizer.")
            return found
        check_checkpoint_name(str(name), self.load_arguments.get("cache_dir"))
        try:
            return AutoTokenizer.from_pretrained(str(name), trust_remote_code=trusted)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokenizer={str(name)!r} could not be loaded ({type(error).__name__}). Check the name, the network "
                "and your token, or give a folder with the files of a tokenizer."
            ) from error

    @property
    def hub_id(self) -> str | None:
        """Hub id of the original, None for a folder outside of the Hub's cache."""
        if isinstance(self.location, str):
            return self.location
        name = str(self.config.name_or_path if self.live is not None else self.location)
        for place in (Path(name), *Path(name).parents):
            if place.parent.name == "snapshots" and place.parents[1].name.startswith("models--"):
                return place.parents[1].name.removeprefix("models--").replace("--", "/")
        if self.live is None or not is_hub_id(name) or Path(name).exists():
            return None
        # The name of a model in memory may be a folder that no longer exists.
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None

    @property
    def title(self) -> str:
        """A title to publish: the Hub id, or the name of a folder without its path, or of a class."""
        if self.hub_id is not None:
            return self.hub_id
        return self.name if self.live is not None else readable_path(Path(native_path(self.name)).resolve().name)


def open_source(
    model: str | Path | PreTrainedModel,
    auto_class: type | None = None,
    dtype: str | torch.dtype = "auto",
    dequantize: bool = False,
    **kwargs: Any,
) -> ModelSource:
    """Open a checkpoint by its config and headers, or a model in memory; no weight is read.

    Args:
        model: Hub id, local path, or a `PreTrainedModel`.
        auto_class: Auto class or model class to load with; by default the architecture that the config names.
        dtype: As in `from_pretrained`; `"auto"` keeps the checkpoint's dtypes.
        dequantize: Read an FP8 or MXFP4 checkpoint as its bf16 values.
        kwargs: Passed to `from_pretrained`; `revision`, `token`, `cache_dir`, `local_files_only` also to the download.

    Raises:
        ValueError: If there is no such checkpoint, it is already compressed, quantized without `dequantize` or not
            quantized with it, has no MoE blocks, or a tensor or shard is missing or broken.
    """
    if not isinstance(model, str | os.PathLike):
        live = check_model(model)
        if dequantize:
            raise ValueError("dequantize=True needs a checkpoint, but this model is in memory. Pass its path instead.")
        return _from_memory(live)
    refuse_arguments(kwargs)
    name, model = readable_path(model), native_path(model)
    directory, headers, is_local = config_and_headers(model, kwargs)
    config = AutoConfig.from_pretrained(directory, **{k: v for k, v in kwargs.items() if k in _CONFIG_ARGUMENTS})
    quantization = accepted_quantization(config, dequantize)
    if quantization is not None:
        config = plain_config(config)
    refuse_larger_than_file(config, headers)
    skeleton = _skeleton(config, auto_class, kwargs.get("trust_remote_code", False))
    as_stored = quantization is None and dtype in ("auto", None)
    if as_stored:
        # The dtype in the config may differ from the stored ones, and is ignored.
        dtype = headers.dtype or "auto"
    arguments: dict[str, Any] = {**kwargs, "dtype": dtype}
    location: str | Path = model
    if is_local:
        # Load the files that were checked, even if they are in the Hub's cache.
        arguments = {k: v for k, v in arguments.items() if k not in (*HUB_ARGUMENTS, "subfolder")}
        location = directory
    elif directory.parent.name == "snapshots":
        # Use the commit, since a branch may change before the weights are loaded.
        arguments["revision"] = directory.name
    return _from_headers(
        ModelSource(
            name,
            config,
            skeleton,
            (),
            ModelInfo((), 0, 0, model_type=config.model_type),
            headers=headers,
            directory=directory,
            location=location,
            load_arguments=arguments,
            quantization=quantization,
            as_stored=as_stored,
        ),
        skeleton,
    )


def _from_headers(source: ModelSource, skeleton: PreTrainedModel) -> ModelSource:
    """A source with another skeleton, and with the blocks and sizes that its headers give."""
    assert source.headers is not None
    headers, dtype = source.headers, source.load_arguments["dtype"]
    blocks = tuple(find_blocks(skeleton))
    itemsize, plain, more = headers.itemsize, headers, dict[str, float]()
    if not source.as_stored:
        asked: Any = source.config.dtype if dtype in ("auto", None) else dtype
        itemsize = _dtype(asked).itemsize
        more = dict.fromkeys(names_in_float32(skeleton, _dtype(asked)), torch.float32.itemsize - itemsize)
    if source.quantization is not None:
        plain = unpacked(headers, int(itemsize))
    # With the user's renaming of tensors the checkpoint is checked when it is loaded.
    if not source.load_arguments.get("key_mapping"):
        refuse_incomplete(source.name, skeleton, plain, blocks)
    size = headers.bytes
    if not source.as_stored:
        state = skeleton.state_dict()
        size = int(plain.parameters * itemsize + sum(state[name].numel() * each for name, each in more.items()))
    blocks = with_itemsizes(blocks, skeleton, lambda name, tensor: itemsize + more.get(name, 0))
    if source.as_stored and len(headers.dtypes) > 1:
        stored = CheckpointTensors(CheckpointReader(skeleton, headers.tensors, cast=False), headers, no_numbers)
        blocks = with_itemsizes(blocks, skeleton, stored.itemsize, stored.mixed())
    described = header_bytes(headers.tensors, len(headers.files))
    found = tuple(each.info for each in blocks)
    info = replace(source.info, blocks=found, parameters=plain.parameters, bytes=size, header_bytes=described)
    return replace(source, skeleton=skeleton, blocks=blocks, info=info)


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The processor of a checkpoint folder, else its tokenizer, else None."""
    names = {path.name for path in directory.iterdir()}
    with utf8_path(directory) as folder:
        if names & {"processor_config.json", "preprocessor_config.json"}:
            return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if any("token" in name or name in ("vocab.json", "spiece.model") for name in names):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return None


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        near = nearest(dtype, ("bfloat16", "float16", "float32", "float64"), cutoff=0.4)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(f"dtype={dtype!r} is unknown; {hint}Use 'auto' or the name of a torch dtype.")
    return found


def _from_memory(model: PreTrainedModel) -> ModelSource:
    accepted_quantization(model.config, dequantize=False)
    if getattr(model, "is_quantized", False):
        raise ValueError("The model in memory is quantized. Load its unquantized weights to compress them.")
    blocks = with_itemsizes(find_blocks(model), model, lambda name, tensor: tensor.element_size())
    parameters = list(model.parameters())
    info = ModelInfo(
        tuple(found.info for found in blocks),
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
        header_bytes(_names_when_saved(model, blocks)),
        model_type=model.config.model_type,
    )
    return ModelSource(type(model).__name__, model.config, model, blocks, info, live=model)


def _names_when_saved(model: PreTrainedModel, blocks: Sequence[FoundBlock]) -> list[str]:
    """Upper bound of the tensor names that saving writes, since stacked experts may be saved one by one."""
    singles = [f"{found.info.name}.experts.{e}" for found in blocks for e in range(found.info.num_experts)] * 3
    return [*dict(model.named_parameters()), *singles]


def model_class(config: PreTrainedConfig) -> Any:
    """The class that the config names, else the first Auto class that knows the config.

    Raises:
        ValueError: If there is none.
    """
    names = getattr(config, "architectures", None) or []
    named = getattr(transformers, names[0], None) if names else None
    if named is not None:
        return named
    carried = getattr(config, "auto_map", None) or {}
    for name in _AUTO_CLASSES:
        if name in carried or auto_class_knows(name, config):
            return getattr(transformers, name)
    raise ValueError(
        f"config.json names the architectures {names}, and no Auto class of transformers knows model_type="
        f"{config.model_type!r}. Pass auto_class=, the class to load with."
    )


def loads_with(model: PreTrainedModel) -> str:
    """Name of the class that loads a checkpoint of a model: an Auto class where there is one."""
    return next((name for name in _AUTO_CLASSES if auto_class_gives(name, model)), type(model).__name__)


def _skeleton(config: PreTrainedConfig, auto_class: type | None, trust_remote_code: bool) -> PreTrainedModel:
    cls: Any = auto_class or model_class(config)
    with torch.device("meta"):
        return model_from_config(cls, config, trust_remote_code)
