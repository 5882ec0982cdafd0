"""Common parts of the commands: arguments, their parsing, tables, and the handling of errors.

Imports only the standard library and optimum's base class, so that `optimum-cli --help` is fast; `execute` imports the
rest.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand

from optimum_moe.checkpoint.names import check_checkpoint_name, data_set_name
from optimum_moe.cli.errors import ParseArgs, ending_in_one_line, name_flags
from optimum_moe.runtimes import QUANTIZERS, RUNTIMES
from optimum_moe.settings import percent, token_count

if TYPE_CHECKING:
    from optimum_moe.recipe import Recipe

SIZES = ("num_experts", "keep_ratio", "target_size", "share")
CALIBRATION = ("text_column", "num_samples", "max_tokens", "sequence_length", "batch_size", "packing")
"""Flags that are fields of `CalibrationConfig`."""
_TARGETS = ("runs_in", "quantize", "tensor_parallel", "bits")


class MoESubcommand(BaseOptimumCLICommand):
    """Base class of a command; subclasses define its arguments and `execute`."""

    args: Namespace

    def execute(self) -> None:
        """Run the command with the parsed arguments."""
        raise NotImplementedError

    def run(self) -> None:
        """Call `execute`; errors are printed in one line, see `errors`."""
        with ending_in_one_line(self.parse_args, self.args.debug), _plain_warnings(self.parse_args):
            for path in self.args.imported:
                _import_file(Path(path))
            self.execute()


def _import_file(path: Path) -> None:
    """Run a Python file of the user, which registers what recipes and checkpoints name.

    Raises:
        ValueError: If there is no such file.
    """
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"--import {path}: there is no such Python file (the working directory is {Path.cwd()}). Give the path of "
            "a .py file that registers functions or stages of your own."
        )
    name = f"imported_by_optimum_cli_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    # A dataclass, such as a stage, looks up its module while it is defined.
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        error.add_note(f"It was raised by --import {path}.")
        raise


@contextmanager
def _plain_warnings(parse_args: ParseArgs) -> Iterator[None]:
    """Show warnings without the line of code that raised them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {name_flags(str(message), parse_args)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def prepare(parser: ArgumentParser, example: str) -> None:
    """Add the arguments that all commands have, and an example, which follows `optimum-cli moe`."""
    parser.allow_abbrev = False
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"example:\n  optimum-cli moe {example}"
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    parser.add_argument(
        "--import",
        dest="imported",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file that registers functions, stages, formats or architectures of your own; may be repeated.",
    )


def add_json_argument(parser: ArgumentParser) -> None:
    """Add the flag that prints results for machines."""
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def add_model_argument(parser: ArgumentParser, what: str = "Hub id, or folder of a checkpoint.") -> None:
    """Add the model, as a positional argument or as a flag."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=what)
    parser.add_argument("--model", dest="named_model", help=argparse.SUPPRESS)


def model_of(args: Namespace) -> str:
    """The given model, after a check that its name is not a mistyped path.

    Raises:
        ValueError: If none or two models are given, or the name can only be a mistyped path.
    """
    given = [name for name in (args.model, args.named_model) if name is not None]
    if len(given) != 1:
        said = " and ".join(given) or "none"
        raise ValueError(f"One MODEL is needed, got {said}. Give a Hub id, or the folder of a checkpoint.")
    check_checkpoint_name(given[0])
    return str(given[0])


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that find and read a checkpoint, beside its name."""
    parser.add_argument("--revision", help="Branch, tag or commit of a Hub model.")
    parser.add_argument("--subfolder", help="Folder of the checkpoint inside of MODEL.")
    parser.add_argument("--variant", help='Which weights, such as "fp16" for model.fp16.safetensors.')
    parser.add_argument("--trust-remote-code", action="store_true", help="Run the modeling code of the checkpoint.")
    parser.add_argument("--dequantize", action="store_true", help="Read an FP8 or MXFP4 checkpoint as its bf16 values.")
    parser.add_argument("--dtype", default="auto", help='Dtype of the weights, such as "bfloat16"; default as stored.')


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """Add the model and the arguments of a recipe."""
    add_model_argument(parser, "Hub id, or folder of a checkpoint in safetensors format.")
    parser.add_argument(
        "--recipe",
        default="byte-budget",
        help="Preset (`optimum-cli moe inspect --list` shows them) or YAML file; by default the byte budget.",
    )
    parser.add_argument("--share", type=share, help="Share of the experts' bytes that remains: 0.5, or 50%%.")
    parser.add_argument("--num-experts", type=int, help="Experts that remain in each block, overrides the recipe.")
    parser.add_argument("--keep-ratio", type=share, help="Share of experts that remain: 0.5, or 50%%.")
    parser.add_argument("--target-size", help='Size of the checkpoint, such as "16GB", "900MiB" or "50%%".')
    parser.add_argument(
        "--runs-in",
        choices=[runtime.name for runtime in RUNTIMES],
        help="What has to load a byte budget's checkpoint; default any: whatever loads the original.",
    )
    parser.add_argument(
        "--quantize",
        type=str.lower,
        choices=[quantizer.name for quantizer in QUANTIZERS],
        metavar="NAME",
        help="Quantizer that comes after a byte budget, such as q4_k_m, q8_0, awq or fp8: widths fit its blocks.",
    )
    parser.add_argument(
        "--tensor-parallel", type=int, metavar="N", help="Processes that a byte budget's experts are split over."
    )
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        metavar="N",
        help="Let a byte budget store matrices in 8 or 4 bits too; needs --runs-in transformers.",
    )
    parser.add_argument(
        "--mtp",
        default="error",
        choices=("error", "copy", "cut", "drop"),
        help="Handling of multi-token-prediction layers; by default a checkpoint that has some is refused.",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="Another setting of a stage, with a YAML value; may be repeated. It applies to the first stage that has "
        "the setting, or to a named one: --set layers=[0,1], --set low-rank-sparse.rank=16",
    )


