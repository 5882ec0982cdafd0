"""Stock models with fewer layers: which config settings make them, and how a model loses layers in place.

Nothing here knows an architecture. A candidate config is built on the meta device, and each of its layers is compared
with the original layer that it stands for: modules, classes, shapes, and plain attributes such as the kind of
attention. If something differs, no stock class can express it, and it is refused.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_moe.hf.compat import model_from_config
from optimum_moe.surgeons.registry import FoundBlock
from optimum_moe.surgeons.stock import REFUSALS, update_config
from optimum_moe.surgeons.towers import config_at, config_paths, path_of_config

_PATTERN = re.compile(r"layer|dense|sparse|step|freq|interval|period|block|hash")
"""Settings whose value may say which layers are of which kind."""
_REFERENCE = re.compile(r"layer.*(idx|index)")
"""Attributes of a layer whose value may be the number of a layer."""
_SHARED = "shared"
"""Entry of a list with one entry for each layer: the layer takes something from the last one that is not shared."""
_FULL = "full"
"""Entry of such a list: the layer computes it itself."""
_FEATURES = re.compile(r"deepstack.*index")
"""Lists of the layers of a tower whose features go into as many first layers of the decoder."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class ShallowModel:
    """A model of the original's class with some of its layers, on the meta device.

    Args:
        settings: The config settings that differ from the original's, by dotted path.
        skeleton: The model.
        stack: Path of the module list of layers.
        kept: Positions in the original of the layers that remain.
    """

    settings: Mapping[str, Any]
    skeleton: PreTrainedModel
    stack: str
    kept: tuple[int, ...]

    def new_name(self, name: str) -> str | None:
        """The name of a module or tensor after the drop; None for one in a layer that is gone."""
        prefix = f"{self.stack}."
        number, dot, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not number.isdecimal():
            return name
        return f"{prefix}{self.kept.index(int(number))}{dot}{rest}" if int(number) in self.kept else None


_BUILT: WeakKeyDictionary[PreTrainedModel, dict[frozenset[str], ShallowModel | str]] = WeakKeyDictionary()


def shallow_model(model: PreTrainedModel, blocks: Sequence[FoundBlock], dropped: Sequence[str]) -> ShallowModel | str:
    """The stock model without some layers, or the reason why there is none; built once for each model and set.

    Args:
        model: The original.
        blocks: Its MoE blocks.
        dropped: Paths of the layers to drop.
    """
    built = _BUILT.setdefault(model, {})
    key = frozenset(dropped)
    if key not in built:
        built[key] = _build(model, blocks, key)
    return built[key]


def drop_layers(model: PreTrainedModel, shallow: ShallowModel) -> None:
    """Take the layers that a shallow model lacks out of a model, in place, and adjust its config and attributes.

    Args:
        model: The original, with weights.
        shallow: The model that it becomes.
    """
    _BUILT.pop(model, None)
    stack: Any = model.get_submodule(shallow.stack)
    parent, _, name = shallow.stack.rpartition(".")
    setattr(model.get_submodule(parent), name, type(stack)(stack[position] for position in shallow.kept))
    update_everywhere(model, shallow.settings)
    own = dict(shallow.skeleton.named_modules())
    for path, module in model.named_modules():
        for attribute, value in _plain_attributes(own[path]).items():
            if vars(module).get(attribute) != value:
                setattr(module, attribute, value)


