"""`optimum-cli moe inspect`: show the content of a checkpoint, what its experts do on text, or what is supported."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_moe.cli.common import (
    CALIBRATION,
    MoESubcommand,
    add_calibration_arguments,
    add_checkpoint_arguments,
    add_json_argument,
    add_model_argument,
    check_text,
    checkpoint_arguments,
    given_flags,
    model_of,
    prepare,
    table,
    text_source,
)

if TYPE_CHECKING:
    from optimum_moe.checkpoint.headers import Headers
    from optimum_moe.model_info import BlockInfo

_LOOKING = ("calibration", *CALIBRATION, "tokenizer", "seed", "output", "device_map", "max_memory")
"""Flags of `--statistics`."""


class InspectCommand(MoESubcommand):
    """Show the MoE blocks of a checkpoint from config and headers; without a checkpoint, list what is supported.

    With --statistics, show what its experts and routers do on text.
    """

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `MoESubcommand`."""
        prepare(parser, "inspect org/model")
        add_model_argument(parser, "Hub id, or folder of a checkpoint, compressed or not. Without it: as --list.")
        parser.add_argument("--list", action="store_true", help="List architectures, presets, stages and functions.")
        add_json_argument(parser)
        add_checkpoint_arguments(parser)
        parser.add_argument(
            "--statistics",
            action="store_true",
            help="Run the model over --calibration, and show what its experts and routers do, block by block.",
        )
        add_calibration_arguments(parser)
        parser.add_argument("--seed", type=int, help="Seed of the calibration sample; default 0.")
        parser.add_argument(
            "--output", metavar="FOLDER", help="Also write all numbers (JSON) and pictures (PNG and SVG) to a folder."
        )
        parser.add_argument("--device-map", help='Device of the weights, such as "auto" or "cuda:0"; default the CPU.')
        parser.add_argument(
            "--max-memory", help='Maximum memory for tensors, such as "20GB", of a model that is run layer by layer.'
        )

    def execute(self) -> None:
        """See `MoESubcommand`."""
        if self.args.statistics:
            self._look()
            return
        given = given_flags(self.args, _LOOKING)
        if given:
            raise ValueError(f"These are only for --statistics: {', '.join(given)}. Add it, or leave them out.")
        listing = self.args.list or self.args.model == self.args.named_model
        record = supported() if listing else inspected(model_of(self.args), **checkpoint_arguments(self.args))
        if self.args.json:
            print(json.dumps(record, indent=1))
        else:
            print(_show_supported(record) if listing else _show_inspected(record))

    def _look(self) -> None:
        """Show, and write if asked, what `look_inside` finds.

        Raises:
            ValueError: If there is no calibration data, or as `look_inside`.
        """
        args = self.args
        check_text(args.calibration, "--calibration")
        model = model_of(args)
        if args.list:
            raise ValueError("--list needs no model, and --statistics runs one. Give one of the two.")
        if not args.calibration:
            raise ValueError("--statistics runs the model over text. Give it, as --calibration corpus.txt.")
        from optimum_moe.calibration import CalibrationConfig
        from optimum_moe.checkpoint.destination import check_destination, owned, written_beside
        from optimum_moe.look import look_inside
        from optimum_moe.reporting.pictures import check_drawing

        output = None if args.output is None else check_destination(args.output)
        if output is not None:
            check_drawing()
        data = {name: value for name in CALIBRATION if (value := getattr(args, name)) is not None}
        look = look_inside(
            model,
            CalibrationConfig(text_source(args.calibration), seed=args.seed, **data),
            tokenizer=args.tokenizer,
            engine="auto" if args.max_memory is None else "streaming",
            device_map=args.device_map,
            max_memory=args.max_memory,
            progress=not args.json,
            **checkpoint_arguments(args),
        )
        if output is not None:
            with owned(output), written_beside(output) as beside:
                look.save(beside)
        if args.json:
            print(json.dumps(look.to_dict()))
            return
        print("\n\n".join(table(rows) for rows in (look.rows(), look.modality_rows()) if rows))
        if output is not None:
            print(f"\nNumbers: {args.output}/look_inside.json; pictures: overview and one of each block, PNG and SVG.")


def inspected(model: str, **arguments: Any) -> dict[str, Any]:
    """Facts of a checkpoint as JSON values, with recipe and calibration of a compressed one.

    Where config and headers tell all of them, the model's class is neither imported nor compared with every tensor, as
    preview and compress do.

    Raises:
        ValueError: See `optimum_moe.checkpoint.source.open_source`.
    """
    from optimum_moe.checkpoint.location import config_and_headers, raw_config
    from optimum_moe.checkpoint.regular_layout import regular_model

    directory, headers, _ = config_and_headers(model, arguments)
    if arguments == {"dtype": "auto"} and not (directory / "plan.json").is_file():
        regular = regular_model(raw_config(directory), headers)
        if regular is not None:
            sizes = headers.parameters, headers.bytes, regular.flops_per_token
            return _inspected(model, regular.architecture, regular.surgeon, sizes, regular.blocks)
    return _inspected_as_built(model, directory, headers, arguments)


