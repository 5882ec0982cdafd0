"""`optimum-cli moe`."""

from optimum.commands import BaseOptimumCLICommand, CommandInfo


class MoECommand(BaseOptimumCLICommand):
    """The command group."""

    COMMAND = CommandInfo(name="moe", help="Compress Mixture-of-Experts models.")
    SUBCOMMANDS = ()