def add_calibration_arguments(parser: ArgumentParser) -> None:
    """Add the source of calibration data, its tokenizer and the flags of `CALIBRATION`."""
    parser.add_argument(
        "--calibration",
        action="append",
        metavar="TEXT[:WEIGHT]",
        help="Text to observe the model on: a .txt, .jsonl or .parquet file, or a Hub dataset as org/name, "
        "org/name:split or org/name:config:split; repeat it for a mixture by weight.",
    )
    parser.add_argument("--text-column", help='Column of the text; default "text", else "messages".')
    parser.add_argument("--tokenizer", help="Hub id, or folder; default the checkpoint's.")
    parser.add_argument("--num-samples", type=int, help="Maximum number of calibration rows.")
    parser.add_argument(
        "--max-tokens",
        type=tokens,
        metavar="N",
        help="Maximum number of calibration tokens, such as 64k or 1M; default 65536.",
    )
    parser.add_argument("--sequence-length", type=int, help="Tokens per calibration row; default 512.")
    parser.add_argument("--batch-size", type=int, help="Calibration rows per forward pass; default 8.")
    parser.add_argument(
        "--no-packing",
        dest="packing",
        action="store_false",
        default=None,
        help="One padded row per document, instead of rows cut from joined documents.",
    )


def tokens(text: str) -> int:
    """Parse a number of tokens, written out or with k, M or G, for argparse."""
    found = token_count(text)
    if not isinstance(found, int):
        raise ValueError(text)
    return found


