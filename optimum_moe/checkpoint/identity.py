"""The identity of a model: its architecture, settings and values, independent of its path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from optimum_moe.checkpoint.checkpoint_tensors import CheckpointTensors
from optimum_moe.checkpoint.reader import CheckpointReader
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.checkpoint.streamed import empty_model
from optimum_moe.checkpoint.value_digest import values_in_memory, values_packed, values_stored
from optimum_moe.surgeons import tower_of

_NOT_SETTINGS = {
    *("transformers_version", "architectures", "dtype", "torch_dtype", "auto_map", "quantization_config"),
    *("fusion_config", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "trust_remote_code"),
}
"""Settings that transformers rewrites when it saves, that do not change what the model computes, or that have their own
checks."""


def identity(source: ModelSource) -> dict[str, Any]:
    """The identity of a model that statistics, plans and unfinished runs record.

    `values` are digests of the stored values, and of the loaded values if these differ. Two models are the same if they
    share a digest.

    Raises:
        ValueError: If the config or the sizes of the checkpoint changed since it was opened.
    """
    return {
        "name": source.title,
        "architecture": type(source.skeleton).__name__,
        "num_experts": {found.info.name: found.info.num_experts for found in source.blocks},
        "towers": {found.info.name: tower_of(source.skeleton, found) for found in source.blocks},
        "dtype": _loaded_dtype(source),
        "config": _settings(source),
        "values": _values(source),
    }


def same_model(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that must match to resume a run; it does not contain the path."""
    config = hashlib.sha256(json.dumps(found["config"], sort_keys=True).encode()).hexdigest()
    return {"architecture": found["architecture"], "config": config, "values": found["values"]}


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first difference of two identities, None if they are the same; missing entries are not compared."""
    for key in ("architecture", "num_experts"):
        if there.get(key) is not None and there[key] != here[key]:
            return key
    for key, before, now in differing_settings(there.get("config") or here["config"], here["config"]):
        return f"{key} ({json.dumps(before)}, here {json.dumps(now)})"
    values = there.get("values")
    if values is not None and not set(values) & set(here["values"]):
        return "content (other values in tensors of the same shapes: a fine-tune, or a file that was changed)"
    return None


def differing_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names and both values of settings that differ; settings that only one side has are ignored."""
    for key in sorted(there.keys() & here.keys()):
        before, now = there[key], here[key]
        if before == now:
            continue
        inside = []
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            inside = [(f"{key}.{name}", *values) for name, *values in differing_settings(before, now)]
            if not inside and key.endswith("_config"):
                continue
        yield from inside or [(key, before, now)]


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """All settings of a config that affect what the model computes, including defaults."""
    return _settings_in(json.loads(config.to_json_string(use_diff=False)))


def _settings_in(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _settings_in(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _NOT_SETTINGS and not key.startswith("_")
    }


def _settings(source: ModelSource) -> dict[str, Any]:
    """The settings of a run's model, including those passed as arguments."""
    found = settings_of(source.config)
    if source.directory is not None:
        arguments = {"trust_remote_code": source.load_arguments.get("trust_remote_code", False)}
        changed = differing_settings(found, settings_of(AutoConfig.from_pretrained(source.directory, **arguments)))
        for key, before, now in changed:
            raise ValueError(
                f"config.json of {source.name} was changed since it was opened: {key} was {json.dumps(before)} and is "
                f"{json.dumps(now)}. Make a new MoECompressor."
            )
    return found | {key: value for key, value in source.load_arguments.items() if key in found}


def _loaded_dtype(source: ModelSource) -> str:
    """The dtype that a run loads the model in: `"auto"` for the stored one, or its name."""
    if source.as_stored:
        return "auto"
    dtype = source.load_arguments.get("dtype") if source.live is None else source.live.dtype
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def _values(source: ModelSource) -> list[str]:
    tied = dict(getattr(source.skeleton, "all_tied_weights_keys", None) or {})
    if source.live is not None:
        return [values_in_memory(source.live, _counting(source), tied)]
    assert source.headers is not None
    gone = [file for file in source.headers.files if isinstance(source.location, Path) and not file.is_file()]
    if gone:
        raise ValueError(f"{gone[0]} was removed since it was opened. Copy it again, or make a new MoECompressor.")
    with source.shards() as shards:
        if source.quantization is not None:
            return values_packed(source.headers, shards)
        reader = CheckpointReader(source.skeleton, source.headers.tensors, cast=False)
        checkpoint_tensors = CheckpointTensors(reader, source.headers, shards)
        return values_stored(
            checkpoint_tensors, shards, _counting(source), tied, _loaded_dtypes(source, checkpoint_tensors)
        )


def _counting(source: ModelSource) -> set[str]:
    """The tensors that the digest covers: parameters, and buffers of MoE blocks.

    Other buffers are not covered, since their class computes them if a checkpoint lacks them.
    """
    prefixes = tuple(f"{found.info.name}." for found in source.blocks)
    parameters = {name for name, _ in source.skeleton.named_parameters(remove_duplicate=False)}
    return parameters | {name for name in source.skeleton.state_dict() if name.startswith(prefixes)}


def _loaded_dtypes(source: ModelSource, checkpoint_tensors: CheckpointTensors) -> dict[str, torch.dtype]:
    """The dtypes of loaded tensors, if loading may change some."""
    asked = source.load_arguments.get("dtype")
    asked = getattr(source.config, "dtype", None) if asked in ("auto", None) else asked
    name = str(asked).removeprefix("torch.")
    if all(str(t.dtype) == f"torch.{name}" for t in checkpoint_tensors.tensors.values() if t.is_floating_point()):
        return {}
    model: PreTrainedModel = empty_model(source)
    return {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
