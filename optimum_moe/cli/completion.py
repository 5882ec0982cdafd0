"""`optimum-cli moe completion`: a script with which a shell completes the commands."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum_moe.cli.common import MoESubcommand, prepare
from optimum_moe.hf.compat import arguments_of

SHELLS = ("bash", "zsh")
_PATHS = {
    "model",
    "named_model",
    "imported",
    "output",
    "calibration",
    "text",
    "statistics",
    "save_statistics",
    "tokenizer",
}
"""Arguments that are files, folders or names of the Hub."""


class CompletionCommand(MoESubcommand):
    """Print the script for a shell; nothing is added to the start of other commands.

    Example:
        optimum-cli moe completion bash > optimum-cli.bash
    """

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser, "completion bash")
        parser.add_argument("shell", choices=SHELLS, help="The shell that runs the script.")

    def execute(self) -> None:
        """See `MoESubcommand`.

        Raises:
            ValueError: If shtab is not installed.
        """
        try:
            import shtab
        except ImportError as error:
            raise ValueError(
                "Completion needs shtab. Install it with: pip install 'optimum-moe[completion]'"
            ) from error
        from optimum.commands.optimum_cli import (
            OPTIMUM_CLI_ROOT_SUBCOMMANDS,
            RootOptimumCLICommand,
            register_optimum_cli_subcommand,
        )

        from optimum_moe.cli.moe import MoECommand
        from optimum_moe.recipe import preset_names

        root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
        for command in (*OPTIMUM_CLI_ROOT_SUBCOMMANDS, MoECommand):
            register_optimum_cli_subcommand(command, parent_command=root)
        root.parser.prog = "optimum-cli"
        for action in arguments_of(root.parser):
            if action.dest == "recipe":
                action.choices = preset_names()
            elif action.dest in _PATHS or action.metavar in ("FILE", "FOLDER", "PATH"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(root.parser, self.args.shell))
