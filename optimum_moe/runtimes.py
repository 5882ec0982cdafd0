"""Runtimes that a compressed checkpoint is made for, as rows of data: what each of them can load."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_moe.settings import choose_one


@dataclass(frozen=True)
class Runtime:
    """What a runtime can load.

    Args:
        name: As in `runs_in`.
        loads_with: What loads the checkpoint, for reports.
        is_uniform: Whether all blocks must have the same number of experts, and all experts the same width, because one
            number in config.json says it for the whole model.
        is_stock: Whether experts must be stored in the original's own tensors, without other formats.
        width_step: Widths are multiples of it where the original's width is one, for quantization blocks and kernels.
    """

    name: str
    loads_with: str
    is_uniform: bool
    is_stock: bool
    width_step: int

    def step(self, intermediate_size: int) -> int:
        """The step of widths for experts of this width: halved until it divides it, at least 8."""
        step = self.width_step
        while step > _LEAST_STEP and intermediate_size % step:
            step //= 2
        return step


_LEAST_STEP = 8

RUNTIMES: tuple[Runtime, ...] = (
    Runtime(
        "any",
        "stock transformers classes, and runtimes that read them (vLLM, SGLang, llama.cpp, MLX)",
        is_uniform=True,
        is_stock=True,
        width_step=32,
    ),
    Runtime(
        "transformers",
        "transformers with this package, or with trust_remote_code=True",
        is_uniform=False,
        is_stock=False,
        width_step=8,
    ),
)


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        ValueError: If there is none; with the nearest match.
    """
    choose_one("runs_in", name, [runtime.name for runtime in RUNTIMES])
    return next(runtime for runtime in RUNTIMES if runtime.name == name)
