"""`optimum-cli moe report`: the report of a compressed folder as one HTML file."""

from __future__ import annotations

import json
from argparse import ArgumentParser
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
)

_GIVEN = ("statistics", "evaluation", "reference", "sweep", "original")


class ReportCommand(MoESubcommand):
    """Write the report of a compressed folder, and print its path."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser, "report small --evaluation scores.small.json --reference scores.original.json")
        add_model_argument(parser, "Folder that `optimum-cli moe compress` wrote.")
        parser.add_argument(
            "--output", metavar="FILE", help="File to write, which leaves MODEL as it is; default MODEL/report.html."
        )
        parser.add_argument(
            "--statistics", metavar="FOLDER", help="Statistics of the original, which compress --save-statistics wrote."
        )
        parser.add_argument("--evaluation", metavar="FILE", help="Scores that evaluate --output wrote.")
        parser.add_argument(
            "--reference", metavar="FILE", help="The original's scores from the same evaluation, shown beside them."
        )
        parser.add_argument("--sweep", metavar="FOLDER", help="Results of a sweep on this model.")
        parser.add_argument(
            "--original",
            help="The original, Hub id or folder, to run beside MODEL on --text: errors by layer, samples.",
        )
        parser.add_argument(
            "--text",
            action="append",
            metavar="TEXT[:WEIGHT]",
            help="Held-out text for --original, as --calibration of compress; the report quotes three pieces of it.",
        )
        add_json_argument(parser)

    def execute(self) -> None:
        """See `MoESubcommand`."""
        folder = Path(model_of(self.args)).expanduser()
        self._check_arguments(folder)
        from optimum_moe.report import write_report

        given = {name: getattr(self.args, name) for name in _GIVEN}
        file = write_report(folder, self.args.output, text=text_source(self.args.text), **given)
        print(json.dumps({"report": str(file), "bytes": file.stat().st_size}) if self.args.json else file)

    def _check_arguments(self, folder: Path) -> None:
        """Check what can be checked before heavy imports."""
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder. Give one that `optimum-cli moe compress` wrote.")
        if (self.args.original is None) != (self.args.text is None):
            raise ValueError(
                "--original and --text belong together: both models are run on the text. Give both, or none."
            )
        if self.args.original is not None:
            check_checkpoint_name(self.args.original)
            check_text(self.args.text, "--text")
        for flag, what in (
            ("statistics", "folder"),
            ("sweep", "folder"),
            ("evaluation", "file"),
            ("reference", "file"),
        ):
            given = getattr(self.args, flag)
            there = given is None or (Path(given).is_dir() if what == "folder" else Path(given).is_file())
            if not there:
                raise ValueError(f"--{flag} {given} is no {what}. Check the path.")
