"""Recipes: an ordered list of stages and calibration settings, as a preset or a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from optimum_moe.calibration.data import CalibrationConfig
from optimum_moe.calibration.sources import FILE_TYPES, check_source
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import CompressionPlan, Routing
from optimum_moe.recovery_settings import Recovery
from optimum_moe.settings import check_fields, check_seed, choose_one, plain, unknown_field
from optimum_moe.stages import BlockCost, Stage, registered_stages
from optimum_moe.statistics import NO_SAMPLE


@dataclass(frozen=True)
class Recipe:
    """A recipe, which is also saved with the compressed checkpoint.

    Args:
        stages: The stages, in order.
        calibration: Settings of `CalibrationConfig`; the source is left out if the user gives it.
        seed: Seed of the run.
        recover: The training after the last stage; None for none.

    Raises:
        ValueError: If there is no stage, one cannot follow the one before it, or the training cannot follow them.
    """

    stages: tuple[Stage, ...]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    recover: Recovery | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("A recipe needs a stage, for example MSMoE(num_experts=8). Got an empty list.")
        for before, stage in zip((None, *self.stages), self.stages, strict=False):
            stage.check_order(before)
        if self.recover is not None and self.dropping is not None:
            compared = {name: getattr(self.recover, name) for name in ("hidden_weight", "reconstruct")}
            for name, value in compared.items():
                if value:
                    raise ValueError(
                        f"{name}={value:g} compares with the original layer by layer, and {self.dropping.name} drops "
                        "some. Leave it out of the training."
                    )

    @property
    def name(self) -> str:
        """Names of the stages, joined by plus signs."""
        return " + ".join(stage.name for stage in self.stages)

    @property
    def dropping(self) -> Stage | None:
        """The stage that drops layers, which is the first one; None if there is none."""
        return self.stages[0] if self.stages[0].drops_layers else None

    @property
    def after_dropping(self) -> Recipe | None:
        """The recipe for the blocks of the layers that remain; None if they are not changed."""
        if self.dropping is None:
            return self
        return dataclasses.replace(self, stages=self.stages[1:]) if len(self.stages) > 1 else None

    @property
    def observed_first(self) -> Recipe:
        """The part of the recipe that reads statistics of the original."""
        return self if self.dropping is None else dataclasses.replace(self, stages=self.stages[:1])

    @property
    def needs(self) -> frozenset[str]:
        """Names of the observations that any stage reads."""
        return frozenset().union(*(stage.needs for stage in self.stages))

    @property
    def gradient_draws(self) -> int:
        """Number of backward passes over the calibration data: one if a stage needs gradients, else none.

        Four passes hardly improved the results, at four times the cost in time and memory.
        """
        return int("gradients" in self.needs)

    @property
    def sample_size(self) -> int:
        """Number of tokens to sample at each block."""
        sizes = [stage.sample_size for stage in self.stages if "sample" in stage.needs]
        return max(sizes, default=self.stages[0].sample_size)

    @property
    def largest_sample(self) -> int:
        """Number of tokens that the sample grows to where as many are observed and memory allows it."""
        sizes = [stage.largest_sample for stage in self.stages if "sample" in stage.needs]
        return max(sizes, default=self.sample_size)

    @property
    def is_adaptive(self) -> bool:
        """Whether all blocks must be observed before the first one is decided."""
        return any(stage.is_adaptive for stage in self.stages)

    @property
    def reads_experts(self) -> bool:
        """Whether the decision on a block reads the weights of its experts."""
        return len(self.stages) > 1 or self.stages[0].reads_experts

    @property
    def knows_size(self) -> bool:
        """Whether `costs` is exact; otherwise it gives an upper bound."""
        return all(stage.knows_size for stage in self.stages) and not self._prunes_rows

    @property
    def _prunes_rows(self) -> bool:
        return self.recover is not None and self.recover.final_density is not None

    @property
    def routing(self) -> Routing:
        """How the router reaches the remaining experts."""
        return next((stage.routing for stage in self.stages if stage.routing is not None), "map")

    def settings(self) -> tuple[Mapping[str, Any], ...]:
        """Name and settings of each stage."""
        return tuple(stage.settings() for stage in self.stages)

    def costs(self, model: ModelInfo) -> Mapping[str, BlockCost]:
        """Cost of the routed experts of each block after the last stage, from config and headers.

        Raises:
            ValueError: If a setting is impossible for the model as it enters its stage.
        """
        costs: Mapping[str, BlockCost] = {block.name: BlockCost.of(block) for block in model.blocks}
        entering = model
        for stage in self.stages:
            if stage.drops_layers:
                # What is left of the model has been checked, and is what enters here.
                continue
            stage.check(entering)
            costs = stage.costs(entering, costs)
            saved = sum(costs[block.name].saved_bytes(block) for block in model.blocks)
            counts = {name: cost.experts for name, cost in costs.items()}
            widths = {name: cost.width for name, cost in costs.items()}
            entering = model.with_experts(counts, widths, removed_bytes=saved)
        if self._prunes_rows and all(cost.stock for cost in costs.values()):
            raise ValueError(
                f"final_density prunes sparse rows as it trains, and the experts of {self.name} stay whole matrices. "
                "Leave it out of the training, or add the stage low-rank-sparse with density=1."
            )
        return costs

    def as_used(self, plan: CompressionPlan) -> Recipe:
        """The recipe to save with a checkpoint: with the calibration and seed of its plan, without local paths.

        The calibration may differ from the recipe's, if it came from a `CalibrationConfig` or earlier statistics.
        """
        calibration = {key: value for key, value in self.calibration.items() if key != "source"}
        if "source" in self.calibration:
            calibration["source"] = _without_folders(self.calibration["source"])
        record = plan.calibration or {}
        sampled = (*_SAMPLED, "reservoir_tokens") if "sample" in self.needs else _SAMPLED
        calibration |= {name: record[name] for name in sampled if record.get(name) is not None}
        if record.get("sequence_length") is not None and record.get("max_tokens") is None:
            # None (no limit) differs from the default, so it must be written.
            calibration["max_tokens"] = None
        recover = None if self.recover is None else _published(self.recover)
        return dataclasses.replace(self, calibration=calibration, seed=plan.seed, recover=recover)

    def to_yaml(self) -> str:
        """The recipe as a YAML document with only the settings that differ from their defaults."""
        described = [dict(stage.described()) for stage in self.stages]
        record: dict[str, Any] = described[0] if len(described) == 1 else {"stages": described}
        if self.calibration:
            record["calibration"] = dict(self.calibration)
        if self.recover is not None:
            record["recover"] = self.recover.described()
        if self.seed is not None:
            record["seed"] = self.seed
        return yaml.safe_dump(record, sort_keys=False)


_SAMPLED = ("num_samples", "max_tokens", "sequence_length", "batch_size", "packing", "seed")
"""Fields of `CalibrationConfig` that the record of calibration data contains."""


def _without_folders(source: Any) -> Any:
    """A source of calibration data, or a mixture, with file names instead of paths."""
    if isinstance(source, Mapping):
        return {_without_folders(key): _without_folders(value) for key, value in source.items()}
    if isinstance(source, list | tuple):
        return [_without_folders(part) for part in source]
    is_file = isinstance(source, str | Path) and Path(source).suffix.lower() in FILE_TYPES
    return Path(source).name if is_file else source


def _published(recover: Recovery) -> Recovery:
    """A recovery whose text is named without folders, or left out where it has no name."""
    return dataclasses.replace(recover, data=_named(recover.data), held_out=_named(recover.held_out))


def _named(data: Any) -> Any:
    """Text data as a recipe writes them; None for text itself, model inputs and the like, which have no name."""
    if isinstance(data, CalibrationConfig):
        data = {f.name: value for f in dataclasses.fields(data) if (value := getattr(data, f.name)) != f.default}
    if CalibrationConfig.is_fields(data):
        return {**data, "source": _without_folders(data["source"])} if _has_name(data["source"]) else None
    return _without_folders(data) if _has_name(data) else None


def _has_name(source: Any) -> bool:
    """Whether a source is a file, a data set, or a mixture of them by weight or domain."""
    if isinstance(source, Mapping):
        return all(_has_name(part) for part in (*source, *source.values()))
    if isinstance(source, list | tuple):
        pairs = bool(source) and all(isinstance(part, list | tuple) and len(part) == 2 for part in source)
        return pairs and all(_has_name(part) and isinstance(weight, int | float) for part, weight in source)
    return isinstance(source, str | Path | int | float)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("optimum_moe") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a preset or a YAML file.

    Args:
        name: Name of a preset (`"m-smoe"`), or path of a `.yaml` file.
        overrides: Settings that replace the recipe's. Each goes to the first stage that has it, or to the one that it
            names (`"low-rank-sparse.rank"`); a size setting replaces the other size settings of its stage. Those of
            the training afterwards are named `"recover.train"` and so on; `"recover"` replaces all of them.

    Raises:
        ValueError: If there is no such preset or file, or it has an unknown field.
    """
    return parse_recipe(recipe_record(name), overrides)


