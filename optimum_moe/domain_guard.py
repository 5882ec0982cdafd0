"""A guard on what a compressed model may lose in its worst domain.

Calibration data decide what remains of a model: calibrated on prose alone, it may forget how to write code, and the
mean loss hardly tells. `compress_guarded` measures every domain, and refuses a model whose worst domain lost too much
more than the mean, or calibrates again with more text of the domains that lost the most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from optimum_moe.calibration import CalibrationConfig
from optimum_moe.calibration.documents import TextSource
from optimum_moe.calibration.sources import by_domain, read_sources
from optimum_moe.checkpoint.compatibility import refuse_original
from optimum_moe.checkpoint.destination import check_destination
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.compressor import MoECompressor
from optimum_moe.engine.streaming import choose_streaming
from optimum_moe.evaluation import EvaluationResult, evaluate
from optimum_moe.evaluation.disjoint import check_disjoint
from optimum_moe.evaluation.domains import LOSS, WorstDomain
from optimum_moe.evaluation.heldout import texts_of
from optimum_moe.ranks import current_ranks
from optimum_moe.recipe import calibration_config, coerce_recipe
from optimum_moe.report import write_report
from optimum_moe.settings import check_count, choose_one

_HOLDS_TWO = "A guard holds the original and the compressed model in memory"
_AFTERWARDS = "compress without a guard and run evaluate on the result."


@dataclass(frozen=True)
class Guard:
    """How much more the worst domain may lose than the mean, and on which text that is measured.

    Args:
        text: Held-out text of at least two domains: `{domain: path}`, or rows with a `"domain"`.
        worst: Largest KL of a domain to the original, over the mean of all domains; more than 1 and less than their
            number. Default 2.
        repair: Other text of the same domains. A model that lost too much in one is calibrated again, as many tokens,
            with more text of the domains that lost more than the mean. None (default) to refuse at once.
        rounds: Most repetitions with `repair`, default 3.
        evaluation: Settings of `evaluate`; by default perplexity, agreement and generation on 8,192 tokens a domain.

    Raises:
        ValueError: If a number is out of range.
    """

    text: Any
    worst: float = 2.0
    repair: Any = None
    rounds: int = 3
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 < self.worst < float("inf"):
            raise ValueError(f"worst={self.worst} must be more than 1: the worst domain never lost less than the mean.")
        check_count("rounds", self.rounds, 1)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its evaluation."""
        return {"max_tokens": 8192, "tasks": ("perplexity", "agreement", "generation"), **self.evaluation}

    def check_domains(self) -> None:
        """Check the domains of its text.

        Raises:
            ValueError: If they are too few, or no model can exceed the limit, or the repair text lacks some.
        """
        config = CalibrationConfig.coerce(self.text)
        found = list(by_domain(config.source, config.text_column))
        if len(found) < 2:
            said = f"only {found[0]!r}" if found else "no domain"
            raise ValueError(
                f"A guard compares domains, and its text names {said}. Give files as {{domain: path}}, or rows with a "
                '"domain".'
            )
        if self.worst >= len(found):
            raise ValueError(
                f"worst={self.worst:g} can never be exceeded with {len(found)} domains, of which the worst loses at "
                f"most {len(found)} times the mean. Lower it, or name more domains."
            )
        if self.repair is not None:
            known = self.repair_sources()
            lacking = [domain for domain in found if domain not in known]
            if lacking:
                raise ValueError(
                    f"repair= has no text of {', '.join(lacking)}, but of {', '.join(known) or 'no domain'}. Add it, "
                    "so that calibration can be weighted towards it."
                )

    def repair_sources(self) -> dict[str, list[TextSource]]:
        """The text of each domain that a repair can add."""
        config = CalibrationConfig.coerce(self.repair)
        return by_domain(config.source, config.text_column)


@dataclass(frozen=True)
class Attempt:
    """One compressed model and what it lost.

    Args:
        losses: KL of each domain to the original, in nats a token.
        weights: Of the domains whose text a repair added to the calibration data, which weigh 1; empty at first.
    """

    losses: Mapping[str, float]
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> WorstDomain:
        """The domain that lost the most."""
        return WorstDomain.among(self.losses)


@dataclass(frozen=True)
class Guarded:
    """A compressed model that a guard let pass.

    Args:
        compressor: It holds model and plan.
        result: Scores, by domain too.
        attempts: All that were made, the last one passed.
        calibration: The data that it was calibrated on, which `recover` may train on too.
        folder: Its checkpoint, None if none was written.
    """

    compressor: MoECompressor
    result: EvaluationResult
    attempts: tuple[Attempt, ...]
    calibration: CalibrationConfig | None
    folder: Path | None = None


