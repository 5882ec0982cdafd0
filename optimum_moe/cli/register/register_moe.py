"""Found by optimum-cli in the namespace `optimum.commands.register`: adds `optimum-cli moe`."""

from optimum_moe.cli.moe import MoECommand

REGISTER_COMMANDS = [MoECommand]