def recipe_record(name: str | Path) -> Mapping[str, Any]:
    """The unchecked content of a preset or a YAML file.

    Raises:
        ValueError: If there is no such preset or file, or it is not a YAML mapping.
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
        raise ValueError(f"Recipe {name} is not valid YAML: {error}. Correct it.") from error
    if not isinstance(record, Mapping):
        raise ValueError(
            f"Recipe {name} must be a mapping with a field 'stage' or 'stages', got {type(record).__name__}."
        )
    return record


def parse_recipe(record: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from the mapping in its YAML; see `load_recipe`."""
    calibration, recover = record.get("calibration") or {}, record.get("recover")
    seed = plain(record.get("seed"))
    if seed is not None:
        check_seed(seed)
    if not isinstance(calibration, Mapping):
        raise ValueError(
            f"The recipe's field 'calibration' must be a mapping, got {calibration!r}. Write the path as its 'source'."
        )
    written = _written_stages(_stage_fields(record))
    given = dict(overrides or {})
    recover = given.pop("recover", recover)
    trained = {name.removeprefix(_TRAINING): given.pop(name) for name in list(given) if name.startswith(_TRAINING)}
    if trained and isinstance(recover, Mapping | None):
        recover = {**(recover or {}), **trained}
    _override(written, given)
    training = None if recover is None else Recovery.coerce(recover)
    return Recipe(tuple(_stage(settings) for settings in written), calibration, seed, training)


