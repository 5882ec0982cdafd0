"""The runtimes that a checkpoint is exported to, as rows of data: what each of them can express and load."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_moe.exporting.exported import CONSTANTS_FIELD, Exported
from optimum_moe.exporting.gguf_types import FILE_TYPES
from optimum_moe.reporting.loads_in import objection_of_plugin
from optimum_moe.settings import choose_one


@dataclass(frozen=True)
class Target:
    """A runtime that a checkpoint is exported to.

    Args:
        name: As in `to`.
        runtime: Name of the runtime, for messages.
        suffix: What the result's name has after the checkpoint's.
        quantize: Types of values that the export can write; empty if it writes the checkpoint's own.
        needs: What the export needs beside this package, and how to install it.
        runs_formats: Whether the runtime runs experts in compressed formats and maps, with this package installed.
        runs_constants: Whether it runs experts that are replaced by a constant output.
        takes_rounded: Whether it takes experts that were stored in 4 or 8 bits by this package.
    """

    name: str
    runtime: str
    suffix: str
    quantize: tuple[str, ...] = ()
    needs: str = ""
    runs_formats: bool = False
    runs_constants: bool = False
    takes_rounded: bool = False


CONVERTER = (
    "Download llama.cpp's converter with `pip download --no-deps --no-binary :all: llama-cpp-python` and pass the file "
    "as llama_cpp= (--llama-cpp), or pass a checkout of llama.cpp"
)
QUANTIZER = (
    "Install llama.cpp's quantizer with `pip install llama-cpp-python` (it compiles; without a compiler: a release of "
    "llama.cpp) and pass that environment as python= (--python), or put llama-quantize on PATH"
)
MLX = "Install it with `pip install mlx-lm` on a Mac, `pip install 'mlx[cpu]' mlx-lm` on Linux"

TARGETS: tuple[Target, ...] = (
    Target(
        "gguf",
        "llama.cpp",
        "gguf",
        quantize=tuple(kind.name for kind in FILE_TYPES),
        needs=f"{CONVERTER}. For quantized types: {QUANTIZER}.",
    ),
    Target("mlx", "MLX", "mlx", quantize=("3bit", "4bit", "5bit", "6bit", "8bit"), needs=f"{MLX}."),
    Target("vllm", "vLLM", "vllm", runs_formats=True, runs_constants=True),
    Target("compressed-tensors", "vLLM", "packed", quantize=("w4a16", "w8a16"), takes_rounded=True),
    Target("transformers4", "transformers 4", "transformers4"),
)


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: If there is none; with the nearest match.
    """
    choose_one("to", name, [target.name for target in TARGETS])
    return next(target for target in TARGETS if target.name == name)


def refuse_inexpressible(checkpoint: Exported, target: Target) -> None:
    """Raise a `ValueError` for a checkpoint that the runtime cannot load, with what to do instead."""
    structure = [*checkpoint.structure]
    if target.runs_constants and CONSTANTS_FIELD in checkpoint.config:
        structure = [said for said in structure if "constant" not in said]
    if structure and not (target.runs_formats or (target.takes_rounded and checkpoint.is_structured)):
        raise ValueError(
            f"{checkpoint.directory} has {' and '.join(structure)}, which {target.runtime} cannot express. Compress "
            "the original again with --runs-in any (the same number of experts and the same width in every layer), "
            "or with a preset that makes plain checkpoints (reap, m-smoe-plain)."
        )
    if checkpoint.is_structured and target.runs_formats:
        objection = objection_of_plugin(checkpoint.config)
        if objection is not None:
            raise ValueError(objection)
    if checkpoint.quantization is not None and target.quantize:
        raise ValueError(
            f"{checkpoint.directory} is quantized with {checkpoint.quantization}. Export the checkpoint from before "
            "its quantization, and give quantize= instead."
        )


def check_quantize(target: Target, quantize: str | None) -> None:
    """Raise a `ValueError` for a type of values that the export to this runtime cannot write."""
    if quantize is None:
        return
    if not target.quantize:
        raise ValueError(
            f"to={target.name!r} writes the checkpoint's own values, so quantize={quantize!r} has no effect. Leave it "
            "out, or quantize experts for vLLM with to='compressed-tensors' (--to compressed-tensors)."
        )
    choose_one("quantize", quantize.lower(), target.quantize)
