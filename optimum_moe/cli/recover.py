"""`optimum-cli moe recover`: train a compressed checkpoint on what its original predicts."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from optimum_moe.checkpoint.names import check_checkpoint_name
from optimum_moe.cli.common import (
    MoESubcommand,
    add_json_argument,
    add_model_argument,
    check_text,
    model_of,
    prepare,
    text_source,
    tokens,
)

_EXAMPLE = """example:
  optimum-cli moe recover small --teacher org/model --data corpus.txt --train router --max-tokens 300k --output better

The same command goes on after an interruption."""
_SETTINGS = (
    *(
        "learning_rate",
        "alpha",
        "temperature",
        "task_weight",
        "hidden_weight",
        "final_density",
        "lora_rank",
        "reconstruct",
    ),
    *("held_out_share", "max_tokens", "seed"),
)
"""Flags that are arguments of `recover`."""


class RecoverCommand(MoESubcommand):
    """Print the divergence from the original before and after, and where the result is."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.epilog = _EXAMPLE
        prepare(parser, "recover pruned --teacher org/model --data corpus.txt --max-tokens 2k --output recovered")
        add_model_argument(parser, "Folder of a compressed checkpoint, or a Hub id.")
        parser.add_argument(
            "--teacher",
            required=True,
            metavar="ORIGINAL",
            help="The original: a Hub id or a folder; or a folder of its logits (store_teacher_logits).",
        )
        parser.add_argument(
            "--data",
            required=True,
            action="append",
            metavar="TEXT[:WEIGHT]",
            help="Text to train on: a .txt, .jsonl or .parquet file, or a Hub dataset as org/name:split; repeat it for "
            "a mixture by weight.",
        )
        parser.add_argument("--output", required=True, help="Folder that the trained checkpoint is written to.")
        parser.add_argument("--overwrite", action="store_true", help="Replace the content of --output; start again.")
        parser.add_argument(
            "--train",
            default="router",
            metavar="WHAT",
            help="router (routers and norms; default), experts (also all that is stored of the experts), lora (merged "
            "adapters; needs peft), or full.",
        )
        parser.add_argument(
            "--max-tokens", type=tokens, metavar="N", help="Tokens to train on, such as 300k or 1M; default 300k."
        )
        parser.add_argument(
            "--held-out",
            action="append",
            metavar="TEXT[:WEIGHT]",
            help="Other text to measure on during the training; by default documents of --data.",
        )
        parser.add_argument(
            "--held-out-share", type=float, metavar="SHARE", help="Share of the documents held out; default 0.1."
        )
        parser.add_argument("--text-column", help='Column of the text; default "text", else "messages".')
        parser.add_argument("--sequence-length", type=int, help="Tokens per row; default 512, or all positions.")
        parser.add_argument("--batch-size", type=int, help="Rows per step; default 4.")
        parser.add_argument("--tokenizer", help="Hub id, or folder; default the checkpoint's.")
        parser.add_argument("--learning-rate", type=float, metavar="RATE", help="Of AdamW; default by --train.")
        parser.add_argument("--alpha", type=float, help="Weight of the divergence from the original; default 1.")
        parser.add_argument("--temperature", type=float, help="At which predictions are compared; default 1.")
        parser.add_argument("--task-weight", type=float, help="Weight of the text's own cross-entropy; default 0.")
        parser.add_argument("--hidden-weight", type=float, help="Weight of differences of hidden states; default 0.")
        parser.add_argument(
            "--final-density", type=float, metavar="SHARE", help="Prune sparse rows down to this density meanwhile."
        )
        parser.add_argument(
            "--reconstruct",
            type=float,
            metavar="SHARE",
            help="Share of --max-tokens on which each MoE block is first fitted to the original's block; default 0.",
        )
        parser.add_argument("--lora-rank", type=int, metavar="R", help="Rank of the adapters of lora; default 8.")
        parser.add_argument("--seed", type=int, help="Seed of the data and all choices; default 0.")
        add_json_argument(parser)
        parser.add_argument("--quiet", action="store_true", help="Print only the path of the output folder.")

    def execute(self) -> None:
        """See `MoESubcommand`."""
        args = self.args
        model = model_of(args)
        check_checkpoint_name(args.teacher)
        check_text(args.data, "--data")
        check_text(args.held_out, "--held-out")
        from transformers.utils import logging

        from optimum_moe.calibration import CalibrationConfig
        from optimum_moe.recovery import recover
        from optimum_moe.reporting.recovery import sentence, summary

        if args.quiet:
            logging.disable_progress_bar()
        column = {} if args.text_column is None else {"text_column": args.text_column}
        rows = {name: getattr(args, name) for name in ("sequence_length", "batch_size") if getattr(args, name)}
        held_out = text_source(args.held_out)
        given = {name: getattr(args, name) for name in _SETTINGS}
        done = recover(
            model,
            teacher=args.teacher,
            data={"source": text_source(args.data), **column, **rows},
            train=args.train,
            output_dir=args.output,
            held_out=None if held_out is None else CalibrationConfig(held_out, **column),
            tokenizer=args.tokenizer,
            overwrite=args.overwrite,
            progress=not args.quiet,
            **{name: value for name, value in given.items() if value is not None},
        )
        if args.json:
            print(json.dumps({"output": str(done.folder), **summary(done.record)}, indent=1))
            return
        if args.quiet:
            print(done.folder)
            return
        share = (
            f"That is {done.record.won_back:.0%} of what was lost" if done.record.kl_before > 0 else "Nothing was lost"
        )
        print(f"{sentence(done.record)} {share}; training ended")
        print(f"{done.record.stopped}, and step {done.record.best_step} of {done.record.steps} was kept.")
        print(f"Saved to {done.folder}. It loads as {Path(model).name} does.")
