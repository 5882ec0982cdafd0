"""Recipes: a method with its settings and calibration settings, as a preset name or a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from optimum_moe.calibration.data import CalibrationConfig
from optimum_moe.calibration.sources import FILE_TYPES, check_source
from optimum_moe.methods import METHODS, Composed, LowRankSparse, Method
from optimum_moe.methods.counts import choose_one
from optimum_moe.plan import CompressionPlan
from optimum_moe.settings import check_seed, plain
from optimum_moe.statistics import NO_SAMPLE


@dataclass(frozen=True)
class Recipe:
    """What to do, as it is written beside the weights.

    Args:
        method: The method.
        calibration: Settings of `CalibrationConfig`, without the source where the user gives it.
        seed: Seed of the run.
    """

    method: Method
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def as_used(self, plan: CompressionPlan) -> Recipe:
        """The recipe to write beside a checkpoint: with the sample and seed of its plan, without folders of the user's.

        What was sampled may be other than the recipe says: from a `CalibrationConfig`, or from earlier statistics.
        """
        calibration = {key: value for key, value in self.calibration.items() if key != "source"}
        if "source" in self.calibration:
            calibration["source"] = _without_folders(self.calibration["source"])
        record = plan.calibration or {}
        calibration |= {name: record[name] for name in _SAMPLED if record.get(name) is not None}
        if record.get("sequence_length") is not None and record.get("max_tokens") is None:
            # No limit is not the default.
            calibration["max_tokens"] = None
        return dataclasses.replace(self, calibration=calibration, seed=plan.seed)

    def to_yaml(self) -> str:
        """The recipe as a YAML document, only settings that differ from their defaults."""
        record = _settings(self.method)
        if self.calibration:
            record["calibration"] = dict(self.calibration)
        if self.seed is not None:
            record["seed"] = self.seed
        return yaml.safe_dump(record, sort_keys=False)


_SAMPLED = ("num_samples", "max_tokens", "sequence_length", "batch_size", "packing", "seed")
"""What the record of calibration data says of their sample, by the names of `CalibrationConfig`."""


def _without_folders(source: Any) -> Any:
    """A source of calibration data, or a mixture of several, whose files are named without where they lie."""
    if isinstance(source, Mapping):
        return {_without_folders(part): weight for part, weight in source.items()}
    if isinstance(source, list | tuple):
        return [_without_folders(part) for part in source]
    return Path(source).name if isinstance(source, str) and Path(source).suffix.lower() in FILE_TYPES else source


def _settings(method: Method) -> dict[str, Any]:
    """Name and settings of a method that differ from their defaults."""
    if isinstance(method, Composed):
        return {**_settings(method.first), "then": _settings(method.then)}
    fields = [f for f in dataclasses.fields(method) if f.init]
    return {"method": method.name, **{f.name: v for f in fields if (v := getattr(method, f.name)) != f.default}}


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("optimum_moe") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a preset or a YAML file.

    Args:
        name: Name of a preset (`"m-smoe"`), or path of a `.yaml` file.
        overrides: Settings of the method that replace the recipe's; one way of saying how many experts remain
            replaces the others.

    Raises:
        ValueError: If there is no such preset or file, or it has an unknown field.
    """
    return parse_recipe(recipe_record(name), overrides)


def recipe_record(name: str | Path) -> Mapping[str, Any]:
    """What a preset or a YAML file says, not yet checked.

    Raises:
        ValueError: If there is no such preset or file, or it holds no mapping.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"No recipe file {path}. Give an existing one, or a preset: {', '.join(preset_names())}.")
        text = path.read_text(encoding="utf-8")
    else:
        choose_one("recipe", str(name), preset_names())
        text = (resources.files("optimum_moe") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {name} is no valid YAML: {error}. Correct it.") from error
    if not isinstance(record, Mapping):
        raise ValueError(f"Recipe {name} must be a mapping with a field 'method', got {type(record).__name__}.")
    return record


def parse_recipe(record: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from the mapping that its YAML holds; see `load_recipe`."""
    settings = dict(record)
    if "method" not in settings:
        raise ValueError(f"A recipe needs a field 'method', one of {', '.join(sorted(METHODS))}.")
    name = settings.pop("method")
    choose_one("method", name, METHODS)
    overrides = overrides or {}
    sizes = METHODS[name].size_fields
    if any(key in sizes for key in overrides):
        settings = {key: value for key, value in settings.items() if key not in sizes}
    settings |= overrides
    known = [f.name for f in dataclasses.fields(METHODS[name]) if f.init]
    check_fields(settings, [*known, "calibration", "seed", "then"])
    then = settings.pop("then", None)
    calibration = settings.pop("calibration", None) or {}
    seed = plain(settings.pop("seed", None))
    if seed is not None:
        check_seed(seed)
    if not isinstance(calibration, Mapping):
        raise ValueError(
            f"The recipe's field 'calibration' must be a mapping, got {calibration!r}. Write the path as its 'source'."
        )
    return Recipe(_then(METHODS[name](**settings), then), calibration, seed)


