"""Many recipes at many sizes on one calibration: which one keeps the most of this model.

Every trial is measured on held-out text against the original. Results are kept as they come, so that the same call
continues an interrupted sweep.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.logging import tqdm

from optimum_moe.calibration import CalibrationConfig
from optimum_moe.checkpoint.destination import owned, remove, written_beside
from optimum_moe.checkpoint.identity import identity
from optimum_moe.compressor import MoECompressor
from optimum_moe.evaluation import EvaluationResult, evaluate_many
from optimum_moe.ranks import current_ranks
from optimum_moe.recipe import Recipe, load_recipe, share_field, size_fields
from optimum_moe.reporting.pareto import Dot, draw_pareto
from optimum_moe.reporting.pictures import check_drawing
from optimum_moe.settings import check_count, percent
from optimum_moe.stages.counts import check_share, parse_size
from optimum_moe.statistics import Statistics

ORIGINAL = "original"
_TASKS = ("perplexity", "agreement")


@dataclass(frozen=True)
class Trial:
    """One recipe at one size.

    Args:
        recipe: What it is called: a preset or YAML file, with other settings as a YAML mapping behind it.
        size: Share of the experts (`"50%"`) or size of the checkpoint (`"16GB"`), as it was given.
    """

    recipe: str
    size: str

    @property
    def name(self) -> str:
        """Recipe and size, as tables show them."""
        return f"{self.recipe} at {self.size}"

    def load(self) -> Recipe:
        """Its recipe.

        Raises:
            ValueError: If there is none, or it takes no size of this kind.
        """
        name, settings = split_recipe(self.recipe)
        taken = size_fields(name)
        if self.size.endswith("%"):
            field = share_field(name)
        else:
            field = "target_size" if "target_size" in taken else None
        if field is None:
            raise ValueError(
                f"The recipe {name!r} takes {', '.join(sorted(taken))}, not a size such as {self.size}. Leave it out, "
                "or give it in a sweep of its own."
            )
        return load_recipe(name, {field: self.size, **settings})


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Args:
        trial: The trial.
        bytes: Of the weights on disk; 0 for a refused one.
        plain: Whether stock transformers can load it.
        seconds: That compressing took, without calibration, and training afterwards, if the recipe says so.
        result: Its scores; None for a refused one.
        refused: Why it was refused; empty if it was not.
    """

    trial: Trial
    bytes: int
    plain: bool
    seconds: float
    result: EvaluationResult | None
    refused: str = ""

    def score(self, name: str) -> float:
        """One of its scores."""
        assert self.result is not None
        return self.result.scores[name].value

    def to_dict(self) -> dict[str, Any]:
        """What a report shows of it, as JSON values: recipe, size, bytes, KL with its interval, perplexity."""
        scores = {} if self.result is None else self.result.scores
        record: dict[str, Any] = {"recipe": self.trial.recipe, "size": self.trial.size, "bytes": self.bytes}
        record |= {"plain": self.plain, "refused": self.refused}
        if "kl" in scores:
            record |= {"kl": scores["kl"].value, "low": scores["kl"].low, "high": scores["kl"].high}
        if "perplexity" in scores:
            record["perplexity"] = scores["perplexity"].value
        return record


