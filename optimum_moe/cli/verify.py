"""`optimum-cli moe verify`: check a compressed checkpoint tensor by tensor."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum_moe.checkpoint.names import check_checkpoint_name
from optimum_moe.cli.common import MoESubcommand, add_model_argument, model_of, prepare

FAILED = 1


class VerifyCommand(MoESubcommand):
    """Print a table of checks; the exit status is 0 if all passed, else 1."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser)
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
        report = verify(model, self.args.against, trained=self.args.trained or None)
        print(report)
        if not report.passed:
            raise SystemExit(FAILED)
