"""`optimum-cli moe compress`: from a checkpoint to a smaller one."""

from __future__ import annotations

import json
import shlex
import warnings
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_moe.cli.common import (
    CALIBRATION,
    MoESubcommand,
    add_calibration_arguments,
    add_checkpoint_arguments,
    add_json_argument,
    add_recipe_arguments,
    check_text,
    checkpoint_arguments,
    given_flags,
    model_of,
    prepare,
    recipe_of,
    table,
    text_source,
)
from optimum_moe.cli.errors import name_flags

if TYPE_CHECKING:
    from optimum_moe.compressor import MoECompressor
    from optimum_moe.recipe import Recipe
    from optimum_moe.statistics import Statistics


_CALIBRATION = (*CALIBRATION, "unseen")
"""Flags that are fields of `CalibrationConfig`."""


class CompressCommand(MoESubcommand):
    """Compress a checkpoint; prints the expected sizes at the start and the measured ones at the end."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser, "compress org/model --share 0.5 --calibration corpus.txt --output small")
        add_recipe_arguments(parser)
        add_checkpoint_arguments(parser)
        parser.add_argument("--output", required=True, help="Folder that the checkpoint is written to.")
        parser.add_argument("--overwrite", action="store_true", help="Replace the content of --output; start again.")
        parser.add_argument(
            "--streaming",
            action="store_true",
            help="Layer by layer, for checkpoints larger than memory; the same command resumes an interrupted run.",
        )
        parser.add_argument("--max-memory", help='Maximum memory for tensors with --streaming, such as "20GB".')
        parser.add_argument(
            "--error-propagation", action="store_true", help="Observe each layer on outputs of compressed layers."
        )
        add_calibration_arguments(parser)
        parser.add_argument(
            "--unseen",
            choices=("warn", "error", "keep", "prune"),
            help="Policy for experts that no calibration token reached; default warn.",
        )
        parser.add_argument(
            "--guard",
            type=guard_limit,
            metavar="worst=FACTOR",
            help="Refuse a result whose worst domain of --guard-text lost more than this factor over the mean of all "
            "domains, such as worst=2x.",
        )
        parser.add_argument(
            "--guard-text",
            action="append",
            metavar="DOMAIN=TEXT",
            help='Held-out text of a domain, such as code=code.txt, or rows with a "domain".',
        )
        parser.add_argument(
            "--guard-repair",
            action="append",
            metavar="DOMAIN=TEXT",
            help="Other text of the domains; instead of a refusal, calibrate again with more of those that lost most.",
        )
        parser.add_argument("--statistics", metavar="FOLDER", help="Reuse statistics that --save-statistics wrote.")
        parser.add_argument("--save-statistics", metavar="FOLDER", help="Save the statistics for other runs.")
        parser.add_argument("--seed", type=int, help="Seed of the calibration sample and all choices; default 0.")
        parser.add_argument(
            "--device-map",
            help='Device of the weights: "auto", "cuda:0", or "local", one for each process; default the CPU.',
        )
        parser.add_argument("--max-shard-size", help='Maximum size of a weight file, such as "2GB"; default "5GB".')
        parser.add_argument(
            "--push-to-hub",
            nargs="?",
            const="",
            metavar="REPO",
            help="Upload the result to this repository; by default to one with the name of the folder.",
        )
        parser.add_argument("--private", action="store_true", help="With --push-to-hub: to a private repository.")
        parser.add_argument("--no-report", dest="report", action="store_false", help="Write no report.html.")
        add_json_argument(parser)
        parser.add_argument("--quiet", action="store_true", help="Print only the path of the output folder.")

    def execute(self) -> None:
        """See `MoESubcommand`."""
        args = self.args
        self._check_arguments()
        model = model_of(args)
        recipe = self._recipe()
        from transformers.utils import logging

        from optimum_moe.checkpoint.destination import check_destination, owned, written_beside
        from optimum_moe.checkpoint.push import check_target
        from optimum_moe.compressor import MoECompressor
        from optimum_moe.recipe import recovery_on
        from optimum_moe.reporting.card import describe_calibration
        from optimum_moe.reporting.page.run_record import read_report
        from optimum_moe.reporting.recovery import sentence
        from optimum_moe.reporting.scores import EVALUATION, worst_domain
        from optimum_moe.statistics import Statistics

        if args.quiet:
            logging.disable_progress_bar()
        if args.push_to_hub is not None:
            check_target(args.push_to_hub or Path(args.output).name, args.private)
        kept = None if args.save_statistics is None else check_destination(args.save_statistics)
        self._check_apart(kept)
        statistics = None if args.statistics is None else Statistics.from_pretrained(args.statistics)
        arguments: dict[str, Any] = {
            "calibration": text_source(args.calibration),
            "engine": "streaming" if args.streaming else "auto",
            "output_dir": args.output,
            "error_propagation": args.error_propagation,
            "max_memory": args.max_memory,
            "max_shard_size": args.max_shard_size,
            "overwrite": args.overwrite,
            "seed": args.seed,
            "device_map": args.device_map,
            "progress": not args.quiet,
            "report": args.report,
            "mtp": args.mtp,
            "tokenizer": args.tokenizer,
            **checkpoint_arguments(args),
        }
        compressor = MoECompressor.from_pretrained(model, recipe, **arguments)
        speaks = compressor.ranks.writes
        needed = bool(compressor.recipe.needs) or kept is not None
        if needed and statistics is None and compressor.calibration is None:
            raise ValueError(
                f"{compressor.recipe.name} needs calibration data. Give --calibration corpus.txt, or --statistics."
            )
        training = compressor.recipe.recover
        if training is not None:
            recovery_on(training, compressor.calibration)
        if args.calibration and not needed and (training is None or training.data is not None):
            warnings.warn(f"{compressor.recipe.name} needs no data here: --calibration is not read.", stacklevel=2)
        talks = speaks and not args.quiet and not args.json
        if talks:
            print(f"Preview\n{compressor.preview()}\n", flush=True)
        if kept is not None:
            statistics = compressor.calibrate()
            if speaks:
                with owned(kept), written_beside(kept) as beside:
                    statistics.save_pretrained(beside)
        if args.guard is None:
            path = compressor.apply(statistics)
        else:
            # It may hold the model, and a guard loads its own.
            del compressor
            compressor, path = self._guarded(model, recipe, statistics, arguments)
        if speaks and args.json:
            print(json.dumps(_record(compressor, path), indent=1))
        elif talks:
            assert compressor.plan is not None
            print(f"\nCalibration: {describe_calibration(compressor.plan.calibration)}")
            if compressor.training is not None:
                print(f"\n{sentence(compressor.training)}")
            print(f"\nMeasured\n{compressor.measured()}\n\n{_where_it_loads(path)}\n\n{_how_to_load(compressor, path)}")
            if worst := worst_domain(read_report(path).get(EVALUATION, {})):
                print(f"\nGuard: {worst}")
            for remark in compressor.plan.remarks:
                print(f"\n{name_flags(remark, self.parse_args)}")
            print(f"\n{_what_next(compressor, path)}")
            for target in (stage.export_to for stage in compressor.recipe.stages if stage.export_to):
                print(f"\n{_how_to_export(path, target)}")
        if args.push_to_hub is not None:
            compressor.save_pretrained(path, push_to_hub=True, repo_id=args.push_to_hub or None, private=args.private)
        if speaks and args.quiet and not args.json:
            print(path)

    def _guarded(
        self, model: str, recipe: Recipe, statistics: Statistics | None, arguments: Mapping[str, Any]
    ) -> tuple[MoECompressor, Path]:
        """Compress with the guard of the arguments."""
        from optimum_moe.domain_guard import Guard, compress_guarded

        guard = Guard(text_source(self.args.guard_text), self.args.guard, text_source(self.args.guard_repair))
        done = compress_guarded(model, recipe, guard=guard, statistics=statistics, **arguments)
        assert done.folder is not None
        return done.compressor, done.folder

    def _check_apart(self, kept: Path | None) -> None:
        """Check that statistics are not saved inside the output folder."""
        output = Path(self.args.output).expanduser().resolve()
        if kept is not None and (kept == output or output in kept.parents):
            raise ValueError(
                f"--save-statistics {kept} is in --output {output}, which is replaced as a whole. Give it another "
                "folder."
            )

    def _check_arguments(self) -> None:
        """Check the arguments before heavy imports."""
        args = self.args
        if args.private and args.push_to_hub is None:
            raise ValueError("--private is only for --push-to-hub. Add it, or leave --private out.")
        check_text(args.calibration, "--calibration")
        check_text(args.guard_text, "--guard-text")
        check_text(args.guard_repair, "--guard-repair")
        given = given_flags(args, ("guard_text", "guard_repair"))
        if args.guard is None and given:
            raise ValueError(f"{' and '.join(given)} belong to a guard. Give --guard worst=2x.")
        if args.guard is not None and args.guard_text is None:
            raise ValueError("--guard measures domains, and has no text. Give --guard-text code=code.txt, and others.")
        if args.statistics is not None and not Path(args.statistics).is_dir():
            raise ValueError(f"--statistics {args.statistics} is not a folder. Give one that --save-statistics wrote.")
        if args.error_propagation and (given := given_flags(args, ("statistics", "save_statistics"))):
            raise ValueError(
                f"--error-propagation observes each layer after cutting those before it, and {' and '.join(given)} "
                "means the uncut model. Give one of them."
            )
        given = given_flags(args, ("calibration", *_CALIBRATION, "save_statistics"))
        if args.statistics is not None and given:
            raise ValueError(f"--statistics replaces the observation of the model. Drop it, or {', '.join(given)}.")

    def _recipe(self) -> Recipe:
        recipe = recipe_of(self.args)
        given = {name: getattr(self.args, name) for name in _CALIBRATION}
        settings = {name: value for name, value in given.items() if value is not None}
        return replace(recipe, calibration={**recipe.calibration, **settings})


def guard_limit(text: str) -> float:
    """Parse the limit of a guard, `worst=2x`, for argparse."""
    name, separator, factor = text.partition("=")
    if name != "worst" or not separator:
        raise ValueError(text)
    return float(factor.strip().removesuffix("x"))


def _record(compressor: MoECompressor, path: Path) -> dict[str, Any]:
    """What a run did, as JSON values."""
    from optimum_moe.reporting.loads_in import known_rows, to_json
    from optimum_moe.reporting.page.run_record import read_report
    from optimum_moe.reporting.recovery import FIELD
    from optimum_moe.reporting.scores import EVALUATION

    assert compressor.plan is not None
    return {
        "output": str(path),
        **compressor.measured().to_dict(),
        "calibration": compressor.plan.calibration,
        "seed": compressor.plan.seed,
        "remarks": list(compressor.plan.remarks),
        "loads_in": to_json(known_rows(path)),
        **{name: value for name, value in read_report(path).items() if name in (EVALUATION, FIELD)},
    }


def _where_it_loads(path: Path) -> str:
    from optimum_moe.reporting.loads_in import known_rows

    return table([("runtime", "what it does"), *((row.title, row.says) for row in known_rows(path))])


def _what_next(compressor: MoECompressor, path: Path) -> str:
    """Where the report is, and the command that measures the checkpoint."""
    folder, original = shlex.quote(str(path)), shlex.quote(compressor.source.name)
    lines = [f"Report: {path / 'report.html'}"] if compressor.report else []
    lines.append(f"Next: optimum-cli moe evaluate {folder} --reference {original} --text HELD_OUT.txt")
    return "\n".join(lines)


def _how_to_load(compressor: MoECompressor, path: Path) -> str:
    from optimum_moe.checkpoint.source import loads_with

    assert compressor.model is not None
    cls = loads_with(compressor.model)
    lines = [
        f"Saved to {path}. Load it with",
        "",
        f"    from transformers import {cls}",
        f'    model = {cls}.from_pretrained("{path}")',
    ]
    if not compressor.measured().plain:
        lines[0] = f"Saved to {path}. With optimum-moe installed, load it with"
    return "\n".join(lines)


def _how_to_export(path: Path, target: str) -> str:
    from optimum_moe.exporting.targets import get_target

    folder, output = shlex.quote(str(path)), shlex.quote(f"{path}-{target}")
    return (
        f"{get_target(target).runtime} without this package loads what a second command makes of it:\n\n"
        f"    optimum-cli moe export {folder} --to {target} --output {output}"
    )