def add_runtime_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that find the tools of a runtime."""
    parser.add_argument(
        "--llama-cpp",
        metavar="PATH",
        help="Checkout of llama.cpp, or source distribution of llama-cpp-python (.tar.gz), with the converter to GGUF.",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="Interpreter of the environment that has the runtime: ENVIRONMENT/bin/python; by default this one.",
    )


def given_flags(args: Namespace, names: Sequence[str]) -> list[str]:
    """The flags among `names` that were given, as the user wrote them."""
    spelled = {"packing": "--no-packing"}
    return [spelled.get(name, _flag(name)) for name in names if getattr(args, name) is not None]


def share(text: str) -> float:
    """Parse a share, written as a number or in percent, for argparse."""
    return float(percent(text))


def checkpoint_arguments(args: Namespace) -> dict[str, Any]:
    """The given arguments as keyword arguments for `from_pretrained`."""
    given: dict[str, Any] = {"dtype": args.dtype}
    for name in ("revision", "subfolder", "variant"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    if args.trust_remote_code:
        given["trust_remote_code"] = True
    if args.dequantize:
        given["dequantize"] = True
    return given


def recipe_of(args: Namespace) -> Recipe:
    """The recipe that the arguments describe.

    Raises:
        ValueError: If there is no such recipe, or a setting is unknown, given twice or not YAML.
    """
    import yaml

    check_recipe_file(args.recipe)
    from optimum_moe.recipe import load_recipe

    overrides = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    _check_sizes(args.recipe, list(overrides))
    overrides |= {name: value for name in _TARGETS if (value := getattr(args, name)) is not None}
    for setting in args.set:
        field, separator, text = setting.partition("=")
        if not separator or not field:
            raise ValueError(f"--set {setting!r} has no value. Write --set field=value.")
        stage, _, field = field.strip().rpartition(".")
        field = f"{stage}." * bool(stage) + field.replace("-", "_")
        if field in overrides:
            raise ValueError(f"{field} is given twice. Give it once.")
        try:
            overrides[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--set {setting!r}: {text!r} is not a YAML value. Quote text that has special characters, "
                f"for example --set 'protect=[\"*.layers.0.*\"]'."
            ) from error
    return load_recipe(args.recipe, overrides)


def check_recipe_file(name: str) -> None:
    """Raise a `ValueError` if a YAML file does not exist."""
    if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
        raise ValueError(
            f"No recipe file {name}. Give an existing one, or a preset of `optimum-cli moe inspect --list`."
        )


def _check_sizes(recipe: str, given: Sequence[str]) -> None:
    """Raise a `ValueError` for a size setting that no stage of the recipe has, with the recipes that have it."""
    from optimum_moe.recipe import preset_names, size_fields

    own = size_fields(recipe)
    for name in (name for name in given if own and name not in own):
        taken = ", ".join(_flag(size) if size in SIZES else f"--set {size}=" for size in sorted(own))
        others = ", ".join(preset for preset in preset_names() if name in size_fields(preset))
        raise ValueError(
            f"{_flag(name)} is not a setting of the recipe {recipe!r}, which takes {taken}. Give one of these, or also "
            f"another recipe: --recipe, one of {others}."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_text(values: Sequence[str] | None, flag: str) -> None:
    """Refuse missing text files before heavy imports, even if the text is not used.

    Raises:
        ValueError: If a value is neither a text file nor the name of a Hub dataset.
    """
    for path in (_named(_weighted(value)[0])[1] for value in values or ()):
        if Path(path).is_file() or data_set_name(path) is not None:
            continue
        raise ValueError(
            f"{flag} {path}: there is no such file (the working directory is {Path.cwd()}). Give a .txt, .jsonl or "
            ".parquet file, or a Hub dataset as org/name:split."
        )


def text_source(values: Sequence[str] | None) -> Any:
    """A source of text: one path, or a mixture if there are several or one has a weight ("PATH:WEIGHT").

    A path may have the name of its domain before it ("DOMAIN=PATH").
    """
    pairs = [_weighted(value) for value in values or ()]
    sources = [(path if domain is None else {domain: path}) for domain, path in (_named(path) for path, _ in pairs)]
    if len(pairs) == 1 and pairs[0][1] is None:
        return sources[0]
    return [
        (source, 1.0 if weight is None else weight) for source, (_, weight) in zip(sources, pairs, strict=True)
    ] or None


def _named(value: str) -> tuple[str | None, str]:
    """The domain and the path of "DOMAIN=PATH"; no domain for the path of a file that has such a name."""
    domain, separator, path = value.partition("=")
    return (domain, path) if separator and domain and not Path(value).exists() else (None, value)


def _weighted(value: str) -> tuple[str, float | None]:
    path, separator, weight = value.rpartition(":")
    if not separator or Path(value).exists():
        return value, None
    try:
        return path, float(weight)
    except ValueError:
        return value, None


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned text with the first one as header; numbers are right-aligned."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(rows[0]))]
    right = [all(isinstance(row[column], int) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    )
    return "\n".join(lines)
