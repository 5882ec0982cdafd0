"""Compressed and then quantized to GGUF: file size, perplexity and KL from the original, measured in llama.cpp itself.

    python benchmarks/quantized_plans.py --original DIR --shares 50 25 --types q8_0 q4_0 \
        --llama-cpp PATH --python ENVIRONMENT/bin/python [--text held_out.jsonl] [--calibration corpus.txt]

The original is compressed to each share of its experts' bytes by REAP, by the byte budget for any runtime, and by one
that was made for the quantizer; `NAME=FOLDER` adds checkpoints, `--whole` types of the whole original. Each checkpoint
is exported with `optimum_moe.export`, which quantizes with llama.cpp, and runs in llama.cpp through llama-cpp-python,
activations quantized as llama.cpp does on this processor, on whole windows of held-out text. KL is from the logits of
the original in transformers, in float32. `measure` is the same as a function.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from reference import CALIBRATION, HELD_OUT
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, MoECompressor, export
from optimum_moe.calibration.data import build_batches
from optimum_moe.exporting.environment import run_script
from optimum_moe.exporting.gguf_file import read_gguf

WINDOW, TOKENS = 256, 16384


@dataclass(frozen=True)
class Tools:
    """Where llama.cpp is.

    Args:
        llama_cpp: As in `export`.
        python: Interpreter of the environment that has llama-cpp-python.
    """

    llama_cpp: str
    python: str


@dataclass(frozen=True, eq=False)
class HeldOutLogits:
    """Held-out windows, and the log-probabilities that the original gives.

    Args:
        rows: Token ids of each window.
        log_probs_WSV: (windows, tokens, vocabulary) of the original, float32.
    """

    rows: list[list[int]]
    log_probs_WSV: torch.Tensor

    @classmethod
    def of(cls, original: str | Path, text: Any = HELD_OUT, tokens: int = TOKENS) -> HeldOutLogits:
        """Run the original on the windows of a text."""
        tokenizer = AutoTokenizer.from_pretrained(original)
        batches = build_batches(CalibrationConfig(text, sequence_length=WINDOW, max_tokens=tokens), tokenizer)
        model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
        with torch.no_grad():
            found = [model(batch["input_ids"]).logits.log_softmax(-1) for batch in batches]
        rows = [row for batch in batches for row in batch["input_ids"].tolist()]
        return cls(rows, torch.cat(found))


@dataclass(frozen=True)
class Measured:
    """What one file gives.

    Args:
        name: Name of the checkpoint.
        quantize: Type of the values.
        bytes: Size of the file.
        expert_bytes: Bytes of the routed experts in it.
        perplexity: On the windows.
        kl: Mean KL(original, this) in nats per token.
        types: Number of tensors of each type, so that fallbacks are seen.
    """

    name: str
    quantize: str
    bytes: int
    expert_bytes: int
    perplexity: float
    kl: float
    types: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Quality:
    """What a file gives on held-out windows.

    Args:
        perplexity: Of the windows.
        kl: Mean KL(original, this) in nats per token.
        accuracy: Share of the tokens of which the most likely next one is the next one.
    """

    perplexity: float
    kl: float
    accuracy: float


def quality(file: Path, held_out: HeldOutLogits, tools: Tools) -> Quality:
    """Run a GGUF file on held-out windows.

    Args:
        file: The file.
        held_out: Windows with the logits of the original.
        tools: Where llama.cpp is.
    """
    with TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.npy"
        request = {"checkpoint": str(file), "prompts": held_out.rows, "num_tokens": 0, "logits": str(logits)}
        run_script(tools.python, "run_llama_cpp", request, "run the file")
        log_probs_WSV = torch.from_numpy(np.load(logits)).log_softmax(-1)
    own_WSV, next_WS = held_out.log_probs_WSV, torch.tensor(held_out.rows)[:, 1:]
    kl = (own_WSV.exp() * (own_WSV - log_probs_WSV)).sum(-1).mean()
    nll = -log_probs_WSV[:, :-1].gather(-1, next_WS[..., None]).mean()
    right = (log_probs_WSV[:, :-1].argmax(-1) == next_WS).float().mean()
    return Quality(float(nll.exp()), float(kl), float(right))


def measure(
    name: str, checkpoint: str | Path, quantize: str, held_out: HeldOutLogits, tools: Tools, calibration: Any = None
) -> Measured:
    """Export a checkpoint to a GGUF file of a type, and run it on held-out windows.

    Args:
        name: Its name in the table.
        checkpoint: Its folder.
        quantize: As in `export`.
        held_out: Windows with the logits of the original.
        tools: Where llama.cpp is.
        calibration: Text for the importance matrix; None for none.
    """
    with TemporaryDirectory() as folder:
        file = export(
            checkpoint,
            "gguf",
            Path(folder) / "model.gguf",
            quantize=quantize,
            calibration=calibration,
            llama_cpp=tools.llama_cpp,
            python=tools.python,
        )
        header, size = read_gguf(file), file.stat().st_size
        found = quality(file, held_out, tools)
    experts = sum(tensor.bytes or 0 for name, tensor in header.tensors.items() if "_exps." in name)
    return Measured(name, quantize, size, experts, found.perplexity, found.kl, header.types())


def table(rows: Sequence[Measured]) -> str:
    """Markdown, in order of the size."""
    lines = ["| checkpoint | type | MB | experts, MB | perplexity | KL | tensors |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row.bytes):
        types = ", ".join(f"{count} {name}" for name, count in sorted(row.types.items()))
        lines.append(
            f"| {row.name} | {row.quantize} | {row.bytes / 1e6:.3f} | {row.expert_bytes / 1e6:.3f} | "
            f"{row.perplexity:.2f} | {row.kl:.4f} | {types} |"
        )
    return "\n".join(lines)


def made(original: str, shares: Sequence[float], types: Sequence[str], folder: Path) -> list[tuple[str, str, str]]:
    """Name, folder and type of the original compressed in all ways; one calibration serves all."""
    calibration = CalibrationConfig(str(CALIBRATION), sequence_length=256, max_tokens=32768)
    found, statistics = [], None
    for share in shares:
        budgets = {f"byte budget for {kind}": ByteBudget(share=share / 100, quantize=kind) for kind in types}
        methods = {"byte budget": ByteBudget(share=share / 100), **budgets}
        methods["REAP"] = ExpertPruning(keep_ratio=share / 100, saliency="reap")
        for name, method in methods.items():
            try:
                compressor = MoECompressor.from_pretrained(original, method, calibration, progress=False)
            except ValueError as refusal:
                print(f"{name} cannot leave {share:g}%: {refusal}", file=sys.stderr)
                continue
            statistics = statistics or compressor.calibrate()
            compressor.apply(statistics=statistics)
            at = compressor.save_pretrained(folder / f"{name} {share:g}".replace(" ", "_"))
            served = [kind for kind in types if name not in budgets or name.endswith(f" {kind}")]
            found += [(f"{name}, {share:g}%", str(at), kind) for kind in served]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--original", required=True)
    parser.add_argument("--shares", type=float, nargs="*", default=[], help="per cent of the experts' bytes")
    parser.add_argument("--whole", nargs="*", default=[], help="types of the original itself")
    parser.add_argument("--output", type=Path, help="also write the table there")
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_0"])
    parser.add_argument("--text", default=str(HELD_OUT))
    parser.add_argument("--calibration", help="text for importance matrices")
    parser.add_argument("--llama-cpp", required=True)
    parser.add_argument("--python", required=True)
    args = parser.parse_args()
    tools = Tools(args.llama_cpp, args.python)
    held_out = HeldOutLogits.of(args.original, args.text)
    wanted = [("original", args.original, kind) for kind in args.whole]
    wanted += [(*entry.split("=", 1), kind) for entry in args.checkpoints for kind in args.types]
    with TemporaryDirectory() as folder:
        wanted += made(args.original, args.shares, args.types, Path(folder))
        rows = [measure(name, at, kind, held_out, tools, args.calibration) for name, at, kind in wanted]
    print(table(rows))
    if args.output:
        args.output.write_text(f"{args.original}\n\n{table(rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
