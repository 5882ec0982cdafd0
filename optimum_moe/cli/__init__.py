"""The commands of `optimum-cli moe`."""