def _inspected_as_built(model: str, directory: Path, headers: Headers, arguments: dict[str, Any]) -> dict[str, Any]:
    """The facts from the model on the meta device, which takes seconds for the imports of its class."""
    from optimum_moe.checkpoint.source import open_source
    from optimum_moe.reporting.inspection import how_it_was_made, inspect_structured, is_structured
    from optimum_moe.reporting.preview import flops_per_token

    made = how_it_was_made(directory)
    compressed = {"compressed": made} if made else {}
    if is_structured(directory):
        return {"model": model, **inspect_structured(directory, headers), **compressed}
    source = open_source(model, **arguments)
    active = {info.name: float(info.top_k * info.expert_multiply_adds) for info in source.info.blocks}
    flops = flops_per_token(source.skeleton, list(source.blocks), active)
    sizes = source.info.parameters, source.info.bytes, flops
    architecture, surgeon = type(source.skeleton).__name__, source.blocks[0].surgeon.name
    return {**_inspected(model, architecture, surgeon, sizes, source.info.blocks), **compressed}


def _inspected(
    model: str, architecture: str, surgeon: str, sizes: tuple[int, int, float], blocks: Sequence[BlockInfo]
) -> dict[str, Any]:
    """The facts as JSON values; `sizes` are parameters, bytes and FLOPs per token."""
    parameters, stored, flops = sizes
    return {
        "model": model,
        "architecture": architecture,
        "surgeon": surgeon,
        "parameters": parameters,
        "bytes": stored,
        "flops_per_token": flops,
        "blocks": [
            {
                "name": info.name,
                "num_experts": info.num_experts,
                "top_k": info.top_k,
                "router_groups": info.router_groups,
                "hidden_size": info.hidden_size,
                "intermediate_size": info.intermediate_size,
                "expert_parameters": info.num_experts * info.expert_parameters,
            }
            for info in blocks
        ],
    }


def supported() -> dict[str, Any]:
    """Architectures, presets, stages and the functions that these name, with short descriptions, as JSON values."""
    from optimum_moe.recipe import load_recipe, preset_names
    from optimum_moe.reporting.support import support
    from optimum_moe.stages import registered_stages
    from optimum_moe.stages.merge_choices import GROUPINGS, ROUTER_ROWS, SIMILARITIES, WEIGHTINGS
    from optimum_moe.stages.saliency import SALIENCIES

    choices = {
        "saliencies": SALIENCIES,
        "similarities": SIMILARITIES,
        "groupings": GROUPINGS,
        "weightings": WEIGHTINGS,
        "router_rows": ROUTER_ROWS,
    }
    recipes = {name: load_recipe(name) for name in preset_names()}
    return {
        "architectures": {
            row.name: {"methods": list(row.methods), "plain": row.plain, "remarks": row.remarks} for row in support()
        },
        "presets": {name: ", ".join(recipe.to_yaml().strip().splitlines()) for name, recipe in recipes.items()},
        "stages": {name: _first_line(stage) for name, stage in sorted(registered_stages().items())},
        **{
            key: {name: _first_line(function) for name, function in sorted(choice.functions.items())}
            for key, choice in choices.items()
        },
    }


def _first_line(described: Any) -> str:
    return (described.__doc__ or "").strip().split("\n")[0]


def _show_inspected(record: dict[str, Any]) -> str:
    headers = ["MoE block", "experts", "top-k", "router groups", "hidden", "intermediate", "expert parameters"]
    headers += ["of experts", "routing", "forms"] if "forms" in record["blocks"][0] else []
    lines = [
        f"{record['model']}: {record['architecture']} (surgeon {record['surgeon']})",
        "",
        table([headers, *(tuple(block.values()) for block in record["blocks"])]),
        "",
        f"{record['parameters']:,} parameters, {record['bytes']:,} bytes, "
        f"{record['flops_per_token']:,.0f} FLOPs per token",
    ]
    made = record.get("compressed")
    if made:
        experts = ", ".join(
            f"{old} -> {new}" for old, new in sorted({tuple(pair) for pair in made["experts"].values()})
        )
        lines += [
            "",
            f"Compressed from {made['original']} by {made['stages']}; experts {experts}.",
            f"Calibration: {made['calibration']}. Seed: {made['seed']}.",
        ]
    return "\n".join(lines)


def _show_supported(record: dict[str, Any]) -> str:
    architectures = [
        (name, ", ".join(entry["methods"]) or "none", "yes" if entry["plain"] else "no", entry["remarks"])
        for name, entry in record["architectures"].items()
    ]
    parts = [table([("architecture", "methods", "plain", "remarks"), *architectures])]
    for key in (key for key in record if key != "architectures"):
        parts.append(table([(key.replace("_", " "), ""), *record[key].items()]))
    return "\n\n".join(parts)
