"""The command group `optimum-cli moe`."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_moe.cli.completion import CompletionCommand
from optimum_moe.cli.compress import CompressCommand
from optimum_moe.cli.evaluate import EvaluateCommand
from optimum_moe.cli.export import ExportCommand
from optimum_moe.cli.inspect import InspectCommand
from optimum_moe.cli.preview import PreviewCommand
from optimum_moe.cli.recover import RecoverCommand
from optimum_moe.cli.report import ReportCommand
from optimum_moe.cli.sweep import SweepCommand
from optimum_moe.cli.verify import VerifyCommand


class MoECommand(BaseOptimumCLICommand):
    """The command group; without a command it prints its help."""

    COMMAND = CommandInfo(name="moe", help="Compress Mixture-of-Experts models.")
    SUBCOMMANDS = (
        CommandInfo("inspect", "Show the MoE blocks of a checkpoint, or what is supported.", InspectCommand),
        CommandInfo("preview", "Show the expected sizes of a recipe, without reading a weight.", PreviewCommand),
        CommandInfo("compress", "Compress a checkpoint.", CompressCommand),
        CommandInfo("completion", "Print a script with which a shell completes commands.", CompletionCommand),
        CommandInfo("evaluate", "Evaluate models on held-out text.", EvaluateCommand),
        CommandInfo(
            "export", "Write a checkpoint for another runtime: GGUF, MLX, vLLM, transformers 4.", ExportCommand
        ),
        CommandInfo("recover", "Train a compressed checkpoint on what its original predicts.", RecoverCommand),
        CommandInfo("report", "Write the report of a compressed checkpoint as one HTML file.", ReportCommand),
        CommandInfo("sweep", "Compare recipes at several sizes on your own model and text.", SweepCommand),
        CommandInfo("verify", "Check a compressed checkpoint tensor by tensor.", VerifyCommand),
    )
