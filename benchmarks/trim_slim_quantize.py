"""Trim, slim and quantize, as in "Demystifying the Compression of MoE": speed, bytes and quality in one run.

    python benchmarks/trim_slim_quantize.py --llama-cpp PATH --python ENVIRONMENT/bin/python [--on reference smollm2]

PATH and the environment are those that `make test-serving` makes: `.cache/serving/downloads/llama_cpp_python-*.tar.gz`
and `.cache/serving/llama_cpp/bin/python`. The original in f16, and its compressed forms in f16 and q4_0, are GGUF files
that run in llama.cpp. On held-out text they give perplexity, KL from the original in float32, and how often the most
likely token is the next one, as a share of the original's. Speed is that of a prompt in one batch, and of one token at
a time, all files side by side in alternating rounds. The bundled model is too small to say anything of speed: for it
files of random weights are timed that have as many layers and experts and are eight times as wide, and whose bytes are
given. SmolLM2-8x192, which `smollm2.py` makes, is timed itself. Writes benchmarks/results/trim_slim_quantize.md, of the
models of `--on` alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from quantized_plans import HeldOutLogits, Tools, quality
from reference import CALIBRATION, REFERENCES, ROOT
from smollm2 import CHECKPOINT

from optimum_moe import BlockDrop, ByteBudget, CalibrationConfig, ExpertPruning, MoECompressor, NeuronPruning, export
from optimum_moe.stages import Stage

RESULTS = ROOT / "benchmarks" / "results"
TRIM, SLIM = ExpertPruning(keep_ratio=0.75, saliency="fisher"), NeuronPruning(keep_ratio=2 / 3)
RECIPES: dict[str, list[Stage]] = {
    "block drop, 25% of the layers": [BlockDrop(keep_ratio=0.75)],
    "trim, 75% of the experts": [TRIM],
    "slim, 2/3 of the neurons": [SLIM],
    "trim and slim": [TRIM, SLIM],
    "byte budget, 50%": [ByteBudget(share=0.5)],
    "byte budget, 25%": [ByteBudget(share=0.25)],
}
TYPES = ("f16", "q4_0")
PROMPT, STEPS, ROUNDS, THREADS = 256, 64, 7, 2


@dataclass(frozen=True)
class Model:
    """A model that is measured.

    Args:
        checkpoint: Its folder.
        tokens: Held-out tokens that quality is measured on.
        calibration: Tokens of calibration.
        wider: How many times as wide the files are that are timed; with 1 they are the same.
    """

    checkpoint: Path
    tokens: int
    calibration: int
    wider: int = 1


MODELS = {
    "reference": Model(REFERENCES["reference"].model, 16384, 32768, wider=8),
    "smollm2": Model(CHECKPOINT, 2048, 4096),
}
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")


def seconds_of(files: Sequence[Path], tools: Tools, folder: Path) -> list[Mapping[str, float]]:
    """Median seconds of the prompt and of all steps after it, for each file."""
    asked, answered = folder / "request.json", folder / "answer.json"
    asked.write_text(
        json.dumps(
            {"files": [*map(str, files)], "prompt": PROMPT, "steps": STEPS, "rounds": ROUNDS, "threads": THREADS}
        ),
        encoding="utf-8",
    )
    script = Path(__file__).with_name("llama_cpp_timing.py")
    subprocess.run([tools.python, str(script), str(asked), str(answered)], check=True)
    found = json.loads(answered.read_text(encoding="utf-8"))
    return [{name: statistics.median(times) for name, times in each.items()} for each in found]


def compressed(model: Model, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The checkpoints of all recipes by name, and why others cannot be."""
    calibration = CalibrationConfig(str(CALIBRATION), sequence_length=256, max_tokens=model.calibration)
    found, refused = {"original": model.checkpoint}, []
    for name, stages in RECIPES.items():
        try:
            compressor = MoECompressor.from_pretrained(model.checkpoint, stages, calibration, progress=False)
        except ValueError as refusal:
            refused.append(f"{name}: {refusal}")
            continue
        compressor.apply()
        found[name] = compressor.save_pretrained(folder / f"checkpoint {len(found)}")
    return found, refused


def wide(checkpoint: Path, wider: int, folder: Path) -> Path:
    """A checkpoint of random weights with a tokenizer, like another one, but so many times as wide."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    for name in WIDTHS:
        setattr(config, name, getattr(config, name) * wider)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def exported(checkpoint: Path, tools: Tools, name: str, folder: Path) -> list[Path]:
    """The GGUF files of a checkpoint, one for each of `TYPES`."""
    files = [folder / f"{name} {kind}.gguf" for kind in TYPES]
    for file, kind in zip(files, TYPES, strict=True):
        export(checkpoint, "gguf", file, quantize=kind, llama_cpp=tools.llama_cpp, python=tools.python)
    return files


def table(model: Model, tools: Tools, folder: Path) -> str:
    """The lines of a model's table."""
    checkpoints, refused = compressed(model, folder)
    held_out = HeldOutLogits.of(model.checkpoint, tokens=model.tokens)
    names = [(name, kind) for name in checkpoints for kind in TYPES]
    scores, files = [], []
    for number, checkpoint in enumerate(checkpoints.values()):
        own = exported(checkpoint, tools, f"{number}", folder)
        scores += [quality(file, held_out, tools) for file in own]
        if model.wider > 1:
            own = exported(wide(checkpoint, model.wider, folder / f"wide {number}"), tools, f"wide {number}", folder)
        files += own
    times = seconds_of(files, tools, folder)
    lines = [
        "| checkpoint | type | MB | smaller | prefill, tokens/s | faster | decode, tokens/s | faster "
        "| perplexity | KL | right next tokens, kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    whole, first, best = files[0].stat().st_size, times[0], scores[0].accuracy
    for (name, kind), file, taken, score in zip(names, files, times, scores, strict=True):
        size, prefill, decode = file.stat().st_size, taken["prefill"], taken["decode"]
        lines.append(
            f"| {name} | {kind} | {size / 1e6:.2f} | {whole / size:.2f}x | {PROMPT / prefill:,.0f} | "
            f"{first['prefill'] / prefill:.2f}x | {STEPS / decode:,.0f} | {first['decode'] / decode:.2f}x | "
            f"{score.perplexity:.2f} | {score.kl:.4f} | {score.accuracy / best:.0%} |"
        )
    return "\n".join([*lines, *(f"\nNot possible: {reason}" for reason in refused)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--llama-cpp", required=True)
    parser.add_argument("--python", required=True)
    args = parser.parse_args()
    tools = Tools(args.llama_cpp, args.python)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parts = ["# Trim, slim and quantize", (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip()]
    parts.append(f"{PROMPT} tokens of prompt, {STEPS} steps, median of {ROUNDS} rounds, {THREADS} threads.")
    for name in args.on:
        with TemporaryDirectory() as folder:
            parts.append(f"## {name}\n\n{table(MODELS[name], tools, Path(folder))}")
        print(parts[-1], flush=True)
        (RESULTS / "trim_slim_quantize.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
