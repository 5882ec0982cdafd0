"""Writes weights and config of a compressed checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_moe.checkpoint.refusals import all_in_memory
from optimum_moe.checkpoint.stored import StoredModel
from optimum_moe.stages.counts import parse_size
from optimum_moe.surgeons import FoundBlock, config_at, tower_of

_BUILT_IN = {"deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}
"""Settings by model type that transformers has built in and other runtimes read from `config.json`."""


def choose_shard_size(size: str | int | None, streams: bool) -> str | int:
    """The maximum size of weight files.

    Raises:
        ValueError: If it is not a size, or is given for a streaming run, which writes one file per layer.
    """
    if size is None:
        return "5GB"
    if streams:
        raise ValueError(
            f'max_shard_size={size!r} is for engine="memory": streaming writes a file for each layer. Leave it out.'
        )
    return parse_size(size, "max_shard_size")


def write_model(
    model: PreTrainedModel,
    directory: Path,
    blocks: Sequence[FoundBlock],
    max_shard_size: str | int,
    stored: StoredModel | None = None,
) -> None:
    """Write weights and config, with all equivalent config settings that readers of the architecture know.

    Args:
        model: The model.
        directory: Output folder.
        blocks: Its original MoE blocks.
        max_shard_size: As in transformers.
        stored: Stored dtypes and values of its tensors; None to save the model's own tensors.

    Raises:
        ValueError: If some of its weights are offloaded.
    """
    all_in_memory(model)
    state = None if stored is None else stored.state()
    present = {parameter.dtype for parameter in model.parameters()}
    # Of a model in memory it may be from before a cast, `model.to(torch.bfloat16)`.
    dtype = model.config.dtype if model.config.dtype in present else None
    # These tensors already have their names in the checkpoint, so skip the renaming.
    save: Any = model.save_pretrained
    save(directory, state_dict=state, max_shard_size=max_shard_size, save_original_format=state is None)
    model.config.dtype = dtype or model.config.dtype
    _complete_config(directory, model.config, blocks)


def describe_model(model: PreTrainedModel, directory: Path, blocks: Sequence[FoundBlock]) -> None:
    """Write the config as `write_model` does, for a model whose shards are already written."""
    dtype = model.config.dtype
    with TemporaryDirectory(dir=directory) as beside, without_bars():
        model.save_pretrained(beside, state_dict={})
        model.config.dtype = dtype
        for path in Path(beside).iterdir():
            # Remove only the empty file of weights.
            if path.suffix != ".safetensors":
                path.rename(directory / path.name)
    _complete_config(directory, model.config, blocks)


@contextmanager
def without_bars() -> Iterator[None]:
    """Context without the progress bars of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _complete_config(directory: Path, config: Any, blocks: Sequence[FoundBlock]) -> None:
    """Give the written config the model's dtype, and the settings that other readers know."""
    path = directory / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if config.dtype is not None:
        # transformers writes that of the first tensor, which some classes keep in float32 whatever the others are.
        written["dtype"] = str(config.dtype).removeprefix("torch.")
    fields = {found.surgeon.count_fields for found in blocks}
    path.write_text(json.dumps(spell_out(written, fields), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def spell_out(config: Mapping[str, Any], count_fields: set[tuple[str, ...]]) -> dict[str, Any]:
    """Add the settings that other versions and runtimes read: every name of the expert count, and flat `rope_theta`.

    transformers 5 writes only one name; transformers 4 would then use the class's default and so wrong shapes. It also
    writes no setting that its class has built in, for which vLLM and llama.cpp would use another default without a
    word: softmax scores for DeepSeek-V3.
    """
    spelled = {
        key: spell_out(value, count_fields) if isinstance(value, Mapping) and key.endswith("_config") else value
        for key, value in config.items()
    }
    for names in count_fields:
        present = [spelled[name] for name in names if isinstance(spelled.get(name), int)]
        if present:
            spelled |= dict.fromkeys(names, present[0])
    for name, value in _BUILT_IN.get(str(spelled.get("model_type")), {}).items():
        spelled.setdefault(name, value)
    rope = spelled.get("rope_parameters")
    if isinstance(rope, Mapping) and isinstance(rope.get("rope_theta"), (int, float)):
        spelled.setdefault("rope_theta", rope["rope_theta"])
    return spelled


def set_expert_counts(model: PreTrainedModel, blocks: Sequence[FoundBlock], counts: Mapping[str, int]) -> None:
    """Set the expert counts in the configs of a model with stock classes."""
    towers = {found.info.name: tower_of(model, found) for found in blocks}
    for found in blocks:
        tower = towers[found.info.name]
        if tower is not None:
            setattr(config_at(model.config, tower), found.surgeon.count_fields[0], counts[found.info.name])