_BESIDE_STAGES = ("calibration", "recover", "seed")
"""Fields of a recipe that belong to no stage."""
_TRAINING = "recover."
"""What settings of the training begin with, among those that replace a recipe's."""


def _stage_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _BESIDE_STAGES}


def _written_stages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of each stage of a recipe, which has a list of stages or a single flat one."""
    if "stages" not in record:
        return [record]
    stages = record.pop("stages")
    if record:
        raise ValueError(
            f"A recipe with 'stages' has no other settings, got {', '.join(map(repr, record))}. Move them to the stage "
            "that they belong to."
        )
    if not isinstance(stages, list | tuple) or not stages or not all(isinstance(stage, Mapping) for stage in stages):
        raise ValueError(
            f"The recipe's field 'stages' must be a list of mappings with a field 'stage', got {stages!r}."
        )
    return [dict(stage) for stage in stages]


def _stage_class(settings: Mapping[str, Any]) -> type[Stage]:
    known = registered_stages()
    if "stage" not in settings:
        raise ValueError(f"A recipe needs a field 'stage', one of {', '.join(sorted(known))}.")
    name = str(settings["stage"])
    choose_one("stage", name, known)
    return known[name]


def size_fields(name: str | Path) -> frozenset[str]:
    """Size settings of the stages of a preset or YAML file; empty if a stage is unknown."""
    known = registered_stages()
    stages = [str(settings.get("stage")) for settings in _written_stages(_stage_fields(recipe_record(name)))]
    return frozenset(size for stage in stages if stage in known for size in known[stage].size_fields)


def share_field(name: str | Path) -> str | None:
    """The setting of a preset or YAML file that says which share remains, of the first stage that has one; else None.

    Raises:
        ValueError: If there is no such preset or file, or a stage is unknown.
    """
    stages = [_stage_class(settings) for settings in _written_stages(_stage_fields(recipe_record(name)))]
    return next((size for stage in stages for size in stage.size_fields if size in stage.share_fields), None)


def _settings_of(stage: type[Stage]) -> list[str]:
    return [f.name for f in dataclasses.fields(stage) if f.init]


def _stage(settings: dict[str, Any]) -> Stage:
    stage = _stage_class(settings)
    given = {name: value for name, value in settings.items() if name != "stage"}
    check_fields(given, _settings_of(stage))
    return stage(**given)


def _override(written: list[dict[str, Any]], overrides: Mapping[str, Any]) -> None:
    """Replace settings in the stages that they belong to; a size replaces the other sizes of its stage."""
    found = [(_stage_with(written, name), name.rpartition(".")[2], value) for name, value in overrides.items()]
    for settings, setting, _ in found:
        sizes = _stage_class(settings).size_fields
        if setting in sizes:
            for other in sizes:
                settings.pop(other, None)
    for settings, setting, value in found:
        settings[setting] = value


def _stage_with(written: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The settings of the first stage that has the setting `name`, or of the stage named before a dot in it."""
    wanted, _, setting = name.rpartition(".")
    candidates = [settings for settings in written if wanted in ("", settings.get("stage"))]
    if not candidates:
        names = ", ".join(str(settings.get("stage")) for settings in written)
        raise ValueError(f"{name!r} names the stage {wanted!r}, but the recipe has {names}. Name one of those.")
    for settings in candidates:
        if setting in _settings_of(_stage_class(settings)):
            return settings
    raise unknown_field(setting, [known for settings in candidates for known in _settings_of(_stage_class(settings))])


