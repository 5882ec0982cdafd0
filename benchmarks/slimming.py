"""Trimming, slimming and quantizing experts, one after the other and alone, on the bundled models.

    python benchmarks/slimming.py [--on reference] [--rows "21 experts of 56 neurons, four bits"]

KL, perplexity and top-1 agreement on held-out text by the share of the experts' bytes that is stored; then zeros, which
save none. One calibration serves all rows of a model, that of `byte_budget.py`, whose rows compare.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from byte_budget import SETTINGS, key_of, statistics_of
from reference import CALIBRATION, HELD_OUT, REFERENCES, ROOT, Reference

from optimum_moe import ExpertPruning, MoECompressor, NeuronPruning, Rounding, Statistics, WeightPruning
from optimum_moe.evaluation import evaluate
from optimum_moe.stages import Stage

COLUMNS = ("perplexity", "kl", "top1_agreement")
# Experts and neurons, for a quarter and an eighth of the bytes: trimmed only, slimmed only, and both.
SIZES = {
    "reference": ((29, 80), (32, 72), (14, 80), (32, 40), (21, 56)),
    # Of its shared expert the width of the others has to be a divisor.
    "reference_deepseek": ((22, 96), (10, 96), (24, 48), (22, 48)),
}


def quantized(reference: Reference, experts: int, neurons: int) -> list[Stage]:
    """The stages that leave a number of experts and of their neurons, in four bits."""
    stages: list[Stage] = []
    if experts < reference.num_experts:
        stages.append(ExpertPruning(num_experts=experts, saliency="fisher"))
    if neurons < reference.intermediate_size:
        stages.append(NeuronPruning(num_neurons=neurons))
    return [*stages, Rounding()]


def rows(name: str) -> dict[str, list[Stage]]:
    """Recipes by what a table calls them."""
    found = {f"{e} experts of {n} neurons, four bits": quantized(REFERENCES[name], e, n) for e, n in SIZES[name]}
    for method in ("magnitude", "wanda", "sparsegpt"):
        found |= {f"{pattern} {method}": [WeightPruning(method, pattern)] for pattern in ("unstructured", "2:4")}
    return found


def line(
    reference: Reference, name: str, stages: list[Stage], statistics: Statistics, original: Any, tokenizer: Any
) -> str:
    """The line of a recipe in the table."""
    compressor = MoECompressor.from_pretrained(reference.model, stages, progress=False)
    shown, whole, routers = compressor.preview(), 0.0, 0.0
    model = compressor.apply(statistics=statistics)
    for block in compressor.source.info.blocks:
        whole += block.bytes_of_experts(block.num_experts, block.num_experts * block.expert_parameters)
        routers += (block.num_experts - shown.counts[block.name][1]) * block.router_parameters * block.router_itemsize
    result = evaluate(
        model,
        str(HELD_OUT),
        reference=original,
        tokenizer=tokenizer,
        calibration=str(CALIBRATION),
        max_tokens=16384,
        tasks=("perplexity", "agreement"),
        progress=False,
    )
    scores = " | ".join(f"{result.scores[column].value:.4f}" for column in COLUMNS)
    return f"| {name} | {1 - (shown.before.bytes - shown.after.bytes - routers) / whole:.1%} | {scores} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, nargs="+", default=list(REFERENCES))
    parser.add_argument("--rows", nargs="+", help="by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "byte_budget")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    for name in arguments.on:
        reference, setting = REFERENCES[name], SETTINGS[name]
        statistics = statistics_of(setting, arguments.seed, arguments.cache / key_of(setting) / f"seed{arguments.seed}")
        original = transformers.AutoModelForCausalLM.from_pretrained(reference.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
        print(reference.source_line, "", "| experts | bytes | perplexity | KL | top-1 |", "|---" * 5 + "|", sep="\n")
        for row, stages in rows(name).items():
            if row in (arguments.rows or [row]):
                print(line(reference, row, stages, statistics, original, tokenizer), flush=True)


if __name__ == "__main__":
    main()
