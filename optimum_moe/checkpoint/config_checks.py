"""Checks that `config.json` of a compressed checkpoint matches its plan and its original."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from optimum_moe.checkpoint.identity import differing_settings, settings_of
from optimum_moe.checkpoint.mtp import COUNT_FIELDS
from optimum_moe.checkpoint.writer import spell_out
from optimum_moe.formats.sparse_rows import SparseRows
from optimum_moe.plan import CompressionPlan
from optimum_moe.surgeons import FoundBlock


def config_failures(
    raw: Mapping[str, Any],
    config: PreTrainedConfig,
    blocks: Sequence[FoundBlock],
    plan: CompressionPlan,
    original: PreTrainedConfig | None,
    tensors: Mapping[str, torch.Tensor],
    saved_again: bool,
    in_files: Mapping[str, str],
) -> list[str]:
    """Check all settings against plan and original, equivalent settings against each other, and the structure.

    Args:
        raw: Content of `config.json`.
        config: The config as parsed by transformers.
        blocks: The MoE blocks of the model.
        plan: The plan of the blocks.
        original: The config of the original; None if it is not compared.
        tensors: The tensors of the model that are in the checkpoint.
        saved_again: Whether transformers saved the config since, which writes only one of the equivalent settings.
        in_files: Prefix in the files of each block, by its module path.
    """
    counted = {found.surgeon.count_fields for found in blocks}
    failures = list(_other_spellings(raw, counted, saved_again))
    failures += _count_failures(blocks, plan)
    failures += _structure_failures(raw, plan, saved_again, in_files)
    failures += _setting_failures(raw, config, counted, plan, original)
    failures += _name_failures(raw, plan, original, tensors)
    return failures


def _other_spellings(raw: Mapping[str, Any], counted: set[tuple[str, ...]], saved_again: bool) -> Iterator[str]:
    given, spelled = _flat(raw), _flat(spell_out(raw, counted))
    for key, value in spelled.items():
        if given.get(key) != value and not (saved_again and key not in given):
            yield f"{key} is {given.get(key)}, other spellings say {value}"
    for key, value in given.items():
        path = key.removesuffix("rope_theta")
        within = _at(raw, f"{path}rope_parameters")
        if key == f"{path}rope_theta" and isinstance(within, Mapping) and within.get("rope_theta", value) != value:
            yield f"{key} is {value}, rope_parameters say {within['rope_theta']}"


def _count_failures(blocks: Sequence[FoundBlock], plan: CompressionPlan) -> Iterator[str]:
    for found in blocks:
        block = plan.blocks.get(found.info.name)
        if block is not None:
            expected = block.num_groups if plan.is_plain else block.num_experts
            if found.info.num_experts != expected:
                yield f"{found.info.name} has {found.info.num_experts} experts by config.json, {expected} by the plan"


def _structure_failures(
    raw: Mapping[str, Any], plan: CompressionPlan, saved_again: bool, in_files: Mapping[str, str]
) -> Iterator[str]:
    structure = raw.get("quantization_config")
    expected = {} if plan.is_plain else {in_files.get(name, name): entry for name, entry in plan.structure().items()}
    stored = dict((structure or {}).get("blocks", {}))
    if saved_again:
        # Training may drop sparse rows.
        stored, expected = ({name: _without_rows(entry) for name, entry in d.items()} for d in (stored, expected))
    if stored != expected:
        yield "the blocks of quantization_config are not those of the plan"
    if bool(structure) != bool(raw.get("fusion_config")):
        yield "quantization_config and fusion_config must occur together, so that stock transformers refuses to load"


def _without_rows(entry: Mapping[str, Any]) -> dict[str, Any]:
    factors = entry.get("factors")
    if not isinstance(factors, Mapping):
        return dict(entry)
    return {**entry, "factors": {k: v for k, v in factors.items() if k not in (SparseRows.name, "checksum")}}


def _setting_failures(
    raw: Mapping[str, Any],
    config: PreTrainedConfig,
    counted: set[tuple[str, ...]],
    plan: CompressionPlan,
    original: PreTrainedConfig | None,
) -> Iterator[str]:
    here, told = settings_of(config), set()
    # These settings have their own checks.
    wrong = [(key, value, _at(here, key)) for key, value in plan.settings.items() if _at(here, key) != value]
    for key, value, now in wrong:
        told.add(key)
        yield f"{key} is {json.dumps(now)}, the plan says {json.dumps(value)}"
    others = {name for names in counted for name in names} | set(COUNT_FIELDS)
    bases = {"the plan": plan.source.get("config"), "the original": None if original is None else settings_of(original)}
    for what, base in bases.items():
        for key, before, now in differing_settings(base or {}, here):
            if plan.settings.get(key) == now:
                continue
            if key.rpartition(".")[2] not in others and key not in told:
                told.add(key)
                yield f"{key} is {json.dumps(now)}, {what} says {json.dumps(before)}"
    written, read = _flat(raw), _flat(here)
    for key in sorted(written.keys() & read.keys() - told):
        value = written[key]
        if value != read[key] and not isinstance(value, list | Mapping) and key.rpartition(".")[2] not in others:
            yield f"{key} is {json.dumps(value)}, and is read as {json.dumps(read[key])}"
    if original is not None:
        # Both configs come from the same version of transformers, so both have all of its settings.
        known = _flat(spell_out(settings_of(original), counted))
        for key in sorted(read.keys() - known.keys()):
            yield f"{key} is {json.dumps(read[key])}, the original has no such setting"


def _name_failures(
    raw: Mapping[str, Any],
    plan: CompressionPlan,
    original: PreTrainedConfig | None,
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[str]:
    architecture = plan.source.get("architecture")
    if architecture is not None and raw.get("architectures") != [architecture]:
        yield f"architectures is {raw.get('architectures')}, the plan was made for {architecture}"
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            numbers[_name(tensor.dtype)] += tensor.numel()
    said = raw.get("dtype", raw.get("torch_dtype"))
    possible = {name for name, _ in numbers.most_common(1)} | {_name(getattr(original, "dtype", None))}
    if said is not None and _name(said) not in possible:
        yield f"dtype is {_name(said)}, most elements are stored in {numbers.most_common(1)[0][0]}"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