@dataclass(frozen=True)
class Sweep:
    """All outcomes; `str()` gives a table.

    Args:
        original: The original model.
        outcomes: By trial, in the order in which they were asked for.
    """

    original: Outcome
    outcomes: tuple[Outcome, ...]

    @classmethod
    def load(cls, output_dir: str | Path) -> Sweep:
        """All outcomes that are in the folder of a sweep, the largest checkpoints first.

        Raises:
            ValueError: If the folder holds no sweep, or one without any result.
        """
        folder = Path(output_dir).expanduser()
        if not (folder / "sweep.json").is_file():
            raise ValueError(f"{folder} holds no sweep. Give the --output of optimum-cli moe sweep.")
        files = (file for file in (folder / "trials").glob("*.json") if not file.name.endswith(".scores.json"))
        found = sorted(map(_read_outcome, files), key=lambda o: (-o.bytes, o.trial.recipe, o.trial.size))
        original = next((outcome for outcome in found if outcome.trial.recipe == ORIGINAL), None)
        if original is None:
            raise ValueError(f"The sweep in {folder} has no result yet. Let it go on first.")
        return cls(original, tuple(outcome for outcome in found if outcome is not original))

    def best(self, size: str) -> Outcome:
        """The outcome with the least KL at a size.

        Raises:
            ValueError: If every trial of that size was refused.
        """
        found = [o for o in self.outcomes if o.trial.size == size and o.result is not None]
        if not found:
            raise ValueError(f"No recipe could be tried at {size}. Choose a larger size.")
        return min(found, key=lambda outcome: outcome.score("kl"))

    def pareto(self) -> list[Outcome]:
        """The outcomes that no other one beats in both bytes and KL, by bytes."""
        found = sorted((o for o in self.outcomes if o.result is not None), key=lambda o: (o.bytes, o.score("kl")))
        kept: list[Outcome] = []
        for outcome in found:
            if not kept or outcome.score("kl") < kept[-1].score("kl"):
                kept.append(outcome)
        return kept

    def __str__(self) -> str:
        front = self.pareto()
        rows = [
            "| size | recipe | checkpoint | KL | perplexity | top-1 | plain | seconds | |",
            "|---" * 9 + "|",
        ]
        for outcome in (self.original, *self.outcomes):
            if outcome.result is None:
                rows.append(
                    f"| {outcome.trial.size} | {outcome.trial.recipe} | refused: {outcome.refused} | | | | | | |"
                )
                continue
            scores = outcome.result.scores
            kl, top = (scores[name].value if name in scores else None for name in ("kl", "top1_agreement"))
            cells = [
                outcome.trial.size,
                outcome.trial.recipe,
                f"{outcome.bytes / 1e6:,.2f} MB",
                "" if kl is None else f"{kl:.4f}",
                f"{scores['perplexity'].value:.3f}",
                "" if top is None else f"{top:.3f}",
                "yes" if outcome.plain else "no",
                f"{outcome.seconds:.0f}",
                "front" if outcome in front else "",
            ]
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows)


def split_recipe(text: str) -> tuple[str, dict[str, Any]]:
    """Name and other settings of `"byte-budget {runs_in: transformers}"`.

    Raises:
        ValueError: If the settings are no YAML mapping.
    """
    name, brace, rest = text.partition("{")
    if not brace:
        return text.strip(), {}
    try:
        settings = yaml.safe_load(brace + rest)
    except yaml.YAMLError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"The recipe {text!r} has no YAML mapping behind its name. Write it as "
            "'byte-budget {runs_in: transformers}'."
        )
    return name.strip(), settings


def sweep(
    model: str | Path,
    recipes: Sequence[str],
    sizes: Sequence[str | float],
    calibration: Any,
    text: Any,
    output_dir: str | Path,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    evaluation: Mapping[str, Any] | None = None,
    at_once: int = 4,
    progress: bool = True,
    **arguments: Any,
) -> Sweep:
    """Compress a model by several recipes at several sizes, and measure each result.

    Args:
        model: Hub id or folder of a decoder-only model.
        recipes: Presets or YAML files, each with other settings as a YAML mapping behind it where wanted:
            `"byte-budget {runs_in: transformers}"`, `"reap {recover: {max_tokens: 300000}}"`.
        sizes: Shares of the experts' bytes in (0, 1] or as `"50%"`, and sizes of the checkpoint such as `"16GB"`.
        calibration: As in `MoECompressor.from_pretrained`; observed once for all trials.
        text: Held-out text, as in `evaluate_many`; checked for overlap with the calibration data.
        output_dir: Folder of results, statistics, table and plot; the same call continues what is there.
        seed: Seed of the calibration sample and of all random choices.
        tokenizer: As in `MoECompressor.from_pretrained`.
        evaluation: Settings of `evaluate_many`; by default the tasks perplexity and agreement.
        at_once: Compressed models in memory at a time; the original runs once for each such batch.
        progress: Show progress bars.
        arguments: Further ones for `MoECompressor.from_pretrained`.

    Returns:
        All outcomes. A trial that is impossible for the model, such as fewer experts than a token selects, is among
        them with its reason.

    Raises:
        ValueError: If a recipe or size is unknown, matplotlib is missing, the folder holds another sweep, or several
            processes were started.
    """
    trials = [Trial(recipe, size) for size in map(_spelled, sizes) for recipe in recipes]
    if not trials:
        raise ValueError("A sweep needs at least one recipe and one size. Pass recipes and sizes.")
    current_ranks().check_single("A sweep")
    if len(set(trials)) < len(trials):
        raise ValueError(f"A recipe or size is given twice in {list(recipes)} and {list(sizes)}. Give each once.")
    check_drawing()
    check_count("at_once", at_once, 1)
    settings = {"tasks": list(_TASKS), **(evaluation or {})}
    lacking = [task for task in _TASKS if task not in settings["tasks"]]
    if lacking:
        raise ValueError(
            f"A sweep compares KL and perplexity, but the tasks {settings['tasks']} lack {', '.join(lacking)}. Add "
            f"{'it' if len(lacking) == 1 else 'them'} to the tasks."
        )
    loaded = {trial: trial.load() for trial in trials}
    given = {"seed": seed, "tokenizer": tokenizer, "progress": False, **arguments}
    refused: dict[Trial, str] = {}
    compressors: dict[Trial, MoECompressor] = {}
    for trial, recipe in loaded.items():
        try:
            compressors[trial] = MoECompressor.from_pretrained(model, recipe, calibration, **given)
        except ValueError as error:
            refused[trial] = " ".join(str(error).split())
    if not compressors:
        raise ValueError(f"No trial is possible for this model. {trials[0].name}: {refused[trials[0]]}")
    folder = Path(output_dir).expanduser()
    source = next(iter(compressors.values())).source
    record: dict[str, Any] = {"model": dict(identity(source)), "seed": seed}
    record |= {"calibration": _fingerprint(calibration), "text": _fingerprint(text)}
    record["evaluation"] = {name: settings[name] for name in sorted(settings)}
    is_new = _begin(folder, json.loads(json.dumps(record, default=str)))
    with owned(folder, overwrite=True):
        work = _Work(folder, str(model), text, calibration, settings, given, at_once, progress)
        try:
            original = work.original(next(iter(compressors.values())))
        except BaseException:
            # Corrected settings may begin in the same folder.
            if is_new:
                remove(folder)
            raise
        wanted = [trial for trial in trials if trial in compressors]
        statistics = work.statistics({t: loaded[t] for t in wanted}) if work.missing(wanted) else None
        work.measure({trial: compressors.pop(trial) for trial in work.missing(wanted)}, statistics)
        outcomes = [
            Outcome(trial, 0, False, 0.0, None, refused[trial]) if trial in refused else work.outcome(trial)
            for trial in trials
        ]
        found = Sweep(original, tuple(outcomes))
        (folder / "sweep.md").write_text(f"{found}\n", encoding="utf-8")
        dots = [Dot(o.trial.recipe, o.bytes, o.score("kl")) for o in found.outcomes if o.result is not None]
        draw_pareto(dots, [(o.bytes, o.score("kl")) for o in found.pareto()], folder / "pareto")
    return found