def coerce_recipe(recipe: Any) -> Recipe:
    """A recipe from a stage, a list of stages, the name of a preset or a path.

    Raises:
        ValueError: If the recipe is none of these.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Stage):
        return Recipe((recipe,))
    if isinstance(recipe, (str, Path)):
        return load_recipe(recipe)
    if isinstance(recipe, Sequence) and all(isinstance(stage, Stage) for stage in recipe):
        return Recipe(tuple(recipe))
    got = type(recipe).__name__
    if isinstance(recipe, Sequence):
        got = f"[{', '.join(getattr(stage, 'name', type(stage).__name__) for stage in recipe)}]"
    raise ValueError(
        f"recipe={got} is not a recipe. Pass a stage such as MSMoE(num_experts=8), a list of stages, a preset, or "
        "the path of a YAML recipe."
    )


def run_seed(recipe: Recipe, seed: Any) -> int:
    """The user's seed, else the recipe's, else 0.

    Raises:
        ValueError: If it is not an integer of at least 0, or too large.
    """
    seed = next((s for s in (plain(seed), recipe.seed) if s is not None), 0)
    check_seed(seed)
    return int(seed)


def calibration_config(recipe: Recipe, calibration: Any, seed: Any = None) -> CalibrationConfig | None:
    """The calibration config of a run: the user's settings, completed by the recipe and the needs of its stages.

    The seed is that of the user's config, of the user's run, of the recipe's calibration, of the recipe, or 0, in this
    order.

    Args:
        recipe: The recipe.
        calibration: The user's source or config, None for the recipe's.
        seed: The user's seed of the run.

    Returns:
        The config, None if there is no source.

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
    if config.reservoir_tokens == 0 and {"sample", "residual_stream"} & recipe.needs:
        raise ValueError(NO_SAMPLE)
    return config


def recovery_on(recovery: Recovery, calibration: CalibrationConfig | None) -> Recovery:
    """The training of a recipe with its text: its own, or that of the calibration.

    Raises:
        ValueError: If there is none, or the calibration reads a stream.
    """
    if recovery.data is not None:
        return recovery
    if calibration is None:
        raise ValueError(
            "The recipe trains the compressed model, and there is no text to train on. Pass calibration='corpus.txt', "
            "or recover={'data': 'corpus.txt'} (--set recover.data=corpus.txt)."
        )
    if isinstance(calibration.source, Iterator):
        raise ValueError(
            "The training reads the calibration data again, and a stream can be read once. Pass a list of it, or other "
            "text as data= of the training."
        )
    text = {"source": calibration.source, "text_column": calibration.text_column}
    return dataclasses.replace(recovery, data=text)