def _then(method: Method, record: Any) -> Method:
    """A method, followed by the one that a recipe's field `then` describes."""
    if record is None:
        return method
    if not isinstance(record, Mapping):
        raise ValueError(f"The recipe's field 'then' must be a mapping with a field 'method', got {record!r}.")
    second = parse_recipe(record).method
    if not isinstance(second, LowRankSparse):
        raise ValueError(f"The recipe's field 'then' may hold {LowRankSparse.name}, got {second.name}. Correct it.")
    return Composed(method, second)


def check_fields(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a `ValueError` with the nearest match for a field that is not known."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f". Known: {', '.join(sorted(known))}."
            raise ValueError(f"Unknown field {name!r}{hint}")


def coerce_recipe(method: Any) -> Recipe:
    """A recipe from a method, a list of one or two, the name of a preset or a path.

    Raises:
        ValueError: If it is none of them.
    """
    if isinstance(method, Recipe):
        return method
    if isinstance(method, Method):
        return Recipe(method)
    if isinstance(method, Sequence) and not isinstance(method, str):
        if len(method) == 1 and isinstance(method[0], Method):
            return Recipe(method[0])
        if len(method) == 2 and isinstance(method[0], Method) and isinstance(method[1], LowRankSparse):
            return Recipe(Composed(*method))
        raise ValueError(
            "A list of methods may hold one that merges or prunes experts, then LowRankSparse; got "
            f"{[getattr(m, 'name', type(m).__name__) for m in method]}. Pass one of them, or both in that order."
        )
    if isinstance(method, (str, Path)):
        return load_recipe(method)
    raise ValueError(
        f"method={type(method).__name__} is none. Pass a method such as MSMoE(num_experts=8), the name of a preset, "
        "or the path of a YAML recipe."
    )


def run_seed(recipe: Recipe, seed: Any) -> int:
    """The user's seed, else the recipe's, else 0.

    Raises:
        ValueError: If it is no integer of at least 0, or too large.
    """
    seed = next((s for s in (plain(seed), recipe.seed) if s is not None), 0)
    check_seed(seed)
    return int(seed)


def calibration_config(recipe: Recipe, calibration: Any, seed: Any = None) -> CalibrationConfig | None:
    """How to calibrate: what the user says, completed by the recipe and by the sample that its method wants.

    The seed is the user's: of the config, else of the run; else the recipe's: of its calibration, else its own; else 0.

    Args:
        recipe: The recipe.
        calibration: The user's source or config, None for the recipe's.
        seed: That the user gives for the run.

    Returns:
        None where there is no source.

    Raises:
        ValueError: If a field is unknown or out of range.
    """
    check_fields(recipe.calibration, [f.name for f in dataclasses.fields(CalibrationConfig)])
    data = calibration if calibration is not None else recipe.calibration.get("source")
    if data is None:
        return None
    config = CalibrationConfig.coerce(data)
    check_source(config.source)
    if not isinstance(data, CalibrationConfig):
        own = data if CalibrationConfig.is_fields(data) else ()
        settings = {k: v for k, v in recipe.calibration.items() if k not in ("source", "seed", *own)}
        config = dataclasses.replace(config, **settings)
    if config.seed is None:
        seeds = seed, recipe.calibration.get("seed"), recipe.seed
        config = dataclasses.replace(config, seed=next((s for s in seeds if s is not None), 0))
    if config.reservoir_tokens == 0 and recipe.method.needs_sample:
        raise ValueError(NO_SAMPLE)
    if config.reservoir_tokens is None:
        config = dataclasses.replace(config, reservoir_tokens=recipe.method.sample_size)
    return config
