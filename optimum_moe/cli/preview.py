"""`optimum-cli moe preview`: show the expected sizes of a recipe, from config and headers."""

from __future__ import annotations

import json
from argparse import ArgumentParser

from optimum_moe.cli.common import (
    MoESubcommand,
    add_checkpoint_arguments,
    add_json_argument,
    add_recipe_arguments,
    check_recipe_file,
    checkpoint_arguments,
    model_of,
    prepare,
    recipe_of,
)


class PreviewCommand(MoESubcommand):
    """Print parameters, bytes and FLOPs per token before and after; no weight is read."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser, "preview org/model --recipe m-smoe --keep-ratio 0.5")
        add_recipe_arguments(parser)
        add_checkpoint_arguments(parser)
        add_json_argument(parser)

    def execute(self) -> None:
        """See `MoESubcommand`."""
        model = model_of(self.args)
        check_recipe_file(self.args.recipe)
        from optimum_moe.compressor import MoECompressor

        recipe = recipe_of(self.args)
        arguments = checkpoint_arguments(self.args)
        preview = MoECompressor.from_pretrained(model, recipe, mtp=self.args.mtp, **arguments).preview()
        print(json.dumps(preview.to_dict(), indent=1) if self.args.json else preview)