def _spelled(size: str | float) -> str:
    """A share as per cent, a size as it was given.

    Raises:
        ValueError: If it is neither.
    """
    value = percent(size)
    try:
        value = float(value)
    except ValueError:
        parse_size(value, "sizes")
        return str(value).strip()
    check_share("sizes", value)
    return f"{100 * value:g}%"


def _fingerprint(data: Any) -> str:
    """Tells text data and their settings from others: a hash of what was given, and of the files that it names."""
    found = hashlib.sha256(repr(data).encode())
    leaves = [data.source if isinstance(data, CalibrationConfig) else data]
    while leaves:
        leaf = leaves.pop()
        if isinstance(leaf, list | tuple):
            leaves += leaf
        elif isinstance(leaf, Mapping):
            leaves += [*leaf, *leaf.values()]
        elif isinstance(leaf, str | Path) and len(str(leaf)) < 4096 and Path(leaf).is_file():
            found.update(Path(leaf).read_bytes())
    return found.hexdigest()[:16]


def _begin(folder: Path, record: Mapping[str, Any]) -> bool:
    """Leave in a new folder what is measured there, and tell whether it is new.

    Raises:
        ValueError: If it holds something else.
    """
    file = folder / "sweep.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        odd = sorted(name for name in {*before, *record} if before.get(name) != record.get(name))
        if odd:
            raise ValueError(
                f"{folder} holds a sweep with another {', '.join(odd)}. Choose another folder, or remove this one."
            )
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds no sweep, but is not empty. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, record)
    return True


def _read_outcome(file: Path) -> Outcome:
    """What was kept of a trial in its file, whose scores are in another one beside it."""
    record = json.loads(file.read_text(encoding="utf-8"))
    result = None if record["result"] is None else EvaluationResult.load(file.parent / record["result"])
    trial = Trial(record["recipe"], record["size"])
    return Outcome(trial, record["bytes"], record["plain"], record["seconds"], result, record["refused"])


def _write(file: Path, record: Mapping[str, Any]) -> None:
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


