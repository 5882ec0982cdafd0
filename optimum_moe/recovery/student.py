"""The student of a recovery: a compressed checkpoint, or a model in memory, that trains in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe.checkpoint.checkpoint_tensors import built
from optimum_moe.checkpoint.dtypes import DTYPES, names_in_float32
from optimum_moe.checkpoint.headers import INDEX_FILE, Headers, read_headers
from optimum_moe.checkpoint.location import raw_config
from optimum_moe.checkpoint.names import check_checkpoint_name
from optimum_moe.checkpoint.refusals import all_in_memory, check_model
from optimum_moe.checkpoint.shards import write_shard
from optimum_moe.hf.compat import names_not_saved, remove_tied_weights_from_state_dict, revert_weight_conversion
from optimum_moe.hf.quantizer import quantized_tensors
from optimum_moe.hf.structure import METHOD, MoEStructureConfig

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes in which the steps of a training would be lost to rounding."""


@dataclass(frozen=True)
class Student:
    """What is trained.

    Args:
        name: Its folder or Hub id, or the class of a model in memory.
        skeleton: The model on the meta device; the model itself if it is in memory.
        folder: Its checkpoint, None for a model in memory.
    """

    name: str
    skeleton: PreTrainedModel
    folder: Path | None = None

    def load(self) -> PreTrainedModel:
        """The model with its values, those of narrow dtypes widened to float32, which represents all of them."""
        if self.folder is None:
            return widened(self.skeleton)
        cls: Any = type(self.skeleton)
        return cls.from_pretrained(self.folder, dtype=torch.float32)

    def running_dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of all parameters and buffers, of a checkpoint those in which `from_pretrained` loads it."""
        found, said = dtypes_of(self.skeleton), self.skeleton.config.dtype
        if self.folder is not None and said is not None:
            dtype: torch.dtype = getattr(torch, str(said).removeprefix("torch."))
            found |= dict.fromkeys(names_in_float32(self.skeleton, dtype), torch.float32)
        return found

    def stored_dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """The dtype of each of these parameters in the checkpoint, or in the model in memory."""
        state = dict(self.skeleton.named_parameters())
        if self.folder is None:
            return {name: state[name].dtype for name in names}
        headers, found = read_headers(self.folder), {}
        for name in names:
            empty = torch.empty(state[name].shape, device="meta")
            stored = next(iter(revert_weight_conversion(self.skeleton, {name: empty})))
            if stored in headers.tensors:
                found[name] = DTYPES[headers.tensors[stored][0]]
        return found


def open_student(model: Any) -> Student:
    """Open a folder or Hub id by its config, or take a model in memory; no weight is read.

    Raises:
        ValueError: If it is quantized, or no model.
    """
    if not isinstance(model, str | Path):
        live = check_model(model)
        refuse_quantized(live)
        return Student(type(live).__name__, live)
    if not Path(model).is_dir():
        check_checkpoint_name(str(model))
        model = snapshot_download(str(model))
    folder = Path(model).expanduser().resolve()
    quantization = raw_config(folder).get("quantization_config") or {}
    inner = quantization.get("quantization") if quantization.get("quant_method") == METHOD else quantization
    if inner:
        raise ValueError(
            f"{folder} is quantized ({inner.get('quant_method')}), and whole numbers cannot be trained. Train the "
            "checkpoint from before, and quantize the result."
        )
    skeleton, _ = built(folder, read_headers(folder))
    return Student(str(model), skeleton, folder)


def refuse_quantized(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if a model in memory has quantized parameters."""
    found = quantized_tensors(model)
    if found:
        name, kind = next(iter(found.items()))
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} quantized parameters, such as {name} ({kind}), which cannot be "
            "trained. Train the model from before, and quantize the result."
        )


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """Give parameters and buffers of narrow dtypes float32, in place."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in NARROW:
            tensor.data = tensor.data.float()
    return model


def dtypes_of(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtypes of all parameters and buffers of a model."""
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def narrowed(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters and buffers the named dtypes again, in place."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])


def write_student(model: PreTrainedModel, student: Student, names: Iterable[str], directory: Path) -> None:
    """Write a trained student: its files, with other values of what was trained.

    Tensors that did not train are copied from the student's files; trained ones are stored in the dtypes that they had.

    Args:
        model: The trained model.
        student: What it was.
        names: Parameters that were trained.
        directory: An empty folder.
    """
    all_in_memory(model)
    if student.folder is None:
        model.save_pretrained(directory)
        return
    headers = read_headers(student.folder)
    values = dict(model.named_parameters())
    trained = {name: values[name].detach() for name in names}
    new = revert_weight_conversion(model, trained)
    if all(name in headers.tensors and tuple(t.shape) == headers.tensors[name][1] for name, t in new.items()):
        gone: set[str] = set()
    else:
        # Rows were dropped, so that indices and sizes changed too.
        new = _whole_state(model)
        gone = set(headers.tensors) - set(new)
    _copy_side_files(student.folder, headers, directory)
    _write_shards(headers, new, gone, directory)
    _write_sizes(model, directory)


def _whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name in names_not_saved(model):
        state.pop(name, None)
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def _copy_side_files(folder: Path, headers: Headers, directory: Path) -> None:
    """Copy all files but weights and hidden ones."""
    shards = {file.name for file in headers.files}
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        hidden = any(part.startswith(".") and part != ".gitattributes" for part in place.parts)
        if file.is_file() and not hidden and (len(place.parts) > 1 or file.name not in shards):
            (directory / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, directory / place)


def _write_shards(headers: Headers, new: Mapping[str, Tensor], gone: set[str], directory: Path) -> None:
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    total = 0
    for file in headers.files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if name in gone:
                    continue
                before = DTYPES[headers.tensors[name][0]]
                tensors[name] = new[name].to("cpu", before).contiguous() if name in new else shard.get_tensor(name)
        write_shard(directory / file.name, tensors)
        weight_map |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = directory / INDEX_FILE
    if index.is_file():
        record = json.loads(index.read_text(encoding="utf-8"))
        record["weight_map"] = weight_map
        record.setdefault("metadata", {})["total_size"] = total
        index.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_sizes(model: PreTrainedModel, directory: Path) -> None:
    """Write the sizes of experts whose rows were dropped into config.json."""
    structure = getattr(model.config, "quantization_config", None)
    if not isinstance(structure, MoEStructureConfig):
        return
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    record = config.get("quantization_config")
    if record is not None and record["blocks"] != structure.blocks:
        record |= {"blocks": structure.blocks, "saved_again": True}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
