"""`optimum-cli moe evaluate`: evaluate models on held-out text."""

from __future__ import annotations

import argparse
import json
import os
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_moe.checkpoint.names import check_checkpoint_name
from optimum_moe.cli.common import MoESubcommand, add_json_argument, check_text, prepare, table, text_source, tokens

if TYPE_CHECKING:
    from optimum_moe.evaluation import EvaluationResult

_SETTINGS = (
    "max_tokens",
    "sequence_length",
    "batch_size",
    "num_questions",
    "num_prompts",
    "new_tokens",
    "seed",
    "tasks",
)
_REFERENCE = " reference"
"""Name of the original among the models of tasks, which no user can give."""


class EvaluateCommand(MoESubcommand):
    """Print a table of scores with their intervals, one row per model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser, "evaluate small pruned --reference org/model --text held_out.jsonl")
        parser.add_argument(
            "models",
            nargs="*",
            metavar="MODEL",
            help="Models to evaluate side by side: Hub ids or folders, as NAME=MODEL with a name for the table.",
        )
        parser.add_argument("--model", dest="named_models", action="append", default=[], help=argparse.SUPPRESS)
        parser.add_argument(
            "--text",
            action="append",
            metavar="TEXT[:WEIGHT]",
            help="Held-out text, as --calibration; as DOMAIN=TEXT it is measured domain by domain.",
        )
        parser.add_argument(
            "--lm-eval",
            nargs="+",
            metavar="TASK",
            help="Tasks of lm-eval, beside or instead of --text; needs pip install 'optimum-moe[eval]'.",
        )
        parser.add_argument(
            "--tasks-dir", metavar="FOLDER", help="Folder with the task files (.yaml) of --lm-eval, read offline."
        )
        parser.add_argument("--limit", type=int, metavar="N", help="Documents of each task of --lm-eval at most.")
        parser.add_argument(
            "--reference",
            help="The original model, for agreement scores; give it as a MODEL too for its own row.",
        )
        parser.add_argument(
            "--calibration",
            action="append",
            metavar="TEXT[:WEIGHT]",
            help="Calibration data of the models: a file, or org/name:split; checked for overlap with --text.",
        )
        parser.add_argument("--text-column", help='Column of the text; default "text", else "messages".')
        parser.add_argument("--tokenizer", help="Hub id, or folder; default that of the first model.")
        parser.add_argument("--tasks", nargs="+", help="Some of: perplexity agreement choice generation. Default all.")
        parser.add_argument(
            "--max-tokens", type=tokens, metavar="N", help="Maximum number of tokens of text; default 65536."
        )
        parser.add_argument("--sequence-length", type=int, help="Tokens per window; default 256.")
        parser.add_argument("--batch-size", type=int, help="Windows per forward pass; default 8.")
        parser.add_argument("--num-questions", type=int, help="Multiple-choice questions; default 200.")
        parser.add_argument("--num-prompts", type=int, help="Prompts to continue; default 32.")
        parser.add_argument("--new-tokens", type=int, help="Tokens of a continuation; default 32.")
        parser.add_argument("--seed", type=int, help="Seed of all random choices; default 0.")
        parser.add_argument(
            "--output",
            metavar="FILE",
            help="Also write the scores as JSON, for EvaluationResult.load; several models give FILE.NAME.json each.",
        )
        add_json_argument(parser)
        parser.add_argument("--quiet", action="store_true", help="Show no progress.")

    def execute(self) -> None:
        """See `MoESubcommand`."""
        args = self.args
        models = named_models([*args.models, *args.named_models])
        for model in (*models.values(), *([args.reference] if args.reference else ())):
            check_checkpoint_name(model)
        if args.tokenizer is not None:
            check_checkpoint_name(args.tokenizer)
        if args.text is None and args.lm_eval is None:
            raise ValueError("Nothing to measure on was given. Pass --text with held-out text, --lm-eval, or both.")
        check_text(args.text or (), "--text")
        check_text(args.calibration, "--calibration")
        files = {} if args.output is None else _output_files(Path(args.output), list(models))
        from transformers.utils import logging

        from optimum_moe.evaluation import compare_results, format_results

        if args.quiet:
            logging.disable_progress_bar()
        results = {} if args.text is None else self._on_text(models)
        reference = None
        if args.lm_eval is not None:
            answered = self._on_tasks(models)
            reference = answered.pop(_REFERENCE, None)
            results = {n: results[n].joined(found) if n in results else found for n, found in answered.items()}
        if args.json:
            print(json.dumps({name: result.summary() for name, result in results.items()}, indent=1))
        else:
            print(format_results(results))
            for name, result in results.items():
                if result.domains:
                    print(f"\n{name}\n{_by_domain(result)}")
            if reference is not None:
                print(compare_results(results, reference))
        for name, file in files.items():
            _save(results[name], file)

    def _on_text(self, models: dict[str, str]) -> dict[str, EvaluationResult]:
        from optimum_moe.calibration import CalibrationConfig
        from optimum_moe.evaluation import evaluate_many

        args = self.args
        given = {name: getattr(args, name) for name in _SETTINGS}
        column = {} if args.text_column is None else {"text_column": args.text_column}
        calibration = text_source(args.calibration)
        return evaluate_many(
            models,
            CalibrationConfig(text_source(args.text), **column),
            args.reference,
            args.tokenizer,
            calibration=None if calibration is None else CalibrationConfig(calibration, **column),
            progress=not args.quiet,
            **{name: value for name, value in given.items() if value is not None},
        )

    def _on_tasks(self, models: dict[str, str]) -> dict[str, EvaluationResult]:
        """Results of the models, and of the reference if there is one."""
        from optimum_moe.evaluation import evaluate_tasks

        args = self.args
        settings = {name: getattr(args, name) for name in ("limit", "batch_size", "seed")}
        return evaluate_tasks(
            models if args.reference is None else {**models, _REFERENCE: args.reference},
            args.lm_eval,
            args.tasks_dir,
            args.tokenizer,
            **{name: value for name, value in settings.items() if value is not None},
        )


def _by_domain(result: EvaluationResult) -> str:
    """A table of domains, and the one that lost the most."""
    from optimum_moe.reporting.scores import domain_rows, worst_domain

    scores = result.summary()
    header, rows = domain_rows(scores)
    return "\n".join([table([header, *rows]), worst_domain(scores)]).rstrip()


def named_models(values: list[str]) -> dict[str, str]:
    """Paths or Hub ids by name; the default name is the last part of the path.

    Raises:
        ValueError: If two have the same name.
    """
    if not values:
        raise ValueError("A MODEL is needed, got none. Give Hub ids or folders, with optional names: a=out.")
    models: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or Path(value).exists():
            name, path = Path(value).name or value, value
        if not name or not path:
            raise ValueError(f"MODEL {value!r} lacks a {'path' if name else 'name'}. Write name=path.")
        if name in models:
            raise ValueError(f"Two models are named {name!r}: {models[name]} and {path}. Write name=path.")
        models[name] = path
    return models


def _output_files(output: Path, names: list[str]) -> dict[str, Path]:
    if output.is_dir():
        raise ValueError(f"{output} is a folder. Give a file, such as {output / 'result.json'}.")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {output.absolute().parent}. Create it, or choose another file.")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise ValueError(f"No permission to write in {output.absolute().parent}. Choose another folder.")
    if len(names) == 1:
        return {names[0]: output}
    return {name: output.with_name(f"{output.stem}.{name.replace('/', '_')}{output.suffix}") for name in names}


def _save(result: EvaluationResult, file: Path) -> None:
    beside = file.with_name(f".{file.name}.writing-{os.getpid()}")
    try:
        result.save(beside)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