def compress_guarded(
    model: str | Path,
    recipe: Any,
    calibration: Any,
    guard: Guard,
    *,
    engine: str = "auto",
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    statistics: Any = None,
    **arguments: Any,
) -> Guarded:
    """Compress a model, unless its worst domain lost more than a guard allows.

    Args:
        model: Hub id or folder of a decoder-only model; it is in memory twice.
        recipe: As in `MoECompressor.from_pretrained`; of one that trains afterwards the trained model is measured.
        calibration: As there.
        guard: The limit, and the text that it is measured on, which must not overlap with the calibration data.
        engine: `"auto"` (default) or `"memory"`: in memory, but `"auto"` refuses a model that exceeds the free memory.
        output_dir: Folder of the checkpoint, with the scores in its report and card; None to keep the model in memory.
        overwrite: Allow `output_dir` to be replaced.
        statistics: Statistics of an earlier `calibrate()`, for the first attempt.
        arguments: Further ones for `MoECompressor.from_pretrained`.

    Returns:
        The model, its scores, and all attempts.

    Raises:
        ValueError: If the worst domain lost too much, in all rounds of a repair too; then nothing is written. Also if a
            setting is invalid, the model has to be streamed, or the guard's text is calibrated on, before any weight is
            read.
    """
    current_ranks().check_single("A guard")
    if not isinstance(model, str | Path):
        raise ValueError(
            "A model in memory is cut in place, and a guard compares with the original. Pass its folder or Hub id."
        )
    choose_one("engine", engine, ("auto", "memory", "streaming"))
    if engine == "streaming":
        raise ValueError(f'{_HOLDS_TWO}, and engine="streaming" holds none. Leave it out, or {_AFTERWARDS}')
    guard.check_domains()
    recipe = coerce_recipe(recipe)
    data = calibration_config(recipe, calibration, arguments.get("seed"))
    if guard.repair is not None and data is None:
        raise ValueError(f"{recipe.name} reads no data, so none can repair it. Leave out repair=.")
    if data is not None and isinstance(data.source, Iterator):
        raise ValueError("A guard reads the calibration data twice, and a stream can be read once. Pass a list of it.")
    if output_dir is not None:
        output_dir = check_destination(output_dir, overwrite)
    attempts: list[Attempt] = []
    weights: dict[str, float] = {}
    reference = None
    while True:
        config = data if not weights or data is None else weighted(data, guard, weights)
        compressor = MoECompressor.from_pretrained(model, recipe, config, engine="memory", **arguments)
        if engine == "auto":
            _check_room(compressor.source, arguments)
        if output_dir is not None:
            refuse_original(output_dir, compressor.source)
        if reference is None:
            training = compressor.recipe.recover
            for given in (data, guard.repair, None if training is None else training.data):
                # `evaluate` compares them too, but after the compression.
                if given is not None:
                    check_disjoint(texts_of(given, compressor.tokenizer), texts_of(guard.text, compressor.tokenizer))
            reference = compressor.source.load().eval()
        result = _measured(compressor, reference, guard, config, statistics if not weights else None)
        losses = {name: scores[LOSS].value for name, scores in result.domains.items()}
        attempts.append(Attempt(losses, dict(weights)))
        if attempts[-1].worst.over_mean <= guard.worst:
            break
        if guard.repair is None or len(attempts) > guard.rounds:
            raise ValueError(_refusal(attempts, guard))
        weights = reweighted(weights, losses)
    told = {"worst": guard.worst, "attempts": [asdict(attempt) for attempt in attempts]}
    result = replace(result, data={**result.data, "guard": told})
    if output_dir is not None:
        compressor.save_pretrained(output_dir, overwrite)
        write_report(output_dir, evaluation=result)
    return Guarded(compressor, result, tuple(attempts), config, output_dir)


def _check_room(source: ModelSource, arguments: Mapping[str, Any]) -> None:
    """Check that a guard would not keep a model in memory that is streamed without one.

    Raises:
        ValueError: If it would.
    """
    if choose_streaming("auto", source, None, arguments.get("device_map"), None, writes=False) is not None:
        raise ValueError(
            f"{_HOLDS_TWO}, and this one, of {source.info.bytes:,} bytes, is streamed because it exceeds the free "
            f"memory. Use a machine with more, or {_AFTERWARDS}"
        )


def reweighted(weights: Mapping[str, float], losses: Mapping[str, float]) -> dict[str, float]:
    """Weights of the domains in the next calibration: those that lost more than the mean get that much more.

    Args:
        weights: Weights of the last one by domain, empty at first; the data that the user gave weigh 1.
        losses: What each domain lost.
    """
    mean = sum(losses.values()) / len(losses)
    added = {name: loss / mean for name, loss in losses.items() if loss > mean}
    return {name: weights.get(name, 0.0) + added.get(name, 0.0) for name in losses if name in weights or name in added}


def weighted(data: CalibrationConfig, guard: Guard, weights: Mapping[str, float]) -> CalibrationConfig:
    """Calibration data with text of some domains added by weight, as many tokens as before.

    Raises:
        ValueError: If they are no text.
    """
    given = read_sources(data.source, data.text_column)
    if not isinstance(given, list):
        raise ValueError("Model inputs, images, audio and video are not mixed with other text. Leave out repair=.")
    sources = _shared(given, 1.0)
    known = guard.repair_sources()
    for domain, weight in weights.items():
        sources += _shared(known[domain], weight)
    return replace(data, source=sources)


def _shared(sources: list[TextSource], weight: float) -> list[TextSource]:
    """Sources with a weight in all."""
    total = sum(source.weight for source in sources)
    return [replace(source, weight=weight * source.weight / total) for source in sources]


def _measured(
    compressor: MoECompressor, reference: Any, guard: Guard, config: CalibrationConfig | None, statistics: Any
) -> EvaluationResult:
    compressed = compressor.apply(statistics)
    return evaluate(
        compressed,
        guard.text,
        reference,
        compressor.tokenizer,
        calibration=config,
        progress=compressor.progress,
        **guard.settings,
    )


def _refusal(attempts: list[Attempt], guard: Guard) -> str:
    worst = attempts[-1].worst
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in attempts[-1].losses.items())
    tried = (
        "" if len(attempts) == 1 else f" ({', '.join(f'{a.worst.over_mean:.2f}' for a in attempts)} in all attempts)"
    )
    remedy = (
        f"Calibrate on text of {worst.name} too, pass repair= with text of all domains, or choose a larger size."
        if guard.repair is None
        else "Choose a larger size, or more calibration data."
    )
    return (
        f"{worst.name} lost {worst.over_mean:.2f} times the mean of all domains{tried}, and worst={guard.worst:g} is "
        f"allowed; KL to the original in nats a token: {losses}. Nothing is written. {remedy}"
    )