def update_everywhere(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Set config settings, also in the copies of a config that some models give to their parts."""
    update_config(model.config, settings)
    for path, value in settings.items():
        tower, _, name = path.rpartition(".")
        owner = config_at(model.config, tower)
        copies = {id(c): c for m in model.modules() if type(c := getattr(m, "config", None)) is type(owner)}
        for copy in copies.values():
            setattr(copy, name, deepcopy(value))


def _build(model: PreTrainedModel, blocks: Sequence[FoundBlock], dropped: frozenset[str]) -> ShallowModel | str:
    stacks = {found.info.layer.rpartition(".")[0] for found in blocks}
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder model has two stacks of layers, and the decoder's attend to the encoder's output"
    if len(stacks) != 1 or "" in stacks:
        return f"its MoE blocks are in {len(stacks)} stacks of layers, and one is needed"
    stack = stacks.pop()
    layers: Any = model.get_submodule(stack)
    kept = tuple(n for n in range(len(layers)) if f"{stack}.{n}" not in dropped)
    tower = path_of_config(model, stack)
    if tower is None:
        return "its layers are not described by one config"
    dense = [n for n in range(len(layers)) if not any(found.info.layer == f"{stack}.{n}" for found in blocks)]
    reasons = []
    if taker := _takes_from_outside(model.config, kept):
        return taker
    if orphan := _orphan(config_at(model.config, tower), len(layers), kept):
        return orphan
    if state := _passed_on(layers, config_at(model.config, tower)):
        return state
    for settings in _possible_settings(config_at(model.config, tower), len(layers), kept, dense):
        named = {f"{tower}.{name}".lstrip("."): value for name, value in settings.items()}
        config = deepcopy(model.config)
        try:
            update_config(config, named)
            # Some classes complete or correct their settings, and will do so when the checkpoint is loaded.
            config = type(config).from_dict(config.to_dict())
            with torch.device("meta"):
                built = model_from_config(type(model), config)
        except REFUSALS as error:
            reasons.append(str(error).strip().split("\n")[-1].strip())
            continue
        made: Any = built.get_submodule(stack)
        if len(made) != len(kept):
            continue
        mismatch = _mismatch(model, built, stack, kept)
        if mismatch is None:
            return ShallowModel(_differing(model.config, config), built, stack, kept)
        reasons.append(mismatch)
    return reasons[0] if reasons else "no setting of its config is the number of its layers"


def _possible_settings(
    config: Any, whole: int, kept: tuple[int, ...], dense: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Settings of fewer layers: lists cut to match, then other values of settings that may say which layer is what."""
    known = config.to_dict()
    counts = [name for name, value in known.items() if value == whole and type(value) is int and "layers" in name]
    counts.sort(key=lambda name: name != "num_hidden_layers")
    base: dict[str, Any] = {}
    others: dict[str, list[Any]] = {}
    for name, value in known.items():
        if isinstance(value, Mapping):
            if not value or not _PATTERN.search(name) or not all(_is_position(key, whole) for key in value):
                continue
            base[name] = {kept.index(int(key)): entry for key, entry in value.items() if int(key) in kept}
        elif isinstance(value, list | tuple) and len(value) == whole:
            base[name] = [value[n] for n in kept]
        elif isinstance(value, list | tuple) and _PATTERN.search(name) and all(_is_position(v, whole) for v in value):
            # A list of layers by their number; an empty one may have to name the dense layers.
            base[name] = [kept.index(n) for n in value if n in kept]
            others[name] = [[kept.index(n) for n in dense if n in kept]]
        elif type(value) is int and 0 < value <= whole and _PATTERN.search(name) and name not in counts:
            # The first so many layers, or each so many.
            first = sum(n < value for n in kept)
            others[name] = [other for other in dict.fromkeys((first, 1)) if other != value]
    for count in counts or [None]:
        counted = base if count is None else base | {count: len(kept)}
        yield counted
        changes = [{name: value} for name, values in others.items() for value in values]
        yield from (counted | change for change in changes)
        yield from (counted | one | two for one, two in combinations(changes, 2) if one.keys() != two.keys())
    # Lists that stand for something else than layers and happen to be as long.
    yield from ({count: len(kept)} for count in counts)


def _takes_from_outside(config: Any, kept: tuple[int, ...]) -> str | None:
    """Which layer takes features of another tower by its number, if it would have another one; None if none."""
    for _, owner in config_paths(config):
        for name, value in vars(owner).items():
            first = len(value) if _FEATURES.search(name) and isinstance(value, list | tuple) else 0
            gone = set(range(first)) - set(kept)
            if gone:
                return f"layer {min(gone)} takes features of another tower by its number ({name})"
    return None


def _passed_on(layers: nn.ModuleList, config: Any) -> str | None:
    """What each layer gets from the one before it, if no setting says which layers use it; None if nothing."""
    taken = [name for name in inspect.signature(type(layers[-1]).forward).parameters if name.startswith("prev_")]
    told = any(
        isinstance(value, list | tuple) and len(value) == len(layers) and set(value) <= {_SHARED, _FULL}
        for value in vars(config).values()
        if not isinstance(value, list | tuple) or all(isinstance(item, str) for item in value)
    )
    return f"each layer uses what the one before it computed ({taken[0]})" if taken and not told else None


def _orphan(config: Any, whole: int, kept: tuple[int, ...]) -> str | None:
    """Which layer would miss what another one computes for it, or which kind of layers would be gone; None if none."""
    for name, value in config.to_dict().items():
        if not isinstance(value, list | tuple) or len(value) != whole:
            continue
        gone = {kind for kind in value if isinstance(kind, str)} - {value[n] for n in kept}
        if gone:
            return f"no layer of the kind {sorted(gone)[0]!r} ({name}) would be left"
        for number in kept:
            source = max((n for n in range(number) if value[n] != _SHARED), default=0)
            if value[number] == _SHARED and source not in kept:
                return f"layer {number} uses what layer {source} computes ({name})"
    return None


def _is_position(value: Any, whole: int) -> bool:
    return str(value).isdecimal() and int(value) < whole


def _mismatch(model: PreTrainedModel, built: PreTrainedModel, stack: str, kept: tuple[int, ...]) -> str | None:
    """How a built model differs from the original without some layers; None if it does not."""
    layers: Any = model.get_submodule(stack)
    for position, number in enumerate(kept):
        difference = _difference(layers, built.get_submodule(f"{stack}.{position}"), number, kept)
        if difference is not None:
            return f"layer {number} would be another one as layer {position}: {difference}"
    inside = f"{stack}."
    before, after = (
        {name: tensor.shape for name, tensor in m.state_dict(keep_vars=True).items() if not name.startswith(inside)}
        for m in (model, built)
    )
    odd = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return f"{odd[0]} outside of the layers has a size by the number of layers" if odd else None


def _difference(layers: nn.ModuleList, made: nn.Module, number: int, kept: tuple[int, ...]) -> str | None:
    """The first thing in which a layer differs from the one that is built in its place."""
    layer = layers[number]
    there, here = dict(layer.named_modules()), dict(made.named_modules())
    odd = sorted(there.keys() ^ here.keys())
    if odd:
        return f"{odd[0]} exists in one of them only"
    sizes = [{n: t.shape for n, t in (*m.named_parameters(), *m.named_buffers())} for m in (layer, made)]
    odd = sorted(n for n in sizes[0].keys() | sizes[1].keys() if sizes[0].get(n) != sizes[1].get(n))
    if odd:
        return f"{odd[0]} has another shape"
    for path, module in here.items():
        before = there[path]
        if type(before) is not type(module):
            return f"{path} is a {type(before).__name__}, and would be a {type(module).__name__}"
        for name, value in _plain_attributes(module).items():
            old = vars(before).get(name)
            if not _is_same(name, _over_layers(layers, path, name), value, number, kept):
                return f"{f'{path}.{name}'.lstrip('.')} is {old!r}, and would be {value!r}"
    return None


def _over_layers(layers: nn.ModuleList, path: str, name: str) -> dict[int, Any]:
    """The value of an attribute in each layer that has it, by the number of the layer."""
    found: dict[int, Any] = {}
    for number, layer in enumerate(layers):
        module: Any = dict(layer.named_modules()).get(path)
        if module is not None and name in vars(module):
            found[number] = vars(module)[name]
    return found


def _is_same(name: str, values: Mapping[int, Any], new: Any, number: int, kept: tuple[int, ...]) -> bool:
    """Whether an attribute says the same of a layer before and after the layers are numbered again.

    Args:
        name: Its name.
        values: Its value in each layer of the original.
        new: Its value in the layer that is built.
        number: Number of the layer in the original.
        kept: The numbers that remain.
    """
    old, position = values.get(number), kept.index(number)
    if type(old) is int and type(new) is int:
        known = [value for value in values.values() if type(value) is int]
        if all(one < two for one, two in pairwise(known)) and new in (values.get(position), old - number + position):
            # It counts the layers.
            return True
        if _REFERENCE.search(name) and 0 <= old <= max(values):
            # It may refer to another layer, as shared keys and values do.
            return old in kept and new == kept.index(old)
    return type(old) is type(new) and old == new


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that are numbers, texts, or lists of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def _differing(before: Any, after: Any) -> dict[str, Any]:
    """The settings of a config that differ from another's, by dotted path."""
    found: dict[str, Any] = {}
    others = dict(config_paths(before))
    for path, config in config_paths(after):
        there, here = (json.loads(c.to_json_string(use_diff=False)) for c in (others[path], config))
        inside = getattr(config, "sub_configs", {})
        found |= {f"{path}.{k}".lstrip("."): v for k, v in here.items() if k not in inside and v != there.get(k)}
    return found
