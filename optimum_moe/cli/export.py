"""`optimum-cli moe export`: write a checkpoint for another runtime."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

from optimum_moe.cli.common import (
    MoESubcommand,
    add_json_argument,
    add_model_argument,
    add_runtime_arguments,
    check_text,
    model_of,
    prepare,
    text_source,
)

TARGETS = ("gguf", "mlx", "vllm", "compressed-tensors", "transformers4")


class ExportCommand(MoESubcommand):
    """Export a checkpoint and print where it is."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser, "export org/model --to vllm")
        add_model_argument(parser, "Folder of a checkpoint.")
        parser.add_argument("--to", required=True, choices=TARGETS, help="Runtime, or its format.")
        parser.add_argument("--output", help="New file or folder; by default beside the checkpoint.")
        parser.add_argument("--quantize", help='"q4_k_m", "q8_0" (gguf), "4bit" (mlx), "w4a16" (packed).')
        parser.add_argument(
            "--calibration",
            action="append",
            metavar="TEXT",
            help="Text file or Hub dataset for the importance matrix of a quantized GGUF file; may be repeated.",
        )
        add_runtime_arguments(parser)
        parser.add_argument(
            "--pre-tokenizer", help="llama.cpp's name of the pre-tokenizer, if it does not recognize the tokenizer."
        )
        add_json_argument(parser)
        parser.add_argument("--overwrite", action="store_true", help="Replace what is there.")

    def execute(self) -> None:
        """See `MoESubcommand`."""
        model = model_of(self.args)
        check_text(self.args.calibration, "--calibration")
        from optimum_moe.exporting import export

        place = export(
            model,
            self.args.to,
            self.args.output,
            quantize=self.args.quantize,
            calibration=text_source(self.args.calibration),
            llama_cpp=self.args.llama_cpp,
            python=self.args.python,
            pre_tokenizer=self.args.pre_tokenizer,
            overwrite=self.args.overwrite,
        )
        size = sum(file.stat().st_size for file in ([place] if place.is_file() else Path(place).rglob("*.*")))
        print(json.dumps({"output": str(place), "bytes": size}) if self.args.json else f"{place}: {size:,} bytes")
