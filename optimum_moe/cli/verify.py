"""`optimum-cli moe verify`: check a compressed checkpoint tensor by tensor."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import asdict
from typing import TYPE_CHECKING

from optimum_moe.checkpoint.names import check_checkpoint_name
from optimum_moe.cli.common import (
    MoESubcommand,
    add_json_argument,
    add_model_argument,
    add_runtime_arguments,
    model_of,
    prepare,
)

if TYPE_CHECKING:
    from optimum_moe.exporting.runs_in import Run

FAILED = 1


class VerifyCommand(MoESubcommand):
    """Print a table of checks, and what runtimes did; the exit status is 0 if all passed, else 1."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser, "verify small --against org/model")
        add_model_argument(parser, "Folder of a compressed checkpoint.")
        parser.add_argument(
            "--against",
            metavar="ORIGINAL",
            help="The original, a Hub id or a folder: compare every tensor with the result of the plan.",
        )
        parser.add_argument(
            "--trained",
            action="store_true",
            help="Weights were trained since the checkpoint was written: list those that differ, but do not fail.",
        )
        parser.add_argument(
            "--runs-in",
            action="append",
            choices=("llama.cpp", "mlx", "transformers4", "vllm"),
            help="Run it in that runtime as well, compare the greedy tokens with those of transformers, and record the "
            "result in report and card; may be repeated.",
        )
        add_runtime_arguments(parser)
        parser.add_argument(
            "--exported", metavar="PATH", help="What --runs-in runs: a result of `optimum-cli moe export`."
        )
        parser.add_argument("--quantize", help="Type of values that --runs-in exports to, where it exports.")
        add_json_argument(parser)
        parser.add_argument("--quiet", action="store_true", help="Show no progress.")

    def execute(self) -> None:
        """See `MoESubcommand`."""
        model = model_of(self.args)
        if self.args.against is not None:
            check_checkpoint_name(self.args.against)
        from transformers.utils import logging

        from optimum_moe.verification import verify

        if self.args.quiet:
            logging.disable_progress_bar()
        self._check_runtime_arguments()
        report = verify(model, self.args.against, trained=self.args.trained or None)
        if not self.args.json:
            print(report)
        runs = [self._run_in(model, runtime) for runtime in self.args.runs_in or ()]
        passed = report.passed and all(run.passed for run in runs)
        if self.args.json:
            record = {"passed": passed, "checks": [asdict(check) for check in report.checks]}
            record |= {"runs": [{"runtime": run.title, "passed": run.passed, "says": run.says} for run in runs]}
            print(json.dumps(record, indent=1))
        if not passed:
            raise SystemExit(FAILED)

    def _check_runtime_arguments(self) -> None:
        """Raise a `ValueError` for arguments of --runs-in without it, or for one runtime with several."""
        given = [name for name in ("python", "llama_cpp", "exported", "quantize") if getattr(self.args, name)]
        if given and not self.args.runs_in:
            raise ValueError(f"--{given[0].replace('_', '-')} is for --runs-in. Add --runs-in, or leave it out.")
        if self.args.exported and len(self.args.runs_in) > 1:
            raise ValueError("--exported is for one --runs-in. Run the command once for each runtime.")

    def _run_in(self, model: str, runtime: str) -> Run:
        """Run the checkpoint in a runtime, print and record what it did."""
        from optimum_moe.exporting.runs_in import run_in

        run = run_in(
            runtime,
            model,
            python=self.args.python,
            exported=self.args.exported,
            llama_cpp=self.args.llama_cpp,
            quantize=self.args.quantize,
        )
        if not self.args.json:
            print(f"{run.title}: {run.says}")
        run.record(model)
        return run
