"""What the commands share: arguments, their parsing, tables, and how errors end a run.

Standard library only besides optimum's base class, so that `optimum-cli --help` stays fast; `execute` imports the rest.
"""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand

if TYPE_CHECKING:
    from optimum_moe.recipes import Recipe

USER_ERROR = 2
SYSTEM_ERROR = 1
INTERRUPTED = 130


class MoESubcommand(BaseOptimumCLICommand):
    """One command; subclasses say which arguments it takes and what it does.

    A `ValueError` states a rule, the actual values and a remedy, an `OSError` what the system refused: neither needs a
    traceback.
    """

    args: Namespace

    def execute(self) -> None:
        """Do what the command is for."""
        raise NotImplementedError

    def run(self) -> None:
        """Execute; exit with 2 on an error of the user's, 1 on one of the system's, 130 on Ctrl-C."""
        try:
            with _plain_warnings():
                self.execute()
        except ValueError as error:
            _exit(f"error: {error}", USER_ERROR)
        except OSError as error:
            _exit(f"error: {error}", SYSTEM_ERROR)
        except KeyboardInterrupt:
            _exit("interrupted", INTERRUPTED)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings without the line of code that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _exit(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(status)


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """How to find and read a checkpoint, beside its name."""
    parser.add_argument("--revision", help="Branch, tag or commit of a Hub model.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Run the modeling code of the checkpoint.")
    parser.add_argument("--dequantize", action="store_true", help="Read an FP8 or MXFP4 checkpoint as its bf16 values.")
    parser.add_argument("--dtype", default="auto", help='Of the weights, such as "bfloat16"; default as stored.')


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """What is done to which model."""
    parser.add_argument("--model", required=True, help="Hub id, or folder of a checkpoint in safetensors format.")
    parser.add_argument(
        "--recipe",
        default="budget",
        help="Preset (`optimum-cli moe inspect --list` shows them) or YAML file; by default the byte budget.",
    )
    parser.add_argument("--budget", type=float, help="Share of the experts' bytes that remains, in (0, 1].")
    parser.add_argument("--num-experts", type=int, help="Experts that remain in each block, instead of the recipe's.")
    parser.add_argument("--keep-ratio", type=float, help="Share of experts that remain, in (0, 1].")
    parser.add_argument("--target-size", help='Size of the checkpoint, such as "16GB" or "900MiB".')
    parser.add_argument(
        "--mtp",
        default="error",
        choices=("error", "copy", "cut", "drop"),
        help="What becomes of multi-token-prediction layers; by default a checkpoint that has some is refused.",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="Another setting of the method, the value in YAML; may be repeated. Example: --set layers=[0,1]",
    )


def checkpoint_arguments(args: Namespace) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` of the arguments that were given."""
    given: dict[str, Any] = {"dtype": args.dtype}
    if args.revision is not None:
        given["revision"] = args.revision
    if args.trust_remote_code:
        given["trust_remote_code"] = True
    if args.dequantize:
        given["dequantize"] = True
    return given


def recipe_of(args: Namespace) -> Recipe:
    """The recipe that the arguments describe.

    Raises:
        ValueError: If there is no such recipe, or a setting is unknown, given twice or no YAML.
    """
    import yaml

    from optimum_moe.recipes import load_recipe

    overrides = {
        name: value
        for name in ("num_experts", "keep_ratio", "target_size", "budget")
        if (value := getattr(args, name)) is not None
    }
    for setting in args.set:
        field, separator, text = setting.partition("=")
        if not separator or not field:
            raise ValueError(f"--set {setting!r} has no value. Write --set field=value.")
        field = field.strip().replace("-", "_")
        if field in overrides:
            raise ValueError(f"{field} is given twice. Give it once.")
        try:
            overrides[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--set {setting!r}: {text!r} is no YAML value. Quote text that has special characters, "
                f"for example --set 'protect=[\"*.layers.0.*\"]'."
            ) from error
    return load_recipe(args.recipe, overrides)


def text_source(values: Sequence[str] | None) -> Any:
    """A source of text: one path, or a mixture where there are several or one has a weight ("PATH:WEIGHT")."""
    pairs = [_weighted(value) for value in values or ()]
    if len(pairs) == 1 and pairs[0][1] is None:
        return pairs[0][0]
    return [(path, 1.0 if weight is None else weight) for path, weight in pairs] or None


def _weighted(value: str) -> tuple[str, float | None]:
    path, separator, weight = value.rpartition(":")
    if not separator or Path(value).exists():
        return value, None
    try:
        return path, float(weight)
    except ValueError:
        return value, None


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned text, the first one being the header; numbers are flushed right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(rows[0]))]
    right = [all(isinstance(row[column], int) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    )
    return "\n".join(lines)
