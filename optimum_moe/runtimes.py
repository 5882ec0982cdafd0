"""Runtimes that a checkpoint is made for, and quantizers that come after: what each can take, as rows of data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

from optimum_moe.settings import choose_one

PER_EXPERT = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe")
"""Model types of which other runtimes read one tensor for each expert."""


@dataclass(frozen=True)
class Runtime:
    """What a runtime can load.

    Args:
        name: As in `runs_in`.
        loads_with: What loads the checkpoint, for reports.
        formats: Formats that an expert may get between empty and unchanged; None for all.
        is_uniform: Whether all blocks must have the same number of experts, and all experts the same width, because one
            number in config.json says it for the whole model.
        is_stock: Whether experts must be stored in the original's own tensors, without other formats.
        removed_as: Format of what is left of a removed expert that calibration tokens reached.
        keeps_one: Whether every block must keep at least one whole expert.
        can_split: Whether the neurons of every expert can be split over processes (tensor parallelism).
        model_types: Model types whose replaced experts it finds; None where it does not matter.
        export_to: Target of `optimum_moe.export` without which the runtime does not load the checkpoint; empty if it
            loads the checkpoint as it is.
    """

    name: str
    loads_with: str
    formats: tuple[str, ...] | None = None
    is_uniform: bool = False
    is_stock: bool = False
    removed_as: str = "empty"
    keeps_one: bool = False
    can_split: bool = True
    model_types: tuple[str, ...] | None = None
    export_to: str = ""

    def objection(self, model_type: str, blocks: Iterable[str]) -> str | None:
        """Why the runtime does not find the replaced experts of a model; None if it does.

        Args:
            model_type: The field of that name in `config.json`.
            blocks: Names of the MoE blocks.
        """
        if self.model_types is None:
            return None
        if model_type not in self.model_types:
            return (
                f"vLLM replaces experts by constants only where it reads them one by one, which is known of "
                f"{', '.join(self.model_types)}, not of {model_type or 'a model without a type'}"
            )
        odd = next((block for block in blocks if sum(part.isdigit() for part in block.split(".")) != 1), None)
        if odd is None:
            return None
        return (
            "vLLM takes the layer of replaced experts from the one number in the name of their block, and "
            f"{odd} has another number of them"
        )


@dataclass(frozen=True)
class Quantizer:
    """What a quantizer asks of the matrices that it is given after the compression.

    Args:
        name: As in `quantize`.
        block: Weights beside each other in a row that are quantized together.
        for_each_rank: Whether every tensor-parallel process needs whole blocks, because the values are quantized before
            they are split.
        otherwise: What happens to a matrix whose rows are no multiple of the block.
    """

    name: str
    block: int
    for_each_rank: bool
    otherwise: str


RUNTIMES: tuple[Runtime, ...] = (
    Runtime(
        "any",
        "stock transformers classes, and runtimes that read them (vLLM, SGLang, llama.cpp, MLX)",
        formats=("narrow",),
        is_uniform=True,
        is_stock=True,
    ),
    Runtime(
        "vllm",
        "vLLM from 0.33 on as it is, and transformers with this package",
        formats=(),
        removed_as="constant",
        keeps_one=True,
        model_types=PER_EXPERT,
        export_to="vllm",
    ),
    Runtime(
        "vllm+optimum_moe",
        "vLLM and transformers, both with this package",
        formats=("narrow", "low_rank", "constant"),
    ),
    Runtime(
        "transformers",
        "transformers with this package, or with trust_remote_code=True",
        can_split=False,
    ),
)

_LARGER = "is stored in a larger type"

QUANTIZERS: tuple[Quantizer, ...] = (
    # llama.cpp: blocks of 32 weights, super-blocks of 256 for the K-quants.
    *(Quantizer(name, 32, False, _LARGER) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")),
    *(
        Quantizer(name, 256, False, _LARGER)
        for name in ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
    ),
    # vLLM: groups of 128 in what AWQ and GPTQ checkpoints usually have, blocks of 128 x 128 in FP8 ones.
    *(Quantizer(name, 128, True, "is refused") for name in ("awq", "gptq", "fp8")),
    # The stage Rounding, exported for vLLM.
    Quantizer("w4a16", 64, True, "is refused"),
    Quantizer("w8a16", 128, True, "is refused"),
    # MLX: groups of 64.
    *(Quantizer(name, 64, False, "is refused") for name in ("mlx4", "mlx8")),
)

_STEPS = (32, 16, 8)
_FEWEST_WIDTHS = 6


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        ValueError: If there is none; with the nearest match.
    """
    choose_one("runs_in", name, [runtime.name for runtime in RUNTIMES])
    return next(runtime for runtime in RUNTIMES if runtime.name == name)


def get_quantizer(name: str) -> Quantizer:
    """The quantizer of that name, in lower case.

    Raises:
        ValueError: If there is none; with the nearest match.
    """
    choose_one("quantize", name, [quantizer.name for quantizer in QUANTIZERS])
    return next(quantizer for quantizer in QUANTIZERS if quantizer.name == name)


def width_step(intermediate_size: int, quantizer: Quantizer | None = None, tensor_parallel: int = 1) -> int:
    """The step of the widths of experts that are stored in stock tensors.

    Without a quantizer it is 32, which every quantizer of 32 weights and most kernels take, or less where the original
    width is no multiple of it, or where it would leave fewer than six widths to choose from.

    Args:
        intermediate_size: The width of the original's experts.
        quantizer: What comes after the compression, None for nothing.
        tensor_parallel: Processes that the neurons of every expert are split over.
    """
    if quantizer is not None:
        return quantizer.block * tensor_parallel if quantizer.for_each_rank else lcm(quantizer.block, tensor_parallel)
    fitting = (s for s in _STEPS if intermediate_size % s == 0 and intermediate_size // s >= _FEWEST_WIDTHS)
    return lcm(next(fitting, _STEPS[-1]), tensor_parallel)