@dataclass(frozen=True)
class _Work:
    """What the trials of a sweep have in common."""

    folder: Path
    model: str
    text: Any
    calibration: Any
    evaluation: Mapping[str, Any]
    given: Mapping[str, Any]
    at_once: int
    progress: bool

    def _file(self, trial: Trial) -> Path:
        readable = re.sub(r"[^A-Za-z0-9.%-]+", "_", trial.name)
        return self.folder / "trials" / f"{readable}.{hashlib.sha256(trial.name.encode()).hexdigest()[:8]}.json"

    def missing(self, trials: Sequence[Trial]) -> list[Trial]:
        """Trials that were not measured yet."""
        return [trial for trial in trials if not self._file(trial).is_file()]

    def outcome(self, trial: Trial) -> Outcome:
        """What was kept of a trial."""
        return _read_outcome(self._file(trial))

    def keep(self, outcome: Outcome) -> None:
        """Write what became of a trial; the scores first."""
        file, scores = self._file(outcome.trial), None
        file.parent.mkdir(exist_ok=True)
        if outcome.result is not None:
            scores = f"{file.stem}.scores.json"
            outcome.result.save(file.parent / scores)
        record = {"recipe": outcome.trial.recipe, "size": outcome.trial.size, "bytes": outcome.bytes}
        record |= {"plain": outcome.plain, "seconds": round(outcome.seconds, 2), "refused": outcome.refused}
        _write(file, record | {"result": scores})

    def original(self, compressor: MoECompressor) -> Outcome:
        """The original's own row, which comes first: evaluation refuses what it cannot measure."""
        trial = Trial(ORIGINAL, "100%")
        if self.missing([trial]):
            result = self._evaluated({ORIGINAL: self.model}, None)[ORIGINAL]
            self.keep(Outcome(trial, compressor.preview().before.bytes, True, 0.0, result))
        return self.outcome(trial)

    def _evaluated(self, models: Mapping[str, Any], reference: str | None) -> dict[str, EvaluationResult]:
        settings = dict(self.evaluation)
        if reference is None:
            settings["tasks"] = [task for task in settings["tasks"] if task != "agreement"]
        return evaluate_many(
            models,
            self.text,
            reference=reference,
            tokenizer=self.given["tokenizer"] or self.model,
            calibration=self.calibration,
            progress=self.progress,
            **settings,
        )

    def statistics(self, recipes: Mapping[Trial, Recipe]) -> Statistics | None:
        """Observed once, with a backward pass if any recipe reads gradients; None if no recipe reads anything."""
        kept = self.folder / "statistics"
        if not kept.is_dir():
            most = max(recipes.values(), key=lambda recipe: ("gradients" in recipe.needs, recipe.largest_sample))
            if not any(recipe.needs for recipe in recipes.values()):
                return None
            needs = frozenset().union(*(recipe.needs for recipe in recipes.values())) - {"gradients"}
            given = {**self.given, "progress": self.progress}
            observed = MoECompressor.from_pretrained(self.model, most, self.calibration, **given).calibrate(needs)
            with owned(kept), written_beside(kept) as beside:
                observed.save_pretrained(beside)
        return Statistics.from_pretrained(kept)

    def measure(self, compressors: dict[Trial, MoECompressor], statistics: Statistics | None) -> None:
        """Compress and evaluate, some models at a time; compressors are taken out with their models."""
        trials = list(compressors)
        with tqdm(total=len(trials), desc="Trials", disable=not self.progress) as bar:
            for start in range(0, len(trials), self.at_once):
                models, made = {}, {}
                for trial in trials[start : start + self.at_once]:
                    began, compressor = time.perf_counter(), compressors.pop(trial)
                    try:
                        models[trial.name] = compressor.apply(statistics if compressor.recipe.needs else None)
                    except ValueError as error:
                        self.keep(Outcome(trial, 0, False, 0.0, None, " ".join(str(error).split())))
                        continue
                    after = compressor.measured()
                    made[trial] = Outcome(trial, after.after.bytes, after.plain, time.perf_counter() - began, None)
                results = self._evaluated(models, self.model) if models else {}
                for trial, outcome in made.items():
                    self.keep(replace(outcome, result=results[trial.name]))
                bar.update(len(trials[start : start + self.at_once]))


def write_best(
    found: Sweep, size: str | float, model: str | Path, sweep_dir: str | Path, output_dir: str | Path, **arguments: Any
) -> Path:
    """Compress once more by the recipe that kept the most at a size, and save the checkpoint.

    Args:
        found: Result of `sweep`.
        size: As it was given there.
        model: The same model.
        sweep_dir: Folder of the sweep, whose statistics are used.
        output_dir: Folder of the checkpoint.
        arguments: Further ones for `MoECompressor.from_pretrained`, as for the sweep; a recipe that trains afterwards
            needs `calibration`.

    Raises:
        ValueError: If every trial of that size was refused, or the folder cannot be written.
    """
    recipe = found.best(_spelled(size)).trial.load()
    kept = Path(sweep_dir).expanduser() / "statistics"
    compressor = MoECompressor.from_pretrained(model, recipe, **{"output_dir": output_dir, **arguments})
    statistics = Statistics.from_pretrained(kept) if recipe.needs else None
    return Path(compressor.apply(statistics))
