"""`optimum-cli moe sweep`: many recipes at many sizes on one calibration."""

from __future__ import annotations

import json
from argparse import ArgumentParser

from optimum_moe.cli.common import (
    MoESubcommand,
    add_checkpoint_arguments,
    add_json_argument,
    add_model_argument,
    check_text,
    checkpoint_arguments,
    model_of,
    prepare,
    text_source,
    tokens,
)

_CALIBRATION = ("text_column", "max_tokens", "sequence_length")


class SweepCommand(MoESubcommand):
    """Print a table of what each recipe keeps at each size, and draw it."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(
            parser,
            "sweep org/model --recipes reap m-smoe byte-budget --keep 75%,50% --calibration corpus.txt"
            " --text held_out.jsonl --output compared",
        )
        add_model_argument(parser, "Hub id, or folder of a checkpoint in safetensors format.")
        add_checkpoint_arguments(parser)
        parser.add_argument(
            "--recipes",
            nargs="+",
            required=True,
            metavar="RECIPE",
            help="Presets or YAML files, with other settings as a YAML mapping: 'byte-budget {runs_in: transformers}'.",
        )
        parser.add_argument("--keep", help="Shares of the experts' bytes, by commas: 0.75,0.5 or 75%%,50%%.")
        parser.add_argument("--target-size", help="Sizes of the checkpoint, by commas: 16GB,12GB.")
        parser.add_argument(
            "--calibration", action="append", required=True, metavar="TEXT[:WEIGHT]", help="As for compress."
        )
        parser.add_argument(
            "--text", required=True, action="append", metavar="TEXT[:WEIGHT]", help="Held-out text, as --calibration."
        )
        parser.add_argument("--text-column", help='Column of the text; default "text", else "messages".')
        parser.add_argument(
            "--max-tokens", type=tokens, metavar="N", help="Maximum number of calibration tokens; default 65536."
        )
        parser.add_argument("--sequence-length", type=int, help="Tokens per calibration row; default 512.")
        parser.add_argument("--tokenizer", help="Hub id, or folder; default the checkpoint's.")
        parser.add_argument(
            "--tasks",
            nargs="+",
            help="Some of: perplexity agreement choice generation. Default perplexity agreement.",
        )
        parser.add_argument(
            "--evaluation-tokens", type=tokens, metavar="N", help="Maximum number of held-out tokens; default 65536."
        )
        parser.add_argument("--at-once", type=int, default=4, help="Compressed models in memory at a time; default 4.")
        parser.add_argument("--device-map", help='Device of the weights, such as "auto" or "cuda:0"; default the CPU.')
        parser.add_argument("--seed", type=int, default=0, help="Seed of all random choices; default 0.")
        parser.add_argument(
            "--output", required=True, help="Folder of results; the same command continues what is there."
        )
        parser.add_argument(
            "--write", metavar="FOLDER", help="Also write the best checkpoint of each size, to FOLDER/SIZE."
        )
        add_json_argument(parser)
        parser.add_argument("--quiet", action="store_true", help="Show no progress.")

    def execute(self) -> None:
        """See `MoESubcommand`."""
        args = self.args
        check_text(args.calibration, "--calibration")
        check_text(args.text, "--text")
        sizes = [part for given in (args.keep, args.target_size) if given for part in given.split(",")]
        if not sizes:
            raise ValueError("A sweep needs sizes. Give --keep 75%,50% or --target-size 16GB,12GB.")
        model = model_of(args)
        from pathlib import Path

        from transformers.utils import logging

        from optimum_moe.calibration import CalibrationConfig
        from optimum_moe.checkpoint.destination import check_destination
        from optimum_moe.sweep import sweep, write_best

        written = {} if args.write is None else {size: check_destination(Path(args.write) / size) for size in sizes}
        if args.quiet:
            logging.disable_progress_bar()
        observed = {name: value for name in _CALIBRATION if (value := getattr(args, name)) is not None}
        column = {} if args.text_column is None else {"text_column": args.text_column}
        evaluation = {"tasks": args.tasks, "max_tokens": args.evaluation_tokens}
        given = checkpoint_arguments(args) | ({} if args.device_map is None else {"device_map": args.device_map})
        calibration = CalibrationConfig(text_source(args.calibration), seed=args.seed, **observed)
        found = sweep(
            model,
            args.recipes,
            sizes,
            calibration,
            CalibrationConfig(text_source(args.text), **column),
            args.output,
            seed=args.seed,
            tokenizer=args.tokenizer,
            evaluation={name: value for name, value in evaluation.items() if value is not None},
            at_once=args.at_once,
            progress=not args.quiet,
            **given,
        )
        if args.json:
            shown = [outcome.to_dict() for outcome in (found.original, *found.outcomes)]
            print(json.dumps({"output": args.output, "trials": shown}, indent=1))
        else:
            print(f"{found}\n\nPictures: {args.output}/pareto.png and pareto.svg")
        for size, folder in written.items():
            path = write_best(
                found,
                size,
                model,
                args.output,
                folder,
                calibration=calibration,
                seed=args.seed,
                tokenizer=args.tokenizer,
                progress=False,
                **given,
            )
            if not args.json:
                print(f"Best at {size}: {path}")
